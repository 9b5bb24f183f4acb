"""The `mine` step's kinds of work and settings, in this process: reuse, candidate filter, several retrievers, cap,
consistency, near duplicates, FAISS, any division."""

import json
from pathlib import Path

import pytest
import torch
from artifacts import publish
from mining_kit import CONFIG, MINE, TEXTS, mine, retriever, vectors
from mining_kit import prepare as prepare_set

from nvembed.core import storage
from nvembed.core.parquet import read_table
from nvembed.mining.config import CandidateFilter, MineConfig, TopKAbs
from nvembed.retrieval.config import EncodeConfig, FaissFlat, FaissHnsw, PretrainedModel, SearchConfig
from nvembed.types import UserError


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Hundreds of small files; nothing crashes here."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_set(str(tmp_path_factory.mktemp("prepared")))


def negatives(rows):
    return {key: [item["id"] for item in row["negatives"]] for key, row in rows.items()}


def test_selecting_again_equals_mining_anew(tmp_path, prepared):
    _, rows, audit = mine(prepared, tmp_path / "first", depth=30)
    assert {len(ids) for key, ids in negatives(rows).items() if key != "far"} == {3}
    assert audit["hubs"]["documents"] > 10 and audit["hubs"]["largest"][0]["queries"] >= 3
    assert set(audit["refused_by_rule"]) == {"topk_abs 0.7", "topk_margin_pos 0.05", "topk_perc_pos 0.95"}
    assert audit["near_duplicates"]["examples"] == 41
    for number, rule in enumerate(
        (
            {"type": "topk_perc_pos", "max_negative_to_positive_ratio": 0.9},
            {"type": "topk_margin_pos", "margin": 0.1},
            {"type": "topk_shifted", "shift": 4},
            {"type": "sampled_topk", "top": 4, "temperature": 0.1},
        )
    ):
        _, expected, _ = mine(prepared, tmp_path / f"anew{number}", rule=rule, depth=30)
        again, selected, _ = mine(
            prepared, tmp_path / f"again{number}", rule=rule, depth=30, reuse=str(tmp_path / "first")
        )
        assert selected == expected, rule
        assert negatives(selected) != negatives(rows)
        assert "set/searched.parquet" not in again.manifest["files"]


def test_selecting_again_refuses_what_was_not_searched(tmp_path, prepared):
    mine(prepared, tmp_path / "first", rule={"type": "topk_abs", "max_score": 0.2})
    reuse = {"reuse": str(tmp_path / "first")}
    with pytest.raises(UserError, match=r"example 'q\d+': the rule needs ranks 11 to"):
        mine(prepared, tmp_path / "a", rule={"type": "topk_abs", "max_score": 0.5}, **reuse)
    with pytest.raises(UserError, match="searched with depth = 10, the recipe says 20"):
        mine(prepared, tmp_path / "b", depth=20, **reuse)
    with pytest.raises(UserError, match="searched with retriever"):
        mine(prepared, tmp_path / "c", retriever=retriever("other"), **reuse)
    with pytest.raises(UserError, match="not a mine step"):
        mine(prepared, tmp_path / "d", reuse=prepared.uri)
    with pytest.raises(ValueError, match="reuse selects again"):
        MineConfig(reuse="x", rule={"type": "random"})


def test_any_division_gives_the_same_bytes(tmp_path, prepared):
    whole, _, _ = mine(prepared, tmp_path / "whole")
    search = SearchConfig(query_rows=7, document_rows=9, block_documents=4, precision="fp32")
    cut, _, _ = mine(prepared, tmp_path / "cut", search=search.model_dump(), encode={"actors": 4, "shard_rows": 3})
    for name in ("mined", "searched"):
        data = [Path(artifact.path("set", f"{name}.parquet")).read_bytes() for artifact in (whole, cut)]
        assert data[0] == data[1]


def test_a_trained_model_is_the_first_retriever_and_its_search_is_not_the_named_ones(tmp_path, prepared):
    trained = publish(tmp_path / "train", "train", lambda uri: storage.write_bytes(f"{uri}/model/weights", b"trained"))
    again = MINE.run(CONFIG, {"prepare": prepared, "model": trained}, str(tmp_path / "again"))
    _, named, _ = mine(prepared, tmp_path / "named", retriever=retriever("model"))
    rows = read_table(again.path("set", "mined.parquet")).to_pylist()
    assert {row["example_id"]: row for row in rows} == named
    assert named != mine(prepared, tmp_path / "plain")[1]
    audit = (tmp_path / "again" / "audit.json").read_text()
    assert json.loads(audit)["retriever"] == {"type": "trained", "model": trained.manifest_hash}
    assert str(tmp_path) not in audit
    with pytest.raises(UserError, match="searched by a trained model"):
        mine(prepared, tmp_path / "reused", reuse=str(tmp_path / "again"))


