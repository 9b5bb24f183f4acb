"""The smaller commands: plan, recipe schema and diff, search, doctor's checks, completion, an early Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import tiny_folder
from typer.testing import CliRunner

from nvembed.commands import complete
from nvembed.commands.app import app
from nvembed.preflight import doctor
from nvembed.recipe.diff import compare_recipes
from nvembed.recipe.schema import load_recipe
from nvembed.retrieval.search_corpus import snippet

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "pipelines/recipes"
TINY, QUICKSTART = RECIPES / "tiny.yaml", RECIPES / "quickstart.yaml"
DOCUMENTS = [
    "the sea is wide",
    "bread is baked in an oven",
    "ships sail the sea",
    "the sea is wide",
    "a train of thought",
]


def run(*arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output, everything."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})
    return done.exit_code, done.stdout, done.output


# -- plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_command() -> None:
    code, output, _ = run("plan", RECIPES / "nv_embed_v1_7b.yaml", "--hardware", "h100x8", "--price", "50")
    assert code == 0 and "7,851,016,192 parameters" in output and "cost" in output and "memory of a rank" in output
    code, output, _ = run("plan", QUICKSTART, "--json", "--set", "stage_1.stream.steps=100")
    found = json.loads(output)
    assert code == 0 and found["stages"]["stage_1"]["steps"] == 100
    parts = found["stages"]["stage_1"]["memory_bytes_per_rank"]
    assert set(parts) == {"process", "weights", "gradients", "optimiser", "activations", "buffers", "total"}
    assert sum(value for name, value in parts.items() if name != "total") == pytest.approx(parts["total"])
    code, output, _ = run("plan", TINY, "--list", "--json")
    assert code == 0 and {"laptop", "h100x8", "h200x8", "a100-80gx8", "l4x1"} <= {
        row["name"] for row in json.loads(output)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hardware", "h100"], "not in the catalogue. Did you mean 'h100x8'?"),
        (["--fill", "1.5"], "--fill 1.5: must be above 0 and at most 1"),
        (["--set", "stage_1.train.sed=1"], "Did you mean 'seed'?"),
    ],
)
def test_wrong_plans(options: list[str], message: str) -> None:
    code, _, text = run("plan", TINY, *options)
    assert code == 2 and message in text


# -- recipe -----------------------------------------------------------------------------------------------------------


def test_the_schema_takes_every_recipe_and_refuses_a_mistyped_key() -> None:
    import yaml
    from jsonschema import Draft202012Validator

    code, output, _ = run("recipe", "schema")
    validator = Draft202012Validator(json.loads(output))
    assert code == 0
    for path in sorted(RECIPES.glob("*.yaml")):
        assert list(validator.iter_errors(yaml.safe_load(path.read_text()))) == [], path
    wrong = yaml.safe_load(TINY.read_text())
    wrong["mine"]["depht"] = 3
    assert any("depht" in error.message for error in validator.iter_errors(wrong))


def test_validate_lists_problems_as_json() -> None:
    code, output, _ = run(
        "recipe", "validate", TINY, "--json", "--set", "mine.depht=3", "--set", "stage_1.train.seed=x"
    )
    found = json.loads(output)
    assert code == 2 and found["valid"] is False
    assert {problem["path"] for problem in found["problems"]} == {"mine.depht", "stage_1.train.seed"}
    code, output, _ = run("recipe", "validate", TINY, "--json")
    assert code == 0 and json.loads(output) == {"valid": True, "name": "tiny", "problems": []}
    code, output, _ = run("recipe", "show", TINY, "--json")
    assert code == 0 and json.loads(output)["name"] == "tiny"


def test_a_diff_is_of_meaning(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    text = TINY.read_text().replace("steps: 10,", "steps: 11,")
    caps, turned = (
        "max_documents: 120, max_train: 120, max_test: 30}",
        "max_test: 30, max_documents: 121, max_train: 120}",
    )
    lines = text.replace(caps, turned, 1)
    other.write_text("# a comment\n" + lines + "cluster: {object_store_mb: 200}\n")
    code, output, _ = run("recipe", "diff", TINY, other)
    assert code == 0 and output.splitlines() == [
        "prepare.sources.cwe.max_documents: 120 -> 121", "stage_1.stream.steps: 10 -> 11"
    ]  # fmt: skip
    code, output, _ = run("recipe", "diff", TINY, TINY, "--json")
    assert code == 0 and json.loads(output) == []
    assert run("recipe", "diff", TINY, TINY)[1] == "no difference\n"


def test_a_section_of_another_type_is_one_difference() -> None:
    first = load_recipe(str(TINY))
    second = load_recipe(str(TINY), ["stage_2=null", "stage_1.train.adapter={type: lora}"])
    found = {item["path"]: item for item in compare_recipes(first, second)}
    assert set(found) == {"stage_2", "stage_1.train.adapter"} and found["stage_2"]["b"] is None
    assert [item["path"] for item in compare_recipes(second, first)] == ["stage_1.train.adapter", "stage_2"]


# -- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nvembed.modeling.config import EmbedderConfig, MeanConfig

    config, prompts = EmbedderConfig(pooling=MeanConfig()), {"find": "Instruct: Find\nQuery: "}
    return tiny_folder(tmp_path_factory.mktemp("model") / "model", DOCUMENTS, config, prompts)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)))
    return path


def hits(*arguments: Any) -> list[dict[str, Any]]:
    code, output, everything = run("search", *arguments, "--json")
    assert code == 0, everything
    return list(json.loads(output))


def test_search_finds_what_the_vectors_say(model: Path, corpus: Path, tmp_path: Path) -> None:
    from nvembed.modeling.folder import load_embedder

    embedder = load_embedder(model)
    scores = embedder.encode(DOCUMENTS) @ embedder.encode(["the sea"], prompt="Instruct: Find\nQuery: ")[0]
    order = np.lexsort((np.arange(len(DOCUMENTS)), -scores.round(6)))
    found = hits(model, corpus, "the sea", "--k", "3", "--prompt-name", "find")
    assert [hit["id"] for hit in found] == [f"d{i}" for i in order[:3]] and found[0]["rank"] == 1
    assert [hit["text"] for hit in found] == [DOCUMENTS[i] for i in order[:3]]
    np.testing.assert_allclose([hit["score"] for hit in found], scores[order[:3]], atol=1e-5)
    whole = hits(model, corpus, "the sea is wide")
    assert [hit["id"] for hit in whole[:2]] == ["d0", "d3"] and len(whole) == 5, "equal texts stand in their order"
    for target in ("vectors.parquet", "vectors.npy"):
        assert run("embed", model, corpus, "--out", tmp_path / target, "--json")[0] == 0
        assert hits(model, corpus, "the sea is wide", "--vectors", tmp_path / target) == whole


def test_search_of_a_beir_folder_and_a_narrow_window(model: Path, tmp_path: Path) -> None:
    rows = [{"_id": "x", "title": "Sea", "text": "a long text " * 40}, {"_id": "x", "title": "", "text": "bread"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = hits(model, tmp_path, "Sea")
    assert len(found) == 2 and any(hit["text"].startswith("Sea") for hit in found), "ids may repeat"
    code, output, _ = run("search", model, tmp_path, "Sea")
    assert code == 0 and all(len(line) <= 100 for line in output.splitlines()) and "…" in output


def test_search_refuses_what_does_not_belong_together(model: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("one\ntwo\n")
    assert run("embed", model, tmp_path / "other.txt", "--out", tmp_path / "v.parquet")[0] == 0
    np.save(tmp_path / "wide.npy", np.ones((5, 31), np.float32))
    for arguments, message in [
        (["--vectors", tmp_path / "v.parquet"], "not the vectors of"),
        (["--vectors", tmp_path / "wide.npy"], "vectors of 31 numbers, the model gives 32"),
        (["--vectors", tmp_path / "no.npy"], "no such file"),
        (["--prompt-name", "fnd"], "it has: document, find"),
        (["--dim", "33"], "choose 1 to 32"),
    ]:
        code, _, text = run("search", model, corpus, "sea", *arguments)
        assert code == 2 and message in text, text
    assert run("search", model, corpus, "  ")[0] == 2
    assert "--prompt-name find" in run("search", model, corpus, "sea")[2], "the model's prompts are named"


def test_snippets() -> None:
    assert snippet("a\n  b") == "a b" and snippet("abcdef", 4) == "abc…" and snippet("abcd", 4) == "abcd"


# -- doctor -----------------------------------------------------------------------------------------------------------

TABLE = """  sl  local_address rem_address   st tx_queue
   0: {address}:2049 00000000:0000 0A 00000000:00000000
   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000
   2: 00000000:2049 0100007F:1234 01 00000000:00000000
