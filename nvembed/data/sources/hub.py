"""A data set on the Hugging Face hub (or a local folder `datasets` can load); code inside it is never run."""

from __future__ import annotations

from nvembed.data.config import HubSource
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.rows import check_columns, pairs_to_rows, read_pairs, require_every_split, rows_of_records
from nvembed.storage import UserError


def read_hub(config: HubSource) -> SourceRows:
    """Stream one split of the data set and read its rows.

    Raises:
        UserError: it cannot be loaded, or its columns are of neither shape.
    """
    import datasets

    place = f"hub:{config.path}"
    try:
        loaded = datasets.load_dataset(
            config.path, config.config_name, split=config.split, revision=config.revision, streaming=True
        )
        records = iter(loaded)
        first = next(records, None)
    except Exception as error:  # `datasets` raises many unrelated kinds: not found, offline, bad split, bad config
        raise UserError(
            f"{place} (config {config.config_name}, split {config.split}) cannot be loaded: "
            f"{type(error).__name__}: {error}. Check the name, the split and the connection."
        ) from error
    if first is None:
        raise UserError(f"{place}: split {config.split} has no rows.")
    check_columns(first, place)

    def rows():  # type: ignore[no-untyped-def]
        yield first
        yield from records

    table = read_pairs(rows_of_records(rows(), place))
    result = pairs_to_rows(table, config.name, config.test_share, config.licence)
    require_every_split(result, config.name, "Raise test_share or take a larger split.")
    return result
