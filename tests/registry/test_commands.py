"""`nvembed registry`: what users type and see; exit codes; a gate that refuses ends with 5 and names every check."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nvembed.commands.app import app

NAME = "nvembed-teacher"


def run(kit: Any, *arguments: Any) -> tuple[int, str]:
    """Exit code and all output of `nvembed registry ...`."""
    command = ["registry", *map(str, arguments), "--registry", kit.uri]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    return done.exit_code, done.output


def as_json(kit: Any, *arguments: Any) -> Any:
    code, text = run(kit, *arguments, "--json")
    assert code == 0, text
    return json.loads(text)


def test_a_champions_life_by_hand(kit: Any, tmp_path: Path) -> None:
    kit.register("a", 0.5, auto_promote=False)
    kit.register("b", 0.6, auto_promote=False)
    kit.register("c", 0.4, auto_promote=False)
    code, text = run(kit, "promote", f"{NAME}/1")
    assert code == 0 and "champion of nvembed-teacher is version 1 now (there was none)" in text, text
    assert "probes: passed" in text and "comparison: skipped: there is no champion" in text
    code, text = run(kit, "promote", NAME)  # its candidate is version 3
    assert code == 5 and "refused: version 3 of nvembed-teacher does not pass the gate:" in text, text
    assert "  comparison: mean difference to champion 1 -10.0" in text and "  floor: cwe: ndcg_at_10 -10.0" in text
    done = as_json(kit, "promote", f"models:/{NAME}/2")
    assert done["promoted"] and done["champion_before"] == "1" and done["gate"]["passed"]
    assert run(kit, "promote", f"{NAME}/2")[1].strip().endswith("is champion already")

    (model,) = as_json(kit, "list")
    assert model["aliases"] == {"candidate": "3", "champion": "2"}
    assert [(row["version"], row["gate"]) for row in model["versions"]] == [
        ("1", "passed"),
        ("2", "passed"),
        ("3", "refused"),
    ]
    shown = as_json(kit, "show", f"{NAME}@champion")
    assert shown["scores"]["model"]["cwe"]["ndcg_at_10"].keys() == {"value", "low", "high"}
    assert shown["champions"] == ["1", "2"] and shown["chain_problems"] == [] and len(shown["chain"]) == 5
    assert shown["gate_results"]["champion"] == "1" and {row["kind"] for row in shown["licences"]} >= {"backbone"}
    code, text = run(kit, "show", f"{NAME}/2")
    assert code == 0 and "cwe       ndcg_at_10  0.6000 [0.5900, 0.6100]" in text and "champions so far: 1 -> 2" in text

    compared = as_json(kit, "compare", f"{NAME}@champion", f"{NAME}/3")
    assert (
        compared["mean"]["value"] == pytest.approx(0.2) and 0.19 < compared["mean"]["low"] <= compared["mean"]["high"]
    )
    assert [row["dataset"] for row in compared["datasets"]] == ["cwe", "hpo"]
    code, text = run(kit, "compare", f"{NAME}@champion", f"{NAME}/3")
    assert code == 0 and "mean                  +20.0 [" in text

    assert as_json(kit, "rollback", NAME) == {"name": NAME, "champion": "1", "champion_before": "2"}
    code, text = run(kit, "rollback", NAME)
    assert code == 5 and "no earlier one is recorded" in text

    target = tmp_path / "exported"
    done = as_json(kit, "export", f"{NAME}@champion", target)
    assert done["folder"] == str(target) and (target / "note.txt").read_text() == "a"
    code, text = run(kit, "export", f"{NAME}@champion", target)
    assert code == 2 and "exists and is not overwritten" in text


def test_mistakes_are_errors_with_a_message(kit: Any) -> None:
    for arguments, message in (
        (("show", "unknown"), "the registry has no model unknown; it has: none"),
        (("rollback", "unknown"), "no model unknown"),
        (("list", "unknown"), "no model unknown"),
        (("promote", "a/b/c"), "no model a"),
    ):
        code, text = run(kit, *arguments)
        assert code == 2 and message in text and "Traceback" not in text, text
    done = CliRunner().invoke(app, ["registry", "list", "--registry", "http://127.0.0.1:9"])
    assert done.exit_code == 2 and "does not answer" in done.output
    assert run(kit, "list") == (0, "no model is registered\n")


@pytest.mark.slow
def test_the_gates_margin_may_be_given(kit: Any) -> None:
    kit.register("a", 0.5)
    kit.register("b", 0.48, auto_promote=False)
    assert run(kit, "promote", NAME)[0] == 5
    code, text = run(kit, "promote", NAME, "--margin", 0.05, "--floor", 0.05)
    assert code == 0 and "not worse by more than 5" in text, text
