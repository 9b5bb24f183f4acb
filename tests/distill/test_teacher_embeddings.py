"""Teacher vectors: nothing held out, each text once, the choice by hash, nothing computed twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.core.steps import load_artifact
from nvembed.data.tables import HELD_OUT, document_text, read_corpus, read_examples
from nvembed.distill import teacher_embeddings
from nvembed.distill.config import TeacherEmbeddingsConfig
from nvembed.distill.teacher_embeddings import (
    TEACHER_EMBEDDINGS,
    choose_texts,
    held_out_texts,
    read_part,
    training_texts,
)
from nvembed.modeling.folder import load_embedder
from nvembed.retrieval.config import EncodeConfig
from nvembed.text.identity import text_key
from nvembed.types import Artifact, UserError

CONFIG = TeacherEmbeddingsConfig(
    holdout_share=0.2, seed=5, encode=EncodeConfig(actors=2, shard_rows=8, precision="fp32")
)
LINKS, KINDS, PAIRS = (f"Instruct: find {name}\nQuery: " for name in ("links", "kinds", "pairs"))
PREFIXES = {"links": LINKS, "kinds": KINDS, "pairs": PAIRS}


def fold(text: str) -> str:
    return " ".join(text.lower().split())


def forbidden(prepare: Artifact) -> set[str]:
    """Held-out texts, collected in another way than the step does it."""
    found = set()
    for dataset in PREFIXES:
        texts = {
            row["id"]: document_text(row["title"], row["text"]) for row in read_corpus(prepare, dataset).to_pylist()
        }
        train = {item.id for row in read_examples(prepare, dataset, "train") for item in row.positives}
        for row in (row for split in HELD_OUT for row in read_examples(prepare, dataset, split)):
            found.add(fold(row.query))
            found.update(fold(texts[item.id]) for item in row.positives if item.id not in train)
        found.update(
            fold(texts[row["id"]]) for row in read_corpus(prepare, dataset).to_pylist() if row["split"] in HELD_OUT
        )
    return found


def expected(prepare: Artifact) -> set[tuple[str, str]]:
    """(text, instruction) of everything a student may see, by hand."""
    links = {(f"a question about {i}", LINKS) for i in range(10)} | {("a question about fourteen", LINKS)}
    numbers = [*range(10), *range(14, 20)]  # 10-13 answer held-out queries only
    documents = {(f"Title {i} the document number {i}" if i % 2 else f"the document number {i}", "") for i in numbers}
    kinds = {(f"seen kind text {i} of train", KINDS) for i in range(6)}
    pairs = {(f"train pair text {i}", PAIRS) for i in range(6)}
    return links | documents | kinds | pairs


def test_training_texts_are_those_of_the_training_split(prepare: Artifact) -> None:
    found = list(training_texts(prepare, held_out_texts(prepare)))
    assert set(found) == expected(prepare)
    assert not {fold(text) for text, _ in found} & forbidden(prepare)
    assert len(found) > len(set(found))  # classes and pairs are both queries and documents


def test_without_the_filter_held_out_texts_would_come_through(prepare: Artifact) -> None:
    """The traps are real: the audit above can fail."""
    leaked = {fold(text) for text, _ in training_texts(prepare, frozenset())} & forbidden(prepare)
    assert {"the document number 10", "held out kind text 3 of test", "test pair text 2"} <= leaked


digests = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=60)


@settings(deadline=None)
@given(digests, st.integers(0, 9), st.integers(10, 30))
def test_the_choice(keys: list[int], seed: int, cap: int) -> None:
    config = TeacherEmbeddingsConfig(holdout_share=0.2, seed=seed, max_texts=cap)
    digest_N = np.array(keys, dtype=np.int64)
    if len(set(keys)) < 2:
        with pytest.raises(UserError, match="a student needs some"):
            choose_texts(digest_N, config)
        return
    found = choose_texts(digest_N, config)
    training, holdout = set(found.training.tolist()), set(found.holdout.tolist())
    assert training and holdout and not training & holdout and training | holdout <= set(keys)
    assert len(training | holdout) == min(cap, len(set(keys))) and found.unique == len(set(keys))
    again = choose_texts(np.array(keys[::-1] + keys, dtype=np.int64), config)  # neither order nor repeats count
    assert np.array_equal(again.training, found.training) and np.array_equal(again.holdout, found.holdout)
    more = choose_texts(digest_N, config.model_copy(update={"max_texts": cap + 5}))
    assert training | holdout <= set(more.training.tolist()) | set(more.holdout.tolist())


def test_another_seed_chooses_others() -> None:
    digest_N = np.arange(1000)
    one, two = (choose_texts(digest_N, TeacherEmbeddingsConfig(seed=seed, max_texts=100)) for seed in (1, 2))
    assert len(set(one.training.tolist()) & set(two.training.tolist())) < 50


@pytest.fixture(scope="module")
def embedded(
    prepare: Artifact, teacher: Artifact, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """Built in two runs: the first dies after encoding, before anything is joined."""
    uri = str(tmp_path_factory.mktemp("embedded") / "teacher_embeddings")
    inputs = {"prepare": prepare, "model": teacher}

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    joined: Callable[..., None] = teacher_embeddings._join
    try:
        teacher_embeddings._join = die
        with pytest.raises(KeyboardInterrupt):
            TEACHER_EMBEDDINGS.run(CONFIG, inputs, uri)
    finally:
        teacher_embeddings._join = joined
    assert not Path(uri, "manifest.json").exists() and not Path(uri, "vectors").exists()
    return TEACHER_EMBEDDINGS.run(CONFIG, inputs, uri)


@pytest.mark.ray
def test_shards_hold_each_training_text_once_and_nothing_held_out(prepare: Artifact, embedded: Artifact) -> None:
    parts = {part: read_part(embedded, part)[0] for part in ("vectors", "holdout")}
    rows = [*parts["vectors"], *parts["holdout"]]
    assert {(row["text"], row["instruction"]) for row in rows} == expected(prepare)
    assert len(rows) == len(expected(prepare)) == embedded.manifest["metrics"]["unique_texts"]
    assert len(parts["holdout"]) == round(0.2 * len(rows))
    assert not {fold(row["text"]) for row in rows} & forbidden(prepare)
    assert all(row["key"] == text_key(row["text"], row["instruction"]) for row in rows)
    assert all(name.split("/")[0] in ("vectors", "holdout") for name in embedded.manifest["files"])
    counted = embedded.manifest["metrics"]["datasets"]
    assert {part: sum(found.values()) for part, found in counted.items()} == {
        part: len(found) for part, found in parts.items()
    }
    for part, found in counted.items():
        kinds = sum(row["instruction"] == KINDS for row in parts[part])
        assert found.get("kinds", 0) == kinds


@pytest.mark.ray
def test_vectors_are_the_teachers(embedded: Artifact, teacher: Artifact) -> None:
    embedder = load_embedder(teacher.path("model"))
    for part in ("vectors", "holdout"):
        rows, matrix = read_part(embedded, part)
        assert matrix.dtype == np.float32 and np.linalg.norm(matrix, axis=1) == pytest.approx(1, abs=1e-5)
        found = embedder.encode([row["text"] for row in rows], prompt=[row["instruction"] for row in rows])
        assert np.abs(found - matrix).max() < 1e-6
    some, _ = read_part(embedded, "vectors", limit=3)
    assert some == read_part(embedded, "vectors")[0][:3]


@pytest.mark.ray
def test_a_resumed_run_computes_nothing_again(embedded: Artifact, prepare: Artifact, teacher: Artifact) -> None:
    metrics = embedded.manifest["metrics"]
    assert metrics["encode_rows"] == 0 and metrics["encode_reused_rows"] == metrics["unique_texts"] > 0
    assert not Path(embedded.uri, "checkpoints").exists()
    again = TEACHER_EMBEDDINGS.run(CONFIG, {"prepare": prepare, "model": teacher}, embedded.uri)
    assert json.dumps(again.manifest) == json.dumps(load_artifact(embedded.uri).manifest)
    with pytest.raises(UserError, match="max_texts: null -> 12"):
        TEACHER_EMBEDDINGS.run(
            CONFIG.model_copy(update={"max_texts": 12}), {"prepare": prepare, "model": teacher}, embedded.uri
        )
