"""Three data sets from the Human Phenotype Ontology: lay term -> definition, classes, graded pairs of names."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

from nvembed.data.config import HpoClassesSource, HpoRetrievalSource, HpoSimilaritySource
from nvembed.data.documents import Documents
from nvembed.data.sources.base import SourceRows, empty_splits
from nvembed.data.sources.ontology import BRANCH_RULE, LICENCE, Ontology, load_ontology
from nvembed.data.tables import SPLITS, Document
from nvembed.text.identity import stable_hash
from nvembed.types import ScoredId, TaskType, TrainingExample

MIN_CLASS_MEMBERS = 10
SIMILARITY_PAIRS = {"train": 4000, "dev": 1000, "test": 1000}  # distinct unordered pairs, before caps
SIMILARITY_BINS = 10


def read_hpo_retrieval(config: HpoRetrievalSource) -> SourceRows:
    """Lay synonym -> definition. A synonym of terms in two splits is left out."""
    ontology = load_ontology()
    defined = [term for term in ontology.terms.values() if term.definition]
    meanings: dict[str, list[str]] = defaultdict(list)
    for term in defined:
        for synonym in term.lay_synonyms:
            if term.id not in meanings[synonym.casefold()]:
                meanings[synonym.casefold()].append(term.id)
    examples = empty_splits()
    seen: set[str] = set()
    for term in defined:
        for number, synonym in enumerate(term.lay_synonyms):
            key = synonym.casefold()
            splits = {ontology.terms[meaning].split for meaning in meanings[key]}
            if key in seen or len(splits) > 1:
                continue
            seen.add(key)
            examples[term.split].append(
                TrainingExample(
                    id=f"{term.id}/{number}",
                    dataset=config.name,
                    task=TaskType.RETRIEVAL,
                    query=synonym,
                    positives=tuple(ScoredId(meaning) for meaning in meanings[key]),
                )
            )
    return SourceRows(
        task=TaskType.RETRIEVAL,
        split_rule=BRANCH_RULE + "; queries and their definitions are in the same split",
        licence=f"{LICENCE} ({ontology.version})",
        documents=Documents.of(Document(term.id, "", term.definition) for term in defined),
        examples=examples,
        documents_split=True,
    )


def read_hpo_classes(config: HpoClassesSource) -> SourceRows:
    """Name and definition -> the child of its top-level branch; terms with exactly one, in classes with members."""
    ontology = load_ontology()
    documents, examples = [], empty_splits()
    for split in SPLITS:
        labels = {term: label for term, label in ontology.classes(split).items() if ontology.terms[term].definition}
        members = Counter(labels.values())
        for identifier, label in sorted(labels.items()):
            if members[label] < MIN_CLASS_MEMBERS:
                continue
            term = ontology.terms[identifier]
            text, name = f"{term.name}. {term.definition}", ontology.terms[label].name
            documents.append(Document(identifier, "", text, label=name, split=split))
            examples[split].append(TrainingExample(identifier, config.name, TaskType.CLASSIFICATION, text, label=name))
    return SourceRows(
        task=TaskType.CLASSIFICATION,
        split_rule=BRANCH_RULE + "; held-out classes never occur in training (k-NN refers to the held-out split only)",
        licence=f"{LICENCE} ({ontology.version})",
        documents=Documents.of(documents),
        examples=examples,
        documents_split=True,
    )


def read_hpo_similarity(config: HpoSimilaritySource) -> SourceRows:
    """Pairs of names graded by Wu-Palmer similarity: synthetic labels, spread over 0-1; train in both directions."""
    ontology = load_ontology()
    examples, used = empty_splits(), {}
    for split in SPLITS:
        for a, b, score in _spread_pairs(ontology, split, SIMILARITY_PAIRS[split]):
            used[a] = used[b] = split
            examples[split].append(_pair(config.name, ontology, a, b, score))
            if split == "train":
                examples[split].append(_pair(config.name, ontology, b, a, score))
    return SourceRows(
        task=TaskType.STS,
        split_rule=BRANCH_RULE + "; both names of a pair are in the pair's split",
        licence=f"{LICENCE} ({ontology.version})",
        documents=Documents.of(
            Document(term, "", ontology.terms[term].name, split=split) for term, split in sorted(used.items())
        ),
        examples=examples,
        documents_split=True,
        synthetic=True,
    )


def _pair(dataset: str, ontology: Ontology, a: str, b: str, score: float) -> TrainingExample:
    return TrainingExample(
        id=f"{a}~{b}",
        dataset=dataset,
        task=TaskType.STS,
        query=ontology.terms[a].name,
        positives=(ScoredId(b, score),),
    )


def _spread_pairs(ontology: Ontology, split: str, count: int) -> list[tuple[str, str, float]]:
    """Distinct pairs of one split, as evenly over `SIMILARITY_BINS` score bins as the graph allows."""
    wanted = count // SIMILARITY_BINS
    bins: dict[int, list[tuple[str, str, float]]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    generator = random.Random(stable_hash("hpo_similarity", split))
    tries = _endless_pairs(ontology, split, generator)
    for _ in range(count * 20):
        if sum(map(len, bins.values())) == wanted * SIMILARITY_BINS:
            break
        a, b = next(tries)
        pair = (min(a, b), max(a, b))
        if a == b or pair in seen:
            continue
        seen.add(pair)
        score = ontology.similarity(a, b)
        place = min(int(score * SIMILARITY_BINS), SIMILARITY_BINS - 1)
        if len(bins[place]) < wanted:
            bins[place].append((a, b, round(score, 6)))
    return [pair for place in sorted(bins) for pair in bins[place]]


def _endless_pairs(ontology: Ontology, split: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    """Endless pairs: a term, one of its ancestors (or itself) at any height, any term of the split below that.

    Uniform pairs would nearly all share only the root; choosing the height first spreads the scores.
    """
    members = sorted(term.id for term in ontology.terms.values() if term.split == split)
    lineage = {term: sorted(ontology.ancestors[term] | {term}) for term in members}
    below: dict[str, list[str]] = defaultdict(list)
    for term in members:
        for ancestor in lineage[term]:
            below[ancestor].append(term)
    while True:
        term = generator.choice(members)
        yield term, generator.choice(below[generator.choice(lineage[term])])
