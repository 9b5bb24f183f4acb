"""The vector cache: known texts are not embedded again, damage is logged and repaired, stored types round as stated."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nvembed.core.parquet import read_table
from nvembed.core.vectors import iter_vectors, shard_content, table_matrix, vector_table, write_shard, write_text_shards
from nvembed.retrieval.cache import UNKNOWN, VectorCache, remove_damaged, row_key
from nvembed.retrieval.config import EncodeConfig, PackageModel
from nvembed.retrieval.encode import Encoding, EncodingWork, ShardEncoder, _looked_in
from nvembed.retrieval.encode_list import encode_texts
from nvembed.retrieval.encoders import open_encoder
from nvembed.retrieval.rows import NOT_FINITE, encode_checked
from nvembed.types import UserError

# largest error against float32, as a share of the row's largest number
ROUNDING = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.51 / 127}


class Counting:
    """A stand-in for a model that is real enough to be wrong: vectors depend on the text, calls are counted."""

    dim, max_length, precision, prompts = 4, 16, "fp32", {}

    def __init__(self):
        self.seen = []

    def used_prompt(self, prompt):
        return prompt

    def encode(self, texts, prompts, max_length=None, *, cut_N=None):
        self.seen += texts
        if cut_N is not None:
            cut_N[:] = [len(text) > (max_length or self.max_length) for text in texts]
        pairs = zip(texts, prompts, strict=True)
        rows = [[len(text), sum(map(ord, text)) % 97, len(before), max_length or 0] for text, before in pairs]
        matrix = np.array(rows, dtype=np.float32).reshape(-1, 4)
        matrix[[text == "poison" for text in texts]] = np.nan
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def opened(folder, kind="fp32"):
    return VectorCache(str(folder), "model", kind)


@pytest.mark.parametrize("kind", list(ROUNDING))
def test_a_second_run_embeds_nothing_and_a_larger_one_only_what_is_new(tmp_path, kind):
    model, texts = Counting(), [f"text {number}" for number in range(20)]
    clean = encode_checked(model, texts, [""] * 20)
    first = encode_checked(model, texts, [""] * 20, cache=opened(tmp_path, kind))
    assert (first.embedded, first.cached) == (20, 0)
    model.seen.clear()
    larger = [*texts[:7], "new", *texts[7:], "newer", "text 3"]
    second = encode_checked(model, larger, [""] * 23, cache=opened(tmp_path, kind))
    assert model.seen == ["new", "newer"] and (second.embedded, second.cached) == (2, 20)
    expected = encode_checked(Counting(), larger, [""] * 23).matrix_AD
    np.testing.assert_allclose(second.matrix_AD, expected, atol=max(ROUNDING[kind], 1e-7), rtol=0)
    np.testing.assert_array_equal(first.matrix_AD, clean.matrix_AD)
    for other in ({"prompts": ["q: "] * 20}, {"max_lengths": [8] * 20}):  # both are part of the key
        options = {"prompts": [""] * 20, **other}
        assert encode_checked(model, texts, cache=opened(tmp_path, kind), **options).embedded == 20


def test_a_damaged_part_is_logged_left_out_and_computed_again(tmp_path, caplog):
    model, texts = Counting(), [f"text {number}" for number in range(6)]
    for half in (texts[:3], texts[3:]):
        encode_checked(model, half, [""] * 3, cache=opened(tmp_path))
    parts = sorted((tmp_path / "model").glob("part-*.parquet"))
    assert len(parts) == 2
    for damage in (lambda data: data[:-40], lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], lambda _: b""):
        whole = parts[0].read_bytes()
        parts[0].write_bytes(damage(whole))
        cache = opened(tmp_path)
        found = encode_checked(model, texts, [""] * 6, cache=cache)
        assert (found.embedded, found.cached) == (3, 3) and cache.damaged == [parts[0].name]
        np.testing.assert_array_equal(found.matrix_AD, encode_checked(Counting(), texts, [""] * 6).matrix_AD)
        assert parts[0].name in caplog.text and "embedded again" in caplog.text
        assert parts[0].read_bytes() == whole  # the same rows give the same part, so it is whole again
        assert cache.damaged_uris() == [str(parts[0])]
        remove_damaged(str(parts[0]))
        assert parts[0].is_file()
    parts[0].write_bytes(b"PAR1")
    remove_damaged(str(parts[0]))
    assert not parts[0].exists()


def test_what_was_cut_is_known_from_the_cache_too(tmp_path):
    texts, limits = ["short", "a" * 16, "b" * 17, "c" * 10], [None, None, None, 8]
    new = encode_checked(Counting(), texts, [""] * 4, limits, cache=opened(tmp_path))
    assert new.cut_A.tolist() == [0, 0, 1, 1] and new.embedded == 4
    known = encode_checked(Counting(), texts, [""] * 4, limits, cache=opened(tmp_path))
    assert known.cut_A.tolist() == [0, 0, 1, 1] and known.embedded == 0
    for part in (tmp_path / "model").glob("part-*.parquet"):  # as an older nvembed wrote it
        data = shard_content(read_table(str(part), ["key", "vector"]), checksums=True)
        part.unlink()
        part.with_name(f"part-{xxhash.xxh3_128_hexdigest(data)}.parquet").write_bytes(data)
    older = encode_checked(Counting(), [*texts, "new"], [""] * 5, [*limits, None], cache=opened(tmp_path))
    assert older.cut_A.tolist() == [UNKNOWN] * 4 + [0] and older.embedded == 1
    np.testing.assert_array_equal(older.matrix_AD[:4], new.matrix_AD)


def test_poisoned_rows_are_named_and_the_others_have_their_vectors(tmp_path):
    texts = ["good", "", " \n", "x" * 101, "a \ud800 b", "poison", None, "good too", "poison"]
    cache = opened(tmp_path)
    found = encode_checked(Counting(), texts, [""] * len(texts), cache=cache, max_bytes=100)
    assert found.accepted_A.tolist() == [0, 7] and found.matrix_AD.shape == (2, 4)
    assert found.rejected == {
        1: "is empty",
        2: "is empty",
        3: "is longer than 100 bytes",
        4: "holds a lone surrogate, which no tokenizer takes",
        5: NOT_FINITE,
        6: "is missing",
        8: NOT_FINITE,
    }
    again = encode_checked(Counting(), texts, [""] * len(texts), cache=opened(tmp_path), max_bytes=100)
    assert (again.embedded, again.cached) == (1, 2)  # what is not finite is not kept
    nothing = encode_checked(Counting(), ["", ""], ["", ""])
    assert nothing.matrix_AD.shape == (0, 4) and len(nothing.rejected) == 2


def test_keys_do_not_run_into_each_other():
    keys = {row_key(*parts) for parts in (("b", "a", 8), ("ab", "", 8), ("", "ab", 8), ("b", "a", 80), ("a", "b", 8))}
    assert len(keys) == 5 and {len(key) for key in keys} == {16}


numbers = st.floats(-4, 4, width=32, allow_subnormal=False)


@given(
    arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 9)), elements=numbers),
    st.sampled_from(list(ROUNDING)),
)
def test_stored_types_give_float32_back(tmp_path_factory, matrix, kind):
    table = vector_table(pa.array([str(row) for row in range(len(matrix))]), matrix, kind)
    path = str(tmp_path_factory.getbasetemp() / f"{kind}.parquet")
    write_shard(table, path)
    found = table_matrix(read_table(path, ["vector"]))
    assert found.dtype == np.float32 and found.shape == matrix.shape
    largest = np.abs(matrix).max(axis=1, initial=0.0)[:, None]
    assert (np.abs(found - matrix) <= ROUNDING[kind] * largest + 1e-7).all()  # fp16 has no smaller steps near zero
    if kind == "bf16":
        import torch

        np.testing.assert_array_equal(found, torch.from_numpy(matrix).bfloat16().float().numpy())
    twice = table_matrix(vector_table(table.column("key"), found, kind))
    np.testing.assert_allclose(twice, found, rtol=1e-6, atol=0)  # what was rounded stays


def test_small_types_are_small(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(512, 384)).astype(np.float32)
    sizes = {}
    for kind in ROUNDING:
        write_shard(vector_table(pa.array(["k"] * 512), matrix, kind), str(tmp_path / kind))
        sizes[kind] = (tmp_path / kind).stat().st_size / matrix.size
    assert sizes["fp16"] < 2.1 and sizes["bf16"] < 2.1 and sizes["int8"] < 1.25 and 4 <= sizes["fp32"] < 4.1


# -- with a model -----------------------------------------------------------------------------------------------------


def test_encode_texts(tmp_path):
    texts = ["heap overflow in a parser", "short", "SQL injection " * 30, "short"]
    found = encode_texts(texts, PackageModel(), precision="fp32")
    assert found.shape == (4, 384) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    encoder = open_encoder(PackageModel(), None, "fp32")
    np.testing.assert_allclose(found, encoder.encode(texts, [""] * 4), atol=1e-6)
    np.testing.assert_array_equal(encode_texts(texts, encoder), found)
    first = encode_texts(texts, PackageModel(), precision="fp32", cache=str(tmp_path))
    np.testing.assert_array_equal(encode_texts(texts, PackageModel(), precision="fp32", cache=str(tmp_path)), first)
    assert len(list(tmp_path.rglob("part-*.parquet"))) == 1
    short = encode_texts(texts, encoder, max_length=8)
    assert np.abs(short[2] - found[2]).max() > 1e-3 and np.abs(short[1] - found[1]).max() < 1e-6
    assert encode_texts([], encoder).shape == (0, 384)
    for problem, arguments in (
        (r"texts\[1\] is empty", (["a", " "], encoder)),
        ("not a list of texts", ("a", encoder)),
        ("512 positions", (["a"], encoder, "", 513)),
    ):
        with pytest.raises(UserError, match=problem):
            encode_texts(*arguments[:2], **dict(zip(("instruction", "max_length"), arguments[2:], strict=False)))


def test_a_shard_with_poison_separate_lengths_and_the_parts_of_the_first_start(tmp_path):
    source, out, cache = (str(tmp_path / name) for name in ("texts", "vectors", "cache"))
    rows = [(f"k{number}", "heap overflow in the parser of a long header " * number, "") for number in range(4)]
    write_text_shards(rows, f"{source}/documents", 100)
    write_text_shards([("q", rows[3][1], "")], f"{source}/queries", 100)
    config = EncodeConfig(precision="fp32", cache=cache, vector_type="fp16", max_query_length=8)
    names = [f"documents/part-0000{number}.parquet" for number in range(4)]

    def start():
        parts = _looked_in(source, [*names, "queries/part-00000.parquet"], "model", out, config)
        encoding = Encoding(source, PackageModel(), out, ("documents",))
        return ShardEncoder([EncodingWork(encoding, "id", "model", parts)], config), parts

    worker, parts = start()
    results = [worker.work({"encoding": 0, "name": name}) for name in names]
    assert results[0]["rejected"] == [["k0", "is empty"]] and [found["cut"] for found in results] == [[0, 0]] * 4
    assert sum(found["embedded"] for found in results) == 3
    query = worker.work({"encoding": 0, "name": "queries/part-00000.parquet"})
    assert query["embedded"] == 1 and query["cut"] == [1, 0]  # cut elsewhere, so another vector
    (_, query), documents = next(iter_vectors(f"{out}/queries")), list(iter_vectors(f"{out}/documents"))
    assert [key for keys, _ in documents for key in keys] == ["k1", "k2", "k3"]
    assert query.dtype == np.float32 and np.abs(query[0] - documents[-1][1][0]).max() > 1e-3
    before = {path: path.read_bytes() for path in Path(out).rglob("part-*.parquet")}
    again, same = start()  # as after a kill: it does not look in what the first start had added
    assert same == parts and again.work({"encoding": 0, "name": names[1]})["embedded"] == 1
    assert {path: path.read_bytes() for path in Path(out).rglob("part-*.parquet")} == before
    (Path(out) / "cache-parts.json").unlink()
    fresh, _ = start()
    assert [fresh.work({"encoding": 0, "name": name})["embedded"] for name in names] == [0, 0, 0, 0]
    assert {path: path.read_bytes() for path in Path(out).rglob("part-*.parquet")} == before  # fp16 rounds both alike
    strict = ShardEncoder([EncodingWork(Encoding(source, PackageModel(), out), "id")], config)
    with pytest.raises(UserError, match="text 'k0' is empty"):
        strict.work({"encoding": 0, "name": names[0]})
