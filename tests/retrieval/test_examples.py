"""The `Example:` of each public function runs and prints what it says."""

import doctest

import pytest

from nvembed.evaluation import evaluate_retrieval
from nvembed.retrieval import encode_texts, search_vectors


@pytest.mark.parametrize("function", [encode_texts, search_vectors, evaluate_retrieval], ids=lambda item: item.__name__)
def test_the_example_runs(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert example.examples and "Example:" in function.__doc__
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0, "see the output above"
