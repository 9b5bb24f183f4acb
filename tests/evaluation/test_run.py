"""The `evaluate` and `baselines` steps on a random model, with real actors, against a computation without any of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.metrics import ndcg_score, v_measure_score

from nvembed.core.parquet import read_table
from nvembed.data.tables import document_text, read_corpus, read_examples
from nvembed.evaluation.baselines import BASELINES, variants
from nvembed.evaluation.config import BaselineConfig, EvaluateConfig
from nvembed.evaluation.run import EVALUATE, load_sets
from nvembed.evaluation.significance import compare
from nvembed.evaluation.tasks import LabelledSet
from nvembed.modeling.config import LastTokenConfig, MeanConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.folder import load_embedder
from nvembed.retrieval.config import EncodeConfig, PackageModel
from nvembed.retrieval.encoders import open_encoder
from nvembed.types import Artifact, UserError

CONFIG = EvaluateConfig(
    dims=(16,),
    bootstrap_samples=100,
    neighbours=3,
    encode=EncodeConfig(actors=2, shard_rows=16, precision="fp32"),
    seed=4,
)


def values(artifact: Artifact, system: str) -> dict[str, dict[str, float]]:
    scores = json.loads(Path(artifact.path("scores.json")).read_text())["scores"][system]
    return {name: {metric: row["value"] for metric, row in found.items()} for name, found in scores.items()}


def encode(embedder: Embedder, texts: list[str], prefix: str, dim: int) -> np.ndarray:
    return embedder.encode(texts, prompt=prefix, dim=dim).astype(np.float64)


def direct(prepare: Artifact, embedder: Embedder, dim: int) -> dict[str, dict[str, float]]:
    """The same scores from their definitions, with scikit-learn and SciPy, in this process."""
    return {
        "links": direct_links(prepare, embedder, dim),
        "kinds": direct_kinds(prepare, embedder, dim),
        "pairs": direct_pairs(prepare, embedder, dim),
    }


def direct_links(prepare: Artifact, embedder: Embedder, dim: int) -> dict[str, float]:
    queries, corpus = read_examples(prepare, "links", "test"), read_corpus(prepare, "links").to_pylist()
    documents = encode(embedder, [document_text(row["title"], row["text"]) for row in corpus], "", dim)
    asked = encode(embedder, [row.query for row in queries], "Instruct: find links\nQuery: ", dim)
    gains = [{item.id: item.score or 1.0 for item in row.positives} for row in queries]
    truth = np.array([[gain.get(row["id"], 0.0) for row in corpus] for gain in gains])
    ranks = np.argsort(np.argsort(-asked @ documents.T, axis=1), axis=1) + 1
    best = np.where(truth > 0, ranks, 1000).min(axis=1)
    mrr = np.where(best <= 10, 1 / best, 0).mean()
    return {"ndcg_at_10": ndcg_score(truth, asked @ documents.T, k=10), "recall_at_100": 1.0, "mrr_at_10": mrr}


def direct_kinds(prepare: Artifact, embedder: Embedder, dim: int) -> dict[str, float]:
    kinds = next(item for item in load_sets(prepare, "test") if isinstance(item, LabelledSet))
    vectors = encode(embedder, [row.query for row in kinds.examples], "Instruct: find kinds\nQuery: ", dim)
    labels = [str(row.label) for row in kinds.examples]
    reference, test = kinds.halves()
    right = []
    for index in test:
        similarity = sorted((float(vectors[index] @ vectors[other]), labels[other]) for other in reference)[-3:]
        votes = {
            name: (sum(n == name for _, n in similarity), sum(s for s, n in similarity if n == name)) for name in labels
        }
        right.append(max(votes, key=votes.__getitem__) == labels[index])
    measures = [
        v_measure_score(
            labels, KMeans(3, n_init=1, random_state=CONFIG.seed + run).fit_predict(vectors.astype(np.float32))
        )
        for run in range(CONFIG.clusterings)
    ]
    return {"accuracy": float(np.mean(right)), "v_measure": float(np.mean(measures))}


def direct_pairs(prepare: Artifact, embedder: Embedder, dim: int) -> dict[str, float]:
    pairs, prefix = read_examples(prepare, "pairs", "test"), "Instruct: find pairs\nQuery: "
    second = {row["id"]: row["text"] for row in read_corpus(prepare, "pairs").to_pylist()}
    a = encode(embedder, [row.query for row in pairs], prefix, dim)
    b = encode(embedder, [second[row.positives[0].id] for row in pairs], prefix, dim)
    return {"spearman": spearmanr((a * b).sum(axis=1), [row.positives[0].score for row in pairs]).statistic}


@pytest.fixture(scope="module")
def evaluated(
    prepare: Artifact, model: Artifact, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    uri = str(tmp_path_factory.mktemp("evaluated") / "evaluate")
    return EVALUATE.run(CONFIG, {"prepare": prepare, "model": model}, uri)


@pytest.fixture(scope="module")
def baselines(
    prepare: Artifact, model: Artifact, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    config = BaselineConfig(
        dev_documents=12, dev_queries=9, evaluate=CONFIG.model_copy(update={"dims": (), "seed": CONFIG.seed})
    )
    uri = str(tmp_path_factory.mktemp("evaluated") / "baselines")
    return BASELINES.run(config, {"prepare": prepare, "model": model}, uri)


@pytest.mark.ray
def test_evaluate_is_what_the_definitions_give(prepare: Artifact, model: Artifact, evaluated: Artifact) -> None:
    embedder = load_embedder(model.path("model"))
    for system, dim in (("model", 32), ("model@16", 16)):
        found, expected = values(evaluated, system), direct(prepare, embedder, dim)
        assert list(found) == ["links", "kinds", "pairs"]
        for dataset, metrics in expected.items():
            assert found[dataset] == {name: pytest.approx(value, abs=1e-6) for name, value in metrics.items()}
    assert values(evaluated, "model") != values(evaluated, "model@16")


@pytest.mark.ray
def test_scores_file_and_items(evaluated: Artifact) -> None:
    content = json.loads(Path(evaluated.path("scores.json")).read_text())
    assert content["evaluation_hash"] == {name: f"hash of {name}" for name in ("links", "kinds", "pairs")}
    assert list(content["scores"]["model"]["links"]) == ["ndcg_at_10", "recall_at_100", "mrr_at_10"]  # primary first
    for found in content["scores"].values():
        for row in (row for metrics in found.values() for row in metrics.values()):
            assert row["low"] <= row["value"] <= row["high"]
    assert "15 texts labelled by their 3 nearest" in content["notes"]["kinds"]
    table = read_table(evaluated.path("items.parquet")).to_pylist()
    for dataset, metric in (("links", "ndcg_at_10"), ("links", "mrr_at_10"), ("kinds", "accuracy")):
        rows = [row for row in table if (row["system"], row["dataset"], row["metric"]) == ("model", dataset, metric)]
        assert np.mean([row["value"] for row in rows]) == pytest.approx(
            content["scores"]["model"][dataset][metric]["value"]
        )
        assert len({row["item_id"] for row in rows}) == len(rows) > 10
    assert evaluated.manifest["metrics"]["encode"]["workers"] == 2
    assert set(evaluated.manifest["files"]) == {"scores.json", "items.parquet"}


def test_an_impossible_prefix_is_refused_before_any_work(prepare: Artifact, model: Artifact, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"dims": (16, 32)})
    with pytest.raises(UserError, match=r"evaluate\.dims: 32 cannot be a prefix of this model's 32 numbers"):
        EVALUATE.run(config, {"prepare": prepare, "model": model}, str(tmp_path / "evaluate"))
    assert not (tmp_path / "evaluate" / "checkpoints").exists()
    with pytest.raises(ValueError, match="no meaning for the baselines"):
        BaselineConfig(evaluate=config)


def test_variants_are_the_embedder_with_its_switches(model: Artifact) -> None:
    texts = [f"text number {index} about the heap " + "and the stack " * (index % 5) for index in range(12)]
    instructions = ["Instruct: find\nQuery: " if index % 2 else "" for index in range(12)]
    vectors = {}
    for name, variant in variants(model.path("model")).items():
        encoder = open_encoder(variant, None, "fp32", token_budget=64)
        vectors[name] = encoder.encode(texts, instructions)
        pooling = MeanConfig() if name.startswith("mean") else LastTokenConfig()
        one = load_embedder(model.path("model"), pooling=pooling, bidirectional=name.endswith("bidirectional"))
        assert np.abs(one.encode(texts, prompt=instructions) - vectors[name]).max() < 1e-6
    names = list(vectors)
    assert names == ["mean_bidirectional", "last_token_bidirectional", "mean_causal", "last_token_causal"]
    assert all(np.abs(vectors[a] - vectors[b]).max() > 1e-3 for a in names for b in names if a < b)


@pytest.mark.ray
def test_baselines(prepare: Artifact, model: Artifact, baselines: Artifact, evaluated: Artifact) -> None:
    content = json.loads(Path(baselines.path("scores.json")).read_text())
    assert set(content["scores"]) == {"bm25", "minilm", "untrained"}
    untrained = content["untrained_variants"]
    for dataset, primary in (("links", "ndcg_at_10"), ("kinds", "accuracy"), ("pairs", "spearman")):
        dev = {name: scores[dataset][primary] for name, scores in untrained["scores"].items()}
        assert list(dev) == list(variants(model.path("model")))
        assert dev[untrained["chosen"][dataset]] == max(dev.values())
        assert untrained["chosen_on"][dataset] == "dev"
        variant = variants(model.path("model"))[untrained["chosen"][dataset]]
        embedder = load_embedder(model.path("model"), pooling=variant.pooling, bidirectional=variant.bidirectional)
        expected = {"links": direct_links, "kinds": direct_kinds, "pairs": direct_pairs}[dataset](prepare, embedder, 32)
        found = values(baselines, "untrained")[dataset]
        assert found == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert list(content["scores"]["bm25"]["kinds"]) == ["accuracy"]
    _check_reference(prepare, baselines)
    for row in compare(evaluated, baselines, "model - untrained", b_system="untrained", samples=100):
        if row["dataset"] in ("links", "kinds", "pairs"):
            ours, theirs = (
                values(side, name)[row["dataset"]][row["metric"]]
                for side, name in ((evaluated, "model"), (baselines, "untrained"))
            )
            assert row["delta"]["value"] == pytest.approx(ours - theirs)


def _check_reference(prepare: Artifact, baselines: Artifact) -> None:
    """MiniLM gets bare texts."""
    encoder = open_encoder(PackageModel(), None, "fp32")
    pairs = read_examples(prepare, "pairs", "test")
    second = {row["id"]: row["text"] for row in read_corpus(prepare, "pairs").to_pylist()}
    a, b = (
        encoder.encode(texts, [""] * len(texts))
        for texts in ([row.query for row in pairs], [second[row.positives[0].id] for row in pairs])
    )
    expected = spearmanr((a * b).sum(axis=1), [row.positives[0].score for row in pairs]).statistic
    assert values(baselines, "minilm")["pairs"]["spearman"] == pytest.approx(expected, abs=1e-6)
