"""Versions in a real MLflow store on SQLite: one per content, mended after a kill, and back to a folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvembed.core import storage
from nvembed.core.formats import FormatError
from nvembed.core.steps import CorruptArtifactError, describe_files
from nvembed.registry import step as register_step
from nvembed.registry.client import RegistryAwayError, open_registry
from nvembed.registry.resolve import resolve_model
from nvembed.registry.step import REGISTER
from nvembed.registry.versions import mean_primary_score
from nvembed.types import UserError

NAME = "nvembed-teacher"
HASHES = {"cwe": "aa", "hpo": "bb"}
Files = Callable[[str | Path], dict[str, bytes]]


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "README.md"}


def folder_of(version: Any) -> Path:
    return storage.local_path(version.source) / "model.sentence_transformer"


# -- versions -------------------------------------------------------------------------------------------------------


def test_a_version_has_the_files_the_scores_and_the_run(kit: Any, files: Files) -> None:
    model = kit.model("a")
    scores = kit.scores(model, 0.5)
    done = kit.submit(model, scores)
    assert (done["name"], done["version"], done["registry_uri"]) == (NAME, "1", f"models:/{NAME}/1")
    assert done["aliases"] == ["candidate", "champion"] and done["champion_before"] is None
    assert done["gate"]["passed"] and {row["name"]: row["state"] for row in done["gate"]["checks"]} == {
        "evaluation": "passed", "comparison": "skipped", "floor": "skipped", "leak": "passed", "probes": "passed",
        "provenance": "passed",
    }  # fmt: skip
    (version,) = kit.versions()
    assert json.loads(version.tags["nvembed.scores"])["model"]["cwe"]["ndcg_at_10"]["value"] == pytest.approx(0.5)
    assert json.loads(version.tags["nvembed.evaluation_hash"]) == HASHES
    assert version.tags["nvembed.manifest_hash"] == model.manifest_hash
    assert version.tags["nvembed.evaluation_manifest_hash"] == scores.manifest_hash
    assert version.tags["nvembed.recipe.schema"] == "tiny" and version.tags["gate.result"] == "passed"
    assert version.run_id == done["run_id"]
    assert without_card(files(folder_of(version))) == without_card(files(storage.local_path(model.path("model"))))
    assert files(scores.uri)["items.parquet"] == files(folder_of(version).parent)["nvembed/items.parquet"]


def test_the_card_carries_evaluation_licences_and_chain(kit: Any) -> None:
    """In the format of the hub: its own reader takes the front matter and finds the results."""
    from huggingface_hub import ModelCard

    kit.register("a", 0.5)
    (version,) = kit.versions()
    card = ModelCard.load(folder_of(version) / "README.md", ignore_metadata_errors=False)
    front = yaml.safe_load(card.content.split("---")[1])
    assert card.data.license == "apache-2.0" and front["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert sorted(front["datasets"]) == ["cwe", "hpo"]
    results = {result.dataset_name: result for result in card.data.eval_results}
    assert results["cwe"].metric_type == "ndcg_at_10" and results["cwe"].metric_value == pytest.approx(0.5)
    assert results["hpo"].metric_args["low"] == pytest.approx(0.49)
    for line in ("| cwe | nDCG@10 | 0.5000 | 0.4900 | 0.5100 |", "| data set | hpo | licence of hpo |",
                 "| mining model | sentence-transformers/all-MiniLM-L6-v2 | Apache-2.0 |", "| prepare-"):  # fmt: skip
        assert line in card.text
    assert {row["kind"] for row in json.loads(version.tags["nvembed.licences"])} == {
        "data set", "backbone", "mining model",
    }  # fmt: skip


def test_the_same_content_is_the_same_version(kit: Any) -> None:
    first, second = kit.register("a", 0.5), kit.register("a", 0.5)
    assert first == {**second, "reason": first["reason"], "gate": first["gate"]}
    messages = {check["name"]: check["said"] for check in second["gate"]["checks"]}
    assert messages["comparison"] == "it is the champion itself"
    tags = kit.versions()[0].tags  # the record of what made it champion stays
    assert tags["gate.comparison"] == "skipped: there is no champion"
    assert len(kit.versions()) == 1
    assert kit.register("b", 0.4)["version"] == "2"


@pytest.mark.slow
def test_scores_of_a_version_follow_its_last_evaluation(kit: Any) -> None:
    prepared = kit.prepare()
    model = kit.model("a", prepare=prepared)
    kit.submit(model, kit.scores(model, 0.5, prepared))
    kit.submit(model, kit.scores(model, 0.7, prepared))
    (version,) = kit.versions()
    assert float(version.tags["nvembed.score"]) == pytest.approx(0.7)
    records = folder_of(version).parent / "nvembed"
    assert storage.read_json(str(records / "scores.json"))["scores"]["model"]["cwe"]["ndcg_at_10"]["value"] > 0.69
    assert "| cwe | nDCG@10 | 0.7000" in (folder_of(version) / "README.md").read_text()


def test_nothing_is_pickled(kit: Any) -> None:
    kit.register("a", 0.5)
    kit.register("b", 0.5, kind="stock")
    expected = {"1": {"python_function"}, "2": {"python_function", "sentence_transformers"}}
    for version in kit.versions():
        root = folder_of(version).parent
        described = yaml.safe_load((root / "MLmodel").read_text())
        assert (
            set(described["flavors"]) == expected[str(version.version)]
            and described["metadata"]["task"] == "llm/v1/embeddings"
        )
        assert described["flavors"]["python_function"]["model_code_path"] == "serving.py"
        assert not [path for path in root.rglob("*") if path.suffix in (".pkl", ".bin", ".pt", ".pickle")]
        assert kit.out not in (root / "MLmodel").read_text()


SHORT = ("before-create_model_version", "after-log_artifacts", "after-set_registered_model_tag")
CALLS = ("create_run", "log_artifacts", "create_registered_model", "create_model_version", "set_registered_model_alias",
         "set_registered_model_tag", "set_model_version_tag", "delete_registered_model")  # fmt: skip


@pytest.mark.parametrize(
    ("call", "after"),
    [
        pytest.param(call, after, id=name, marks=() if name in SHORT else pytest.mark.slow)
        for call in CALLS
        for after in (False, True)
        for name in [f"{'after' if after else 'before'}-{call}"]
    ],
)
def test_killed_registration_is_mended(kit: Any, monkeypatch: pytest.MonkeyPatch, call: str, after: bool) -> None:
    class Killed(BaseException):
        pass

    class Dying:
        def __init__(self, client: Any) -> None:
            self.client = client

        def __getattr__(self, name: str) -> Any:
            real = getattr(self.client, name)

            def die(*args: Any, **kwargs: Any) -> Any:
                if after:
                    real(*args, **kwargs)
                raise Killed

            return die if name == call else real

    monkeypatch.setattr("nvembed.registry.champion.PATIENCE_SECONDS", 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(register_step, "open_registry", lambda uri: Dying(open_registry(uri)))
        with pytest.raises(Killed):
            kit.register("a", 0.5)
    done = kit.register("a", 0.5)
    assert done["version"] == "1"
    assert len(kit.versions()) == 1
    assert kit.aliases() == {"candidate": "1", "champion": "1"}
    client = kit.client
    assert len(client.search_runs([client.get_experiment_by_name("nvembed").experiment_id])) == 1


def test_mean_primary_score() -> None:
    classes = {"v_measure": {"value": 0.1}, "accuracy": {"value": 0.6}}
    assert mean_primary_score({"scores": {"model": {"a": classes, "b": {"other": {"value": 0.2}}}}}) == pytest.approx(
        0.4
    )


# -- the step -------------------------------------------------------------------------------------------------------


def test_step_registers_once_and_is_skipped(kit: Any) -> None:
    model = kit.model("a")
    inputs = {"model": model, "scores": kit.scores(model, 0.5)}
    made = REGISTER.run(kit.config(), inputs, storage.join(kit.out, "register_teacher"))
    registration = storage.read_json(made.path("registration.json"))
    assert registration["registry_uri"] == f"models:/{NAME}/1"
    again = REGISTER.run(kit.config(run_id="another"), inputs, storage.join(kit.out, "register_teacher"))
    assert again.manifest_hash == made.manifest_hash


@pytest.mark.slow
def test_a_run_given_by_tracking_is_used(kit: Any) -> None:
    client = kit.client
    run = client.create_run(client.create_experiment("nvembed", Path(kit.out, "mlartifacts").as_uri()))
    assert kit.register("a", 0.5, run_id=run.info.run_id)["run_id"] == run.info.run_id


def test_a_registry_that_is_away_has_its_own_error(kit: Any) -> None:
    with pytest.raises(RegistryAwayError, match=r"does not answer.*run again"):
        kit.register("a", 0.5, tracking_uri="http://127.0.0.1:9")


# -- back to a folder -----------------------------------------------------------------------------------------------


def test_resolve_alias_version_and_folder(kit: Any, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.register("a", 0.5)
    kit.register("b", 0.4)
    first, second = (files(folder_of(version)) for version in kit.versions())
    assert first["note.txt"] == b"a" and second["note.txt"] == b"b"
    assert files(resolve_model(f"models:/{NAME}@champion", kit.uri)) == first
    assert files(resolve_model(f"models:/{NAME}@candidate", kit.uri)) == second
    assert files(resolve_model(f"models:/{NAME}/2", kit.uri)) == second
    monkeypatch.setenv("MLFLOW_TRACKING_URI", kit.uri)
    assert files(resolve_model(f"models:/{NAME}/1")) == first
    Path("here").mkdir()
    assert resolve_model("here") == str(Path("here").absolute())


def test_files_that_are_elsewhere_are_downloaded_once(kit: Any, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a source that does not count as local, as on a server, the download lands in the cache, checked."""
    kit.register("a", 0.5)
    (version,) = kit.versions()
    expected, cache = files(folder_of(version)), Path(kit.out, "cache")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "is_local", lambda uri: not uri.startswith("file:"))
        first = resolve_model(f"models:/{NAME}/1", kit.uri, cache)
        assert Path(first).parent == cache
        assert files(first) == expected
        assert [path.name for path in cache.iterdir()] == [Path(first).name]
        shutil.rmtree(Path(kit.out, "mlartifacts"))
        assert resolve_model(f"models:/{NAME}@candidate", kit.uri, cache) == first


