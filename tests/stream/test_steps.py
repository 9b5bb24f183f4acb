"""Training streams of small hand-made artifacts: written, read back from any step, the same with Ray."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import PreparedSet, publish, publish_prepared
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nvembed.core import storage
from nvembed.core.formats import stamp
from nvembed.core.parquet import write_table
from nvembed.core.steps import CorruptArtifactError
from nvembed.data.tables import SCORED_IDS, Document
from nvembed.stream import steps
from nvembed.stream.config import DistillStreamConfig, StreamConfig
from nvembed.stream.layout import open_tokeniser
from nvembed.stream.steps import DISTILL_STREAM, STREAM, StreamReader
from nvembed.text.identity import document_key
from nvembed.types import Artifact, Batch, ScoredId, TaskType, TrainingExample, UserError

MAX_LENGTH = 16
MINED = pa.schema(
    [
        ("example_id", pa.string()),
        ("positives", SCORED_IDS),
        ("negatives", SCORED_IDS),
        ("known_positives", pa.list_(pa.string())),
    ]
)
TASKS = {"facts": TaskType.RETRIEVAL, "kinds": TaskType.CLASSIFICATION, "pairs": TaskType.STS}
PREFIX = "Instruct: find {}\nQuery: "
COUNT = 60


def examples(name: str) -> list[TrainingExample]:
    label = (lambda i: f"class {i % 6}") if name == "kinds" else (lambda i: None)
    positives = (lambda i: ()) if name == "kinds" else (lambda i: (ScoredId(f"d{i // 2}"),))
    negatives = (lambda i: (ScoredId("d40"), ScoredId(f"d{i // 2}"))) if name == "facts" else (lambda i: ())
    return [
        TrainingExample(f"e{i}", name, TASKS[name], f"{name} question {i}", positives(i), negatives(i), label(i))
        for i in range(COUNT)
    ]


def mined(name: str) -> list[dict[str, Any]]:
    """Pairs of examples share a document; the first retrieval example has no negatives, every sixth sts no positive."""
    rows = []
    for i in range(COUNT):
        positives = [f"d{i // 2}"] if name != "kinds" else [f"d{(i + 6 * k) % COUNT}" for k in (1, 2)]
        if name == "pairs" and i % 6 == 0:
            positives = []
        negatives = [] if i == 0 else [f"d{(i + k) % 30 + 30}" for k in range(1, 5)]
        as_scored = [[{"id": key, "score": 0.5} for key in keys] for keys in (positives, negatives)]
        known = sorted({*positives, f"d{i // 2}"})
        rows.append(
            {"example_id": f"e{i}", "positives": as_scored[0], "negatives": as_scored[1], "known_positives": known}
        )
    return rows


def documents(name: str) -> list[Document]:
    return [Document(f"d{i}", f"Title {i}" if i % 3 == 0 else "", f"{name} text " + "word " * i) for i in range(COUNT)]


def build_mine(uri: str) -> None:
    for name in TASKS:
        write_table(pa.Table.from_pylist(mined(name), MINED), storage.join(uri, name, "mined.parquet"))


def build_model(uri: str) -> None:
    folder = Path(uri, "model")
    vocabulary = ["[UNK]", "</s>", "Instruct", ":", "find", "Query", "question", "word", "text", *TASKS]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="[UNK]").save_pretrained(folder)
    text = {"max_length": MAX_LENGTH, "add_bos": False, "add_eos": True, "mask_instruction": True}
    storage.write_json(str(folder / "nvembed.json"), {**stamp(1), "embedder": {"text": text}})


def build_teacher_embeddings(uri: str) -> None:
    for part in range(3):
        keys = [f"k{part}-{i}" for i in range(20)]
        vectors = np.array([[part, i, 0.5, -1] for i in range(20)], np.float32)
        columns = {
            "key": keys,
            "text": [f"text {key}" for key in keys],
            "instruction": [PREFIX.format("x") if i % 2 else "" for i in range(20)],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4),
        }
        write_table(pa.table(columns), storage.join(uri, "vectors", f"part-{part:05d}.parquet"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("inputs")
    datasets = {
        name: PreparedSet(task, documents(name), examples(name), PREFIX.format(name)) for name, task in TASKS.items()
    }
    builders = {"mine": build_mine, "model": build_model, "teacher_embeddings": build_teacher_embeddings}
    published = {name: publish(root / name, name, build) for name, build in builders.items()}
    return {"prepare": publish_prepared(root / "prepare", datasets), **published}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "ROWS_PER_SHARD", 24)


def config(**changes: Any) -> StreamConfig:
    values = {"weights": {"facts": 2, "kinds": 1, "pairs": 1}, "steps": 13, "global_batch_size": 8, "num_negatives": 2}
    return StreamConfig(**{**values, "batching": "blended", "seed": 5, **changes})


def lay_out(inputs: dict[str, Artifact], uri: Path, **changes: Any) -> Artifact:
    wanted = {name: inputs[name] for name in ("prepare", "mine", "model")}
    return STREAM.run(config(**changes), wanted, str(uri))


def digest(batch: Batch) -> str:
    """Everything a batch holds, as one hash."""
    vectors = [] if batch.teacher_vectors is None else batch.teacher_vectors.tolist()
    parts = [batch.step, list(batch.example_ids), list(batch.texts), list(batch.instructions), vectors]
    arrays = [batch.token_lengths, batch.present, batch.document_ids, *batch.positive_ids]
    return hashlib.sha256(json.dumps([parts, [array.tolist() for array in arrays]]).encode()).hexdigest()


def rows_of(artifact: Artifact) -> list[dict[str, Any]]:
    names = storage.list_directory(artifact.path("shards"))
    return [row for name in names for row in pq.read_table(artifact.path("shards", name)).to_pylist()]


def test_rows_say_what_the_inputs_say(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = lay_out(inputs, tmp_path / "stream")
    assert len(storage.list_directory(artifact.path("shards"))) == 5  # 3 steps a shard
    assert set(artifact.manifest["files"]) == {f"shards/part-{shard:05d}.parquet" for shard in range(5)}
    rows = rows_of(artifact)
    assert [(row["step"], row["slot"]) for row in rows] == [(step, slot) for step in range(13) for slot in range(8)]
    given = {(name, row.id): row for name in TASKS for row in examples(name)}
    result = {(name, row["example_id"]): row for name in TASKS for row in mined(name)}
    short = 0
    for row in rows:
        key = (row["dataset"], row["example_id"])
        task = TASKS[row["dataset"]]
        assert (row["task"], row["symmetric"]) == (task.value, task is not TaskType.RETRIEVAL)
        assert row["instruction"] == PREFIX.format(row["dataset"])
        assert row["texts"][0] == given[key].query
        positives = {document_key(row["dataset"], item["id"]) for item in result[key]["positives"]}
        known = {document_key(row["dataset"], item) for item in result[key]["known_positives"]}
        offered = {item["id"] for item in result[key]["negatives"]} | {item.id for item in given[key].negatives}
        negatives = {document_key(row["dataset"], item) for item in offered} - known
        query_id, positive, *chosen = row["document_ids"]
        assert query_id == 0 and positive in positives
        assert set(row["positive_ids"]) == known | {positive}
        real = [item for item in chosen if item]
        assert set(real) <= negatives and len(set(real)) == len(real) == min(2, len(negatives))
        assert [text is None for text in row["texts"]] == [False, False, *(item == 0 for item in chosen)]
        assert [length == 0 for length in row["token_lengths"]] == [text is None for text in row["texts"]]
        short += len(chosen) - len(real)
    assert short > 0  # the first examples have fewer negatives than asked for
    assert {row["dataset"] for row in rows} == set(TASKS)


def test_titles_are_joined_and_tokens_counted(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = lay_out(inputs, tmp_path / "stream")
    titled = 0
    for row in rows_of(artifact):
        for place, (text, length) in enumerate(zip(row["texts"], row["token_lengths"], strict=True)):
            if text is None:
                continue
            prefix = row["instruction"] if place == 0 or row["symmetric"] else ""
            words = (prefix + text).replace(":", " : ").split()
            assert length == min(len(words) + 1, MAX_LENGTH)
            titled += text.startswith("Title ")
    assert titled > 0


def test_sts_pairs_without_a_positive_are_not_used(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = lay_out(inputs, tmp_path / "stream", weights={"pairs": 1}, steps=20)
    used = {row["example_id"] for row in rows_of(artifact)}
    assert used == {f"e{i}" for i in range(COUNT) if i % 6}
    result = artifact.manifest["metrics"]["datasets"]["pairs"]
    assert {key: result[key] for key in ("usable", "rows", "epochs")} == {"usable": 50, "rows": 160, "epochs": 3.2}
    assert result["asked"] == result["realised"] == 1


def test_caps_and_sizes_decide_the_shares(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """Usable: facts 60, capped to 15; pairs 50. With exponent 0.5 facts get sqrt(15) : sqrt(50)."""
    options: dict[str, Any] = {"weights": {"facts": 2, "pairs": 1}, "caps": {"facts": 15}, "steps": 40}
    artifact = lay_out(inputs, tmp_path / "stream", size_exponent=0.5, **options)
    result = artifact.manifest["metrics"]["datasets"]
    wanted = 2 * 15**0.5 / (2 * 15**0.5 + 50**0.5)
    assert result["facts"]["usable"] == 15 and result["pairs"]["usable"] == 50
    assert result["facts"]["asked"] == pytest.approx(wanted)
    assert result["facts"]["realised"] == pytest.approx(wanted, abs=1 / 320)
    rows = rows_of(artifact)
    assert len({row["example_id"] for row in rows if row["dataset"] == "facts"}) == 15
    assert sum(row["dataset"] == "facts" for row in rows) == result["facts"]["rows"]
    plain = lay_out(inputs, tmp_path / "plain", **options)
    assert plain.manifest["metrics"]["datasets"]["facts"]["asked"] == pytest.approx(2 / 3)


def test_the_truncated_share_is_that_of_the_stream(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = lay_out(inputs, tmp_path / "stream", weights={"facts": 1}, steps=6)
    uncut = cut = 0
    for row in rows_of(artifact):
        for text in row["texts"][1:]:
            if text is not None:
                uncut += 1
                cut += len(text.replace(":", " : ").split()) + 1 > MAX_LENGTH
    result = artifact.manifest["metrics"]["datasets"]["facts"]
    assert result["documents_truncated"] == pytest.approx(cut / uncut, abs=1e-6) and cut > 0
    assert result["queries_truncated"] == 0


def test_caps_are_checked(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"caps.kinds: no data set of the weights, which are facts"):
        lay_out(inputs, tmp_path / "stream", weights={"facts": 1}, caps={"kinds": 3})
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        lay_out(inputs, tmp_path / "stream", weights={"facts": 1}, caps={"facts": 0})


@pytest.mark.parametrize("batching", ["homogeneous", "blended"])
def test_a_longer_stream_begins_with_the_same_rows(inputs: dict[str, Artifact], tmp_path: Path, batching: str) -> None:
    long = rows_of(lay_out(inputs, tmp_path / "long", batching=batching))
    short = rows_of(lay_out(inputs, tmp_path / "short", batching=batching, steps=4))
    assert short == long[: len(short)] and len(short) == 32
    other = rows_of(lay_out(inputs, tmp_path / "other", batching=batching, steps=4, seed=6))
    assert [row["example_id"] for row in other] != [row["example_id"] for row in short]
    datasets = [{row["dataset"] for row in long[start : start + 8]} for start in range(0, len(long), 8)]
    assert all(len(result) == 1 for result in datasets) == (batching == "homogeneous")


def test_the_same_recipe_gives_the_same_bytes_whatever_the_shards(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lay_out(inputs, tmp_path / "a")
    assert lay_out(inputs, tmp_path / "b").manifest["files"] == first.manifest["files"]
    monkeypatch.setattr(steps, "ROWS_PER_SHARD", 4096)
    whole = lay_out(inputs, tmp_path / "c")
    assert len(whole.manifest["files"]) == 1
    assert rows_of(whole) == rows_of(first)


def test_a_positive_of_a_homogeneous_batch_comes_once(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = lay_out(inputs, tmp_path / "stream", weights={"facts": 1}, batching="homogeneous", steps=7)
    reader = StreamReader(artifact.uri)
    for batch in reader.batches():
        assert len(set(batch.document_ids[:, 1].tolist())) == 8


def test_negatives_vary_with_the_epoch(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    rows = rows_of(lay_out(inputs, tmp_path / "stream", weights={"facts": 1}, steps=15))
    seen: dict[str, list[list[int]]] = {}
    for row in rows:
        seen.setdefault(row["example_id"], []).append(row["document_ids"][2:])
    assert all(len(draws) == 2 for draws in seen.values())
    assert sum(first != second for first, second in seen.values()) > COUNT / 2


def test_reading_from_the_middle_equals_reading_from_the_start(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    reader = StreamReader(lay_out(inputs, tmp_path / "stream").uri)
    assert (len(reader), reader.num_steps, reader.batch_size, reader.group_size) == (13, 13, 8, 4)
    assert reader.teacher_dim is None
    whole = [digest(batch) for batch in reader.batches()]
    assert len(set(whole)) == 13
    for start in (0, 1, 5, 12, 13):
        assert [digest(batch) for batch in reader.batches(start)] == whole[start:]
    assert [digest(reader.batch(step)) for step in (12, 0, 7)] == [whole[12], whole[0], whole[7]]
    with pytest.raises(IndexError):
        reader.batch(13)


def test_batches_have_the_shapes_of_the_contract(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    reader = StreamReader(lay_out(inputs, tmp_path / "stream").uri)
    absent = 0
    for step, batch in enumerate(reader.batches()):
        assert (batch.step, batch.batch_size, batch.group_size) == (step, 8, 4)
        assert len(batch.texts) == len(batch.instructions) == len(batch.token_lengths) == 32
        assert batch.token_lengths.dtype == np.int32 and batch.document_ids.dtype == np.int64
        assert batch.present[:, :2].all() and not batch.document_ids[:, 0].any()
        flat = batch.present.ravel()
        assert ((batch.token_lengths == 0) == ~flat).all()
        assert all((batch.texts[t] == "") == (not flat[t]) for t in range(32))
        assert all(batch.instructions[t] == "" for t in range(32) if not flat[t])
        for row, name in enumerate(text.split()[0] for text in batch.texts[::4]):
            prefixes = batch.instructions[4 * row : 4 * row + 2]
            bare = "" if TASKS[name] is TaskType.RETRIEVAL else PREFIX.format(name)
            assert list(prefixes) == [PREFIX.format(name), bare]
            assert batch.document_ids[row, 1] in batch.positive_ids[row]
        absent += int((~flat).sum())
    assert absent > 0


def test_a_reader_can_be_left_early(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    import threading

    reader = StreamReader(lay_out(inputs, tmp_path / "stream").uri)
    batches = reader.batches(2)
    assert next(batches).step == 2
    batches.close()
    assert not any(thread.name == "stream-prefetch" for thread in threading.enumerate())


def test_streams_on_another_filesystem(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    wanted = {name: inputs[name] for name in ("prepare", "mine", "model")}
    local = lay_out(inputs, tmp_path / "stream")
    remote = STREAM.run(config(), wanted, "memory://bucket/stream")
    assert remote.manifest["files"] == local.manifest["files"]
    batches = zip(StreamReader(remote.uri).batches(4), StreamReader(local.uri).batches(4), strict=True)
    assert all(digest(a) == digest(b) for a, b in batches)


def test_the_tokenizer_of_a_remote_model_folder(inputs: dict[str, Artifact]) -> None:
    folder = inputs["model"].path("model")
    for name in storage.list_directory(folder):
        data = storage.read_bytes(storage.join(folder, name))
        storage.write_bytes(f"memory://models/tiny/{name}", data)
    texts, prefixes = ["question word", "text"], [PREFIX.format("facts"), ""]
    local, remote = (open_tokeniser(uri) for uri in (folder, "memory://models/tiny"))
    assert remote.lengths(texts, prefixes).tolist() == local.lengths(texts, prefixes).tolist() == [9, 2]
    with pytest.raises(UserError, match=r"^memory://models is not an nvembed model folder \(no nvembed\.json\)"):
        open_tokeniser("memory://models")


# -- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_streams_are_refused(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = lay_out(inputs, tmp_path / "stream")
    shard = Path(artifact.path("shards", "part-00001.parquet"))
    data = shard.read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    shard.write_bytes(changed)
    reader = StreamReader(artifact.uri)
    assert reader.batch(0).step == 0  # another shard
    with pytest.raises(CorruptArtifactError, match=r"part-00001\.parquet: checksum differs"):
        reader.batch(3)
    with pytest.raises(CorruptArtifactError, match="checksum differs"):
        list(reader.batches(1))
    shard.write_bytes(data[:-10])
    with pytest.raises(CorruptArtifactError, match=f"{len(data) - 10} bytes, expected {len(data)}"):
        StreamReader(artifact.uri)
    shard.unlink()
    with pytest.raises(CorruptArtifactError, match=r"part-00001\.parquet: missing"):
        StreamReader(artifact.uri)


def test_what_is_no_stream_is_refused(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training stream but the result of a 'mine' step"):
        StreamReader(inputs["mine"].uri)
    with pytest.raises(CorruptArtifactError, match=r"no manifest.json"):
        StreamReader(str(tmp_path))


# -- bad weights ------------------------------------------------------------------------------------------------------


def test_unknown_data_sets_and_weights_are_named_together(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        lay_out(inputs, tmp_path / "stream", weights={"fact": 1, "kinds": 0})
    message = str(raised.value)
    assert "weights.fact: no such data set, there are facts, kinds, pairs. Did you mean 'facts'?" in message
    assert "weights.kinds: 0.0 is not a positive number" in message
    with pytest.raises(ValidationError, match="finite number"):
        lay_out(inputs, tmp_path / "stream", weights={"pairs": float("nan")})


def test_too_few_examples(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data set pairs: 50 usable .* takes 55.*Lower global_batch_size"):
        lay_out(inputs, tmp_path / "stream", weights={"pairs": 1}, global_batch_size=55, batching="homogeneous")


def test_a_data_set_that_was_not_mined(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    def build(uri: str) -> None:
        write_table(pa.Table.from_pylist(mined("facts"), MINED), storage.join(uri, "facts", "mined.parquet"))

    partly = publish(tmp_path / "mine", "mine", build)
    with pytest.raises(UserError, match="data set kinds was not mined"):
        lay_out({**inputs, "mine": partly}, tmp_path / "stream")


# -- distillation -----------------------------------------------------------------------------------------------------


def test_a_distillation_stream(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    wanted = {name: inputs[name] for name in ("teacher_embeddings", "model")}
    options = DistillStreamConfig(steps=15, global_batch_size=8, seed=1)
    reader = StreamReader(DISTILL_STREAM.run(options, wanted, str(tmp_path / "stream")).uri)
    assert (reader.num_steps, reader.group_size, reader.teacher_dim) == (15, 1, 4)
    seen: list[str] = []
    for batch in reader.batches():
        assert batch.teacher_vectors is not None and batch.teacher_vectors.dtype == np.float32
        assert batch.present.shape == batch.document_ids.shape == (8, 1)
        assert len(set(batch.example_ids)) == 8
        for row, key in enumerate(batch.example_ids):
            part, number = key.removeprefix("k").split("-")
            assert batch.teacher_vectors[row].tolist() == [float(part), float(number), 0.5, -1]
            assert batch.texts[row] == f"text {key}"
            assert batch.instructions[row] == (PREFIX.format("x") if int(number) % 2 else "")
            assert batch.token_lengths[row] == (11 if int(number) % 2 else 5)
        seen += batch.example_ids
    assert sorted(seen[:60]) == sorted(seen[60:]) and len(set(seen)) == 60  # two epochs of 60
    short = DISTILL_STREAM.run(
        DistillStreamConfig(steps=4, global_batch_size=8, seed=1), wanted, str(tmp_path / "short")
    )
    whole = [digest(batch) for batch in reader.batches()]
    assert [digest(batch) for batch in StreamReader(short.uri).batches()] == whole[:4]
    assert [digest(batch) for batch in reader.batches(9)] == whole[9:]


def test_distillation_needs_vectors(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"60 usable .* takes 64"):
        DISTILL_STREAM.run(
            DistillStreamConfig(steps=1, global_batch_size=64),
            {name: inputs[name] for name in ("teacher_embeddings", "model")},
            str(tmp_path / "stream"),
        )
    with pytest.raises(UserError, match="holds no teacher vectors"):
        DISTILL_STREAM.run(
            DistillStreamConfig(steps=1, global_batch_size=64),
            {"teacher_embeddings": inputs["mine"], "model": inputs["model"]},
            str(tmp_path / "other"),
        )


# -- Ray --------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_ray_data_lays_out_the_same_bytes(
    ray_session: None,
    inputs: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import ray

    wanted = {name: inputs[name] for name in ("teacher_embeddings", "model")}
    options = DistillStreamConfig(steps=15, global_batch_size=8, seed=1)

    def both(folder: Path) -> list[dict[str, Any]]:
        made = (lay_out(inputs, folder / "stream"), DISTILL_STREAM.run(options, wanted, str(folder / "distill")))
        return [artifact.manifest["files"] for artifact in made]

    with caplog.at_level("INFO", "nvembed.core.ray_tasks"):
        with monkeypatch.context() as disconnected:
            disconnected.setattr(ray, "is_initialized", lambda: False)
            alone = both(tmp_path / "alone")
        assert "with Ray Data" not in caplog.text
        spread = both(tmp_path / "spread")
    assert caplog.text.count("with Ray Data") == 3  # the shards' documents are listed first
    assert spread == alone and all(len(files) == 5 for files in alone)