"""


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("0100007F", True), ("00000000", False), ("020011AC", False), ("00000000000000000000000001000000", True),
        ("00000000000000000000000000000000", False), ("0000000000000000FFFF00000100007F", True),
    ],
)  # fmt: skip
def test_who_can_reach_a_port(address: str, local: bool) -> None:
    assert doctor.listening(8265, TABLE.format(address=address)) == [address]
    assert doctor._is_loopback_hex(address) is local
    assert doctor.listening(8264, TABLE.format(address=address)) == []


def test_doctor_looks_at_mlflow_disk_clock_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def findings() -> dict[str, doctor.Finding]:
        return {finding.check: finding for finding in doctor.examine()}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary-password@127.0.0.1:9/")
    monkeypatch.setattr(doctor, "MIN_DISK_BYTES", 2**60)
    monkeypatch.setattr(doctor, "MIN_OPEN_FILES", 10**9)
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    found = findings()
    assert found["mlflow"].state == doctor.PROBLEM and "canary" not in str(found["mlflow"])
    assert found["disk of the runs"].state == doctor.NOTE and found["open files"].fix.startswith("ulimit -n")
    assert found["clock"].state == doctor.PROBLEM and "1 model(s)" in found["hub cache"].message
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/mlflow.db")
    assert findings()["mlflow"].state == doctor.OK and not (tmp_path / "no").exists(), "nothing is made by looking"


# -- completion, Ctrl-C -----------------------------------------------------------------------------------------------


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert complete.recipe_files("quick") == ["pipelines/recipes/quickstart.yaml"]
    assert complete.recipe_files("pipelines/recipes/ti") == ["pipelines/recipes/tiny.yaml"]
    assert "pipelines/" in complete.recipe_files("pi") and complete.recipe_files("no/such/folder/x") == []
    assert complete.hardware_names("h100") == ["h100x1", "h100x8"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a/train/model").mkdir(parents=True)
    (tmp_path / "runs/a/train/model/nvembed.json").write_text("{}")
    assert complete.model_folders("runs/a/t") == ["runs/a/train/", "runs/a/train/model"]


def test_the_shell_gets_its_completions() -> None:
    environment = os.environ | {
        "_NVEMBED_COMPLETE": "complete_bash", "COMP_WORDS": "nvembed plan pipelines/recipes/qu", "COMP_CWORD": "2",
    }  # fmt: skip
    script = "import sys; sys.argv = ['nvembed']; from nvembed.commands.app import app; app(prog_name='nvembed')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.split() == ["pipelines/recipes/quickstart.yaml"], done.stderr
    code, output, _ = run("--help")
    assert code == 0 and "--install-completion" in output


SLOW_IMPORT = """
import sys, time, runpy
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic":
            print("loading", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["pipelines/quickstart.py", "pipelines/distill.py", "nvembed/cli.py"])
def test_ctrl_c_while_libraries_load_is_quiet(script: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SLOW_IMPORT, str(ROOT / script), "recipe", "show"]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, **streams, env=environment, cwd=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=10)[0]
    assert (process.returncode, output) == (130, "interrupted\n")
