"""Instructions and prompts: the catalogue, and the only home of the template.

An *instruction* is a task sentence or its key in `CATALOGUE`. The *prompt* is the string put before a text:
`Instruct: {sentence}\\nQuery: ` (NV-Embed 4.2, wording of E5-Mistral 3.2). Documents have none; symmetric tasks put the
same prompt before both texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nvembed.core.arguments import check_list, shown
from nvembed.core.messages import nearest
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


def task_sentence(instruction: str) -> str:
    """The sentence of an instruction: that of its key in the catalogue, or the sentence itself.

    Args:
        instruction: a string with a space is a sentence, one without must be a key.

    Raises:
        UserError: an unknown key (the message names one that is similar), or a rendered prompt.
    """
    instruction = instruction.strip()
    if instruction in CATALOGUE:
        return CATALOGUE[instruction]
    if instruction.lower().startswith("instruct:"):
        raise UserError(
            f"instruction {instruction[:60]!r} is a rendered prompt. Give the task alone, as a sentence or a key "
            "of the catalogue; the library renders the prompt. In Python, prompt= takes a string that is used as it is."
        )
    if not any(character.isspace() for character in instruction):
        raise UserError(
            f"unknown instruction {instruction!r}: it is no key of the catalogue and no sentence either."
            f"{nearest(instruction, CATALOGUE)} Keys: {', '.join(CATALOGUE)}. "
            "Or write the task as a sentence."
        )
    return instruction


def instruction_prefix(instruction: str) -> str:
    """The prompt of an instruction: `Instruct: {sentence}\\nQuery: `, with the trailing space.

    Args:
        instruction: see `task_sentence`.
    """
    return f"Instruct: {task_sentence(instruction)}\nQuery: "


def named_prompt(prompts: Mapping[str, str], name: str) -> str:
    """The prompt that a model stores under a name.

    Raises:
        UserError: it stores none of this name; the message lists all, and names one that is similar.
    """
    if not isinstance(name, str) or name not in prompts:
        listed, hint = ", ".join(prompts) or "none", nearest(name, prompts)
        raise UserError(f"prompt name {shown(name)}: the model has no prompt of this name; it has: {listed}.{hint}")
    return prompts[name]


def is_none(instruction: str | Sequence[str]) -> bool:
    """Whether an argument `instruction` is none for all texts: "" or an empty list."""
    return isinstance(instruction, str | list | tuple) and not instruction


def choose_prompts(
    count: int,
    instruction: str | Sequence[str] = "",
    prompt: str | Sequence[str] | None = None,
    prompt_name: str | None = None,
    prompts: Mapping[str, str] | None = None,
) -> list[str]:
    """The prompts of `count` texts, from at most one of `instruction`, `prompt` and `prompt_name`.

    Args:
        instruction: a task sentence or its key, for all texts, or one for each; "" for no prompt.
        prompt: strings used as they are, one for all texts, or one for each.
        prompt_name: a name of `prompts`.
        prompts: the model's stored prompts by name.

    Raises:
        UserError: more than one of the three, another number than `count`, an unknown key or name, or something that is
            not a string.
    """
    given = {"instruction": None if is_none(instruction) else instruction, "prompt": prompt, "prompt_name": prompt_name}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise UserError(f"{' and '.join(names)} are both given; give one of instruction, prompt and prompt_name.")
    if prompt_name is not None:
        return [named_prompt(prompts or {}, prompt_name)] * count
    if prompt is not None:
        return _each("prompt", prompt, count)
    instructions = _each("instruction", instruction, count)
    rendered = {value: instruction_prefix(value) if value else "" for value in dict.fromkeys(instructions)}
    return [rendered[value] for value in instructions]


def _each(name: str, value: str | Sequence[str], count: int) -> list[str]:
    if value is None:
        raise UserError(f'{name} is None; give "" for none, one {name} for all texts, or one for each.')
    values = [value] * count if isinstance(value, str) else check_list(name, value, f"{name}s")
    if len(values) != count:
        raise UserError(f"{count} texts but {len(values)} {name}s; give one {name}, or one for each text.")
    for index, item in enumerate(values):
        if not isinstance(item, str):
            raise UserError(f"{name}[{index}] is {type(item).__name__}, not a string: {shown(item)}")
    for item in dict.fromkeys(values):
        try:
            item.encode("utf-8")
        except UnicodeEncodeError as error:
            problem = "holds a lone surrogate, which no tokenizer takes"
            raise UserError(f"{name} {shown(item)} {problem}. Correct it.") from error
    return values
