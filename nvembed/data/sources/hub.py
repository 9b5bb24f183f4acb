"""A data set on the Hugging Face hub, or a folder that `datasets` saved; code inside it is never run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nvembed.core import storage
from nvembed.data.config import HubSource
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.files import column_check, rows_of_task
from nvembed.data.sources.rows import rows_of_records
from nvembed.types import UserError

SAVED = ("dataset_dict.json", "dataset_info.json")  # what `save_to_disk` writes


def read_hub(config: HubSource) -> SourceRows:
    """Read one split: streamed from the hub, memory-mapped from a saved folder. Class numbers become their names.

    Raises:
        UserError: it cannot be loaded, its columns are of no known shape, or a split is empty.
    """
    place = f"hub:{config.path}"
    try:
        loaded = _load(config)
        records = iter(loaded)
        first = next(records, None)
    except Exception as error:  # `datasets` raises many unrelated kinds: missing, offline, bad split, bad config
        raise UserError(
            f"{place} (config {config.config_name}, split {config.split}) cannot be loaded: "
            f"{type(error).__name__}: {error}. Check the name, the split and the connection."
        ) from error
    if first is None:
        raise UserError(f"{place}: split {config.split} has no rows.")
    column_check(config)(first, place)
    names = _class_names(loaded)

    def rows() -> Iterator[Mapping[str, Any]]:
        yield _named(first, names)
        for record in records:
            yield _named(record, names)

    return rows_of_task(rows_of_records(rows(), place), config)


def _load(config: HubSource) -> Iterable[dict[str, Any]]:
    import datasets

    if any(storage.exists(storage.join(config.path, name)) for name in SAVED if _is_place(config.path)):
        saved = datasets.load_from_disk(config.path)
        split = saved[config.split] if isinstance(saved, datasets.DatasetDict) else saved
        assert isinstance(split, datasets.Dataset)
        return split
    streamed: Iterable[dict[str, Any]] = datasets.load_dataset(
        config.path, config.config_name, split=config.split, revision=config.revision, streaming=True
    )
    return streamed


def _is_place(path: str) -> bool:
    """False for a path that can only be a name on the hub, so that no remote store is queried."""
    return "://" in path or storage.exists(path)


def _class_names(loaded: Any) -> dict[str, list[str]]:
    """Names of the classes of every column of class numbers."""
    features = getattr(loaded, "features", None) or {}
    return {key: list(kind.names) for key, kind in features.items() if hasattr(kind, "names")}


def _named(record: Mapping[str, Any], names: Mapping[str, list[str]]) -> Mapping[str, Any]:
    if not names:
        return record
    named = {}
    for key, kinds in names.items():
        number = record.get(key)  # -1 means "no label" in data sets with hidden labels
        named[key] = kinds[number] if isinstance(number, int) and number >= 0 else None
    return {**record, **named}
