"""What the comparison of student and teacher says, against direct computation."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from artifacts import publish
from safetensors.numpy import save_file

from nvembed.core.vectors import vector_table, write_shard
from nvembed.distill.config import CompareConfig
from nvembed.distill.student import COMPARE_STUDENT, cosine_to_teacher, encode_cost
from nvembed.modeling.folder import load_embedder
from nvembed.modeling.shapes import folder_size
from nvembed.text.identity import text_key
from nvembed.types import Artifact

CONFIG = CompareConfig(holdout_texts=20, texts=8, repeats=2, precision="fp32", bootstrap_samples=100)
TEXTS = [f"a text about the number {index} " + "and more " * (index % 4) for index in range(24)]
PREFIX = "Instruct: find\nQuery: "


@pytest.fixture(scope="module")
def inputs(teacher: Artifact, before: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("compare")

    def teacher_embeddings(work: str) -> None:
        instructions = [PREFIX if index % 2 else "" for index in range(24)]
        vectors = load_embedder(teacher.path("model")).encode(TEXTS, prompt=instructions)
        for part in range(3):
            rows = slice(8 * part, 8 * part + 8)
            keys = [text_key(*pair) for pair in zip(TEXTS[rows], instructions[rows], strict=True)]
            table = vector_table(pa.array(keys), vectors[rows])
            table = table.add_column(1, "text", [TEXTS[rows]]).add_column(2, "instruction", [instructions[rows]])
            write_shard(table, f"{work}/holdout/part-{part:05d}.parquet")

    def student(work: str) -> None:
        shutil.copytree(before.path("model"), f"{work}/model")
        generator = np.random.default_rng(0)
        tensors = {f"projections.{width}.weight": generator.normal(size=(32, width)) for width in (32, 16)}
        save_file({name: value.astype(np.float32) for name, value in tensors.items()}, f"{work}/objective.safetensors")

    return {
        "teacher_embeddings": publish(root / "teacher_embeddings", "teacher_embeddings", teacher_embeddings),
        "teacher": teacher,
        "before": before,
        "student": publish(root / "student", "train", student),
    }


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


def test_comparison(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = COMPARE_STUDENT.run(CONFIG, inputs, str(tmp_path / "compare"))
    found = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    assert found == json.loads(json.dumps(artifact.manifest["metrics"]))
    texts, instructions = TEXTS[:20], [PREFIX if index % 2 else "" for index in range(20)]
    ours = load_embedder(inputs["student"].path("model")).encode(texts, prompt=instructions)
    theirs = load_embedder(inputs["teacher"].path("model")).encode(texts, prompt=instructions)
    cosines = found["cosine_to_teacher"]
    assert cosines["texts"] == 20
    assert cosines["before"]["32"]["value"] == pytest.approx(cosine(ours, theirs), abs=1e-6)
    assert "no projection" in cosines["before"]["through"]
    generator = np.random.default_rng(0)
    for width in (32, 16):  # the order in which the fixture drew them
        weight = generator.normal(size=(32, width)).astype(np.float32)
        value = cosine(ours[:, :width] @ weight.T, theirs)
        row = cosines["after"][str(width)]
        assert row["value"] == pytest.approx(value, abs=1e-6) and row["low"] < row["value"] < row["high"]
    for name in ("teacher", "student"):
        embedder = load_embedder(inputs[name].path("model"))
        assert found["parameters"][name] == sum(parameter.numel() for parameter in embedder.parameters())
        assert 4 * found["parameters"][name] < found["bytes"][name] < 4 * found["parameters"][name] + 20_000
    assert found["parameters"]["ratio"] == found["parameters"]["student"] / found["parameters"]["teacher"] < 1
    cost = found["encode_cost"]
    assert cost["texts"] == 8 and cost["precision"] == "fp32" and cost["threads"] == 1
    assert cost["ratio"] == pytest.approx(cost["student"] / cost["teacher"]) and cost["student"] > 0


def test_probe_vectors_are_no_weights(before: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(before.path("model"), folder)
    sizes = folder_size(folder)
    assert (folder / "probes.safetensors").exists()
    (folder / "probes.safetensors").unlink()
    assert folder_size(folder) == sizes


def test_cosine_needs_equal_widths_or_a_projection() -> None:
    generator = np.random.default_rng(1)
    student, teacher = generator.normal(size=(10, 4)), generator.normal(size=(10, 6))
    assert list(cosine_to_teacher(student, teacher, {}, CONFIG)) == ["through"]
    assert "not comparable: 4 numbers" in cosine_to_teacher(student, teacher, {}, CONFIG)["through"]
    weight, *_ = np.linalg.lstsq(student, student @ generator.normal(size=(4, 6)), rcond=None)
    assert cosine_to_teacher(student, student @ weight, {4: weight.T}, CONFIG)["4"]["value"] == pytest.approx(1.0)
    same = cosine_to_teacher(teacher, teacher * 3, {}, CONFIG)
    assert same["6"] == {"value": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}


class Worker:
    """Uses its thread for a known time and notes its turn."""

    dim = 4

    def __init__(self, name: str, seconds: float, turns: list[str]) -> None:
        self.name, self.seconds, self.turns = name, seconds, turns

    def encode(self, texts: Any, instructions: Any) -> np.ndarray:
        self.turns.append(self.name)
        deadline = time.thread_time() + self.seconds
        while time.thread_time() < deadline:
            pass
        time.sleep(0.02)  # waiting is not counted
        return np.zeros((len(texts), self.dim), dtype=np.float32)


def test_cost_counts_cpu_time_of_the_thread_in_turns() -> None:
    turns: list[str] = []
    encoders = {"teacher": Worker("teacher", 0.04, turns), "student": Worker("student", 0.01, turns)}
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            sum(range(1000))

    other = threading.Thread(target=disturb)  # as Ray's threads do in the driver
    other.start()
    try:
        cost = encode_cost(encoders, TEXTS[:10], [""] * 10, CONFIG)
    finally:
        stop.set()
        other.join()
    assert turns == ["teacher", "student"] * 3  # a warm-up and two rounds
    assert cost["teacher"] == pytest.approx(4.0, rel=0.1)  # 0.04 s for 10 texts
    assert cost["ratio"] == pytest.approx(0.25, rel=0.2)


def test_threads_are_limited_for_a_while(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        artifact = COMPARE_STUDENT.run(CONFIG, inputs, str(tmp_path / "compare"))
        assert torch.get_num_threads() == 2 and artifact.manifest["metrics"]["encode_cost"]["threads"] == 1
    finally:
        torch.set_num_threads(before)
