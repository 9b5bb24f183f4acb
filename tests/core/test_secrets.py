"""Secrets: recognised by name, by value, in URLs; never in what is logged or stored."""

import http.server
import logging
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core.secrets import (
    MASK,
    MaskingFormatter,
    has_credentials,
    is_secret_name,
    mask,
    secret_values,
    why_refused,
    without_credentials,
)
from nvembed.core.terminal import Console
from nvembed.pipeline.exit_codes import report_error
from nvembed.recipe.schema import RecipeError, load_recipe
from nvembed.tracking.store import probe, resolve_store

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pipelines/recipes/tiny.yaml"
WORD = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.~%+=", min_size=8, max_size=40)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY", "PGPASSWORD"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["PATH", "PWD", "RAY_AUTH_TOKEN_PATH", "HOME", "KEYBOARD", "MONKEY_BARS", "TOKENIZERS"]
)
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_secret_name(name)


@given(WORD, WORD)
def test_a_password_in_a_url_is_masked_everywhere(user: str, password: str) -> None:
    url = f"https://{user}:{password}@host.example/path"
    text = mask(f"failed: {url} (see {url})", {})
    assert f":{password}@" not in text and "host.example/path" in text
    assert has_credentials(url) and not has_credentials(without_credentials(url))
    assert without_credentials(url) == "https://host.example/path"


@given(WORD)
def test_the_value_of_a_secret_is_masked_in_any_text(value: str) -> None:
    environment = {"SOME_API_KEY": value, "PATH": "/usr/bin"}
    assert value not in mask(f"x{value}y\n{value}", environment).replace(MASK, "")
    assert why_refused(f"s3://bucket/{value}", environment)


def test_passwords_inside_urls_of_the_environment_count() -> None:
    environment = {"MLFLOW_TRACKING_URI": "https://me:hunter2hunter2@mlflow.example"}
    assert secret_values(environment) == {"hunter2hunter2": "MLFLOW_TRACKING_URI (its password)"}
    assert mask("the password is hunter2hunter2", environment) == f"the password is {MASK}"


@pytest.mark.parametrize(
    "url", ["s3://bucket/a@b", "https://host/a:b@c", "models:/teacher@champion", "me@example.org", "a: b@c", "/a/b:c@d"]
)
def test_addresses_without_secrets_stay(url: str) -> None:
    assert mask(url, {}) == url and not has_credentials(url) and not why_refused(url, {})


def test_a_signed_url_loses_its_signature() -> None:
    url = "https://b.s3.amazonaws.com/x?X-Amz-Signature=abcdef0123&part=3"
    assert mask(url, {}) == f"https://b.s3.amazonaws.com/x?X-Amz-Signature={MASK}&part=3"


def test_a_recipe_with_a_password_is_refused_with_the_variable_to_use() -> None:
    with pytest.raises(RecipeError, match=r"tracking\.uri: a URL with a password.*MLFLOW_TRACKING_PASSWORD"):
        load_recipe(str(TINY), ["tracking.uri=https://me:canary-canary@mlflow.example"])


def test_a_recipe_with_a_secret_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanary")
    with pytest.raises(RecipeError, match=r"description: holds the value of HF_TOKEN"):
        load_recipe(str(TINY), ["description=hf_canarycanary"])


def test_what_is_stored_of_a_tracking_uri_has_no_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:canary-canary@db.example/mlflow")
    store = resolve_store(None, str(tmp_path))
    assert store.configured == "postgresql://db.example/mlflow"
    assert store.uri == "postgresql://me:canary-canary@db.example/mlflow"


def test_the_console_and_the_log_mask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canarycanary")
    Console().line("error: sk-canarycanary at https://a:canary-canary@b")
    assert capsys.readouterr().err == f"error: {MASK} at https://a:{MASK}@b\n"
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "key %s", ("sk-canarycanary",), None)
    assert MaskingFormatter().format(record) == f"key {MASK}"


def test_the_file_of_an_error_masks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary/canary+canary")
    messages: list[str] = []
    assert report_error(RuntimeError("denied: canary/canary+canary"), messages.append, str(tmp_path)) == 4
    (file,) = (tmp_path / "logs").iterdir()
    assert "canary" not in file.read_text() and f"denied: {MASK}" in file.read_text()


def test_a_server_is_asked_without_the_password_of_its_address() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        probe(f"http://me:canary-canary@127.0.0.1:{server.server_port}")  # 404 is an answer
        with pytest.raises(OSError):
            probe("http://me:canary-canary@127.0.0.1:1")
    finally:
        server.shutdown()


SECRET = "Zq8vN3xT5mK1pL7w"
LEAKS = {
    "slash in a password": f"https://me:a/{SECRET}@host.example/x",
    "hash in a password": f"postgresql://me:a#{SECRET}@db.example:5432/mlflow",
    "question mark in a password": f"https://me:a?{SECRET}@host.example",
    "quote in a password": f"https://me:a'{SECRET}@host.example",
    "at in a password": f"https://me:a@{SECRET}@host.example",
    "token before the host": f"https://{SECRET}@host.example/x",
    "header": f"Authorization: Bearer {SECRET}",
    "header as JSON": f'{{"Authorization": "Basic {SECRET}"}}',
    "header without a scheme": f"authorization={SECRET}",
    "azure": f"DefaultEndpointsProtocol=https;AccountName=x;AccountKey={SECRET}==;EndpointSuffix=core",
    "odbc": f"Driver=x;Uid=me;Pwd={SECRET};",
    "gitlab": f"glpat-{SECRET}{SECRET}",
    "github": f"github_pat_{SECRET}{SECRET}",
    "slack": f"xoxb-{SECRET}",
    "google key": f"AIza{SECRET}{SECRET}abc",
    "google token": f"ya29.{SECRET}",
    "jwt": f"eyJhbGciOiJI.eyJzdWIiOiIx.{SECRET}",
    "private key": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n-----END OPENSSH PRIVATE KEY-----",
    "cut private key": f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
}


@pytest.mark.parametrize("text", LEAKS.values(), ids=LEAKS)
def test_secrets_of_any_shape_are_masked_and_refused(text: str) -> None:
    shown = mask(f"before {text} after", {})
    assert SECRET not in shown and MASK in shown
    assert text.startswith("-----BEGIN") or shown.endswith(" after") or "private key" in text
    assert mask(shown, {}) == shown, "masking twice changes nothing"
    assert why_refused(text, {})


@pytest.mark.parametrize("name", ["SMTP_PASS", "SSH_PASSPHRASE", "AZURE_STORAGE_CONNECTION_STRING", "SENTRY_DSN"])
def test_the_value_of_a_variable_with_such_a_name_is_a_secret(name: str) -> None:
    assert MASK in mask(f"x {SECRET}", {name: SECRET}) and SECRET not in mask(f"x {SECRET}", {name: SECRET})


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/a@b", "https://me@host.example", "ssh://git@host/x", "http://127.0.0.1:5000", "s3://bucket/a=b",
        "password: 12 characters", "bypass=true", "tokens = 4096", "key=value", "the authorization of users",
        "https://host:443?x=me@y", "sk-learn", "token_budget=4096", "keywords=abcdefghij",
    ],
)  # fmt: skip
def test_plain_words_stay(text: str) -> None:
    assert mask(text, {}) == text and not why_refused(text, {})
