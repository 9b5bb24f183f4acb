"""Ctrl-C while a command is still loading its libraries ends it quietly with 130. Standard library only (layer 6).

Imported first by every command, for what it does: `import nvembed.pipeline.early`. The handlers of a run (`signals.py`)
take over when it begins; until then nothing has been written that would have to be tidied up.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once, without a traceback."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, leave)
