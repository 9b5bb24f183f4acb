"""What must not be sent with a job: secrets, found by `nvembed.core.secrets`.

A secret reaches a job only as a reference: the name of a variable that the cluster provides, a key of a Kubernetes
Secret, a file on the cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nvembed.core.secrets import has_credentials, has_token, is_secret_name, secret_values


def leaks(texts: Iterable[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """What the texts hold that must not be sent: sentences that name a secret without showing it."""
    joined = "\n".join(texts)
    found = [f"the value of {name}" for value, name in secret_values(environment).items() if value in joined]
    return [
        *sorted(found),
        *(["a password inside a URL"] if has_credentials(joined) else []),
        *(["what has the shape of an access token"] if has_token(joined) else []),
    ]


def wrong_variables(variables: Mapping[str, str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> why of the plain settings that are secrets."""
    values = secret_values(environment)
    wrong = {}
    for name, value in variables.items():
        if is_secret_name(name):
            wrong[name] = "looks like a secret by its name"
        elif value in values:
            wrong[name] = f"has the value of {values[value]}, a secret of your environment"
        elif has_credentials(value):
            wrong[name] = "holds a URL with a password"
        elif found := leaks([value], environment):
            wrong[name] = f"holds {' and '.join(found)}"
    return wrong
