"""Secrets: recognised by name, by value and inside URLs; masked where text is logged or stored.

A secret comes from the environment and stays there. Nothing here reads one for any other purpose than to find it
where it must not be.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MASK = "****"
SHORTEST = 8  # characters of a value that is looked for; shorter ones ("1", "true") stand everywhere by chance
_NAMES = re.compile(
    r"(^|_)(KEY|TOKEN|PASSWORD|PASSWD|PASSPHRASE|PASS|PWD|SECRET|CREDENTIALS?|DSN|CONN(ECTION)?_?STR(ING)?)S?(_|$)"
    r"|(KEY|TOKEN|PASSWORD|SECRET)$",
    re.IGNORECASE,
)
_PATHS = re.compile(r"_(PATH|FILE|DIR)$", re.IGNORECASE)  # says where a secret is
_NO_SECRETS = ("PWD", "OLDPWD")  # the shell's working directories
_USER = re.compile(r"(?<=://)[^/\s@'\"?#]+@")  # user or a token before a host
# A password may hold any sign of a URL unencoded: it ends at the last @ of the word. Digits before a path are a port.
_PASSWORD = re.compile(r"(?<=://)([^/\s:@'\"?#]*):(?!\d{1,5}(?:[/?#]|$))([^\s\"]+)(?=@)")
_BARE_TOKEN = re.compile(r"(?<=://)(?=[^/\s:@'\"?#]*\d|[^/\s:@'\"?#]{16})[^/\s:@'\"?#]{8,}(?=@)")
_QUERY = re.compile(
    r"([?&](?:[\w-]*(?:token|password|passwd|secret|signature|credential)|sig|api[_-]?key|access[_-]?key)=)[^&\s'\"#]+",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"((?:authorization|x-api-key|private-token|api-key)['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token|apikey)\s+)?)"
    r"(?!\*{4}|(?:bearer|basic|token|apikey)\s)[^\s'\",;]{6,}",
    re.IGNORECASE,
)
_PAIR = re.compile(  # of a connection string: AccountName=x;AccountKey=...
    r"\b((?:account_?key|shared_?access_?(?:key|signature)|password|passwd|pwd|secret_?(?:access_?)?key|client_?secret)"
    r"\s*=\s*)(?!\*{4})[^\s;&'\",)\]}]{6,}",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----.*?(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----|\Z)", re.DOTALL
)
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|AKIA[A-Z0-9]{12,}|ASIA[A-Z0-9]{12,}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{16,}|sk-[A-Za-z0-9_-]{16,}"
    r"|xox[a-z]-[A-Za-z0-9-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,})"
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret: HF_TOKEN, AWS_SECRET_ACCESS_KEY, PGPASSWORD, SMTP_PASS."""
    return bool(_NAMES.search(name)) and not _PATHS.search(name) and name not in _NO_SECRETS


def secret_values(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Value -> name of the secrets in an environment (by default this process's), passwords inside URLs included."""
    secrets = {}
    for name, value in (os.environ if environment is None else environment).items():
        if is_secret_name(name) and len(value) >= SHORTEST:
            secrets[value] = name
        elif "://" in value and (inside := _PASSWORD.search(value)) and len(inside.group(2)) >= SHORTEST:
            secrets[inside.group(2)] = f"{name} (its password)"
        elif bare := _BARE_TOKEN.search(value):
            secrets[bare.group()] = f"{name} (its token)"
    return secrets


def mask(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace the secrets in a text by `****`.

    These are: values of the environment's secrets; passwords and tokens inside URLs, headers and connection strings;
    private keys; what has the shape of a well-known token.
    """
    for value in sorted(secret_values(environment), key=len, reverse=True):
        text = text.replace(value, MASK)
    text = _TOKENS.sub(MASK, _PRIVATE_KEY.sub(MASK, text))
    text = _PAIR.sub(rf"\1{MASK}", _HEADER.sub(rf"\1{MASK}", text))
    if "://" not in text:
        return text
    return _QUERY.sub(rf"\1{MASK}", _BARE_TOKEN.sub(MASK, _PASSWORD.sub(rf"\1:{MASK}", text)))


def mask_all(value: Any) -> Any:
    """A nested plain value with every text in it masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {mask_all(key): mask_all(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [mask_all(item) for item in value]
    return value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a nested plain value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_in(item)


def has_token(text: str) -> bool:
    """Whether the text holds a private key, a secret of a header or connection string, or a well-known token."""
    return any(pattern.search(text) for pattern in (_TOKENS, _PRIVATE_KEY, _HEADER, _PAIR))


def has_credentials(text: str) -> bool:
    """Whether a URL in the text carries a password, or a token before its host or in its query."""
    return "://" in text and any(pattern.search(text) for pattern in (_PASSWORD, _BARE_TOKEN, _QUERY))


def without_credentials(uri: str) -> str:
    """The URI as it may be stored: no user, no password, no token."""
    return _QUERY.sub(rf"\1{MASK}", _USER.sub("", _PASSWORD.sub(r"\1", uri)))


def why_refused(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Why a value must not be stored in a recipe or an address; "" where it may."""
    for value, name in secret_values(environment).items():
        if value in text:
            return f"holds the value of {name}, a secret of your environment. Leave it there, out of what is stored"
    if has_token(text):
        return "holds what has the shape of an access token. Leave it in the environment, out of what is stored"
    if not has_credentials(text):
        return ""
    return (
        "a URL with a password or token in it; recipes and outputs are stored and shown. Give it through the "
        "environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or the whole MLFLOW_TRACKING_URI), "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN, ~/.netrc"
    )


class MaskingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks too, hold no secret."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return mask(super().format(record))
