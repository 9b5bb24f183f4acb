"""The only home of prompts: a catalogue of task sentences and the template around them (NV-Embed 4; SPEC 1).

A query is `Instruct: {task}\\nQuery: {text}`; documents are bare; symmetric tasks put it on both sides.
"""

from __future__ import annotations

import difflib

from nvembed.storage import UserError

TEMPLATE = "Instruct: {task}\nQuery: "

CATALOGUE = {
    # the quickstart's sets
    "cwe": "Given a vulnerability report, retrieve the software weakness behind it",
    "hpo_retrieval": "Given a lay term, retrieve the definition of the clinical phenotype",
    "stdlib_code": "Given a docstring, retrieve the Python function it documents",
    "hpo_classes": "Identify the category of the clinical phenotype",
    "hpo_similarity": "Retrieve semantically similar clinical phenotypes",
    # general ones, worded as the field's public training sets are
    "web_search": "Given a web search query, retrieve relevant passages that answer the query",
    "question_passages": "Given a question, retrieve passages that answer the question",
    "question_documents": "Given a question, retrieve documents that can help answer the question",
    "multi_hop": "Given a multi-hop question, retrieve documents that can help answer the question",
    "claim_verification": "Given a claim, retrieve documents that support or refute the claim",
    "scientific_claim": "Given a scientific claim, retrieve documents that support or refute the claim",
    "financial_question": "Given a financial question, retrieve relevant passages that answer the query",
    "entailment": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "similar_text": "Retrieve semantically similar text",
    "duplicates": "Given a question, retrieve other questions that ask the same thing",
    "topic": "Identify the topic or theme of the given text",
}


def instruction_prefix(task: str) -> str:
    """The prefix of a query: `task` is a catalogue key or a task sentence of one's own (it has a space).

    Raises:
        UserError: an unknown key, with the nearest known one.
    """
    sentence = CATALOGUE.get(task)
    if sentence is None:
        if " " not in task.strip():
            near = difflib.get_close_matches(task, CATALOGUE, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(CATALOGUE)}."
            raise UserError(f"instruction {task!r} is no key of the catalogue and no sentence.{hint}")
        sentence = task.strip()
    return TEMPLATE.format(task=sentence)
