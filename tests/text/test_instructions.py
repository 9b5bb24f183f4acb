"""Instructions and prompts: the template, the catalogue, mistyped keys and names, rendered prompts."""

import pytest

from nvembed.text.instructions import CATALOGUE, choose_prompts, instruction_prefix, named_prompt
from nvembed.types import UserError


def test_template_is_nv_embeds_with_its_trailing_space():
    assert instruction_prefix("web_search") == (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
    )


def test_a_sentence_of_ones_own_is_taken_as_it_is():
    assert instruction_prefix(" Find the recipe ") == "Instruct: Find the recipe\nQuery: "


def test_keys_of_the_quickstart_are_there():
    assert {"cwe", "hpo_retrieval", "hpo_classes", "hpo_similarity", "stdlib_code", "duplicates"} <= set(CATALOGUE)
    assert all(" " in sentence and "\n" not in sentence for sentence in CATALOGUE.values())


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("web_serch", " Did you mean 'web_search'?"),
        ("hpo_retreival", " Did you mean 'hpo_retrieval'?"),
        ("", ""),
        ("xyzzy", ""),
    ],
)
def test_unknown_key_names_a_similar_one_and_all(typed, hint):
    with pytest.raises(UserError) as caught:
        instruction_prefix(typed)
    assert f"and no sentence either.{hint} Keys: cwe, hpo_retrieval, " in str(caught.value)


@pytest.mark.parametrize("rendered", [instruction_prefix("cwe"), "Instruct: find it", " instruct: x\nQuery:"])
def test_a_rendered_prompt_is_no_instruction(rendered):
    with pytest.raises(UserError, match=r"is a rendered prompt\. Give the task alone"):
        instruction_prefix(rendered)


def test_prompts_of_texts():
    cwe, prompts = instruction_prefix("cwe"), {"document": "", "query": "Q: "}
    assert choose_prompts(2) == ["", ""] and choose_prompts(0, "cwe") == choose_prompts(0, []) == []
    assert choose_prompts(2, "cwe") == [cwe, cwe]
    assert choose_prompts(3, ["cwe", "", "Find it all"]) == [cwe, "", "Instruct: Find it all\nQuery: "]
    assert choose_prompts(2, prompt="cwe") == ["cwe", "cwe"]  # as it is
    assert choose_prompts(2, prompt=[cwe, ""]) == [cwe, ""]
    assert choose_prompts(2, prompt_name="query", prompts=prompts) == ["Q: ", "Q: "]
    assert choose_prompts(1, prompt_name="document", prompts=prompts) == [""]


def test_wrong_prompts_are_refused():
    for problem, options in (
        ("instruction and prompt are both given", {"instruction": "cwe", "prompt": ""}),
        ("prompt and prompt_name are both given", {"prompt": "", "prompt_name": "query"}),
        ("2 texts but 1 instructions; give one instruction, or one for each text", {"instruction": ["cwe"]}),
        ("2 texts but 3 prompts", {"prompt": ["", "", ""]}),
        (r"prompt\[1\] is int", {"prompt": ["", 1]}),
        ("unknown instruction 'cew'.*Did you mean 'cwe'", {"instruction": ["", "cew"]}),
        ("has no prompt of this name; it has: none", {"prompt_name": "query"}),
    ):
        with pytest.raises(UserError, match=problem):
            choose_prompts(2, **options)
    with pytest.raises(UserError, match=r"it has: document, query\. Did you mean 'query'\?"):
        named_prompt({"document": "", "query": "Q: "}, "qurey")
