"""`champion` moves by compare-and-set on a real store: the gate, two movers at once, killed movers, rollback."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core.uris import file_path
from nvembed.registry import champion
from nvembed.registry.champion import (
    PromotionRefusedError,
    champions,
    list_locks,
    move_champion,
    promote_candidate,
    roll_back,
)
from nvembed.registry.client import model_names
from nvembed.registry.config import GateConfig
from nvembed.registry.evidence import evaluate_gate

NAME = "nvembed-teacher"


@pytest.fixture
def models(kit: Any) -> Any:
    """A registered name with three bare versions; version 1 is champion."""
    client = kit.client
    client.create_registered_model(NAME)
    for _ in range(3):
        client.create_model_version(NAME, "file:///nowhere")
    move_champion(client, NAME, "1", None)
    return kit


# -- promotion by a run ---------------------------------------------------------------------------------------------


def test_the_register_step_promotes_what_passes_and_says_why_not(kit: Any) -> None:
    assert kit.register("a", 0.5)["reason"] == "there was no champion"
    worse = kit.register("b", 0.4)
    assert not worse["promoted"] and "comparison: mean difference to champion 1 -10.0 points" in worse["reason"]
    assert "floor: cwe: ndcg_at_10 -10.0 points" in worse["reason"], "all refusals at once"
    elsewhere = kit.register("d", 0.9, {"cwe": "aa", "hpo": "changed"})
    assert not elsewhere["promoted"] and "hashes differ of hpo" in elsewhere["reason"]
    assert kit.aliases() == {"candidate": "3", "champion": "1"}
    better = kit.register("e", 0.6)
    assert better["promoted"] and "+10.0 points" in better["reason"] and better["reason"].endswith("better")
    assert better["champion_before"]["version"] == "1"
    assert better["champion_before"]["evaluation_hash"] == {"cwe": "aa", "hpo": "bb"}
    assert better["champion_before"]["scores"]["model"]["cwe"]["ndcg_at_10"]["value"] == pytest.approx(0.5)
    mean = better["champion_before"]["mean"]
    assert mean["value"] == pytest.approx(0.5) and mean["low"] <= 0.5 <= mean["high"]
    assert kit.aliases() == {"candidate": "4", "champion": "4"}
    again = kit.register("e", 0.6)
    assert again["promoted"] and again["champion_before"]["version"] == "1", "the champion when the gate was evaluated"


def test_without_auto_promote_champion_stays_and_the_gate_speaks(kit: Any) -> None:
    first = kit.register("a", 0.5, auto_promote=False)
    assert not first["promoted"] and kit.aliases() == {"candidate": "1"}
    assert {row["name"]: row["state"] for row in first["gate"]["checks"]}["probes"] == "skipped"


def test_the_gate_reads_the_versions_own_files(kit: Any) -> None:
    kit.register("a", 0.5, auto_promote=False)
    kit.register("b", 0.6, auto_promote=False)
    _, second = kit.versions()
    assert evaluate_gate(kit.client, kit.uri, NAME, "1").passed
    weights = Path(file_path(second.source), "model.sentence_transformer/1_Pooling/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    result = evaluate_gate(kit.client, kit.uri, NAME, "2")
    assert not result.passed and "probes: models:/nvembed-teacher/2: the files at" in result.refusal()
    with pytest.raises(PromotionRefusedError, match="does not pass the gate"):
        promote_candidate(kit.client, result)
    tags = kit.client.get_model_version(NAME, "2").tags
    assert tags["gate.result"] == "refused" and tags["gate.probes"].startswith("refused: ")
    assert tags["gate.provenance"].startswith("passed: ")


def test_leaks_and_a_cut_chain_are_refused(kit: Any) -> None:
    prepared = kit.prepare(near_duplicates=3)
    model = kit.model("a", prepare=prepared)
    done = kit.submit(model, kit.scores(model, 0.5, prepared))
    assert (
        not done["promoted"] and "leak: train examples that nearly copy a held-out text: cwe 3, hpo 3" in done["reason"]
    )
    other = kit.prepare()
    elsewhere = kit.submit(model, kit.scores(model, 0.6, other))
    assert "leak: near duplicates between" in elsewhere["reason"]
    assert kit.aliases() == {"candidate": "1"}


def test_a_champion_of_the_first_format_must_be_registered_again(kit: Any) -> None:
    client = kit.client
    client.create_registered_model(NAME)
    tags = {"nvembed.evaluation_hash": json.dumps({"cwe": "aa", "hpo": "bb"}), "nvembed.scores": "{}"}
    client.create_model_version(NAME, "file:///nowhere", tags=tags)
    client.set_registered_model_alias(NAME, "champion", "1")
    done = kit.register("a", 0.5)
    assert (
        not done["promoted"]
        and "champion 1: version 1 of nvembed-teacher was registered by an older nvembed" in done["reason"]
    )


def test_the_recipes_margin_decides(kit: Any) -> None:
    kit.register("a", 0.5)
    strict = kit.register("b", 0.495, gate=GateConfig(samples=200, margin=0))
    assert not strict["promoted"] and "it must be above 0" in strict["reason"]
    assert evaluate_gate(kit.client, kit.uri, NAME, "2", GateConfig(samples=200, margin=0.02)).passed


# -- compare and set ------------------------------------------------------------------------------------------------


def test_a_move_from_where_champion_is_not_any_more_is_refused(models: Any) -> None:
    move_champion(models.client, NAME, "2", "1")
    with pytest.raises(PromotionRefusedError, match="was version 1 when this was decided and is version 2 now"):
        move_champion(models.client, NAME, "3", "1")
    assert models.aliases() == {"champion": "2"}
    assert model_names(models.client) == [NAME] and list_locks(models.client, NAME) == {}


MOVER = """
import sys, time
from nvembed.registry.champion import PromotionRefusedError, move_champion
from nvembed.registry.client import open_registry
uri, name, number, expected, at = sys.argv[1:]
client = open_registry(uri)
client.get_registered_model(name)
print("ready", flush=True)
sys.stdin.readline()
try:
    move_champion(client, name, number, expected)
    print("won")