def test_the_candidate_filter_refuses_by_its_own_scale(tmp_path, prepared):
    second = CandidateFilter(model=PretrainedModel(name="second"), ceiling=TopKAbs(max_score=0.3))
    _, rows, _ = mine(prepared, tmp_path / "filtered", candidate_filter=second.model_dump())
    _, plain, _ = mine(prepared, tmp_path / "plain", num_negatives=42, depth=42)
    matrix = dict(
        zip(
            [f"d{n:02d}" for n in range(40)] + ["near", "copy"],
            vectors([*TEXTS, f"{TEXTS[0]} again", TEXTS[1].upper()], "second"),
            strict=True,
        )
    )
    for number, (key, row) in enumerate(rows.items()):
        text = "race in the kernel" if key == "far" else f"{TEXTS[number]} found today"
        query = vectors([text], "second")[0]
        expected = [item["id"] for item in plain[key]["negatives"] if matrix[item["id"]] @ query < 0.3][:3]
        assert [item["id"] for item in row["negatives"]] == expected


def cross_encoder(folder):
    """A random reranker of real form."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator([f"{text} found today" for text in TEXTS], vocab_size=300, show_progress=False)
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=1, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    return str(folder)


def test_a_cross_encoder_scores_pairs(tmp_path, prepared):
    from sentence_transformers import CrossEncoder

    folder = cross_encoder(tmp_path / "reranker")
    reranker = {"model": {"type": "cross_encoder", "name": folder}, "ceiling": {"type": "topk_abs", "max_score": 0.5}}
    whole, rows, _ = mine(prepared, tmp_path / "reranked", candidate_filter=reranker)
    cut, _, _ = mine(
        prepared, tmp_path / "cut", candidate_filter=reranker, search={"query_rows": 7, "document_rows": 9}
    )
    files = [Path(artifact.path("set", "mined.parquet")).read_bytes() for artifact in (whole, cut)]
    assert files[0] == files[1], "a pair's score does not depend on what else is scored"
    _, plain, _ = mine(prepared, tmp_path / "plain", num_negatives=42, depth=42)
    texts = {f"d{n:02d}": text for n, text in enumerate(TEXTS)} | {
        "near": f"{TEXTS[0]} again",
        "copy": TEXTS[1].upper(),
    }
    model, refused = CrossEncoder(folder, device="cpu"), 0
    for number, (key, row) in enumerate(rows.items()):
        query = "race in the kernel" if key == "far" else f"{TEXTS[number]} found today"
        ids = [item["id"] for item in plain[key]["negatives"]]
        scores = model.predict([(query, texts[one]) for one in ids], activation_fn=torch.nn.Sigmoid())
        assert [item["id"] for item in row["negatives"]] == [
            one for one, score in zip(ids, scores, strict=True) if score < 0.5
        ][:3]
        refused += int((scores >= 0.5).sum())
    assert refused > 20
    with pytest.raises(UserError, match="no model folder"):
        mine(
            prepared,
            tmp_path / "none",
            candidate_filter={"model": {"type": "cross_encoder", "name": str(tmp_path / "gone")}},
        )


def test_several_retrievers_take_turns(tmp_path, prepared):
    more = [{"type": "bm25"}, retriever("other")]
    _, merged, _ = mine(prepared, tmp_path / "three", more_retrievers=more, rule={"type": "topk"})
    _, alone, _ = mine(prepared, tmp_path / "other", retriever=more[1], rule={"type": "topk"})
    _, first, _ = mine(prepared, tmp_path / "first", rule={"type": "topk"})
    for key, row in merged.items():
        ids = [item["id"] for item in row["negatives"]]
        assert len(set(ids)) == 3 and not set(ids) & set(row["known_positives"])
        assert ids[0] == negatives(first)[key][0]  # one of each; BM25's may be what the first chose
        assert negatives(alone)[key][0] in ids[1:] or negatives(alone)[key][0] == ids[0]
    assert negatives(merged) != negatives(first)


def test_an_index_beyond_memory_is_refused_before_texts_are_written(tmp_path, prepared, monkeypatch):
    class Small:
        total = 20_000

    monkeypatch.setattr("psutil.virtual_memory", Small)
    with pytest.raises(UserError, match=r"BM25 over 'set': an index of 42 documents takes about 0\.0 GiB"):
        mine(prepared, tmp_path / "refused", more_retrievers=[{"type": "bm25"}])
    assert not (tmp_path / "refused" / "checkpoints").exists()
    Small.total, Small.available = 1 << 30, 20_000  # the actor's machine has not as much left
    with pytest.raises(UserError, match=r"Leave bm25 out of mine\.more_retrievers"):
        mine(prepared, tmp_path / "later", more_retrievers=[{"type": "bm25"}])
    Small.available = 1 << 30
    mine(prepared, tmp_path / "later", more_retrievers=[{"type": "bm25"}])


def test_cap_consistency_and_near_duplicates(tmp_path, prepared):
    _, rows, audit = mine(prepared, tmp_path / "cap", max_per_document=4, depth=40)
    assert audit["hubs"]["largest"][0]["queries"] == 4
    assert sum(map(len, negatives(rows).values())) == audit["negatives"] > 2.8 * 41
    _, rows, audit = mine(prepared, tmp_path / "consistent", max_positive_rank=2)
    assert "far" not in rows and audit["dropped"]["positive_ranks_too_low"] == 41 - len(rows) >= 1
    loose = {"type": "topk"}
    _, rows, audit = mine(prepared, tmp_path / "loose", rule=loose)
    assert "near" in negatives(rows)["q00"] and audit["near_duplicates"]["near_duplicates_of_a_positive"] >= 1
    assert "copy" not in negatives(rows)["q01"]
    _, rows, audit = mine(prepared, tmp_path / "strict", rule=loose, near_duplicate=0.8)
    assert "near" not in negatives(rows)["q00"] and audit["near_duplicates"]["near_duplicates_of_a_positive"] == 0
    assert len(negatives(rows)["q00"]) == 3


def test_faiss_flat_gives_the_same_and_the_audit_has_the_recall(tmp_path, prepared):
    pytest.importorskip("faiss")
    _, exact, audit = mine(prepared, tmp_path / "exact")
    assert "index_recall" not in audit
    _, flat, audit = mine(prepared, tmp_path / "flat", search=SearchConfig(index=FaissFlat()).model_dump())
    exact.pop("far"), flat.pop("far")  # below the twenty candidates that FAISS returns
    assert flat == exact and audit["index_recall"] == {"queries": 41, "depth": 10, "mean": 1.0, "min": 1.0}
    _, _, audit = mine(
        prepared, tmp_path / "hnsw", search=SearchConfig(index=FaissHnsw(links=2, search_width=1)).model_dump()
    )
    assert 0.0 < audit["index_recall"]["mean"] <= 1.0


def test_an_index_is_built_once_for_all_groups_of_an_actor(tmp_path, prepared, monkeypatch):
    faiss = pytest.importorskip("faiss")
    built, build = [], faiss.IndexFlatIP

    def counting(dim):
        built.append(dim)
        return build(dim)

    monkeypatch.setattr(faiss, "IndexFlatIP", counting)
    cut = SearchConfig(index=FaissFlat(), query_rows=6, document_rows=20, recall_queries=0)
    _, rows, _ = mine(prepared, tmp_path / "cut", search=cut)
    _, whole, _ = mine(prepared, tmp_path / "whole", search=SearchConfig(index=FaissFlat(), recall_queries=0))
    assert rows == whole
    assert len(built) <= 2 * (3 + 1)  # two actors, three parts and the whole; there are seven groups


@pytest.mark.parametrize(
    "checks",
    [
        {"near_duplicate": 0.6},
        {
            "candidate_filter": {
                "model": retriever("second"),
                "ceiling": {"type": "topk_abs", "max_score": 0.5},
            }
        },
        {"near_duplicate": 0.6, "more_retrievers": [{"type": "bm25"}, retriever("second")]},
    ],
)
def test_checks_read_the_corpus_once_a_group(prepared, tmp_path, monkeypatch, checks):
    """However many rounds of candidates are refused, and however many of its queries there are."""
    opened, open_reader = [], storage.open_reader

    def counting(uri):
        opened.append(uri)
        return open_reader(uri)

    monkeypatch.setattr(storage, "open_reader", counting)
    folder = "vectors_candidate_filter" if "candidate_filter" in checks else "texts"
    reads = []
    for name, settings in (("plain", {}), ("checked", checks)):
        opened.clear()
        one_group = {"depth": 60, "encode": EncodeConfig(actors=1, shard_rows=5)}  # and never searched deeper
        more = {"more_retrievers": checks.get("more_retrievers", ())}
        mine(prepared, tmp_path / name, **{**one_group, **more, **settings})
        shards = [uri for uri in opened if f"/{folder}/set/documents/" in uri]
        reads.append({uri.rsplit("/", 1)[1]: shards.count(uri) for uri in shards})
    plain, checked = reads
    assert len(checked) == 9
    for shard, count in checked.items():  # its keys, and its rows where some are candidates
        assert count - plain.get(shard, 0) in (1, 2)
