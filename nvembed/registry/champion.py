"""Compare-and-set of the alias `champion`, its history and rollback.

MLflow moves an alias without comparing it with an expected value. So a process first takes a lock: a registered model
with a reserved name (`<name>.nvembed-lock.<n>`), since MLflow lets exactly one process create it. Under the lock it
reads the alias again, writes the planned move into the history, and moves. A lock lasts a few calls; the gate is
evaluated before. A lock left by a killed process is overtaken by the next number once a waiter has seen it unchanged
for `PATIENCE_SECONDS` of its own clock, and a process gives its lock up after `HOLD_SECONDS`: no clock of one machine
is compared with another's.

Not prevented: another client that moves the alias in MLflow itself between our read and our move. The alias is read
again afterwards, and the history names both moves.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from nvembed.core.runtime import user_name
from nvembed.registry.client import CHAMPION, HISTORY, LOCK, aliases, get_model, get_version
from nvembed.registry.evidence import GateResult

PATIENCE_SECONDS = 90.0
HOLD_SECONDS = 60.0  # six calls; with a slower registry nothing is moved
POLL_SECONDS = 0.3
HISTORY_ENTRIES = 20  # MLflow keeps 5,000 characters of a tag
PROMOTE, ROLLBACK = "promote", "rollback"
Entry = Mapping[str, Any]


class PromotionRefusedError(Exception):
    """`champion` was not moved by this process; the message says where it is."""


def process_name() -> str:
    """Name of this process in locks and history: user, machine, process id."""
    return f"{user_name()}@{socket.gethostname()}:{os.getpid()}"[:100]  # twenty of them fit a tag


def move_champion(client: Any, name: str, number: str, expected: str | None, action: str = PROMOTE) -> None:
    """Compare and set: `champion` goes from `expected` (None: nowhere) to `number`.

    Raises:
        PromotionRefusedError: it is not at `expected` any more, or another process is moving it.
    """
    with champion_lock(client, name) as lock:
        model = get_model(client, name)
        current = None if CHAMPION not in model.aliases else str(model.aliases[CHAMPION])
        if current != expected:
            raise PromotionRefusedError(
                f"champion of {name} was {_shown(expected)} when this was decided and is {_shown(current)} now: "
                "another process was faster. Run the command again to compare with that one."
            )
        entry = {"version": number, "from": current, "action": action, "at": round(time.time()), "by": process_name()}
        entries = [*effective(_history(model), current), entry][-HISTORY_ENTRIES:]
        lock.check()  # an overtaken process must not overwrite the history of the one that overtook it
        # the history comes before the move: a killed process leaves a trace
        client.set_registered_model_tag(name, HISTORY, json.dumps(entries))
        lock.check()
        client.set_registered_model_alias(name, CHAMPION, number)
        after = aliases(client, name).get(CHAMPION)
    if after != number:
        raise PromotionRefusedError(
            f"champion of {name} was moved to {_shown(number)} and is {_shown(after)}: "
            "another client moved it without the lock"
        )


def promote_candidate(client: Any, result: GateResult) -> None:
    """Move `champion` to a version that passed the gate, from the champion that it was compared with.

    Raises:
        PromotionRefusedError: the gate refused it, or champion has changed since.
    """
    if not result.passed:
        raise PromotionRefusedError(result.refusal())
    move_champion(client, result.name, result.version, result.champion)


def roll_back(client: Any, name: str) -> tuple[str, str]:
    """Put `champion` back to the version it was before; (from, to).

    Raises:
        PromotionRefusedError: there is no earlier champion, or another process is moving it.
        UserError: the earlier version was deleted.
    """
    current = aliases(client, name).get(CHAMPION)
    if current is None:
        raise PromotionRefusedError(f"{name} has no champion: nothing to roll back")
    before = champions(read_history(client, name), current)[:-1]
    if not before:
        raise PromotionRefusedError(f"champion of {name} is {_shown(current)} and no earlier one is recorded")
    get_version(client, name, before[-1])
    move_champion(client, name, before[-1], current, ROLLBACK)
    return current, before[-1]


def _shown(number: str | None) -> str:
    return "nowhere" if number is None else f"version {number}"


# -- history --------------------------------------------------------------------------------------------------------


def read_history(client: Any, name: str) -> list[Entry]:
    """Moves of `champion`, oldest first."""
    return _history(get_model(client, name))


def _history(model: Any) -> list[Entry]:
    return list(json.loads(model.tags.get(HISTORY, "[]")))


def effective(entries: Sequence[Entry], current: str | None) -> list[Entry]:
    """The moves that took place: the last entry may be of a process that was killed before it moved."""
    if entries and entries[-1]["version"] != current and entries[-1]["from"] == current:
        return list(entries[:-1])
    return list(entries)


def champions(entries: Sequence[Entry], current: str | None) -> list[str]:
    """Champions as a stack, the current one last: a promotion adds one, a rollback takes one away."""
    stack: list[str] = []
    for entry in effective(entries, current):
        if entry["from"] is not None and (not stack or stack[-1] != entry["from"]):
            stack.append(entry["from"])  # older than the history, or moved by hand
        if entry["action"] == ROLLBACK and len(stack) > 1:
            stack.pop()
        if not stack or stack[-1] != entry["version"]:
            stack.append(entry["version"])
    if current is not None and (not stack or stack[-1] != current):
        stack.append(current)
    return stack


def champion_before(entries: Sequence[Entry], number: str, current: str | None) -> str | None:
    """The champion that a version is compared with: the current one, or the one before where it is that itself."""
    if current != number:
        return current
    stack = champions(entries, current)
    return stack[-2] if len(stack) > 1 else None


# -- the lock -------------------------------------------------------------------------------------------------------


class ChampionLock:
    """A lock on `champion` that this process created."""

    def __init__(self, client: Any, name: str, number: int, token: str) -> None:
        self._client, self._name, self._number, self._token = client, name, number, token
        self._since = time.monotonic()

    def check(self) -> None:
        """Raise PromotionRefusedError unless the lock is still ours and younger than HOLD_SECONDS."""
        locks = list_locks(self._client, self._name)
        mine = locks.get(self._number)
        if mine is None or mine["token"] != self._token or max(locks) != self._number:
            raise PromotionRefusedError(f"this process was so slow that another one moves champion of {self._name}")
        if time.monotonic() - self._since > HOLD_SECONDS:
            raise PromotionRefusedError(
                f"the registry took more than {HOLD_SECONDS:.0f} s for a few calls; champion of {self._name} was left "
                "where it is. Run the command again."
            )

    def release(self) -> None:
        """Delete it and those it overtook, lowest first; never one of another live process."""
        for number, other in sorted(list_locks(self._client, self._name).items()):
            if number < self._number or other["token"] == self._token:
                with suppress(Exception):  # the next mover overtakes what stays
                    self._client.delete_registered_model(_lock_name(self._name, number))


def _lock_name(name: str, number: int) -> str:
    return f"{name}{LOCK}{number}"


def list_locks(client: Any, name: str) -> dict[int, dict[str, str]]:
    """Number -> token and holder of every lock of a model."""
    prefix = name + LOCK
    matches = client.search_registered_models(filter_string=f"name LIKE '{prefix}%'")
    ours = [model for model in matches if model.name.startswith(prefix) and model.name.removeprefix(prefix).isdigit()]
    return {
        int(model.name.removeprefix(prefix)): {
            "token": model.tags.get("token", ""),
            "holder": model.tags.get("holder", "unknown"),
        }
        for model in ours
    }


@contextmanager
def champion_lock(client: Any, name: str) -> Iterator[ChampionLock]:
    """The lock of a model's `champion` for the block.

    Raises:
        PromotionRefusedError: other processes had it for three times PATIENCE_SECONDS.
        UserError: there is no such model.
    """
    get_model(client, name)
    lock = _acquire(client, name)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(client: Any, name: str) -> ChampionLock:
    from mlflow.exceptions import MlflowException

    token = uuid.uuid4().hex
    seen: tuple[int, str] | None = None
    since = begun = time.monotonic()
    while time.monotonic() - begun < 3 * PATIENCE_SECONDS:
        locks = list_locks(client, name)
        top = max(locks, default=-1)
        now = (top, locks[top]["token"] if locks else "")
        if now != seen:
            seen, since = now, time.monotonic()
        if not locks or time.monotonic() - since > PATIENCE_SECONDS:
            try:
                client.create_registered_model(
                    _lock_name(name, top + 1),
                    tags={"token": token, "holder": process_name()},
                    description=f"nvembed is moving the alias {CHAMPION} of {name}; gone in a moment.",
                )
                return ChampionLock(client, name, top + 1, token)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        time.sleep(POLL_SECONDS)
    raise PromotionRefusedError(
        f"other processes move champion of {name} all the time, or have a lock that you may not see. Look in MLflow "
        f"for registered models named {name}{LOCK}*; if no process moves it, delete them."
    )
