"""Secrets in texts that are shown: passwords in URIs, signed queries, tokens, what the environment calls secret.

Layer 6, standard library only. Nothing should hold a secret in the first place; this is for what a user typed anyway.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
MIN_SECRET = 6  # characters; a shorter value of the environment would blot out ordinary words
_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
_NO_SECRET = re.compile(r"(_PATH|_FILE|_DIR|_MODE|TOKENIZERS_PARALLELISM)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/@\s]+@")
_QUERY = re.compile(
    r"(?P<name>[?&](?:[\w-]*(?:token|sig|signature|password|secret|credential|key)[\w-]*)=)[^&#\s\"']+", re.IGNORECASE
)
_TOKENS = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,}|sk-[A-Za-z0-9_-]{16,})")


def mask(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without secrets.

    Args:
        environment: whose secret-looking variables are masked wherever their value stands; os.environ by default.
    """
    for secret in _secrets(os.environ if environment is None else environment):
        text = text.replace(secret, MASK)
    text = _USER_INFO.sub(rf"\g<scheme>{MASK}@", text)
    text = _QUERY.sub(rf"\g<name>{MASK}", text)
    return _TOKENS.sub(MASK, text)


def mask_all(value: Any) -> Any:
    """A nested plain value with every text in it masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {mask_all(key): mask_all(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [mask_all(item) for item in value]
    return value


def _secrets(environment: Mapping[str, str]) -> list[str]:
    found = {
        value
        for name, value in environment.items()
        if len(value) >= MIN_SECRET and _SECRET_NAME.search(name) and not _NO_SECRET.search(name)
    }
    return sorted(found, key=len, reverse=True)  # a secret that holds another one goes first
