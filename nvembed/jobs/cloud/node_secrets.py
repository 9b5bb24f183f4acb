"""Run on a machine of a cloud: fetch secrets by reference with the machine's own role, then become a command.

    python -m nvembed.jobs.cloud.node_secrets HF_TOKEN=aws-secret:eu-central-1:nvembed/hf -- ray start --head

A value goes from the cloud's secret manager into the environment of the command (`execvp`), and from Ray's processes
to the jobs: never to a file, an argument or a line of output. Exit code 3 where a secret cannot be had.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nvembed.jobs.config import CloudSecret, CloudTarget

AWS_SECRET, AWS_PARAMETER, GCP_SECRET = "aws-secret", "aws-parameter", "gcp-secret"
GCP_ADDRESS = "https://secretmanager.googleapis.com/v1"
GCP_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
SECONDS = 30.0
PREFLIGHT = 3


def reference(target: CloudTarget, secret: CloudSecret) -> str:
    """Reference to a secret, `kind:place:name`, with `#field` for one field of JSON. Holds no value."""
    field = f"#{secret.key}" if secret.key else ""
    if target.provider.type == "aws":
        kind, name = (AWS_SECRET, secret.secret) if secret.secret else (AWS_PARAMETER, secret.parameter)
        return f"{kind}:{target.provider.region}:{name}{field}"
    return f"{GCP_SECRET}:{target.provider.project}:{secret.secret}/versions/{secret.version}{field}"


def command_with_secrets(target: CloudTarget, command: str) -> str:
    """The shell command that gives `command` the target's secrets; `command` itself where there are none."""
    if not target.secrets:
        return command
    named = [f"{name}={reference(target, secret)}" for name, secret in target.secrets.items()]
    return f"python -m nvembed.jobs.cloud.node_secrets {shlex.join(named)} -- {command}"


def fetch(where: str) -> str:
    """The value of a reference.

    Raises:
        LookupError: it has no such field, is empty, or is not text; the message holds nothing of it.
        Exception: the cloud's own errors: no role, no permission, no such secret, no network.
    """
    where, _, field = where.partition("#")
    kind, place, name = where.split(":", 2)
    text = _FETCH[kind](place, name)
    if field:
        try:
            text = json.loads(text)[field]
        except (ValueError, KeyError, TypeError):
            raise LookupError(f"is not JSON with a field {field!r}") from None
    if not isinstance(text, str) or not text.strip():
        raise LookupError("is empty or no text")
    return text.strip()


def _aws_secret(region: str, name: str) -> str:
    import boto3

    answer: dict[str, Any] = boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=name)
    if "SecretString" not in answer:
        raise LookupError("is binary")
    return str(answer["SecretString"])


def _aws_parameter(region: str, name: str) -> str:
    import boto3

    client = boto3.client("ssm", region_name=region)
    return str(client.get_parameter(Name=name, WithDecryption=True)["Parameter"]["Value"])


def _gcp_secret(project: str, name: str) -> str:
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    credentials, _ = google.auth.default(scopes=[GCP_SCOPE])
    full = name if name.startswith("projects/") else f"projects/{project}/secrets/{name}"
    answer = AuthorizedSession(credentials).get(f"{GCP_ADDRESS}/{full}:access", timeout=SECONDS)
    if answer.status_code != 200:
        raise LookupError(f"answers {answer.status_code} {answer.reason}")
    try:
        return base64.b64decode(answer.json()["payload"]["data"], validate=True).decode("utf-8")
    except (ValueError, KeyError, TypeError):
        raise LookupError("is binary, or no answer of Secret Manager") from None


_FETCH: dict[str, Callable[[str, str], str]] = {
    AWS_SECRET: _aws_secret,
    AWS_PARAMETER: _aws_parameter,
    GCP_SECRET: _gcp_secret,
}


def main(arguments: Sequence[str]) -> int:
    """Fetch the secrets named before `--`, then become the command after it.

    Returns:
        3, where a secret is missing; otherwise it does not return.
    """
    cut = list(arguments).index("--")
    values = {}
    for named in arguments[:cut]:
        name, _, where = named.partition("=")
        try:
            values[name] = fetch(where)
        except Exception as error:  # every cloud has errors of its own; they name the secret, never its value
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            print(
                f"error: {name}: {where}: {type(error).__name__}: {first[:500]}. The machine's role must be allowed to "
                "read it (secretsmanager:GetSecretValue, ssm:GetParameter, secretmanager.versions.access).",
                file=sys.stderr,
            )
            return PREFLIGHT
    command = list(arguments[cut + 1 :])
    os.execvpe(command[0], command, os.environ | values)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
