"""Wrong arguments of the public functions: each is a `UserError` that names the argument, the value and the remedy.

`OK` marks inputs that look unusual and are right. No Ray, no network; one tiny model folder.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from artifacts import tiny_folder

import nvembed
from nvembed import (
    Embedder,
    encode_texts,
    evaluate_retrieval,
    load_embedder,
    mine_vectors,
    run_pipeline,
    search_vectors,
)
from nvembed.mining.config import TopK
from nvembed.pipeline.declaration import Pipeline
from nvembed.retrieval.config import CrossEncoderModel, PackageModel
from nvembed.types import UserError

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["how to sort a list", "lists are sorted in place", "bread is baked in an oven"]
FRAME = pd.DataFrame({"text": ["a", "b"]})
OK = None
NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("inputs") / "model", TEXTS)


@pytest.fixture(scope="module")
def model(folder: Path) -> Embedder:
    return load_embedder(folder, check_probes=False)


def check(words: str | None, call: Callable[[], object]) -> None:
    """The call succeeds, or its error has all of the words that `|` separates."""
    if words is OK:
        call()
        return
    with pytest.raises(UserError) as caught:
        call()
    missing = [word for word in words.split("|") if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def ids(value: Any) -> str:
    """The same in every process: no addresses, no order of a set."""
    return str(value)[:60] if isinstance(value, str | int | float | None) else type(value).__name__


# -- texts ------------------------------------------------------------------------------------------------------------

WRONG_TEXTS: list[tuple[object, str | None]] = [
    (None, "texts is None, not a list of texts"),
    (5, "texts is 5, not a list"),
    ("abc", "texts is 'abc', not a list|write ['abc']"),
    (b"abc", "texts is b'abc'|Give strings"),
    ({"a": "text"}, "not a list|list(texts.values())"),
    ({"a", "b"}, "A set has no order"),
    (FRAME, "a DataFrame of shape (2, 1)|Give one column"),
    (np.array([["a", "b"]]), "an ndarray of shape (1, 2)"),
    (np.array("a"), "an ndarray of shape ()"),
    (torch.nn.Linear(2, 2), "texts is a Linear"),
    (["a", None], "1 text cannot be embedded: texts[1] is missing|Correct or remove"),
    (["a", 3], "texts[1] is int, not a text"),
    ([b"a"], "texts[0] is bytes"),
    ([["a"]], "texts[0] is list"),
    (FRAME.to_dict("records"), "texts[0] is dict|texts[1] is dict"),
    (pd.Series(["a", np.nan]), "texts[1] is float"),
    (np.array(["a", None], dtype=object), "texts[1] is missing"),
    (np.array([True]), "texts[0] is bool"),
    (["\ud800"], "texts[0] holds a lone surrogate"),
    (["a" * 1_000_001], "texts[0] is longer than 1,000,000 bytes"),
    (("a",), OK),
    (pd.Series(["a", "b"]), OK),
    (np.array(["a", "b"]), OK),
    ({"a": "text"}.values(), OK),
    ([], OK),
]


@pytest.mark.parametrize(("texts", "words"), WRONG_TEXTS, ids=ids)
def test_texts(texts: Any, words: str | None, model: Embedder) -> None:
    check(words, lambda: model.encode(texts))
    check(words, lambda: encode_texts(texts, model))


def test_a_generator_of_texts_or_prompts_is_read_once(model: Embedder) -> None:
    for encode in (model.encode, lambda *args, **options: encode_texts(args[0], model, **options)):
        vectors = encode((text for text in TEXTS), prompt=(prompt for prompt in "xyz"))
        np.testing.assert_array_equal(vectors, encode(TEXTS, prompt=list("xyz")))


WRONG_OPTIONS: list[tuple[dict[str, Any], str | None]] = [
    ({"instruction": None}, 'instruction is None; give "" for none'),
    ({"instruction": 5}, "instruction is 5"),
    ({"instruction": {"cwe"}}, "A set has no order"),
    ({"instruction": {"cwe": 1}}, "not a list of instructions"),
    ({"instruction": b"cwe"}, "Give strings"),
    ({"instruction": "web_serch"}, "Did you mean 'web_search'"),
    ({"instruction": "Find \ud800 it"}, "instruction|lone surrogate"),
    ({"instruction": ["cwe"]}, "2 texts but 1 instructions"),
    ({"instruction": ["cwe", 3]}, "instruction[1] is int"),
    ({"instruction": "cwe", "prompt": "x"}, "both given"),
    ({"prompt": 3}, "prompt is 3"),
    ({"prompt": "\ud800"}, "prompt|lone surrogate"),
    ({"prompt": {"x", "y"}}, "A set has no order"),
    ({"prompt_name": 3}, "prompt name 3|it has: document"),
    ({"prompt_name": ["query"]}, "prompt name ['query']"),
    ({"prompt_name": "documnt"}, "Did you mean 'document'?"),
    ({"max_length": 0}, "max_length is 0; give a whole number of at least 1"),
    ({"max_length": -1}, "max_length is -1"),
    ({"max_length": 1}, "max_length is 1; BOS and EOS take 1. Choose 2 or more"),
    ({"max_length": "8"}, "max_length is '8'"),
    ({"max_length": 8.5}, "max_length is 8.5"),
    ({"max_length": True}, "max_length is True"),
    ({"max_length": 10**6}, "max_length is 1000000|positions"),
    ({"max_length": 10**12}, "give at most 2,147,483,647"),
    ({"token_budget": 0}, "token_budget is 0"),
    ({"token_budget": None}, "token_budget is None"),
    ({"token_budget": float("inf")}, "token_budget is inf"),
    ({"precision": "bf-16"}, "precision 'bf-16': choose auto, fp32 or bf16. Did you mean 'bf16'?"),
    ({"precision": None}, "precision None: choose"),
    ({"precision": ["fp32"]}, "precision ['fp32']: choose"),
    ({"batch_size": 3}, "unknown argument 'batch_size'|It takes: texts"),
    ({"max_len": 3}, "unknown argument 'max_len'. Did you mean 'max_length'?"),
    ({"prompt": np.array(["x", "y"])}, OK),
    ({"instruction": pd.Series(["cwe", "cwe"])}, OK),
    ({"max_length": np.int64(8)}, OK),
]


@pytest.mark.parametrize(("options", "words"), WRONG_OPTIONS, ids=ids)
def test_options_of_encoding(options: dict[str, Any], words: str | None, model: Embedder) -> None:
    check(words, lambda: model.encode(["a", "b"], **options))
    check(words, lambda: encode_texts(["a", "b"], model, **options))


@pytest.mark.parametrize(
    ("dim", "words"),
    [("8", "dim is '8'"), (0, "choose 1 to"), (8.0, "dim is 8.0"), (True, "dim is True"), (9999, "choose 1 to")],
)
def test_dim(dim: Any, words: str, model: Embedder) -> None:
    check(words, lambda: model.encode(["a"], dim=dim))


def test_the_signature_shows_no_internals_and_dir_lists_the_exports() -> None:
    import inspect

    assert list(inspect.signature(Embedder.encode).parameters) == [
        *("self", "texts", "instruction", "prompt", "prompt_name", "dim", "token_budget", "precision", "max_length")
    ]
    assert set(nvembed.__all__) <= set(dir(nvembed))


# -- models -----------------------------------------------------------------------------------------------------------


class Other:
    def encode(self, texts: list[str]) -> list[str]:
        return texts


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "model is None; give a model folder"),
        (5, "model is 5"),
        ("", "model is ''"),
        (["m"], "model is ['m']"),
        ({"type": "package"}, "model is {'type': 'package'}"),
        (Other(), "model is an Other"),
        (PackageModel, "model is the class PackageModel"),
        (CrossEncoderModel(name="x"), "model is a CrossEncoderModel"),
        ("/nope", "model /nope: no such folder"),
        ("models:/x@champion", "a registry version|nvembed registry export x@champion DIR"),
        ("foo://x/y", "model foo://x/y cannot be reached|Protocol not known"),
        (__file__, "is a file; give the folder"),
    ],
    ids=ids,
)
def test_models(given: Any, words: str) -> None:
    check(words, lambda: encode_texts(["a"], given))
    check(words, lambda: evaluate_retrieval(given, {"d": "a"}, {"q": "a"}, {"q": {"d": 1}}))


def test_a_mistyped_folder_and_swapped_arguments(folder: Path, model: Embedder) -> None:
    check("no such folder. Did you mean 'model'?", lambda: encode_texts(["a"], str(folder.parent / "modle")))
    swapped: Any = (model, ["a"])
    check("texts is an Embedder|The texts come first", lambda: encode_texts(*swapped))
    check("missing a required argument: 'model'", lambda: encode_texts(["a"]))  # type: ignore[call-arg]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", None, 0, "meta"])
def test_devices(device: Any, model: Embedder) -> None:
    check("is not here; use cpu, or cuda", lambda: encode_texts(["a"], model, device=device))
    check("is not here; use cpu, or cuda", lambda: search_vectors(QUERIES, DOCUMENTS, 1, device=device))
    check("is not here", lambda: mine_vectors(QUERIES, DOCUMENTS, ROWS, 1, {"type": "random"}, device=device))


def test_caches(folder: Path, tmp_path: Path) -> None:
    cached: Any = lambda cache: lambda: encode_texts(["a"], folder, cache=cache)  # noqa: E731
    (tmp_path / "file").write_text("x")
    check("cache is 3; give the path", cached(3))
    check("cache is ''", cached(""))
    check("is a file; give a directory", cached(str(tmp_path / "file")))
    check("cache foo://x cannot be reached", cached("foo://x"))
    check(OK, cached(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "folder is None; give the path"),
        (5, "folder is 5"),
        ("", "folder is ''"),
        (["x"], "folder is ['x']"),
        (b"x", "folder is b'x'"),
        (__file__, "not an nvembed model folder|It is a file"),
        ("models:/x@champion", "registry version|nvembed registry export x@champion DIR"),
        ("s3://bucket/model", "s3://bucket/model is not|A local folder is needed"),
        ("PARENT", "Its subfolder is one"),
        ("TYPO", "nothing at this path. Did you mean 'model'?"),
        ("STOCK", "sentence-transformers model: encode_texts(texts, folder)"),
        ("PLAIN", "transformers model"),
    ],
    ids=ids,
)
def test_load_embedder(given: Any, words: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "stock" / "modules.json").write_text("[]")
    (tmp_path / "plain" / "config.json").write_text("{}")
    places = {
        "PARENT": folder.parent,
        "TYPO": folder.parent / "modle",
        "STOCK": tmp_path / "stock",
        "PLAIN": tmp_path / "plain",
    }
    check(words, lambda: load_embedder(places[given] if isinstance(given, str) and given in places else given))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"check_probes": "no"}, "check_probes is 'no'; give True or False"),
        ({"bidirectional": "no"}, "bidirectional is 'no'"),
        ({"pooling": "mean"}, "pooling is 'mean'; give MeanConfig()"),
        ({"pooling": {"type": "mean"}}, "pooling is {'type': 'mean'}"),
        ({"check_probe": False}, "Did you mean 'check_probes'?"),
    ],
    ids=ids,
)
def test_options_of_load_embedder(options: dict[str, Any], words: str, folder: Path) -> None:
    check(words, lambda: load_embedder(folder, **options))


def test_parts_of_an_embedder(model: Embedder) -> None:
    make: Any = Embedder
    parts = (model.embedding_model, model.tokeniser, model.config)
    check("embedding_model is None|load_embedder(folder)", lambda: make(None, *parts[1:]))
    check("tokeniser is a|Tokeniser(tokenizer, config.text)", lambda: make(parts[0], parts[1].tokenizer, parts[2]))
    check("config is {'pooling': 'mean'}|EmbedderConfig", lambda: make(*parts[:2], {"pooling": "mean"}))
    check("Embedder: missing a required argument: 'tokeniser'", lambda: make(parts[0]))
    check("is an Embedder, which is loaded already", lambda: load_embedder(model))  # type: ignore[arg-type]


# -- vectors ----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
QUERIES, DOCUMENTS = (RNG.standard_normal((count, 8)).astype(np.float32) for count in (3, 20))
ROWS = [[0], [1], [2]]
RULE = {"type": "topk"}


def with_value(matrix: np.ndarray, value: float) -> np.ndarray:
    changed = matrix.copy()
    changed[1, 2] = value
    return changed


WRONG_MATRICES: list[tuple[object, str]] = [
    (None, "is None. Give a matrix"),
    ("abc", "is 'abc'. Give a matrix"),
    (5, "is 5. Give a matrix"),
    ({"a": 1}, "is {'a': 1}"),
    ({1, 2}, "is {1, 2}"),
    (["a", "b"], "has shape (2,)"),
    (QUERIES[0], "has shape (8,)|One vector: "),
    (QUERIES[None], "has shape (1, 3, 8)"),
    ([[1, 2], [1]], "not a matrix"),
    (QUERIES > 0, "is a matrix of bool"),
    (QUERIES.astype(complex), "is a matrix of complex128"),
    (QUERIES.astype(str), "is a matrix of <U"),
    (np.array([["a", 1.0]], dtype=object), "holds something that is no number"),
    (pd.DataFrame({"a": ["x"], "b": [1.0]}), "holds something that is no number"),
    (pd.Series(QUERIES.tolist()), "A column of vectors: np.stack"),
    (np.zeros((2, 8), "M8[s]"), "is a matrix of datetime64"),
    (QUERIES[:, :0], "its vectors have no numbers"),
]


@pytest.mark.parametrize(("matrix", "words"), WRONG_MATRICES, ids=ids)
def test_matrices(matrix: Any, words: str) -> None:
    check(f"queries|{words}", lambda: search_vectors(matrix, DOCUMENTS, 2))
    if not (isinstance(matrix, np.ndarray) and matrix.ndim == 3):
        check(f"documents|{words}", lambda: search_vectors(QUERIES, matrix, 2))
    check(f"queries|{words}", lambda: mine_vectors(matrix, DOCUMENTS, ROWS, 2, RULE))
    check(f"documents|{words}", lambda: mine_vectors(QUERIES, matrix, ROWS, 2, RULE))


@pytest.mark.parametrize(
    "form",
    [
        np.ndarray.tolist,
        list,
        lambda matrix: tuple(map(tuple, matrix.tolist())),
        torch.tensor,
        lambda matrix: torch.tensor(matrix, requires_grad=True),
        pd.DataFrame,
        lambda matrix: matrix.astype(object),
    ],
)
def test_every_form_of_a_matrix_gives_the_same_bytes(form: Callable[[np.ndarray], Any]) -> None:
    expected = search_vectors(QUERIES, DOCUMENTS, 4)
    for part, other in zip(expected, search_vectors(form(QUERIES), form(DOCUMENTS), 4), strict=True):
        assert part.tobytes() == other.tobytes()
    for streamed in ([form(DOCUMENTS[:9]), form(DOCUMENTS[9:])], iter([form(DOCUMENTS[:9]), form(DOCUMENTS[9:])])):
        assert search_vectors(QUERIES, streamed, 4)[1].tobytes() == expected[1].tobytes()
    mined = mine_vectors(QUERIES, DOCUMENTS, ROWS, 4, RULE)
    assert mine_vectors(form(QUERIES), form(DOCUMENTS), np.array(ROWS), 4, RULE).tobytes() == mined.tobytes()


@pytest.mark.parametrize(
    ("queries", "documents", "words"),
    [
        (QUERIES[:, :3], DOCUMENTS, "(20, 8)|3|Embed"),
        (with_value(QUERIES, NAN), DOCUMENTS, "queries[1] holds NaN"),
        (with_value(QUERIES, np.inf), DOCUMENTS, "queries[1] holds NaN, infinity"),
        (QUERIES.astype(float) * 1e300, DOCUMENTS, "queries[0] holds"),
        (QUERIES, with_value(DOCUMENTS, NAN), "ocument"),
    ],
    ids=ids,
)
def test_vectors_that_do_not_fit(queries: Any, documents: Any, words: str) -> None:
    check(words, lambda: search_vectors(queries, documents, 2))
    for rule in (RULE, {"type": "random"}):
        check(words, lambda rule=rule: mine_vectors(queries, documents, ROWS, 19, rule))


def test_parts_of_a_stream() -> None:
    check("documents[1] has shape (8,)", lambda: search_vectors(QUERIES, iter([DOCUMENTS, DOCUMENTS[0]]), 2))
    check("documents[0] has shape (8,)", lambda: search_vectors(QUERIES, (row for row in DOCUMENTS), 2))
    check("(20, 3), queries have 8", lambda: search_vectors(QUERIES, [DOCUMENTS, DOCUMENTS[:, :3]], 2))
    check("documents is a generator", lambda: mine_vectors(QUERIES, (row for row in DOCUMENTS), ROWS, 2, RULE))  # type: ignore[arg-type]


WRONG_COUNTS: list[tuple[object, str]] = [
    (0, "is 0; give a whole number of at least 1"),
    (-1, "is -1"),
    (2.0, "is 2.0"),
    ("2", "is '2'"),
    (None, "is None"),
    (True, "is True"),
    ([2], "is [2]"),
    (NAN, "is nan"),
    (10**13, "is 10000000000000; give at most 2,147,483,647"),
]


@pytest.mark.parametrize(("count", "words"), WRONG_COUNTS, ids=ids)
def test_counts(count: Any, words: str, model: Embedder) -> None:
    check(f"k {words}", lambda: search_vectors(QUERIES, DOCUMENTS, count))
    check(f"num_negatives {words}", lambda: mine_vectors(QUERIES, DOCUMENTS, ROWS, count, RULE))
    check(f"k {words}", lambda: evaluate_retrieval(model, CORPUS, ASKED, QRELS, k=count))
    if count is not None:
        check(
            f"max_per_document {words}",
            lambda: mine_vectors(QUERIES, DOCUMENTS, ROWS, 2, RULE, max_per_document=count),
        )


def test_results_that_no_memory_holds() -> None:
    check("k is 2,000,000,000: results of 300 queries", lambda: search_vectors(np.eye(300), np.eye(300), 2 * 10**9))
    check(OK, lambda: search_vectors(QUERIES, DOCUMENTS, np.int64(30)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ceiling": [0.1]}, "ceiling has shape (1,); give one number per query, (3,)"),
        ({"ceiling": 0.5}, "ceiling has shape ()"),
        ({"ceiling": ["a", "b", "c"]}, "ceiling is ['a', 'b', 'c']; give one number"),
        ({"ceiling": [True, False, True]}, "ceiling is [True, False, True]"),
        ({"ceiling": {0: 1}}, "ceiling is {0: 1}"),
        ({"ceiling": [0.1, NAN, 0.3]}, "ceiling[1] is not a number; give inf"),
        ({"precision": "fp23"}, "Did you mean 'fp32'?"),
        ({"top_k": 2}, "unknown argument 'top_k'|It takes: queries, documents, k"),
        ({"ceilings": 2}, "Did you mean 'ceiling'?"),
        ({"ceiling": [0.1, 0.2, np.inf]}, OK),
    ],
    ids=ids,
)
def test_options_of_search(options: dict[str, Any], words: str | None) -> None:
    check(words, lambda: search_vectors(QUERIES, DOCUMENTS, 2, **options))


@pytest.mark.parametrize(
    ("positives", "words"),
    [
        (None, "positives is None"),
        ("abc", "positives is 'abc'"),
        ([0, 1, 2], "positives[0] is 0, not a list of row numbers such as [0, 4]"),
        (np.arange(3), "positives[0] is"),
        ([["a"], [1], [2]], "positives[0] holds 'a'"),
        (["0", "1", "2"], "positives[0] is '0'"),
        ([[0.5], [1], [2]], "positives[0] holds 0.5"),
        ([[None], [1], [2]], "positives[0] holds None"),
        ([None, [1], [2]], "positives[0] is None"),
        ([[[0]], [[1]], [[2]]], "positives[0] holds [0]"),
        (np.eye(3, 20, dtype=bool), "positives[0] holds True|np.flatnonzero(mask)"),
        (np.eye(3, 20, dtype=bool).tolist(), "np.flatnonzero(mask)"),
        ({0: [0], 1: [1], 2: [2]}, "list(positives.values())"),
        ([{0: 1}, {1: 1}, {2: 1}], "positives[0] is {0: 1}"),
        ({(0,), (1,), (2,)}, "A set has no order"),
        (pd.DataFrame({"p": [0, 1, 2]}), "Give one column"),
        ([iter([0]), [1], [2]], "positives[0] is a list_iterator"),
        ([[-1], [1], [2]], "query 0 names document -1; rows are 0 to 19"),
        ([[20], [1], [2]], "query 0 names document 20"),
        ([[2**70], [1], [2]], "positives[0] holds 1180591620717411303424"),
        ([[0]], "1 lists of positives for 3 queries; give one for each"),
        ([{0}, {1}, {2}], OK),
        (pd.Series(ROWS), OK),
        ([torch.tensor([0]), np.array([1]), (2,)], OK),
        ([[0, 0], [1], []], OK),
    ],
    ids=ids,
)
def test_positives(positives: Any, words: str | None) -> None:
    check(words, lambda: mine_vectors(QUERIES, DOCUMENTS, positives, 2, RULE))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (None, 'rule is None; give its keys: {"type": ...}, one of topk, topk_shifted'),
        ("topk_perc", "rule is 'topk_perc'|Did you mean 'topk_perc_pos'?"),
        ([RULE], "rule is [{'type': 'topk'}]"),
        (TopK, "rule is the class TopK"),
        (PackageModel(), "rule is a PackageModel"),
        ({}, "rule.type: missing; allowed: topk, topk_shifted"),
        ({"shift": 3}, "rule.type: missing"),
        ({"type": "topk_percpos"}, "rule.type: 'topk_percpos'|Did you mean 'topk_perc_pos'?"),
        ({"type": None}, "rule.type: None: allowed"),
        ({"type": "topk_margin_pos", "margn": 1}, "rule.margn: unknown key. Did you mean 'margin'?"),
        ({"type": "topk_margin_pos", "margin": "a lot"}, "rule.margin: 'a lot': must be a valid number"),
        ({"type": "topk_perc_pos", "max_negative_to_positive_ratio": 2}, "ratio: 2: must be less than or equal to 1"),
        (
            {"type": "rank_window", "first": 0, "last": "x", "lats": 3},
            "3 problems|rule.first: 0|rule.last: 'x'|rule.lats: unknown key. Did you mean 'last'?",
        ),
        ({"type": "rank_window", "first": 9, "last": 3}, "rule: last = 3 comes before first = 9"),
        ({"type": "sampled_topk", "ceiling": {"type": "topk_ab"}}, "rule.ceiling.type|Did you mean 'topk_abs'?"),
        ({"type": "sampled_topk", "ceiling": "topk_abs"}, "rule.ceiling: 'topk_abs': must be a section"),
        (
            {"type": "sampled_topk", "top": 0, "ceiling": {"type": "topk_abs", "max_scor": 1}},
            "2 problems|rule.top: 0|rule.ceiling.max_scor: unknown key. Did you mean 'max_score'?",
        ),
        ({"type": "topk_abs", "max_score": NAN}, "rule.max_score: nan: must be a finite number"),
        ({1: 2, "type": "topk"}, "rule.1: unknown key"),
        ({"type": "sampled_topk", "top": 10**12}, OK),
        (TopK(), OK),
    ],
    ids=ids,
)
def test_rules(rule: Any, words: str | None) -> None:
    check(words, lambda: mine_vectors(QUERIES, DOCUMENTS, ROWS, 2, rule))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_similarity_to_positive": 2}, "max_similarity_to_positive is 2; give a number from -1 to 1"),
        ({"max_similarity_to_positive": NAN}, "max_similarity_to_positive is nan"),
        ({"max_similarity_to_positive": "0.9"}, "max_similarity_to_positive is '0.9'"),
        ({"max_similarity_to_positive": True}, "max_similarity_to_positive is True"),
        ({"seed": "x"}, "seed is 'x'; give a whole number"),
        ({"seed": None}, "seed is None"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": np.random.default_rng(0)}, "seed is a Generator"),
        ({"precision": "bf61"}, "Did you mean 'bf16'?"),
        ({"max_per_documents": 1}, "Did you mean 'max_per_document'?"),
        ({"seed": -1}, OK),
    ],
    ids=ids,
)
def test_options_of_mining(options: dict[str, Any], words: str | None) -> None:
    for rule in (RULE, {"type": "random"}):
        check(words, lambda rule=rule: mine_vectors(QUERIES, DOCUMENTS, ROWS, 2, rule, **options))


# -- a retrieval task -------------------------------------------------------------------------------------------------

CORPUS: dict[Any, Any] = {"a": "sort a list", "b": "bake bread"}
ASKED: dict[Any, Any] = {"q": "how to sort"}
QRELS: dict[Any, Any] = {"q": {"a": 1}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            ({name: value}, f"{name} is |not a mapping. Give ")
            for name in ("corpus", "queries", "qrels")
            for value in (None, ["a"], "a", FRAME, {"a"}, 5)
        ),
        ({"qrels": {"q": ["a"]}}, "qrels['q'] is ['a'], not a mapping"),
        ({"qrels": {"q": {"a"}}}, "qrels['q'] is {'a'}"),
        ({"qrels": {"q": None}}, "qrels['q'] is None"),
        ({"qrels": {"q": {"a": "1"}}}, "qrels['q']['a'] is '1'; give a finite number"),
        ({"qrels": {"q": {"a": None}}}, "qrels['q']['a'] is None"),
        ({"qrels": {"q": {"a": NAN, "b": 1}}}, "qrels['q']['a'] is nan"),
        ({"qrels": {"q": {"a": float("inf")}}}, "qrels['q']['a'] is inf"),
        ({"qrels": {"q": {"aa": 1}}}, "'aa'. Did you mean 'a'? Remove them or add them"),
        ({"qrels": {"q": {1: 1, "z": 1}}}, "2 documents that are not given: 1, 'z'"),
        ({"qrels": {}}, "no relevant document"),
        ({"corpus": {1: "x", 2: "y"}, "qrels": {"q": {"1": 1}}}, "There is 1: use one type of id"),
        ({"corpus": {1: "same", "a": "same"}}, "corpus has the id 1; give strings"),
        ({"corpus": {("a", 1): "x"}}, "corpus has the id ('a', 1)"),
        ({"corpus": {None: "x", "a": "y"}}, "corpus has the id None"),
        ({"corpus": {}}, "documents that are not given: 'a'"),
        ({"corpus": {"a": None}}, "document 'a' is missing"),
        ({"corpus": {"a": 3}}, "document 'a' is int"),
        ({"corpus": {"a": ["x"]}}, "document 'a' is list"),
        ({"corpus": {"a": {"title": 3, "text": "x"}}}, "document 'a' has a title that is int"),
        ({"corpus": {"a": {"text": 3}}}, "document 'a' has a text that is int"),
        ({"corpus": {"a": {"title": "t", "txt": "x"}}}, "document 'a' is empty: it has no \"text\"|title, txt"),
        ({"queries": {"q": None}}, "query 'q' is missing"),
        ({"queries": {"q": {"text": "x"}}}, "query 'q' is dict"),
        ({"queries": {"q": "\ud800"}}, "query 'q' holds a lone surrogate"),
        ({"instruction": 3}, "instruction is 3; give one task sentence"),
        ({"instruction": ["cwe"]}, "instruction is ['cwe']"),
        ({"instruction": "cew"}, "Did you mean 'cwe'"),
        ({"precision": "f32"}, "Did you mean 'fp32'?"),
        ({"intervals": "no"}, "intervals is 'no'; give True or False"),
        ({"ks": [10]}, "unknown argument 'ks'. Did you mean 'k'?"),
        ({"k": 10**6}, OK),
        ({"corpus": {1: "x", 2: "y"}, "queries": {7: "z"}, "qrels": {7: {1: np.int64(1)}}}, OK),
        ({"qrels": {"q": {"a": True, "b": -1}}}, OK),
    ],
    ids=ids,
)
def test_evaluate_retrieval(changes: dict[str, Any], words: str | None, model: Embedder) -> None:
    given = {"corpus": CORPUS, "queries": ASKED, "qrels": QRELS, **changes}
    check(words, lambda: evaluate_retrieval(model, **given))


# -- a pipeline -------------------------------------------------------------------------------------------------------

PIPELINE, RECIPE = "pipelines/quickstart.py", "pipelines/recipes/tiny.yaml"


def nothing(run: object) -> None:
    """A pipeline without steps."""


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        (None, "pipeline is None; give a Pipeline, or the path"),
        (5, "pipeline is 5"),
        ("", "pipeline is ''"),
        (nothing, "Pipeline(nothing)"),
        ("pipelines/quikstart.py", "no such pipeline file. Did you mean 'quickstart.py'?"),
        ("pipelines", "a folder; give the pipeline file in it"),
        (RECIPE, "a recipe is the second argument"),
        ("BROKEN", "cannot be imported (SyntaxError"),
    ],
    ids=ids,
)
def test_pipelines(pipeline: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "broken.py").write_text("def (:\n")
    given = tmp_path / "broken.py" if pipeline == "BROKEN" else pipeline
    check(words, lambda: run_pipeline(given, RECIPE, dry_run=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": 5}, "recipe is 5; give the path or URI of a YAML file"),
        ({"recipe": ""}, "recipe is ''"),
        ({"recipe": {"name": "x"}}, "recipe is {'name': 'x'}"),
        ({"recipe": b"x"}, "recipe is b'x'"),
        ({"recipe": Path("pipelines/recipes/tinny.yaml")}, "Did you mean pipelines/recipes/tiny.yaml?"),
        ({"recipe": "pipelines"}, "cannot be read as a recipe"),
        ({"recipe": PIPELINE}, "not valid YAML"),
        ({"settings": "a=b"}, "settings is 'a=b', not a list of settings. For a single one write ['a=b']"),
        ({"settings": b"a=b"}, "settings is b'a=b'"),
        ({"settings": None}, "settings is None"),
        ({"settings": {"a": "b"}}, "write ['a=b']"),
        ({"settings": {"name=x"}}, "A set has no order"),
        ({"settings": [5]}, 'settings[0] is 5; write "section.key=value"'),
        ({"settings": [("a", "b")]}, "settings[0] is ('a', 'b')"),
        ({"settings": ["name"]}, "write --set section.key=value"),
        ({"settings": ["nme=x", "mine.depht=3"]}, "2 problems|Did you mean 'name'?|Did you mean 'depth'?"),
        ({"out": 5}, "out is 5; give the path or URI"),
        ({"out": ""}, "out is ''"),
        ({"out": __file__}, "is a file, not a directory"),
        ({"out": f"{__file__}/below"}, "is a file, not a directory"),
        ({"dry_run": "false"}, "dry_run is 'false'; give True or False"),
        ({"quiet": "no"}, "quiet is 'no'"),
        ({"set": ["a=b"]}, "unknown argument 'set'|It takes: pipeline, recipe, settings"),
        ({"recipe": Path(RECIPE), "settings": (setting for setting in ["description=x"])}, OK),
    ],
    ids=ids,
)
def test_options_of_run_pipeline(
    options: dict[str, Any], words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    given: dict[str, Any] = {"recipe": RECIPE, "out": tmp_path / "out", "dry_run": True, **options}
    check(words, lambda: run_pipeline(Pipeline(nothing), **given))
    assert os.listdir(tmp_path) == []
