"""Instructions: the only home of prompts.

A query is embedded as `Instruct: {task}\\nQuery: {query}` (NV-Embed 4.2, wording of E5-Mistral 3.2); documents are
bare. Symmetric tasks put the same prefix on both texts.
"""

from __future__ import annotations

import difflib

from nvembed.types import UserError

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
    # training sets of NV-Embed v1 and v2; classes and clusters in the words of E5-Mistral's table 15
    "query_documents": "Given a query, retrieve documents",
    "question_relevant_documents": "Given a question, retrieve relevant documents that best answer the question",
    "scientific_claim_evidence": "Given a scientific claim, retrieve documents that support or refute the claim",
    "amazon_counterfactual": (
        "Classify a given Amazon customer review text as either counterfactual or not-counterfactual"
    ),
    "amazon_polarity": "Classify Amazon reviews into positive or negative sentiment",
    "amazon_rating": "Classify the given Amazon review into its appropriate rating category",
    "banking_intent": "Given a online banking query, find the corresponding intents",
    "twitter_emotion": (
        "Classify the emotion expressed in the given Twitter message into one of the six emotions: anger, fear, joy, "
        "love, sadness, and surprise"
    ),
    "movie_sentiment": "Classify the sentiment expressed in the given movie review text from the IMDB dataset",
    "utterance_intent": "Given a user utterance as query, find the user intents",
    "utterance_scenario": "Given a user utterance as query, find the user scenarios",
    "task_domain": "Classify the intent domain of the given utterance in task-oriented conversation",
    "task_intent": "Classify the intent of the given utterance in task-oriented conversation",
    "toxic_comment": "Classify the given comments as either toxic or not toxic",
    "tweet_sentiment": "Classify the sentiment of a given tweet as either positive, negative, or neutral",
    "arxiv_abstract_category": (
        "Identify the main and secondary category of Arxiv papers based on the titles and abstracts"
    ),
    "arxiv_title_category": "Identify the main and secondary category of Arxiv papers based on the titles",
    "biorxiv_abstract_category": "Identify the main category of Biorxiv papers based on the titles and abstracts",
    "biorxiv_title_category": "Identify the main category of Biorxiv papers based on the titles",
    "medrxiv_abstract_category": "Identify the main category of Medrxiv papers based on the titles and abstracts",
    "medrxiv_title_category": "Identify the main category of Medrxiv papers based on the titles",
    "reddit_title_topic": "Identify the topic or theme of Reddit posts based on the titles",
    "reddit_post_topic": "Identify the topic or theme of Reddit posts based on the titles and posts",
    "stackexchange_title_topic": "Identify the topic or theme of StackExchange posts based on the titles",
    "stackexchange_paragraph_topic": (
        "Identify the topic or theme of StackExchange posts based on the given paragraphs"
    ),
    "news_topic": "Identify the topic or theme of the given news articles",
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
    """The prefix of a query: `Instruct: {task}\\nQuery: `, with the trailing space.

    Args:
        task: a key of `CATALOGUE` or a sentence of one's own.
    """
    return f"Instruct: {task_sentence(task)}\nQuery: "
