"""The audit's count of documents that serve many queries."""

from collections import Counter

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.data.tables import SCORED_IDS
from nvembed.mining.audit import HUBS, Audit

IDS = [f"d{number:02d}" for number in range(HUBS + 5)]


@given(st.lists(st.lists(st.lists(st.sampled_from(IDS), max_size=9), max_size=6), max_size=5), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_hubs_are_counted_over_tables(tables, together):
    audit, counter = Audit(hub_rows=together), Counter()
    for rows in tables:
        lists = [[{"id": key, "score": None} for key in keys] for keys in rows]
        audit.add_hubs(pa.chunked_array([pa.array(lists, SCORED_IDS)]))
        counter.update(key for keys in rows for key in keys)
    summary = audit.hub_summary()
    largest = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:HUBS]
    assert summary["largest"] == [{"id": key, "queries": count} for key, count in largest]
    assert summary["documents"] == len(counter)
    assert summary["share_of_top_percent"] == (largest[0][1] / counter.total() if counter else 0.0)
