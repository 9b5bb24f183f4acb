"""`nvembed export` and `nvembed import` as a user types them: what is printed, and how they end."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvembed.commands.app import app

MODEL = Path(__file__).parents[1] / "assets" / "formats" / "model_folder" / "v1"


def run(*arguments):
    return CliRunner().invoke(app, [str(part) for part in arguments])


def test_export_prints_and_stores_what_was_measured(tmp_path):
    (tmp_path / "texts.txt").write_text("one two\n\nthree\n")
    done = run("export", MODEL, tmp_path / "out", "--as", "folded", "--texts", tmp_path / "texts.txt", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["format_version"] == 1 and record["parity"]["given"]["texts"] == 2
    adapter = run("export", MODEL, tmp_path / "adapter", "--as", "adapter")
    assert adapter.exit_code == 0 and "base: base, weights " in adapter.stdout and "give --base" in adapter.stdout


def test_refusals_have_their_exit_codes(tmp_path, monkeypatch):
    assert run("export", MODEL, tmp_path / "x", "--as", "gguf").exit_code == 2
    assert run("export", tmp_path, tmp_path / "x", "--as", "folded").exit_code == 2
    assert run("export", MODEL, tmp_path / "x", "--as", "folded", "--texts", tmp_path / "none.txt").exit_code == 2
    assert run("import", MODEL, tmp_path / "x").exit_code == 2
    monkeypatch.setattr("nvembed.modeling.exports.forms.LIMIT", -1.0)
    assert run("export", MODEL, tmp_path / "x", "--as", "folded").exit_code == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["export", "import"])
def test_help(command):
    assert run(command, "--help").exit_code == 0
