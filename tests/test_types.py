"""The words of layer 0."""

import numpy as np
import pytest
from pydantic import Field, ValidationError

from nvembed.types import Artifact, Batch, Config, TaskType


class Section(Config):
    """A section as packages define them."""

    steps: int = Field(3, ge=1)


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Section(stepps=3)  # type: ignore[call-arg]


def test_values_never_change() -> None:
    section = Section(steps=4)
    with pytest.raises(ValidationError, match="frozen"):
        section.steps = 5  # type: ignore[misc]
    assert section.steps == 4


def test_only_retrieval_is_asymmetric() -> None:
    assert {task for task in TaskType if not task.symmetric} == {TaskType.RETRIEVAL}


def test_a_batch_knows_its_sizes() -> None:
    batch = Batch(
        step=0,
        example_ids=["a", "b"],
        texts=["q", "p", "n"] * 2,
        instructions=[""] * 6,
        token_lengths=np.ones(6, np.int32),
        present=np.ones((2, 3), bool),
        document_ids=np.zeros((2, 3), np.int64),
        positive_ids=[np.zeros(1, np.int64)] * 2,
    )
    assert (batch.batch_size, batch.group_size) == (2, 3)


def test_an_artifact_joins_paths_and_hides_nothing_of_its_identity() -> None:
    artifact = Artifact("s3://bucket/run/mine/", {"fingerprint": "f", "content_hash": "c"})
    assert artifact.path("cwe", "mined.parquet") == "s3://bucket/run/mine/cwe/mined.parquet"
    assert (artifact.fingerprint, artifact.manifest_hash) == ("f", "c")
