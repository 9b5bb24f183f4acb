"""Instructions: the template, the catalogue, and what a mistyped key says."""

import pytest

from nvembed.text.instructions import CATALOGUE, instruction_prefix
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
    ("typed", "nearest"), [("web_serch", "web_search"), ("hpo_retreival", "hpo_retrieval"), ("", "")]
)
def test_unknown_key_names_the_nearest(typed, nearest):
    with pytest.raises(UserError, match=f"Did you mean '{nearest}"):
        instruction_prefix(typed)
