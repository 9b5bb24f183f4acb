"""Intervals: against closed forms, coverage of a known truth, pairing, strata, and what may be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from artifacts import publish
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import v_measure_score

from nvembed.core.parquet import write_table
from nvembed.evaluation import significance
from nvembed.evaluation.run import ITEMS_SCHEMA
from nvembed.evaluation.significance import (
    MEAN,
    PairedItems,
    bootstrap,
    bootstrap_v_measure,
    compare,
    draw,
    mean_statistic,
    paired_bootstrap,
    paired_bootstrap_mean,
    paired_bootstrap_runs,
    spearman_statistic,
)
from nvembed.types import Artifact, UserError

values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@settings(deadline=None)
@given(values, st.integers(0, 100))
def test_an_interval_holds_its_value_and_stays_among_the_items(items: list[float], seed: int) -> None:
    value_N = np.array(items)
    found = bootstrap(mean_statistic(value_N), len(items), 100, seed)
    assert min(items) - 1e-12 <= found["low"] <= found["value"] <= found["high"] <= max(items) + 1e-12
    assert found["value"] == pytest.approx(value_N.mean())
    assert found == bootstrap(mean_statistic(value_N), len(items), 100, seed)


def test_the_interval_of_a_mean_is_about_two_standard_errors() -> None:
    value_N = np.random.default_rng(1).normal(size=400)
    found = bootstrap(mean_statistic(value_N), 400, 4000, 7)
    error = value_N.std() / 20
    assert found["low"] == pytest.approx(value_N.mean() - 1.96 * error, abs=0.12 * error)
    assert found["high"] == pytest.approx(value_N.mean() + 1.96 * error, abs=0.12 * error)


def test_coverage_of_a_known_mean() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for seed in range(300):
        value_N = (generator.random(100) < 0.3).astype(float)
        found = bootstrap(mean_statistic(value_N), 100, 300, seed)
        held += found["low"] <= 0.3 <= found["high"]
    assert 0.90 <= held / 300 <= 0.98


def test_blocks_of_draws_bound_memory_and_all_draws_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "_BLOCK_ITEMS", 50)
    sizes = []

    def statistic(index_SN: np.ndarray) -> np.ndarray:
        sizes.append(index_SN.size)
        return index_SN.mean(axis=1)

    assert draw(statistic, 20, 101, 0).shape == (101,)
    assert max(sizes) <= 50


def test_spearman_draws_are_correlations_of_the_drawn_pairs() -> None:
    generator = np.random.default_rng(3)
    gold_N = generator.random(40).round(1)
    value_N = gold_N + generator.normal(size=40)
    index_SN = generator.integers(0, 40, (5, 40))
    found = spearman_statistic(value_N, gold_N)(index_SN)
    assert found == pytest.approx([spearmanr(value_N[row], gold_N[row]).statistic for row in index_SN])
    interval = bootstrap(spearman_statistic(value_N, gold_N), 40, 500, 0)
    assert interval["value"] == pytest.approx(spearmanr(value_N, gold_N).statistic)
    assert interval["low"] < interval["value"] < interval["high"]


def test_v_measure_interval() -> None:
    generator = np.random.default_rng(4)
    label_N = generator.integers(0, 4, 80)
    noisy = np.where(generator.random((2, 80)) < 0.3, generator.integers(0, 4, (2, 80)), label_N)
    found = bootstrap_v_measure(label_N, noisy, 300, 0)
    assert found["value"] == pytest.approx(np.mean([v_measure_score(label_N, row) for row in noisy]))
    assert found["low"] < found["value"] < found["high"]
    assert found["high"] - found["low"] < 0.5
    perfect = bootstrap_v_measure(label_N, label_N[None], 100, 0)
    assert perfect == {"value": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1)}


def test_pairing_removes_what_both_systems_share() -> None:
    generator = np.random.default_rng(5)
    hard_N = generator.random(200)
    pair = PairedItems("set", "ndcg_at_10", hard_N + 0.02, hard_N, None)
    found = paired_bootstrap(pair)
    assert found["value"] == pytest.approx(0.02) and found["low"] == pytest.approx(0.02, abs=1e-9)
    alone = bootstrap(mean_statistic(hard_N), 200, 1000, 0)
    assert alone["high"] - alone["low"] > 0.05  # unpaired, 0.02 would be lost in the noise


def _runs(dataset: str, delta_RN: np.ndarray) -> list[PairedItems]:
    return [PairedItems(dataset, "ndcg_at_10", delta_N, np.zeros_like(delta_N)) for delta_N in delta_RN]


def test_runs_that_agree_add_nothing_and_runs_that_differ_span_the_interval() -> None:
    delta_N = np.random.default_rng(8).normal(size=80)
    same = paired_bootstrap_runs([_runs("set", np.stack([delta_N] * 4))], 500, 3)
    assert same == pytest.approx(paired_bootstrap(_runs("set", delta_N[None])[0], 500, 3))
    apart = paired_bootstrap_runs([_runs("set", np.repeat([[0.0], [1.0], [2.0]], 80, axis=1))], 2000, 3)
    assert apart == {"value": 1.0, "low": 0.0, "high": 2.0}  # one draw in 27 takes the same run three times


def test_a_run_is_drawn_for_all_data_sets_at_once() -> None:
    up, down = np.repeat([[-1.0], [1.0]], 10, axis=1), np.repeat([[1.0], [-1.0]], 10, axis=1)
    found = paired_bootstrap_runs([_runs("first", up), _runs("second", down)], 500)
    assert found == {"value": 0.0, "low": 0.0, "high": 0.0}  # what a run gains on one set it loses on the other


def test_coverage_of_a_known_difference_over_runs_and_items() -> None:
    generator = np.random.default_rng(9)
    held = 0
    for seed in range(200):
        delta_RN = 0.1 + generator.normal(0, 0.05, (8, 1)) + generator.normal(0, 0.2, 60)
        found = paired_bootstrap_runs([_runs("set", delta_RN)], 300, seed)
        held += found["low"] <= 0.1 <= found["high"]
    assert 0.88 <= held / 200 <= 0.98


def test_equal_systems_differ_by_nothing_and_order_changes_the_sign() -> None:
    generator = np.random.default_rng(6)
    a_N, b_N, gold_N = generator.random((3, 60))
    for metric in ("accuracy", "spearman"):
        forth = paired_bootstrap(PairedItems("set", metric, a_N, b_N, gold_N))
        back = paired_bootstrap(PairedItems("set", metric, b_N, a_N, gold_N))
        assert forth["low"] == pytest.approx(-back["high"]) and forth["value"] == pytest.approx(-back["value"])
        same = paired_bootstrap(PairedItems("set", metric, a_N, a_N, gold_N))
        assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_mean_over_sets_weighs_sets_equally_and_draws_them_apart() -> None:
    generator = np.random.default_rng(7)
    a_N = generator.random(300)
    one, other = (PairedItems(name, "ndcg_at_10", a_N, np.zeros(300)) for name in ("one", "other"))
    single, mean = paired_bootstrap(one, 4000), paired_bootstrap_mean([one, other], 4000)
    assert mean["value"] == pytest.approx(single["value"])
    ratio = (mean["high"] - mean["low"]) / (single["high"] - single["low"])
    assert ratio == pytest.approx(1 / np.sqrt(2), abs=0.05)  # drawn together, it would be 1
    small = PairedItems("small", "ndcg_at_10", np.ones(3), np.zeros(3))
    assert paired_bootstrap_mean([one, small])["value"] == pytest.approx((a_N.mean() + 1) / 2)


def _evaluation(uri: Path, rows: list[tuple[Any, ...]], hashes: dict[str, str]) -> Artifact:
    def build(work: str) -> None:
        columns = dict(zip(ITEMS_SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
        write_table(pa.table(columns, schema=ITEMS_SCHEMA), f"{work}/items.parquet")
        Path(work, "scores.json").write_text(json.dumps({"evaluation_hash": hashes, "scores": {}}))

    return publish(uri, "evaluate", build)


def _rows(system: str, seed: int, lift: float) -> list[tuple[Any, ...]]:
    generator = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    for dataset, metric in (("x", "ndcg_at_10"), ("y", "ndcg_at_10"), ("x", "mrr_at_10"), ("z", "spearman")):
        for index in np.random.default_rng(lift.__hash__() % 7).permutation(40):  # files need not agree on the order
            gold = index / 40 if metric == "spearman" else None
            rows.append((system, dataset, metric, f"i{index}", index / 80 + lift + 0.01 * generator.random(), gold))
    return rows


def test_compare_two_evaluations(tmp_path: Path) -> None:
    hashes = {"x": "1", "y": "2", "z": "3"}
    a = _evaluation(tmp_path / "a", _rows("model", 1, 0.2), hashes)
    b = _evaluation(tmp_path / "b", [*_rows("bm25", 2, 0.1), *_rows("untrained", 3, 0.0)], hashes)
    rows = compare(a, b, "trained - bm25", b_system="bm25", samples=200)
    assert [(row["name"], row["dataset"], row["metric"]) for row in rows] == [
        ("trained - bm25", "x", "ndcg_at_10"),
        ("trained - bm25", "y", "ndcg_at_10"),
        ("trained - bm25", "z", "spearman"),
        ("trained - bm25", MEAN, "ndcg_at_10"),
    ]
    for row in (rows[0], rows[1], rows[3]):
        assert 0.09 < row["delta"]["low"] <= row["delta"]["value"] <= row["delta"]["high"] < 0.11
    assert abs(rows[2]["delta"]["value"]) < 0.05
    with pytest.raises(UserError, match=r"no scores of 'minilm'; it has bm25, untrained"):
        compare(a, b, "x", b_system="minilm")


def test_sets_that_are_not_the_same_are_not_compared(tmp_path: Path) -> None:
    a = _evaluation(tmp_path / "a", _rows("model", 1, 0.2), {"x": "1", "y": "2", "z": "3"})
    other = _evaluation(tmp_path / "b", _rows("model", 1, 0.1), {"x": "1", "y": "other", "z": "3"})
    fewer = _evaluation(tmp_path / "c", _rows("model", 1, 0.2)[1:], {"x": "1", "y": "2", "z": "3"})
    for b in (other, fewer):
        with pytest.raises(UserError, match="not scored on the same items"):
            compare(a, b, "a - b")
