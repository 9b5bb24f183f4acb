"""The `nvembed` command: exit codes, files in and out, and the same vectors as the model gives in process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import tiny_folder
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nvembed.commands.app import app
from nvembed.preflight import doctor
from nvembed.retrieval import encode_file
from nvembed.retrieval.encode_file import ModelOptions, cut

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pipelines/recipes/tiny.yaml"
TEXTS = ["the first text", "a second, somewhat longer text about the sea", "third", "Vierter Text: Größe und Maß"]
PROMPT = "Instruct: Find\nQuery: "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of ours with a prompt."""
    return tiny_folder(tmp_path_factory.mktemp("model") / "model", TEXTS, prompts={"find": PROMPT})


def run(*arguments: Any) -> tuple[int, str]:
    """Exit code and all output of a command."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def expected(model: Path, instruction: str = "") -> np.ndarray:
    from nvembed.modeling.folder import load_embedder

    return load_embedder(model).encode(TEXTS, prompt=instruction)


def write_input(folder: Path, kind: str) -> Path:
    path = folder / f"in.{kind}"
    if kind == "txt":
        path.write_text("\n".join(TEXTS) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": f"t{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    else:
        pq.write_table(pa.table({"id": [f"t{i}" for i in range(len(TEXTS))], "text": TEXTS, "n": [1, 2, 3, 4]}), path)
    return path


def read_output(path: Path) -> tuple[list[str] | None, np.ndarray]:
    if path.suffix == ".npy":
        return None, np.load(path)
    table = pq.read_table(path)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), table.column("vector")[0].as_py().__len__())
    return table.column("id").to_pylist(), np.array(table.column("vector").to_pylist(), dtype=np.float32)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("target", ["out.parquet", "out.npy"])
def test_vectors_are_those_of_the_model(
    model: Path, tmp_path: Path, kind: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_file, "BLOCK_ROWS", 3)  # several blocks
    code, output = run("embed", model, write_input(tmp_path, kind), "--out", tmp_path / target)
    assert code == 0 and f"{tmp_path / target}: 4 vectors of 32 numbers" in output
    ids, vectors = read_output(tmp_path / target)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected(model), atol=1e-6)
    assert ids in (None, ["1", "2", "3", "4"] if kind == "txt" else ["t0", "t1", "t2", "t3"])
    assert sorted(os.listdir(tmp_path)) == sorted([f"in.{kind}", target]), "nothing is left lying about"


@pytest.mark.parametrize(
    ("options", "instruction"),
    [
        (["--instruction", "Find it all"], "Instruct: Find it all\nQuery: "),
        (["--instruction", "duplicates"], "Instruct: Retrieve duplicate questions from a forum\nQuery: "),
        (["--prompt-name", "find"], PROMPT),
        (["--prompt-name", "document"], ""),
        (["--batch-tokens", "16"], ""),
    ],
)
def test_instructions_and_prompts(model: Path, tmp_path: Path, options: list[str], instruction: str) -> None:
    code, output = run("embed", model, write_input(tmp_path, "txt"), "--out", tmp_path / "out.npy", *options)
    assert code == 0, output
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(model, instruction), atol=1e-6)


def test_a_matryoshka_prefix_is_scaled_to_length_1(model: Path, tmp_path: Path) -> None:
    code, _ = run("embed", model, write_input(tmp_path, "txt"), "--out", tmp_path / "out.npy", "--dim", "8")
    vectors, whole = np.load(tmp_path / "out.npy"), expected(model)[:, :8]
    assert code == 0 and vectors.shape == (4, 8)
    np.testing.assert_allclose(vectors, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6)


def test_a_cache_knows_the_texts_of_the_last_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvembed.modeling import embedder

    seen: list[str] = []
    encode = embedder.encode_prompted

    def counted(model: embedder.Embedder, texts: list[str], *arguments: Any, **options: Any) -> Any:
        seen.extend(texts)
        return encode(model, texts, *arguments, **options)

    monkeypatch.setattr("nvembed.modeling.probes.check_probes", lambda *_: None)  # it encodes, too
    monkeypatch.setattr(embedder, "encode_prompted", counted)
    source, cache = write_input(tmp_path, "txt"), tmp_path / "cache"
    for name in ("first", "second"):
        assert run("embed", model, source, "--out", tmp_path / f"{name}.npy", "--cache", cache)[0] == 0
    assert sorted(seen) == sorted(set(TEXTS))  # once each
    np.testing.assert_array_equal(np.load(tmp_path / "first.npy"), np.load(tmp_path / "second.npy"))
    source.write_text(source.read_text() + "a new one\n")
    assert run("embed", model, source, "--out", tmp_path / "third.npy", "--cache", cache)[0] == 0
    assert seen[len(set(TEXTS)) :] == ["a new one"]


def test_texts_that_were_cut_are_counted_from_the_cache_too(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("\n".join([*TEXTS, "the sea " * 3000, "text " * 4000]) + "\n")
    for name in ("first", "second"):
        code, output = run("embed", model, source, "--out", tmp_path / f"{name}.npy", "--cache", tmp_path / "cache")
        assert code == 0 and "; longer than 512 tokens and cut there: 2" in output
    code, output = run("embed", model, source, "--out", tmp_path / "third.npy", "--json")
    assert code == 0 and json.loads(output[output.index("{") :])["truncated"] == 2
    code, output = run("embed", model, write_input(tmp_path, "txt"), "--out", tmp_path / "short.npy")
    assert code == 0 and "cut there" not in output


@given(st.integers(1, 6), st.integers(1, 5))
def test_cut_keeps_directions_and_gives_unit_rows(dim: int, rows: int) -> None:
    matrix = np.random.default_rng(dim * 10 + rows).normal(size=(rows, 6)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    prefix = cut(matrix, dim)
    assert prefix.shape == (rows, dim) and prefix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(prefix, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(
        prefix * np.linalg.norm(matrix[:, :dim], axis=1, keepdims=True), matrix[:, :dim], atol=1e-6
    )


def test_text_and_title_columns(model: Path, tmp_path: Path) -> None:
    first, _, rest = TEXTS[0].partition(" ")
    rows = [{"_id": "a", "head": first, "body": rest}, {"_id": "b", "head": None, "body": TEXTS[1]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--text-column", "body", "--title-column", "head"]
    code, output = run("embed", model, tmp_path / "in.jsonl", "--out", tmp_path / "out.parquet", *options)
    assert code == 0, output
    ids, vectors = read_output(tmp_path / "out.parquet")
    assert ids == ["a", "b"]
    np.testing.assert_allclose(vectors, expected(model)[:2], atol=1e-6)


def test_an_empty_file_gives_no_vectors(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("")
    code, _ = run("embed", model, tmp_path / "in.txt", "--out", tmp_path / "out.npy")
    assert code == 0 and np.load(tmp_path / "out.npy").shape == (0, 32)


def test_remote_files(model: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/cli/in.txt", "\n".join(TEXTS).encode())
    code, output = run("embed", model, "memory://cli/in.txt", "--out", "memory://cli/out.npy")
    assert code == 0, output
    with memory.open("/cli/out.npy", "rb") as file:
        np.testing.assert_allclose(np.load(file), expected(model), atol=1e-6)


BAD = [
    ("in.jsonl", '{"text": "good"}\n{"text": 3}\nno json\n{"txt": "x"}\n[1]\n\n{"text": " "}\n', [
        "6 of 7 rows cannot be embedded", "line 2: text is int, not a text", "line 3: not JSON", "line 4: no text",
        "line 5: a JSON list, not an object", "line 6: empty",
    ]),
    ("in.jsonl", '{"text": "\\ud800"}\n', ["line 1: text holds a lone surrogate"]),
    ("in.txt", "one\n\nthree\n", ["1 of 3 rows", "line 2: the line is empty"]),
    ("in.txt", b"one\ncaf\xe9\n", ["line 2: not UTF-8 (byte 4)"]),
    ("in.parquet", b"PAR1 is not all", ["not a parquet file that can be read"]),
    ("in.csv", "a,b\n", ["unknown input format; the name must end in one of .txt, .jsonl, .ndjson, .parquet"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "messages"), BAD, ids=range(len(BAD)))
def test_bad_input_is_listed_by_line_and_nothing_is_written(
    model: Path, tmp_path: Path, name: str, content: str | bytes, messages: list[str]
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, text = run("embed", model, tmp_path / name, "--out", tmp_path / "out.npy")
    assert code == 2 and all(part in text for part in messages), text
    assert os.listdir(tmp_path) == [name] and "Traceback" not in text


def test_null_texts_and_missing_columns_of_parquet(model: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["x", None]}), tmp_path / "in.parquet")
    code, output = run("embed", model, tmp_path / "in.parquet", "--out", tmp_path / "out.npy")
    assert code == 2 and "line 2: no text" in output
    code, output = run("embed", model, tmp_path / "in.parquet", "--out", tmp_path / "out.npy", "--text-column", "body")
    assert code == 2 and "no column body; it has id, text. See --text-column." in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dim", "33"], "--dim 33: this model's vectors have 32 numbers; choose 1 to 32"),
        (["--prompt-name", "serch"], "the model has no prompt of this name; it has: document, find"),
        (["--instruction", "duplicate"], "Did you mean 'duplicates'?"),
        (["--instruction", "duplicates", "--prompt-name", "find"], "give --instruction or --prompt-name, not both"),
        (["--precision", "fp8"], "choose fp32, bf16 or auto"),
        (["--bogus"], "No such option"),
    ],
)
def test_wrong_options(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, text = run("embed", model, write_input(tmp_path, "txt"), "--out", tmp_path / "out.npy", *arguments)
    assert code == 2 and message in text, text
    assert not (tmp_path / "out.npy").exists()


def test_an_existing_output_is_kept_unless_forced(model: Path, tmp_path: Path) -> None:
    source, out = write_input(tmp_path, "txt"), tmp_path / "out.npy"
    out.write_bytes(b"mine")
    code, output = run("embed", model, source, "--out", out)
    assert code == 2 and "exists. Choose another --out, or give --force" in output and out.read_bytes() == b"mine"
    assert run("embed", model, source, "--out", out, "--force")[0] == 0
    assert np.load(out).shape == (4, 32)


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    source = write_input(tmp_path, "txt")
    for model, message in [
        (tmp_path / "no", "no such model folder"),
        ("models:/m@champion", "Set MLFLOW_TRACKING_URI"),
    ]:
        code, text = run("embed", model, source, "--out", tmp_path / "out.npy")
        assert code == 2 and message in text


def test_the_registry_of_the_only_run_is_used_and_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvembed.registry.client import open_registry

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    client = open_registry(f"sqlite:///{tmp_path}/runs/a/mlflow.db")
    client.create_registered_model("m")
    version = client.create_model_version("m", model.as_uri())
    client.set_registered_model_alias("m", "champion", version.version)
    code, output = run("embed", "models:/m@champion", write_input(tmp_path, "txt"), "--out", tmp_path / "out.npy")
    assert code == 0 and "registry: runs/a/mlflow.db" in output, output
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(model), atol=1e-6)
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/mlflow.db").touch()
    code, output = run("embed", "models:/m@champion", tmp_path / "in.txt", "--out", tmp_path / "other.npy")
    assert code == 2 and "which registry?" in output and "runs/b/mlflow.db" in output


def test_stopped_in_the_middle_nothing_is_left(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a text of some length to be embedded\n" * 400_000)
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-m", "nvembed.cli", "embed", str(model), str(tmp_path / "in.txt"), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob(".*.tmp")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
    assert os.listdir(tmp_path) == ["in.txt"]


def test_recipe_commands(tmp_path: Path) -> None:
    code, output = run("recipe", "validate", TINY)
    assert code == 0 and "a valid recipe (tiny)" in output
    code, output = run("recipe", "validate", TINY, "--set", "stage_1.train.optimizer={}", "--set", "mine.depht=3")
    assert (
        code == 2
        and "2 problems" in output
        and "Did you mean 'optimiser'?" in output
        and "Did you mean 'depth'?" in output
    )
    code, output = run("recipe", "show", TINY, "--set", "mine.depth=31")
    (tmp_path / "shown.yaml").write_text(output)
    assert code == 0 and "depth: 31" in output and run("recipe", "validate", tmp_path / "shown.yaml")[0] == 0


def test_doctor_lists_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "py311_cpu" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)

    def problems() -> dict[str, str]:
        return {finding.check: finding.fix for finding in doctor.examine() if finding.state == doctor.PROBLEM}

    assert "torch extensions" not in problems(), "a fresh lock is a build at work"
    os.utime(lock, (time.time() - 3600,) * 2)
    assert problems()["torch extensions"] == f"if no compiler is running: rm {lock}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "unset RAY_AUTH_MODE" in problems()["ray authentication"]
    code, output = run("doctor")
    assert code == 3 and "!! torch extensions" in output
    code, output = run("doctor", "--json")
    assert code == 3 and {"check", "state", "said", "fix"} == set(json.loads(output)[0])


def test_doctor_compares_versions() -> None:
    from packaging.requirements import Requirement

    wanted = [Requirement("numpy>=1"), Requirement("numpy>=99"), Requirement("no-such-package>=1")]
    states = [finding.state for finding in doctor._compare(wanted, doctor.NOTE, "pip install {name}")]
    assert states == [doctor.OK, doctor.PROBLEM, doctor.NOTE]


def test_the_job_is_what_the_command_line_says() -> None:
    assert ModelOptions("m").precision == "fp32", "vectors equal those of the library by default"
