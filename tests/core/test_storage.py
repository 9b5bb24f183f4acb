"""Publication of steps, checksums, atomic writes, and what is refused."""

import json
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core import storage
from nvembed.core.formats import FormatError
from nvembed.core.steps import ChangedRecipeError, CorruptArtifactError, Step, StepResult, differences, load_artifact
from nvembed.types import Artifact, Config, UserError


class Settings(Config):
    """Config of the step under test."""

    value: int = 1


class Counter:
    """A step that writes two files and counts how often it was built."""

    def __init__(self, *, logic_version: int = 1, cleared: bool = True, fail: bool = False) -> None:
        self.builds = 0
        self.result: list[str] = []
        self.fail = fail
        self.step = Step("count", logic_version, self.build, cleared)

    def build(self, config: Any, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
        self.builds += 1
        self.result = storage.list_directory(work_uri)
        storage.write_bytes(storage.join(work_uri, "deep", "values.bin"), bytes([config.value] * 1000))
        if self.fail:
            raise RuntimeError("killed here")
        storage.write_json(storage.join(work_uri, "notes.json"), {"value": config.value})
        storage.write_bytes(storage.join(work_uri, "checkpoints", "last"), b"working file")
        return StepResult(rows={"values": 1000}, metrics={"mean": config.value})


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for an output: on disk, and on a store without rename."""
    return str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_a_step_is_published_then_skipped(root: str) -> None:
    counter, uri = Counter(), storage.join(root, "count")
    first = counter.step.run(Settings(), {}, uri, fence=7)
    again = counter.step.run(Settings(), {}, uri)
    assert counter.builds == 1
    assert again.manifest == json.loads(storage.read_bytes(storage.join(uri, "manifest.json")))
    assert first.manifest["rows"] == {"values": 1000} and first.manifest["fence"] == 7
    assert set(first.manifest["files"]) == {"deep/values.bin", "notes.json"}
    assert first.manifest["files"]["deep/values.bin"]["size"] == 1000
    assert storage.list_directory(uri) == ["deep", "manifest.json", "notes.json"], "working files are gone"
    assert load_artifact(uri).manifest_hash == first.manifest_hash


def test_equal_results_have_equal_hashes_wherever_they_lie(tmp_path: Path) -> None:
    artifacts = [
        Counter().step.run(Settings(), {}, uri) for uri in (str(tmp_path / "a"), f"memory://{uuid.uuid4().hex}/b")
    ]
    assert artifacts[0].manifest_hash == artifacts[1].manifest_hash


@pytest.mark.parametrize("change", ["config", "version", "input"])
def test_another_identity_is_refused_with_the_difference(tmp_path: Path, change: str) -> None:
    uri = str(tmp_path / "count")
    source = Counter().step.run(Settings(), {}, str(tmp_path / "source"))
    other = Counter().step.run(Settings(value=9), {}, str(tmp_path / "other"))
    Counter().step.run(Settings(), {"in": source}, uri)
    step = Counter(logic_version=2 if change == "version" else 1).step
    config = Settings(value=2 if change == "config" else 1)
    with pytest.raises(ChangedRecipeError) as refused:
        step.run(config, {"in": other if change == "input" else source}, uri)
    messages = {
        "config": "config.value: 1 -> 2",
        "version": "logic_version: 1 -> 2",
        "input": f'inputs.in: "{source.manifest_hash}" -> "{other.manifest_hash}"',
    }
    assert messages[change] in str(refused.value)
    assert load_artifact(uri).manifest["config"] == {"value": 1}, "nothing was touched"


def test_a_changed_recipe_is_refused_before_anything_was_published(tmp_path: Path) -> None:
    failing, uri = Counter(fail=True, cleared=False), str(tmp_path / "count")
    with pytest.raises(RuntimeError, match="killed here"):
        failing.step.run(Settings(), {}, uri)
    with pytest.raises(ChangedRecipeError, match=r"config\.value: 1 -> 2"):
        failing.step.run(Settings(value=2), {}, uri)


def test_what_a_killed_run_left_is_no_result(root: str) -> None:
    uri = storage.join(root, "count")
    failing = Counter(fail=True)
    with pytest.raises(RuntimeError, match="killed here"):
        failing.step.run(Settings(), {}, uri)
    assert storage.exists(storage.join(uri, "deep", "values.bin"))
    with pytest.raises(CorruptArtifactError, match="not a published artifact"):
        load_artifact(uri)
    assert failing.step.find(Settings(), {}, uri) is None


@pytest.mark.parametrize("cleared", [True, False])
def test_a_build_finds_the_files_of_a_killed_one_only_where_it_resumes(root: str, cleared: bool) -> None:
    counter, uri = Counter(cleared=cleared, fail=True), storage.join(root, "count")
    with pytest.raises(RuntimeError):
        counter.step.run(Settings(), {}, uri)
    counter.fail = False
    counter.step.run(Settings(), {}, uri)
    assert counter.builds == 2
    assert ("deep" in counter.result) is not cleared


def test_a_foreign_directory_is_never_touched(tmp_path: Path) -> None:
    uri = tmp_path / "count"
    uri.mkdir()
    (uri / "thesis.tex").write_text("years of work")
    counter = Counter()
    with pytest.raises(UserError, match=r"holds files this run did not make \(thesis\.tex\)"):
        counter.step.run(Settings(), {}, str(uri))
    assert counter.builds == 0 and (uri / "thesis.tex").read_text() == "years of work"


def test_a_resumable_step_too_refuses_a_foreign_directory(tmp_path: Path) -> None:
    uri = tmp_path / "count"
    uri.mkdir()
    (uri / "notes.json").write_text("mine")
    with pytest.raises(UserError, match="did not make"):
        Counter(cleared=False).step.run(Settings(), {}, str(uri))
    assert (uri / "notes.json").read_text() == "mine"


@pytest.mark.parametrize(
    "damage", ["truncated", "changed", "missing", "manifest cut", "manifest empty", "manifest newer"]
)
def test_a_damaged_artifact_is_refused_by_name(root: str, damage: str) -> None:
    counter, uri = Counter(), storage.join(root, "count")
    counter.step.run(Settings(), {}, uri)
    file, manifest = storage.join(uri, "deep", "values.bin"), storage.join(uri, "manifest.json")
    text = storage.read_bytes(manifest)
    writes = {
        "truncated": (file, bytes([1] * 999)),
        "changed": (file, bytes([1] * 999 + [2])),
        "manifest cut": (manifest, text[: len(text) // 2]),
        "manifest empty": (manifest, b""),
        "manifest newer": (manifest, text.replace(b'"format_version": 1', b'"format_version": 99')),
    }
    if damage == "missing":
        storage.remove(file)
    else:
        storage.write_bytes(*writes[damage])
    kind = FormatError if damage == "manifest newer" else CorruptArtifactError
    with pytest.raises(kind, match="manifest" if damage.startswith("manifest") else r"values\.bin"):
        counter.step.run(Settings(), {}, uri)
    assert counter.builds == 1


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    uri = tmp_path / "count"
    Counter().step.run(Settings(), {}, str(uri))
    (uri / "notes.json").unlink()
    (uri / "deep" / "values.bin").write_bytes(b"")
    with pytest.raises(CorruptArtifactError, match=r"values\.bin: 0 bytes, expected 1000; notes\.json: missing"):
        load_artifact(str(uri))


def test_the_error_names_a_torn_start_file(tmp_path: Path) -> None:
    uri = tmp_path / "count"
    uri.mkdir()
    (uri / ".step.json").write_bytes(b"")
    with pytest.raises(CorruptArtifactError, match=r"\.step\.json cannot be read"):
        Counter().step.run(Settings(), {}, str(uri))


def test_killed_while_clearing_the_rest_is_still_known_to_be_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, uri = Counter(fail=True), str(tmp_path / "count")
    with pytest.raises(RuntimeError, match="killed here"):
        counter.step.run(Settings(), {}, uri)
    storage.write_bytes(storage.join(uri, "zz-last"), b"x")
    real, removed = storage.remove, list[str]()

    def dying(path: str) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        real(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "remove", dying)
        counter.step.run(Settings(), {}, uri)
    assert removed and ".step.json" in storage.list_directory(uri)
    counter.fail = False
    assert counter.step.run(Settings(), {}, uri).manifest["rows"] == {"values": 1000}


def test_killed_right_after_publication_the_working_files_go_later(tmp_path: Path) -> None:
    counter, uri = Counter(), str(tmp_path / "count")
    counter.step.run(Settings(), {}, uri)
    storage.write_bytes(storage.join(uri, "checkpoints", "last"), b"left over")
    counter.step.run(Settings(), {}, uri)
    assert counter.builds == 1 and not storage.exists(storage.join(uri, "checkpoints"))


def test_nothing_is_published_when_the_output_was_taken_over(root: str) -> None:
    counter, uri = Counter(), storage.join(root, "count")

    def taken() -> None:
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        counter.step.run(Settings(), {}, uri, guard=taken)
    assert counter.builds == 1 and counter.step.find(Settings(), {}, uri) is None


def test_a_write_is_never_seen_in_part(tmp_path: Path) -> None:
    path, stop, seen = tmp_path / "state.json", threading.Event(), set()
    storage.write_json(str(path), ["a"] * 20000)

    def read() -> None:
        while not stop.is_set():
            seen.add(tuple(sorted(set(storage.read_json(str(path))))))

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(40):
        storage.write_json(str(path), ["ab"[index % 2]] * 20000)
    stop.set()
    reader.join()
    assert seen <= {("a",), ("b",)} and seen


def test_a_failed_write_leaves_the_old_contents_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    storage.write_bytes(str(path), b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state.json"]


def test_remove_and_list_cope_with_what_is_not_there(root: str) -> None:
    assert storage.list_directory(storage.join(root, "nowhere")) == []
    storage.remove(storage.join(root, "nowhere"))
    storage.write_bytes(storage.join(root, "b", "x"), b"1")
    storage.write_bytes(storage.join(root, "a"), b"1")
    assert storage.list_directory(root) == ["a", "b"]


def test_local_paths(tmp_path: Path) -> None:
    assert storage.local_path(f"file://{tmp_path}/x") == tmp_path / "x"
    assert storage.absolute("a/../b/") == str(Path.cwd() / "b")
    assert storage.absolute("memory://a/b/") == "memory://a/b"
    with pytest.raises(UserError, match="needs a local path"):
        storage.local_path("memory://a")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES)
def test_a_value_does_not_differ_from_itself(value: Any) -> None:
    assert differences(value, json.loads(json.dumps(value))) == []


@given(
    st.dictionaries(st.text(max_size=3), VALUES, max_size=4), st.dictionaries(st.text(max_size=3), VALUES, max_size=4)
)
def test_differences_are_found_both_ways_and_exactly_when_there_are_any(old: dict, new: dict) -> None:
    forth, back = differences(old, new), differences(new, old)
    assert len(forth) == len(back)
    assert bool(forth) == (storage.hash_json(old) != storage.hash_json(new))


def test_differences_name_the_path_and_both_values() -> None:
    old = {"stage_1": {"train": {"seed": 17, "lr": 0.1}}, "sources": [1, 2]}
    new = {"stage_1": {"train": {"seed": 99, "lr": 0.1}}, "sources": [1, 3]}
    assert differences(old, new) == ["sources: [1, 2] -> [1, 3]", "stage_1.train.seed: 17 -> 99"]


@given(VALUES)
def test_the_hash_of_json_ignores_the_order_of_keys(value: Any) -> None:
    wrapped = {"a": value, "b": 1}
    assert storage.hash_json(wrapped) == storage.hash_json(dict(reversed(list(wrapped.items()))))
