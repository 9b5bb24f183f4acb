"""CVE description -> CWE weakness, from the MITRE catalogue inside the PyPI package `cwe2`.

Each weakness lists observed examples: a CVE and a sentence on how the flaw shows there. The sentence is the query, the
weaknesses MITRE lists that CVE under are its positives.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from nvembed.data.config import CweSource
from nvembed.data.documents import Documents
from nvembed.data.sources.base import RejectLog, SourceRows, empty_splits, package_file, split_by_hash, tidy
from nvembed.data.tables import Document
from nvembed.types import ScoredId, TaskType, TrainingExample

PACKAGE, FILE = "cwe2", "cwe2/database_v49/cwec_v4.14.xml"
TEST_SHARE, DEV_SHARE = 0.2, 0.1
SPLIT_RULE = (
    "by hash of the CVE id (20 % test, 10 % dev), so all descriptions of one CVE are in one split; the 938 weakness "
    "documents are shared by all splits, as in any retrieval task"
)
LICENCE = "CWE content (c) The MITRE Corporation, free to use under the CWE Terms of Use with attribution"


def read_cwe(config: CweSource) -> SourceRows:
    """Read the catalogue; deprecated weaknesses and references other than CVE ids are left out."""
    documents, positives, described, rejects = _parse(package_file(PACKAGE, FILE))
    examples = empty_splits()
    for cve, descriptions in sorted(described.items()):
        split = split_by_hash(cve, salt="cwe", test_share=TEST_SHARE, dev_share=DEV_SHARE)
        for number, description in enumerate(sorted(descriptions)):
            examples[split].append(
                TrainingExample(
                    id=cve if number == 0 else f"{cve}#{number}",
                    dataset=config.name,
                    task=TaskType.RETRIEVAL,
                    query=description,
                    positives=tuple(ScoredId(weakness) for weakness in sorted(positives[cve])),
                )
            )
    return SourceRows(
        task=TaskType.RETRIEVAL,
        split_rule=SPLIT_RULE,
        licence=LICENCE,
        documents=Documents.of(documents),
        examples=examples,
        documents_split=False,
        rejects=rejects,
    )


def _parse(path: Path) -> tuple[list[Document], dict[str, set[str]], dict[str, set[str]], RejectLog]:
    """Weakness documents; weaknesses and descriptions by CVE id."""
    root = ElementTree.parse(path).getroot()
    space = {"c": root.tag[1:].split("}")[0]}
    documents: list[Document] = []
    positives: dict[str, set[str]] = defaultdict(set)
    described: dict[str, set[str]] = defaultdict(set)
    rejects = RejectLog()
    for weakness in root.iterfind("c:Weaknesses/c:Weakness", space):
        if weakness.get("Status") == "Deprecated":
            continue
        identifier = f"CWE-{weakness.get('ID')}"
        text = tidy("".join(weakness.find("c:Description", space).itertext()))  # type: ignore[union-attr]
        documents.append(Document(identifier, tidy(weakness.get("Name")), text))
        for example in weakness.iterfind(".//c:Observed_Example", space):
            cve = tidy(example.findtext("c:Reference", namespaces=space))
            description = tidy(example.findtext("c:Description", namespaces=space))
            rejects.rows += 1
            if not cve.startswith("CVE-"):
                rejects.add(path.name, len(documents), "reference is not a CVE id")
            elif not description:
                rejects.add(path.name, len(documents), "empty description")
            else:
                positives[cve].add(identifier)
                described[cve].add(description)
    return documents, positives, described, rejects
