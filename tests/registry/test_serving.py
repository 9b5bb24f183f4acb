"""The pyfunc of a version where nvembed is not installed: the same vectors, over Python and over HTTP."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from servers import free_port

from nvembed.core.uris import file_path
from nvembed.registry.client import open_registry
from nvembed.registry.serving import Embeddings
from nvembed.text.instructions import CATALOGUE, instruction_prefix
from nvembed.types import UserError

NAME = "nvembed-teacher"
TEXTS = ["how to reverse a list", "a second, somewhat longer text about the sea", "Größe 東京 🙂", ""]
PROMPT = "Instruct: Find\nQuery: "
REQUESTS: dict[str, tuple[dict[str, Any], str, int | None]] = {
    "bare": ({"input": TEXTS}, "", None),
    "one": ({"input": TEXTS[0]}, "", None),
    "prompt": ({"input": TEXTS, "prompt_name": "find"}, PROMPT, None),
    "sentence": (
        {"input": TEXTS, "instruction": "Find the answer to it"},
        instruction_prefix("Find the answer to it"),
        None,
    ),
    "key": ({"input": TEXTS, "instruction": "web_search", "dimensions": 8}, instruction_prefix("web_search"), 8),
}
# Another process, in which nvembed cannot be imported.
LOAD = """
import json, sys
sys.modules["nvembed"] = None
import mlflow
uri, reference, requests = sys.argv[1:]
mlflow.set_tracking_uri(uri)
mlflow.set_registry_uri(uri)
model = mlflow.pyfunc.load_model(reference)
answers = {name: model.predict(request) for name, request in json.loads(requests).items()}
refused = {}
bad = {
    "prompt": {"input": "a", "prompt_name": "none"},
    "width": {"input": "a", "dimensions": 99},
    "key": {"input": "a", "instruction": "web_serch"},
}
for name, request in bad.items():
    try:
        model.predict(request)
    except Exception as error:
        refused[name] = str(error)
stock = None
if reference.endswith("@candidate"):
    import mlflow.sentence_transformers
    model = mlflow.sentence_transformers.load_model(reference)
    stock = model.encode(json.loads(requests)["prompt"]["input"], prompt_name="find").tolist()
print("RESULT" + json.dumps({"answers": answers, "refused": refused, "stock": stock}))
"""


@pytest.fixture
def registered(kit: Any) -> Any:
    """A model with code of its own (champion) and a stock one (candidate)."""
    assert kit.register("a", 0.5)["promoted"]
    kit.register("b", 0.4, kind="stock")
    assert kit.aliases() == {"champion": "1", "candidate": "2"}
    return kit


def expected(folder: Path, prefix: str, texts: list[str], dim: int | None) -> np.ndarray:
    from nvembed.modeling.folder import load_embedder
    from nvembed.retrieval.encode_file import cut

    vectors_ND = load_embedder(folder).encode(texts, prompt=prefix)
    return vectors_ND if dim is None else cut(vectors_ND, dim)


def check(answers: dict[str, Any], folder: Path) -> None:
    """Every answer against ours: at most 1e-5 apart, unit length, the shape of OpenAI's embeddings."""
    for name, (request, prefix, dim) in REQUESTS.items():
        texts = [request["input"]] if isinstance(request["input"], str) else request["input"]
        answer = answers[name]
        assert answer["object"] == "list" and [row["index"] for row in answer["data"]] == list(range(len(texts)))
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
        found_ND = np.array([row["embedding"] for row in answer["data"]])
        np.testing.assert_allclose(found_ND, expected(folder, prefix, texts, dim), rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(np.linalg.norm(found_ND, axis=1), 1, atol=1e-5)


def environment(uri: str) -> dict[str, str]:
    """Without our PYTHONPATH, so that only the version's own files can be used."""
    others = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**others, "MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}


def test_an_instruction_follows_the_rules_of_the_library() -> None:
    """A task sentence or a key; the copied file has the rules of `task_sentence` without its module."""
    model = Embeddings()
    model.settings = {"template": "Instruct: {task}\nQuery: ", "instructions": CATALOGUE}
    for instruction in (*CATALOGUE, "Find {the} answer", "Wörter mit Ümlaut"):
        assert model._prefix({"instruction": instruction}) == instruction_prefix(instruction)
    for wrong, words in {
        "web_serch": "unknown instruction 'web_serch'.*Did you mean 'web_search'",
        "Instruct: Find it\nQuery: ": "is a rendered prompt; give the task alone",
    }.items():
        with pytest.raises(UserError):
            instruction_prefix(wrong)
        with pytest.raises(MlflowException, match=words):
            model._prefix({"instruction": wrong})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("alias", "kind"), [("champion", "masked"), ("candidate", "stock")])
def test_a_fresh_process_gets_our_vectors(registered: Any, folders: dict[str, Path], alias: str, kind: str) -> None:
    requests = json.dumps({name: request for name, (request, _, _) in REQUESTS.items()})
    command = [sys.executable, "-c", LOAD, registered.uri, f"models:/{NAME}@{alias}", requests]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment(registered.uri), cwd=registered.out
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.split("RESULT")[1])
    check(result["answers"], folders[kind])
    assert "no prompt 'none'" in result["refused"]["prompt"] and "choose 1 to 32" in result["refused"]["width"]
    assert "Did you mean 'web_search'?" in result["refused"]["key"]
    if kind == "stock":
        found_ND = np.array(result["stock"])
        np.testing.assert_allclose(found_ND, expected(folders[kind], PROMPT, TEXTS, None), rtol=0, atol=1e-5)
    else:
        assert result["stock"] is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_code_that_was_not_registered_is_not_run(registered: Any) -> None:
    version = open_registry(registered.uri).get_model_version(NAME, "1")
    folder = Path(file_path(version.source), "model.sentence_transformer")
    for change, message in (
        ("pooling.py", "is not the code that was registered"),
        ("extra.py", "was not registered: extra.py"),
    ):
        changed = shutil.copytree(folder.parent, Path(registered.out, f"copy-{change}"))
        with open(changed / "model.sentence_transformer" / change, "a") as file:
            file.write("\nraise SystemExit('it ran')\n")
        code = f"import mlflow; mlflow.pyfunc.load_model({str(changed)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment(registered.uri)
        )
        assert done.returncode != 0 and message in done.stderr and "it ran" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_models_serve_answers_over_http(registered: Any, folders: dict[str, Path]) -> None:
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}@champion",
        "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    log = Path(registered.out, "serve.log")
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment(registered.uri),
            cwd=registered.out, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        answers = {name: ask(port, request) for name, (request, _, _) in REQUESTS.items()}
        check(answers, folders["masked"])
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(port, {"input": "a", "dimensions": 99})
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=60)


def ask(port: int, request: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return dict(json.load(answer))
