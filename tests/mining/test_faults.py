"""What mining does with poisoned texts, a disk that is full, and a store that answers 5xx: the whole step, for real."""

import mining_kit
import pytest
import weaknesses

from nvembed.core import retry, storage
from nvembed.core.parquet import read_table
from nvembed.core.steps import MANIFEST, CorruptArtifactError, load_artifact
from nvembed.mining.config import MineConfig
from nvembed.mining.step import MINE
from nvembed.retrieval.config import EncodeConfig, PretrainedModel

CONFIG = MineConfig(
    num_negatives=3, depth=8, encode=EncodeConfig(actors=1, shard_rows=16, precision="fp32", max_rejected_share=0.2)
)
POISON = {
    "p-empty": "",
    "p-spaces": " \n\t ",
    "p-long": "overflow " * 120_000,
    "p-nan": weaknesses.NAN_TEXT,
}


def prepare(uri, poison=(), more=()):
    """The set, and the poisoned documents and examples that are wanted."""
    documents = weaknesses.documents() + [weaknesses.document(key, POISON[key]) for key in poison]
    examples = sorted([*weaknesses.examples(), *more], key=lambda example: example.id)
    return weaknesses.prepare(uri, documents, examples)


def poisoned_model(folder):
    return PretrainedModel(name=weaknesses.poisoned_model(folder))


def mined(artifact):
    table = read_table(artifact.path("set", "mined.parquet"))
    return {row["example_id"]: row for row in table.to_pylist()}


def files(out):
    return dict(load_artifact(str(out)).manifest["files"])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_poisoned_documents_are_left_out_and_counted(tmp_path, ray_session, precision):
    """Also one whose vector is not finite: its neighbours in the same chunk, packed or padded, keep theirs."""
    encode = CONFIG.encode.model_copy(update={"precision": precision})
    config = CONFIG.model_copy(update={"retriever": poisoned_model(tmp_path / "model"), "encode": encode})
    artifact = MINE.run(config, {"prepare": prepare(tmp_path / "prepare", POISON)}, str(tmp_path / "mine"))
    clean = MINE.run(config, {"prepare": prepare(tmp_path / "clean")}, str(tmp_path / "mine_clean"))
    rejected = artifact.manifest["metrics"]["encode_rejected"]
    assert sum(rejected.values()) == len(POISON), rejected
    rows, expected = mined(artifact), mined(clean)
    assert not {item["id"] for row in rows.values() for item in row["negatives"]} & POISON.keys()
    for key, row in expected.items():
        assert [item["id"] for item in rows[key]["negatives"]] == [item["id"] for item in row["negatives"]]


@pytest.mark.slow
@pytest.mark.ray
def test_a_query_without_a_vector_is_left_out_and_counted(tmp_path, ray_session):
    """And an example whose only positive has none; on several actors, as `test_rejected.py` does in one process."""
    config = CONFIG.model_copy(
        update={
            "retriever": poisoned_model(tmp_path / "model"),
            "encode": CONFIG.encode.model_copy(update={"actors": 2}),
        }
    )
    clean = MINE.run(config, {"prepare": prepare(tmp_path / "clean")}, str(tmp_path / "mine_clean"))
    query = weaknesses.example("e00-poisoned", POISON["p-nan"], "d00")
    positive = weaknesses.example("e20-positive", "about a zoo", "p-nan")
    prepared = prepare(tmp_path / "prepare", ["p-nan"], [query, positive])
    artifact = MINE.run(config, {"prepare": prepared}, str(tmp_path / "mine"))
    assert mined(artifact) == mined(clean)
    audit = storage.read_json(artifact.path("audit.json"))["datasets"]["set"]
    assert audit["dropped"] == {"positives_rejected": 1, "query_rejected": 1}


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("size", ["48k", "112k", "200k", "260k"])
def test_a_full_disk_stops_mining_and_room_lets_it_finish(tmp_path, ray_session, small_disk, size):
    """A real one, at several moments: the texts, the vectors, the search, the result."""
    small_disk.resize(size)
    prepared, out = prepare(tmp_path / "prepare"), small_disk.place / "mine"
    with pytest.raises(Exception) as raised:
        MINE.run(CONFIG, {"prepare": prepared}, str(out))
    assert "No space left on device" in str(raised.value) and f"{out}/" in str(raised.value)
    assert not (out / MANIFEST).exists()
    small_disk.resize("64m")
    MINE.run(CONFIG, {"prepare": prepared}, str(out))
    MINE.run(CONFIG, {"prepare": prepared}, str(tmp_path / "clean"))
    assert files(out) == files(tmp_path / "clean")


# -- a store that answers 5xx -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_store_that_answers_5xx_changes_nothing(store, caplog):
    """Every seventh request of each kind is refused."""
    prepared = mining_kit.prepare("s3://bucket")
    mining_kit.MINE.run(mining_kit.CONFIG, {"prepare": prepared}, "s3://bucket/clean")
    requests = {}

    def refuse(method, path):
        requests[method] = requests.get(method, 0) + 1
        return requests[method] % 7 == 0

    store.refuse = refuse
    with caplog.at_level("WARNING", "nvembed.core.retry"):
        mining_kit.MINE.run(mining_kit.CONFIG, {"prepare": prepared}, "s3://bucket/mine")
    store.refuse = lambda method, path: False
    assert store.refused["PUT"] > 3 and store.refused["GET"] > 3 and "trying again" in caplog.text
    assert files("s3://bucket/mine") == files("s3://bucket/clean")


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [2, 9, 14, 20])
def test_a_store_that_stays_away_stops_mining_with_nothing_published(store, allowed):
    """Writing ends after some objects: at the texts, the vectors, the search, the selection."""
    prepared = mining_kit.prepare("s3://bucket")
    written = []

    def refuse(method, path):
        if method in ("PUT", "POST") and "/mine/" in path:
            written.append(path)
            return len(written) > allowed
        return False

    store.refuse = refuse
    with pytest.raises(OSError, match="try later"):
        mining_kit.MINE.run(mining_kit.CONFIG, {"prepare": prepared}, "s3://bucket/mine")
    assert store.refused.total() >= retry.ATTEMPTS
    store.refuse = lambda method, path: False
    assert not storage.exists("s3://bucket/mine/manifest.json")
    with pytest.raises(CorruptArtifactError, match="not a published artifact"):
        load_artifact("s3://bucket/mine")
    mining_kit.MINE.run(mining_kit.CONFIG, {"prepare": prepared}, "s3://bucket/mine")
    mining_kit.MINE.run(mining_kit.CONFIG, {"prepare": prepared}, "s3://bucket/clean")
    assert files("s3://bucket/mine") == files("s3://bucket/clean")
