"""Which revision of the code wrote an artifact (layer 0)."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_revision(folder: Path | None = None) -> str | None:
    """Revision of a checkout (by default the one this package runs from), `-dirty` added when it has changes.

    None outside a checkout. Writes nothing: `git describe --dirty` would refresh git's index.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        place = folder or Path(__file__).parent
        return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return f"{revision}-dirty" if git("status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.SubprocessError):
        return None
