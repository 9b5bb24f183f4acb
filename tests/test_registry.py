"""The registry against a real MLflow store on SQLite: one version per content, honest promotion, aliases resolved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nvembed import registry, storage
from nvembed.mlflow_store import resolve_store
from nvembed.registry import (
    REGISTER,
    RegisterConfig,
    RegistrationConfig,
    mean_primary_score,
    open_registry,
    register_model,
    registration_config,
    resolve_model,
)
from nvembed.storage import CorruptArtifactError, UserError
from nvembed.types import Artifact, Config

NAME = "nvembed-teacher"
HASHES = {"cwe": "aa", "hpo": "bb"}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_registry(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def out(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return str(tmp_path)


def config(out: str, **changes: Any) -> RegistrationConfig:
    store = resolve_store(None, out)
    made = registration_config(RegisterConfig(auto_promote=True), NAME, "tiny", "nvembed", store, None)
    return made.model_copy(update=changes)


def model_folder(out: str, content: str) -> str:
    folder = Path(out, f"model-{content}")
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content.encode() * 1000)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return str(folder)


def scores(value: float, hashes: dict[str, str] | None = None) -> dict[str, Any]:
    def metrics(primary: float) -> dict[str, Any]:
        return {name: {"value": v, "low": v, "high": v} for name, v in (("mrr_at_10", 0.9), ("ndcg_at_10", primary))}

    systems = {"model": {"cwe": metrics(value), "hpo": metrics(value + 0.1)}, "model@32": {"cwe": metrics(0.99)}}
    return {"evaluation_hash": hashes or HASHES, "scores": systems}


def register(
    out: str, content: str, value: float, hashes: dict[str, str] | None = None, **changes: Any
) -> dict[str, Any]:
    return register_model(
        config(out, **changes), model_folder(out, content), scores(value, hashes), {"manifest_hash": "m"}
    )


def versions(out: str) -> list[Any]:
    return list(open_registry(f"sqlite:///{out}/mlflow.db").search_model_versions(f"name = '{NAME}'"))


def aliases(out: str) -> dict[str, str]:
    found = open_registry(f"sqlite:///{out}/mlflow.db").get_registered_model(NAME).aliases
    return {key: str(value) for key, value in found.items()}


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# -- versions -------------------------------------------------------------------------------------------------------


def test_a_version_has_the_files_the_scores_and_the_run(out: str) -> None:
    done = register(out, "a", 0.5)
    assert (done["name"], done["version"], done["registry_uri"]) == (NAME, "1", f"models:/{NAME}/1")
    assert done["aliases"] == ["candidate", "champion"]
    (version,) = versions(out)
    assert json.loads(version.tags["nvembed.scores"])["model"]["cwe"]["ndcg_at_10"]["value"] == 0.5
    assert json.loads(version.tags["nvembed.evaluation_hash"]) == HASHES
    assert version.tags["nvembed.manifest_hash"] == "m"
    assert version.tags["nvembed.recipe"] == "tiny"
    assert version.run_id == done["run_id"]
    assert files(storage.local_path(version.source)) == files(model_folder(out, "a"))


def test_the_same_content_is_the_same_version(out: str) -> None:
    first, second = register(out, "a", 0.5), register(out, "a", 0.5)
    assert first == {**second, "reason": first["reason"]}
    assert len(versions(out)) == 1
    assert register(out, "b", 0.4)["version"] == "2"


def test_scores_of_a_version_follow_its_last_evaluation(out: str) -> None:
    register(out, "a", 0.5)
    register(out, "a", 0.7, {"cwe": "other", "hpo": "bb"})
    (version,) = versions(out)
    assert float(version.tags["nvembed.score"]) == pytest.approx(0.75)
    assert json.loads(version.tags["nvembed.evaluation_hash"])["cwe"] == "other"


@pytest.mark.parametrize(
    "call",
    ["create_run", "log_artifacts", "create_registered_model", "create_model_version", "set_registered_model_alias"],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_registration_is_mended(out: str, monkeypatch: pytest.MonkeyPatch, call: str, after: bool) -> None:
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

    with monkeypatch.context() as patched:
        patched.setattr(registry, "open_registry", lambda uri: Dying(open_registry(uri)))
        with pytest.raises(Killed):
            register(out, "a", 0.5)
    done = register(out, "a", 0.5)
    assert done["version"] == "1"
    assert len(versions(out)) == 1
    assert aliases(out) == {"candidate": "1", "champion": "1"}
    client = open_registry(f"sqlite:///{out}/mlflow.db")
    assert len(client.search_runs([client.get_experiment_by_name("nvembed").experiment_id])) == 1


# -- promotion ------------------------------------------------------------------------------------------------------


def test_champion_moves_only_to_a_better_score_on_the_same_sets(out: str) -> None:
    assert register(out, "a", 0.5)["reason"] == "there was no champion"
    worse = register(out, "b", 0.4)
    assert not worse["promoted"] and "not better" in worse["reason"]
    equal = register(out, "c", 0.5)
    assert not equal["promoted"]
    elsewhere = register(out, "d", 0.9, {"cwe": "aa", "hpo": "changed"})
    assert not elsewhere["promoted"] and "hashes differ" in elsewhere["reason"]
    assert aliases(out) == {"candidate": "4", "champion": "1"}
    better = register(out, "e", 0.6)
    assert better["promoted"] and "0.6500 against 0.5500 of champion 1" in better["reason"]
    assert aliases(out) == {"candidate": "5", "champion": "5"}


def test_without_auto_promote_champion_stays(out: str) -> None:
    first = register(out, "a", 0.5, auto_promote=False)
    assert not first["promoted"]
    assert aliases(out) == {"candidate": "1"}


def test_mean_primary_score() -> None:
    assert mean_primary_score(scores(0.5)) == pytest.approx(0.55)
    classes = {"v_measure": {"value": 0.1}, "accuracy": {"value": 0.6}}
    assert mean_primary_score({"scores": {"model": {"a": classes, "b": {"other": {"value": 0.2}}}}}) == pytest.approx(
        0.4
    )


# -- the step -------------------------------------------------------------------------------------------------------


def published(out: str, name: str, **contents: str) -> Artifact:
    def build(_: Config, inputs: Any, uri: str) -> storage.StepResult:
        for path, text in contents.items():
            storage.write_bytes(storage.join(uri, path.replace("__", "/").replace("_json", ".json")), text.encode())
        return storage.StepResult()

    return storage.Step(name, 1, build).run(Config(), {}, storage.join(out, name))


def test_step_registers_once_and_is_skipped(out: str) -> None:
    inputs = {
        "model": published(out, "train", model__weights="abc"),
        "scores": published(out, "evaluate", scores_json=json.dumps(scores(0.5))),
    }
    made = REGISTER.run(config(out), inputs, storage.join(out, "register_teacher"))
    registration = storage.read_json(made.path("registration.json"))
    assert registration["registry_uri"] == f"models:/{NAME}/1"
    again = REGISTER.run(config(out, run_id="another"), inputs, storage.join(out, "register_teacher"))
    assert again.manifest_hash == made.manifest_hash
    (version,) = versions(out)
    assert version.tags["nvembed.manifest_hash"] == inputs["model"].manifest_hash
    assert version.tags["nvembed.evaluation_manifest_hash"] == inputs["scores"].manifest_hash


def test_a_run_given_by_tracking_is_used(out: str) -> None:
    client = open_registry(f"sqlite:///{out}/mlflow.db")
    run = client.create_run(client.create_experiment("nvembed", Path(out, "mlartifacts").as_uri()))
    assert register(out, "a", 0.5, run_id=run.info.run_id)["run_id"] == run.info.run_id


def test_dead_registry_is_a_clear_error(out: str) -> None:
    with pytest.raises(UserError, match=r"does not answer.*run again"):
        register(out, "a", 0.5, tracking_uri="http://127.0.0.1:9")


# -- back to a folder -----------------------------------------------------------------------------------------------


def test_resolve_alias_version_and_folder(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register(out, "a", 0.5)
    register(out, "b", 0.4)
    uri = f"sqlite:///{out}/mlflow.db"
    assert files(resolve_model(f"models:/{NAME}@champion", uri)) == files(model_folder(out, "a"))
    assert files(resolve_model(f"models:/{NAME}@candidate", uri)) == files(model_folder(out, "b"))
    assert files(resolve_model(f"models:/{NAME}/2", uri)) == files(model_folder(out, "b"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert files(resolve_model(f"models:/{NAME}/1")) == files(model_folder(out, "a"))
    assert resolve_model("model-a") == model_folder(out, "a")


def test_files_that_are_elsewhere_are_downloaded_once(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a source that does not count as local, as on a server, the download lands in the cache, checked."""
    register(out, "a", 0.5)
    cache = Path(out, "cache")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "is_local", lambda uri: not uri.startswith("file:"))
        first = resolve_model(f"models:/{NAME}/1", f"sqlite:///{out}/mlflow.db", cache)
        assert Path(first).parent == cache
        assert files(first) == files(model_folder(out, "a"))
        assert [path.name for path in cache.iterdir()] == [Path(first).name]
        shutil.rmtree(Path(out, "mlartifacts"))
        assert resolve_model(f"models:/{NAME}@candidate", f"sqlite:///{out}/mlflow.db", cache) == first


def test_damaged_files_are_refused(out: str) -> None:
    register(out, "a", 0.5)
    (version,) = versions(out)
    Path(storage.local_path(version.source), "model.safetensors").write_bytes(b"other")
    with pytest.raises(CorruptArtifactError, match="not those that were registered"):
        resolve_model(f"models:/{NAME}/1", f"sqlite:///{out}/mlflow.db")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("models:/nobody@champion", f"no model nobody; it has: {NAME}"),
        (f"models:/{NAME}@production", r"no alias production; it has: @candidate \(version 1\), @champion"),
        (f"models:/{NAME}/7", "no version 7; it has: 1"),
        (f"models:/{NAME}", "write models:/name@alias"),
        ("no/such/folder", "no such model folder"),
    ],
)
def test_what_cannot_be_resolved_says_what_exists(out: str, reference: str, said: str) -> None:
    register(out, "a", 0.5)
    with pytest.raises(UserError, match=said):
        resolve_model(reference, f"sqlite:///{out}/mlflow.db")


def test_a_registry_must_be_named(out: str) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        resolve_model(f"models:/{NAME}@champion")
