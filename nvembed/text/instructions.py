"""Instructions: the only home of prompts.

A query is embedded as `Instruct: {task}\\nQuery: {query}` (NV-Embed 4.2, wording of E5-Mistral 3.2); documents are
bare. Symmetric tasks put the same prefix on both sides.
"""

from __future__ import annotations

import difflib

from nvembed.storage import UserError

CATALOGUE: dict[str, str] = {
    # the quickstart's own data sets
    "cwe": "Given the description of a software vulnerability, retrieve the weakness that causes it",
    "hpo_retrieval": "Given a term for a clinical finding, retrieve its definition",
    "hpo_classes": "Identify the body system that a clinical finding concerns",
    "hpo_similarity": "Retrieve clinical findings similar in meaning",
    "stdlib_code": "Given the documentation of a Python function, retrieve its source code",
    # general ones, worded as in E5-Mistral's and NV-Embed's tables
    "web_search": "Given a web search query, retrieve relevant passages that answer the query",
    "question_passages": "Given a question, retrieve passages that answer the question",
    "question_documents": "Given a question, retrieve documents that can help answer the question",
    "multi_hop_question": "Given a multi-hop question, retrieve documents that can help answer the question",
    "claim_evidence": "Given a claim, retrieve documents that support or refute the claim",
    "financial_question": "Given a financial question, retrieve relevant passages that answer the query",
    "duplicates": "Retrieve duplicate questions from a forum",
    "entailment": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "similar_text": "Retrieve semantically similar text",
    "code_search": "Given a question about code, retrieve code that answers it",
    "topic": "Identify the topic or theme of the given text",
    "sentiment": "Classify the sentiment expressed in the given text",
    "intent": "Given a user utterance, find the user intent",
}


def task_sentence(task: str) -> str:
    """The sentence of a task: looked up when `task` is a key of the catalogue, itself when it is a sentence.

    Raises:
        UserError: a single word that is no key; the message names the nearest one.
    """
    task = task.strip()
    if task in CATALOGUE:
        return CATALOGUE[task]
    if not task or not any(character.isspace() for character in task):
        nearest = difflib.get_close_matches(task, CATALOGUE, n=1, cutoff=0.0)[0]
        raise UserError(
            f"unknown instruction {task!r}: it is no key of the catalogue and no sentence either. "
            f"Did you mean {nearest!r}? Keys: {', '.join(CATALOGUE)}. Or write the task as a sentence."
        )
    return task


def instruction_prefix(task: str) -> str:
    """What stands before a query: `Instruct: {task}\\nQuery: `, with the trailing space.

    Args:
        task: a key of `CATALOGUE` or a sentence of one's own.
    """
    return f"Instruct: {task_sentence(task)}\nQuery: "
