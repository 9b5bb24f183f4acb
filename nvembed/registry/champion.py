"""Moving `champion`: one mover at a time, and only from where the mover thinks it is; and back again.

MLflow moves an alias without looking at where it was. So a mover first takes a lock: a registered model with a reserved
name (`<name>.nvembed-lock.<n>`), as making one is the thing of which MLflow lets exactly one succeed. Under the lock it
reads the alias again, writes what it is about to do into the history, and moves. Locks are held for a few calls; the
gate is judged before. One that a killed mover left is overtaken by the next number once a waiter has seen it unchanged
for `PATIENCE_SECONDS` of its own clock, while a mover that has held its lock for `HOLD_SECONDS` gives up: no clock of
one machine is compared with another's.

What this cannot stop: somebody who moves the alias in MLflow itself between our look and our move. The move is looked
at afterwards, and the history names both.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from nvembed.registry.client import CHAMPION, HISTORY, LOCK, aliases, get_model, get_version
from nvembed.registry.evidence import GateResult

PATIENCE_SECONDS = 90.0
HOLD_SECONDS = 60.0  # six calls; a registry that takes longer is not fit to be moved on
POLL_SECONDS = 0.3
HISTORY_ENTRIES = 20  # MLflow keeps 5,000 characters of a tag
PROMOTE, ROLLBACK = "promote", "rollback"
Entry = Mapping[str, Any]


class PromotionRefusedError(Exception):
    """`champion` was not moved, and is where it was, or where somebody else put it. The message says which."""


def holder() -> str:
    """Who moves: user, machine, process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{os.getpid()}"[:100]  # twenty of them fit a tag


def move_champion(client: Any, name: str, number: str, expected: str | None, action: str = PROMOTE) -> None:
    """Compare and set: `champion` goes from `expected` (None: nowhere) to `number`.

    Raises:
        PromotionRefusedError: it was not at `expected` any more, or somebody else is moving it.
    """
    with lock(client, name) as held:
        model = get_model(client, name)
        current = None if CHAMPION not in model.aliases else str(model.aliases[CHAMPION])
        if current != expected:
            raise PromotionRefusedError(
                f"champion of {name} was {_shown(expected)} when this was decided and is {_shown(current)} now: "
                "somebody else was faster. Run the command again to decide against that one."
            )
        entry = {"version": number, "from": current, "action": action, "at": round(time.time()), "by": holder()}
        entries = [*effective(_history(model), current), entry][-HISTORY_ENTRIES:]
        held.check()  # an overtaken mover must not write over the history of the one that overtook it
        client.set_registered_model_tag(name, HISTORY, json.dumps(entries))  # before the move: a killed one is seen
        held.check()
        client.set_registered_model_alias(name, CHAMPION, number)
        after = aliases(client, name).get(CHAMPION)
    if after != number:
        raise PromotionRefusedError(
            f"champion of {name} was moved to {_shown(number)} and is {_shown(after)}: somebody moved it without asking"
        )


def promote_candidate(client: Any, result: GateResult) -> None:
    """Move `champion` to a version that passed the gate, from the champion that it was compared with.

    Raises:
        PromotionRefusedError: the gate refused it, or champion is another one by now.
    """
    if not result.passed:
        raise PromotionRefusedError(result.refusal())
    move_champion(client, result.name, result.version, result.champion)


def roll_back(client: Any, name: str) -> tuple[str, str]:
    """Put `champion` back to the version it was before; (from, to).

    Raises:
        PromotionRefusedError: there is no earlier champion, or somebody else is moving it.
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
    """The moves that took place: the last one may have been announced by a mover that was killed before it moved."""
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
    """The champion a version stands against: the current one, or, where it is that itself, the one before."""
    if current != number:
        return current
    stack = champions(entries, current)
    return stack[-2] if len(stack) > 1 else None


# -- the lock -------------------------------------------------------------------------------------------------------


class HeldLock:
    """A lock this process made."""

    def __init__(self, client: Any, name: str, number: int, token: str) -> None:
        self._client, self._name, self._number, self._token = client, name, number, token
        self._since = time.monotonic()

    def check(self) -> None:
        """Raise unless the lock is still ours and young."""
        found = list_locks(self._client, self._name)
        mine = found.get(self._number)
        if mine is None or mine["token"] != self._token or max(found) != self._number:
            raise PromotionRefusedError(f"this process was so slow that somebody else moves champion of {self._name}")
        if time.monotonic() - self._since > HOLD_SECONDS:
            raise PromotionRefusedError(
                f"the registry took more than {HOLD_SECONDS:.0f} s for a few calls; champion of {self._name} was left "
                "where it is. Run the command again."
            )

    def release(self) -> None:
        """Delete it and those it overtook, lowest first; never one that is not ours."""
        for number, found in sorted(list_locks(self._client, self._name).items()):
            if number < self._number or found["token"] == self._token:
                with suppress(Exception):  # the next mover overtakes what stays
                    self._client.delete_registered_model(_lock_name(self._name, number))


def _lock_name(name: str, number: int) -> str:
    return f"{name}{LOCK}{number}"


def list_locks(client: Any, name: str) -> dict[int, dict[str, str]]:
    """Number -> token and holder of every lock of a model."""
    prefix = name + LOCK
    found = client.search_registered_models(filter_string=f"name LIKE '{prefix}%'")
    ours = [model for model in found if model.name.startswith(prefix) and model.name.removeprefix(prefix).isdigit()]
    return {
        int(model.name.removeprefix(prefix)): {
            "token": model.tags.get("token", ""),
            "holder": model.tags.get("holder", "somebody"),
        }
        for model in ours
    }


@contextmanager
def lock(client: Any, name: str) -> Iterator[HeldLock]:
    """Hold the lock of a model's `champion`.

    Raises:
        PromotionRefusedError: somebody has held it, alive, for longer than anyone should.
        UserError: there is no such model.
    """
    get_model(client, name)
    held = _take(client, name)
    try:
        yield held
    finally:
        held.release()


def _take(client: Any, name: str) -> HeldLock:
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
                    tags={"token": token, "holder": holder()},
                    description=f"nvembed is moving the alias {CHAMPION} of {name}; gone in a moment.",
                )
                return HeldLock(client, name, top + 1, token)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        time.sleep(POLL_SECONDS)
    raise PromotionRefusedError(
        f"somebody is moving champion of {name} all the time, or holds a lock you may not see. Look in MLflow for "
        f"registered models named {name}{LOCK}*; if nobody moves it, delete them."
    )