def test_a_newer_format_names_the_nvembed_to_install(kit: Any) -> None:
    kit.register("a", 0.5)
    for tag, value in (("nvembed.format", "9"), ("nvembed.version", "9.1")):
        kit.client.set_model_version_tag(NAME, "1", tag, value)
    with pytest.raises(FormatError, match=r"version 1 of .* format version 9, made by nvembed 9\.1; .*nvembed>=9\.1"):
        resolve_model(f"models:/{NAME}/1", kit.uri)


def test_damaged_files_are_refused(kit: Any) -> None:
    kit.register("a", 0.5)
    (version,) = kit.versions()
    (folder_of(version) / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CorruptArtifactError, match="not those that were registered"):
        resolve_model(f"models:/{NAME}/1", kit.uri)


def test_a_version_of_the_first_format_is_still_read(kit: Any, files: Files, folders: dict[str, Path]) -> None:
    """Format 1: the source is the model folder itself, its hash with the card, no format tag."""
    files_of_folder = describe_files(str(folders["stock"]))
    content = storage.hash_json({name: entry["xxh3_128"] for name, entry in files_of_folder.items()})
    client = kit.client
    client.create_registered_model(NAME)
    client.create_model_version(NAME, folders["stock"].as_uri(), tags={"nvembed.content_hash": content})
    assert files(resolve_model(f"models:/{NAME}/1", kit.uri)) == files(folders["stock"])
    client.set_model_version_tag(NAME, "1", "nvembed.content_hash", "other")
    with pytest.raises(CorruptArtifactError, match="not those that were registered"):
        resolve_model(f"models:/{NAME}/1", kit.uri)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/unknown@champion", f"no model unknown; it has: {NAME}"),
        (f"models:/{NAME}@production", r"no alias production; it has: @candidate \(version 1\), @champion"),
        (f"models:/{NAME}/7", "no version 7; it has: 1"),
        (f"models:/{NAME}", "write models:/name@alias"),
        ("no/such/folder", "no such model folder"),
    ],
)
def test_a_failed_lookup_lists_the_existing_names(kit: Any, reference: str, message: str) -> None:
    client = kit.client
    client.create_registered_model(NAME)
    client.create_model_version(NAME, "file:///nowhere")
    for alias in ("candidate", "champion"):
        client.set_registered_model_alias(NAME, alias, "1")
    with pytest.raises(UserError, match=message):
        resolve_model(reference, kit.uri)


def test_a_registry_must_be_named(kit: Any) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        resolve_model(f"models:/{NAME}@champion")
