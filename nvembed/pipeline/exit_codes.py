"""Exit codes of every command, and the message an error ends with."""

from __future__ import annotations

import enum
import time
import traceback
from collections.abc import Callable

from pydantic import ValidationError

from nvembed.core import storage
from nvembed.core.messages import first_line
from nvembed.core.secrets import mask
from nvembed.preflight.findings import PreflightError
from nvembed.types import UserError

MAX_CHARACTERS = 1000  # of an error's first line on the console


class ExitCode(enum.IntEnum):
    """The exit code of a command of nvembed."""

    DONE = 0
    USAGE = 2  # arguments, recipe, data or a damaged artifact: the user can correct it
    PREFLIGHT = 3
    FAILED = 4
    GATE = 5
    INTERRUPTED = 130


class GatePreconditionError(RuntimeError):
    """A gate refused: its precondition does not hold. Exit code 5."""


class PendingError(RuntimeError):
    """Every step ran, but some wait for a registry that does not answer. Exit code 4."""


def report_error(error: BaseException, write: Callable[[str], None], out: str | None = None) -> int:
    """Write what went wrong and return the exit code.

    Args:
        error: users' mistakes are written as they are; of anything else the first line is written, and the traceback
            goes to a file.
        write: takes a line.
        out: output of the run; the traceback is written below its `logs/`, or with `write` where there is no output.
    """
    if isinstance(error, UserError | ValidationError):
        write(f"error: {error}")
        return ExitCode.USAGE
    if isinstance(error, PreflightError):
        write(f"error: {error}")
        return ExitCode.PREFLIGHT
    if isinstance(error, GatePreconditionError):
        write(f"refused: {error}")
        return ExitCode.GATE
    if isinstance(error, PendingError):
        write(f"error: {error}")
        return ExitCode.FAILED
    text = mask("".join(traceback.format_exception(error)))
    write(f"error: {first_line(error)[:MAX_CHARACTERS]}")
    if out is None:
        write(text)
        return ExitCode.FAILED
    path = storage.join(out, "logs", f"error-{time.strftime('%Y%m%d-%H%M%S')}.log")
    try:
        storage.write_bytes(path, text.encode("utf-8", "replace"))
        write(f"the full error is in {path}")
    except OSError:  # the disk is full or gone, which may be the error itself
        write(text)
    return ExitCode.FAILED
