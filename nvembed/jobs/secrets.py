"""Secrets: recognised by name and by value, refused in what is sent, masked in what is shown.

A secret reaches a job only as a reference: the name of a variable that the cluster provides, a key of a Kubernetes
Secret, a file on the cluster. Nothing here reads a secret for any other purpose than to find it where it must not be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

MASK = "****"
_NAMES = re.compile(
    r"(^|_)(KEY|TOKEN|PASSWORD|PASSWD|PWD|SECRET|CREDENTIALS?)S?(_|$)|(KEY|TOKEN|PASSWORD|SECRET)$", re.I
)
_PATHS = re.compile(r"_(PATH|FILE|DIR)$", re.I)  # says where a secret is
_NO_SECRETS = ("PWD", "OLDPWD")  # the shell's working directories
_IN_URL = re.compile(r"(?<=://)([^/\s:@'\"]*):([^/\s@'\"]+)(?=@)")
SHORTEST = 6  # characters of a value that is looked for; shorter ones ("1", "true") stand everywhere by chance


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret: HF_TOKEN, AWS_SECRET_ACCESS_KEY, PGPASSWORD."""
    return bool(_NAMES.search(name)) and not _PATHS.search(name) and name not in _NO_SECRETS


def secret_values(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Value -> name of the secrets in an environment (by default this process's)."""
    found = (os.environ if environment is None else environment).items()
    return {value: name for name, value in found if is_secret_name(name) and len(value) >= SHORTEST}


def mask(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with every secret of the environment, and every password inside a URL, replaced by `****`."""
    for value in sorted(secret_values(environment), key=len, reverse=True):
        text = text.replace(value, MASK)
    return _IN_URL.sub(rf"\1:{MASK}", text)


def leaks(texts: Iterable[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """What the texts hold that must not be sent: sentences that name a secret without showing it."""
    joined = "\n".join(texts)
    found = [f"the value of {name}" for value, name in secret_values(environment).items() if value in joined]
    return sorted(found) + (["a password inside a URL"] if _IN_URL.search(joined) else [])


def wrong_variables(variables: Mapping[str, str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> why of the plain settings that are secrets."""
    values = secret_values(environment)
    wrong = {}
    for name, value in variables.items():
        if is_secret_name(name):
            wrong[name] = "looks like a secret by its name"
        elif value in values:
            wrong[name] = f"has the value of {values[value]}, a secret of your environment"
        elif _IN_URL.search(value):
            wrong[name] = "holds a URL with a password"
    return wrong
