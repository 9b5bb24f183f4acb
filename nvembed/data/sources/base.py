"""The result of a source (`SourceRows`), and helpers that sources share."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvembed.data.documents import Documents
from nvembed.data.tables import SPLITS
from nvembed.text.identity import MAX_TEXT_BYTES, unit_hash
from nvembed.types import TaskType, TrainingExample, UserError

MAX_LISTED = 100  # rejects written out per data set; all are counted


@dataclass
class RejectLog:
    """Malformed rows of one data set: counted by reason, the places of the first `MAX_LISTED`. Never their text."""

    rows: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Rows refused."""
        return sum(self.by_reason.values())

    def add(self, file: str, line: int, reason: str) -> None:
        """Count one malformed row; `line` is 1-based (for parquet and hub data sets: the row number)."""
        self.by_reason[reason] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append({"file": file, "line": line, "reason": reason})

    def reasons(self) -> str:
        """Why rows were refused, the most frequent reason first."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.by_reason.most_common())

    def check(self, dataset: str, max_share: float) -> None:
        """Refuse a data set with too many malformed rows.

        Raises:
            UserError: counts by reason, the first places, what to do.
        """
        if self.total <= max_share * self.rows:
            return
        reasons = self.reasons()
        places = "; ".join(f"{row['file']}:{row['line']} {row['reason']}" for row in self.listed[:5])
        raise UserError(
            f"data set {dataset}: {self.total} of {self.rows} rows are malformed, more than "
            f"prepare.max_reject_share = {max_share} allows ({reasons}). First: {places}. "
            "Mend the rows, or raise prepare.max_reject_share to leave them out."
        )


@dataclass
class SourceRows:
    """A data set as its source gives it, before near duplicates are dropped and caps applied.

    Attributes:
        split_rule: one sentence: how train, dev and test are separated.
        documents_split: True where the documents of held-out examples are in their split too; False for a corpus
            that all splits share, as in most retrieval tasks.
        synthetic: True where labels were computed rather than given by people.
        positives_from: of classes and clusters: "examples" (mining draws them) or "labels" (the label's text).
        examples: rows by split, in no particular order; `prepare` orders and caps them.
    """

    task: TaskType
    split_rule: str
    licence: str
    documents: Documents
    examples: dict[str, list[TrainingExample]]
    documents_split: bool
    synthetic: bool = False
    positives_from: str = "examples"
    rejects: RejectLog = field(default_factory=RejectLog)


def empty_splits() -> dict[str, list[TrainingExample]]:
    """`{train: [], dev: [], test: []}`."""
    return {split: [] for split in SPLITS}


def split_by_hash(key: str, *, salt: str, test_share: float, dev_share: float) -> str:
    """Split of a key: the same key has the same split whatever else is in the data."""
    position = unit_hash(salt, key)
    if position < test_share:
        return "test"
    return "dev" if position < test_share + dev_share else "train"


def package_file(package: str, relative: str) -> Path:
    """A file inside an installed package; the package is never imported.

    Raises:
        UserError: the package or the file is not there, with the line that installs it.
    """
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(relative)))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the data set needs the package {package}, which is not installed. Run: pip install 'nvembed[quickstart]'"
        ) from error
    if not path.is_file():
        raise UserError(
            f"{path}: not in the installed {package} {importlib.metadata.version(package)}. "
            "Run: pip install --force-reinstall 'nvembed[quickstart]'"
        )
    return path


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates: as broken encodings and `\\ud800` escapes produce."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def too_long(text: str) -> bool:
    """Whether a text has more bytes than an encoder takes: a file that was taken for a text."""
    return len(text) > MAX_TEXT_BYTES // 4 and len(text.encode()) > MAX_TEXT_BYTES  # a character has 4 bytes at most


def tidy(text: str | None) -> str:
    """Text with every run of white space turned into one space."""
    return " ".join((text or "").split())