except PromotionRefusedError as refused:
    print("refused", refused)
"""


def race(
    uri: str,
    name: str,
    numbers: list[str],
    environment: dict[str, str] | None = None,
    beside: Callable[[], None] = lambda: None,
) -> list[str]:
    """Outputs of processes that start at once and move version 1 to `numbers`; `beside` runs here meanwhile."""
    movers = [
        subprocess.Popen(
            [sys.executable, "-c", MOVER, uri, name, number, "1", "0"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number in numbers
    ]  # fmt: skip
    for mover in movers:
        assert mover.stdout is not None and mover.stdout.readline() == "ready\n", mover.communicate()[1]
    for mover in movers:
        assert mover.stdin is not None
        mover.stdin.write("\n")
        mover.stdin.flush()
    beside()
    outputs = []
    for mover in movers:
        out, err = mover.communicate(timeout=120)
        assert mover.returncode == 0, err
        outputs.append(out.strip())
    return outputs


def test_of_two_movers_at_once_one_wins_and_the_other_is_refused(models: Any) -> None:
    """Two processes: another one, and this."""
    client, here = models.client, []

    def move() -> None:
        try:
            move_champion(client, NAME, "3", "1")
            here.append("won")
        except PromotionRefusedError as refused:
            here.append(f"refused {refused}")

    outputs = race(models.uri, NAME, ["2"], beside=move) + here
    assert sorted(line.split()[0] for line in outputs) == ["refused", "won"], outputs
    winner = "2" if outputs[0] == "won" else "3"
    assert models.aliases() == {"champion": winner}
    refusal = next(line for line in outputs if line != "won")
    assert f"is version {winner} now: another process was faster" in refusal
    assert list_locks(models.client, NAME) == {}
    history = champion.read_history(models.client, NAME)
    assert [(entry["from"], entry["version"]) for entry in history] == [(None, "1"), ("1", winner)]


def test_a_killed_mover_does_not_block_for_ever(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(champion, "PATIENCE_SECONDS", 1.0)
    models.client.create_registered_model(f"{NAME}.nvembed-lock.0", tags={"token": "dead", "holder": "x@y:1"})
    started = time.monotonic()
    move_champion(models.client, NAME, "2", "1")
    assert time.monotonic() - started >= 1.0
    assert models.aliases() == {"champion": "2"} and list_locks(models.client, NAME) == {}


def test_a_slow_mover_that_was_overtaken_does_not_move(models: Any) -> None:
    with champion.champion_lock(models.client, NAME) as lock:
        lock.check()
        models.client.create_registered_model(f"{NAME}.nvembed-lock.1", tags={"token": "other"})
        with pytest.raises(PromotionRefusedError, match="so slow that another one moves"):
            lock.check()
    assert list(list_locks(models.client, NAME)) == [1], "only its own is taken away"


def test_an_overtaken_mover_leaves_the_history_alone(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = champion.read_history(models.client, NAME)

    def overtaken(client: Any, name: str) -> Any:
        model = get_model(client, name)
        if list_locks(client, name):
            client.create_registered_model(f"{name}.nvembed-lock.1", tags={"token": "other"})
        return model

    get_model = champion.get_model
    monkeypatch.setattr(champion, "get_model", overtaken)
    with pytest.raises(PromotionRefusedError, match="so slow that another one moves"):
        move_champion(models.client, NAME, "2", "1")
    monkeypatch.setattr(champion, "get_model", get_model)
    assert champion.read_history(models.client, NAME) == before and models.aliases() == {"champion": "1"}


def test_a_mover_gives_up_when_the_registry_is_slow(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(champion, "HOLD_SECONDS", -1.0)
    with pytest.raises(PromotionRefusedError, match="was left where it is"):
        move_champion(models.client, NAME, "2", "1")
    assert models.aliases() == {"champion": "1"}
    monkeypatch.setattr(champion, "HOLD_SECONDS", 60.0)
    move_champion(models.client, NAME, "3", "1")
    stack = champions(champion.read_history(models.client, NAME), "3")
    assert stack == ["1", "3"], "a move that was announced and did not happen is no part of the history"


# -- rollback -------------------------------------------------------------------------------------------------------


def test_rollback_restores_the_previous_champion_one_by_one(models: Any) -> None:
    move_champion(models.client, NAME, "2", "1")
    move_champion(models.client, NAME, "3", "2")
    assert roll_back(models.client, NAME) == ("3", "2")
    assert roll_back(models.client, NAME) == ("2", "1")
    with pytest.raises(PromotionRefusedError, match="no earlier one is recorded"):
        roll_back(models.client, NAME)
    assert models.aliases() == {"champion": "1"}
    assert [entry["action"] for entry in champion.read_history(models.client, NAME)][-2:] == ["rollback", "rollback"]


def test_rollback_of_a_champion_moved_by_hand(models: Any) -> None:
    models.client.set_registered_model_alias(NAME, "champion", "3")
    assert roll_back(models.client, NAME) == ("3", "1")


def test_history_stays_within_what_a_tag_holds(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widest = {"version": "10000", "from": "10000", "action": "rollback", "at": 1_800_000_000, "by": "u" * 100}
    assert len(json.dumps([widest] * champion.HISTORY_ENTRIES)) < 5000
    monkeypatch.setattr(champion, "HISTORY_ENTRIES", 2)
    for number, before in (("2", "1"), ("3", "2")):
        move_champion(models.client, NAME, number, before)
    assert [entry["version"] for entry in champion.read_history(models.client, NAME)] == ["2", "3"]


@given(st.lists(st.one_of(st.none(), st.integers(1, 6)), max_size=15), st.booleans())
def test_the_history_gives_the_stack_of_champions(moves: list[int | None], died: bool) -> None:
    """None rolls back, a number promotes; the last move may have been announced only."""
    stack: list[str] = []
    entries: list[dict[str, Any]] = []
    for move in moves:
        before = stack[-1] if stack else None
        if move is None and len(stack) > 1:
            stack.pop()
            entries.append({"version": stack[-1], "from": before, "action": "rollback"})
        elif move is not None and str(move) != before:
            stack.append(str(move))
            entries.append({"version": str(move), "from": before, "action": "promote"})
    if died:
        entries.append({"version": "9", "from": stack[-1] if stack else None, "action": "promote"})
    assert champions(entries, stack[-1] if stack else None) == stack
