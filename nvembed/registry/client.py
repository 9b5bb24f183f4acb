"""The registry's MLflow client, the names of its tags, and the lookup of models and versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nvembed.core.formats import WRITER as WRITER_KEY
from nvembed.core.formats import check_format
from nvembed.tracking.store import prepare_environment, probe
from nvembed.types import UserError

CANDIDATE, CHAMPION = "candidate", "champion"
LOCK = ".nvembed-lock."  # a registered model whose name ends so is a lock, see `champion.py`

FORMAT_VERSION = 2  # 1: the model folder alone; 2: an MLflow model around it, with scores, items and provenance
FORMAT, WRITER = "nvembed.format", "nvembed.version"
CONTENT = "nvembed.content_hash"
SCORE = "nvembed.score"
SCORES = "nvembed.scores"
EVALUATION = "nvembed.evaluation_hash"
EVALUATED = "nvembed.evaluation_manifest_hash"
GATE_CONFIG = "nvembed.gate"
LICENCES = "nvembed.licences"
HISTORY = "nvembed.champion_history"
GATE = "gate."


class RegistryAwayError(UserError):
    """The registry does not answer. The run is complete; its registration waits."""


def open_registry(uri: str) -> Any:
    """An MlflowClient for the registry at `uri`.

    Raises:
        RegistryAwayError: it does not answer.
    """
    try:
        probe(uri)
    except Exception as error:  # sqlite3.Error, OSError and what urllib makes of a mistyped URI
        raise _away(uri, error) from error
    prepare_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _away(uri: str, error: BaseException) -> RegistryAwayError:
    return RegistryAwayError(
        f"the model registry at {uri} does not answer ({str(error)[:300]}). Start it, or correct tracking.uri or "
        "MLFLOW_TRACKING_URI, and run again: finished steps are kept."
    )


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Raise RegistryAwayError for errors of the block that a registry out of reach causes.

    A registry that was away for seconds and is back counts too: the call that met the gap is lost, the work is not.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        try:
            probe(uri)
        except Exception as gone:
            raise _away(uri, gone) from error
        if _is_connection_error(error):
            raise _away(uri, error) from error
        raise


# What MLflow's client wraps, by name: these packages are MLflow's dependencies, not ours.
_AWAY = {"requests": "RequestException", "sqlalchemy": "OperationalError", "urllib3": "HTTPError"}


def _is_connection_error(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(seen).__mro__}
        if isinstance(seen, ConnectionError | TimeoutError) or kinds & set(_AWAY.items()):
            return True
        seen = seen.__cause__ or seen.__context__
    return any(phrase in str(error) for phrase in ("Max retries exceeded", "OperationalError"))


def version_format(version: Any) -> int:
    """The format a version was registered in.

    Raises:
        FormatError: a newer one; the message names the nvembed to install.
    """
    number = str(version.tags.get(FORMAT, 1))
    record = {"format_version": int(number) if number.isdigit() else number, WRITER_KEY: version.tags.get(WRITER)}
    return check_format(record, f"version {version.version} of {version.name}", newest=FORMAT_VERSION)


# -- looking up -----------------------------------------------------------------------------------------------------


def model_names(client: Any) -> list[str]:
    """Registered models, sorted; locks are not models."""
    names = (model.name for model in _pages(client.search_registered_models))
    return sorted(name for name in names if LOCK not in name)


def list_versions(client: Any, name: str) -> list[Any]:
    """All versions of a model, oldest first."""
    versions = _pages(client.search_model_versions, filter_string=f"name = '{name}'")
    return sorted(versions, key=lambda version: int(version.version))


def _pages(search: Any, **arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token, **arguments)
        yield from page
        token = page.token
        if not token:
            return


def get_model(client: Any, name: str) -> Any:
    """The registered model.

    Raises:
        UserError: there is none; the message lists the others.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        _raise_unless_missing(error)
        known = ", ".join(model_names(client)) or "none"
        raise UserError(f"the registry has no model {name}; it has: {known}") from error


def aliases(client: Any, name: str) -> dict[str, str]:
    """Alias -> version."""
    return {key: str(value) for key, value in get_model(client, name).aliases.items()}


def find_version(client: Any, reference: str) -> Any:
    """The version of `models:/name@alias`, `models:/name/version`, or the same without `models:/`.

    Raises:
        UserError: no such name, alias or version; the message lists the others.
    """
    name, at, alias = reference.removeprefix("models:/").partition("@")
    number = ""
    if not at:
        name, _, number = name.partition("/")
    if not name or not (alias or number):
        raise UserError(f"{reference}: write models:/name@alias or models:/name/version")
    try:
        by_alias = aliases(client, name)
    except UserError as error:
        raise UserError(f"{reference}: {error}") from error
    if alias:
        number = by_alias.get(alias, "")
        if not number:
            known = ", ".join(f"@{key} (version {value})" for key, value in sorted(by_alias.items()))
            raise UserError(f"{reference}: {name} has no alias {alias}; it has: {known or 'none'}")
    return get_version(client, name, number, reference)


def get_version(client: Any, name: str, number: str, reference: str | None = None) -> Any:
    """A version by number.

    Raises:
        UserError: there is none; the message lists the others.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        _raise_unless_missing(error)
        known = ", ".join(str(version.version) for version in list_versions(client, name)) or "none"
        message = f"{reference or f'{name}/{number}'}: {name} has no version {number}; it has: {known}"
        raise UserError(message) from error


def _raise_unless_missing(error: Any) -> None:
    if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        raise error


def json_tag(version: Any, key: str) -> Any:
    """Value of a JSON tag; None where the version has no such tag."""
    text = version.tags.get(key)
    return None if text is None else json.loads(text)


def set_tags(client: Any, version: Any, values: dict[str, str]) -> None:
    """Set those tags of a version that differ."""
    for key, value in values.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, str(version.version), key, value)
