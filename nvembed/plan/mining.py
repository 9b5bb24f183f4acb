"""The plan of the `mine` step: rows, operations, bytes, shards, passes over the documents, memory, hours.

Counts are exact integers for given rows; seconds come from measured rates of one core (`encoding.py`, `searching.py`).
Not in them: laying texts out, selecting in Python, waiting for storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nvembed.mining.config import Bm25Retriever, MineConfig
from nvembed.plan.corpora import Corpus, Division, Rows, division, searched_sets
from nvembed.plan.encoding import TEXT_BYTES, EncoderSizes, encode_memory, encode_seconds, encoder_sizes, on_gpus
from nvembed.plan.hardware import Hardware
from nvembed.plan.searching import NUMBER, search_flops, search_memory, search_seconds, shard_bytes
from nvembed.plan.sizes import Model
from nvembed.plan.work import flops_text, size_text, time_text
from nvembed.recipe.schema import Recipe
from nvembed.retrieval.bm25 import index_bytes
from nvembed.retrieval.config import ExactIndex, PackageModel

MANY_PASSES, MANY_TASKS, MANY_SHARDS = 16, 100_000, 100_000
PREPARED_DOCUMENT, PREPARED_EXAMPLE = 78, 5_000  # bytes that `prepare`, one process, holds at its peak; measured


@dataclass(frozen=True)
class ModelPlan:
    """One model over all corpora.

    Attributes:
        place: its key in the recipe's `mine` section.
        name: package, folder or hub name.
        encode_flops, encode_seconds: of all texts; seconds without the pool's start.
        search_flops, search_seconds: of all queries against all documents; None for a candidate filter.
        vector_bytes, shard_bytes: of the numbers; of the files.
        read_bytes: that all passes read.
    """

    place: str
    name: str
    dim: int
    encode_flops: float
    encode_seconds: float
    search_flops: int | None
    search_seconds: float | None
    vector_bytes: int
    shard_bytes: float
    read_bytes: float


@dataclass(frozen=True)
class MinePlan:
    """The plan of a mining step.

    Attributes:
        corpora, divisions: rows of every searched set; how those are cut whose rows are known.
        tokens, text_bytes: of all texts.
        encode_memory, search_memory: bytes of one actor on its host, at the most demanding model and set.
        unknown, missing: sets without rows; models whose sizes are not known on this machine.
        starts: seconds until the actors of all pools have started.
        notes: settings to change, and limits of the numbers.
    """

    corpora: Sequence[Corpus]
    divisions: Mapping[str, Division]
    models: Sequence[ModelPlan]
    tokens: float
    text_bytes: float
    encode_memory: float
    search_memory: float
    unknown: Sequence[str]
    missing: Sequence[str]
    starts: float
    notes: Sequence[str]

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole step; None where rows or sizes are not known."""
        if self.unknown or self.missing:
            return None
        return self.starts + sum(model.encode_seconds + (model.search_seconds or 0.0) for model in self.models)


def plan_mining(
    recipe: Recipe, hardware: Hardware, length: float, rows: Rows | None = None, trained: Model | None = None
) -> MinePlan:
    """Plan the `mine` step, or with `trained` the `mine_again` step.

    Args:
        length: mean tokens of a text; `max_query_length` and `max_document_length` cut it.
        rows: data set -> (queries, documents), where the sources have no caps.
        trained: the stage-1 model, which mines in the first retriever's place.
    """
    config = recipe.mine if trained is None else recipe.mine.model_copy(update={"reuse": None})
    searched = config.rule.type != "random" and config.reuse is None
    sets = searched_sets(recipe, rows)
    known = [corpus for corpus in sets if corpus.rows is not None]
    cuts = {
        corpus.name: division(corpus.queries, corpus.documents, config)
        for corpus in known
        if corpus.queries is not None and corpus.documents is not None
    }
    lengths = [
        min(length, cap or length) for cap in (config.encode.max_query_length, config.encode.max_document_length)
    ]
    tokens = sum((c.queries or 0) * lengths[0] + (c.documents or 0) * lengths[1] for c in known)
    models, missing, memory = [], [], [(0.0, 0.0)]
    for place, model in config.embedders() if searched else ():
        encoder, name = encoder_sizes(model), model.package if isinstance(model, PackageModel) else model.name
        if trained is not None and place == "retriever":
            encoder, name = EncoderSizes.of(trained), "the stage-1 model"
        if encoder is None:
            missing.append(name)
            continue
        models.append(_model_plan(place, name, encoder, known, cuts, tokens, lengths[1], config, hardware))
        most = max((search_memory(cuts[c.name], encoder.dim, c.documents or 0, config) for c in known), default=0.0)
        memory.append((encode_memory(encoder, config.encode, lengths[1]), most))
    return MinePlan(
        corpora=sets,
        divisions=cuts,
        models=models,
        tokens=tokens,
        text_bytes=tokens * TEXT_BYTES,
        encode_memory=max(one for one, _ in memory),
        search_memory=max(two for _, two in memory),
        unknown=[corpus.name for corpus in sets if corpus.rows is None],
        missing=missing,
        starts=hardware.start_seconds * max(len(models), 1),
        notes=_notes(config, known, cuts, lengths[1], hardware) if searched else ["nothing is encoded or searched"],
    )


def _model_plan(
    place: str,
    name: str,
    encoder: EncoderSizes,
    known: Sequence[Corpus],
    cuts: Mapping[str, Division],
    tokens: float,
    length: float,
    config: MineConfig,
    hardware: Hardware,
) -> ModelPlan:
    searches, kind, dim = not place.startswith("candidate_filter"), config.encode.vector_type, encoder.dim
    rows = sum(corpus.rows or 0 for corpus in known)
    passed = [(corpus.documents or 0) * cuts[corpus.name].passes for corpus in known]
    return ModelPlan(
        place=place,
        name=name,
        dim=dim,
        encode_flops=encoder.flops(tokens, length),
        encode_seconds=encode_seconds(encoder, tokens, length, config.encode, hardware),
        search_flops=sum(search_flops(c.queries or 0, c.documents or 0, dim) for c in known) if searches else None,
        search_seconds=sum(search_seconds(corpus, cuts[corpus.name], dim, config, hardware) for corpus in known)
        if searches
        else None,
        vector_bytes=rows * dim * NUMBER[kind],
        shard_bytes=shard_bytes(rows, dim, kind),
        read_bytes=shard_bytes(sum(passed), dim, kind) if searches else 0.0,
    )


def _notes(
    config: MineConfig, known: Sequence[Corpus], cuts: Mapping[str, Division], length: float, hardware: Hardware
) -> list[str]:
    """`length`: mean tokens of a document."""
    notes = []
    for corpus in known:
        cut = cuts[corpus.name]
        if cut.passes > MANY_PASSES and cut.passes > config.encode.actors:
            notes.append(
                f"{corpus.name}: the documents are read {cut.passes:,} times; --set mine.search.query_rows="
                f"{_power(-(-(corpus.queries or 0) // MANY_PASSES))} makes it at most {MANY_PASSES} (or one per actor)"
            )
        if cut.tasks > MANY_TASKS:
            notes.append(f"{corpus.name}: {cut.tasks:,} tasks; a larger mine.search.document_rows makes fewer")
        if cut.document_shards > MANY_SHARDS:
            notes.append(f"{corpus.name}: {cut.document_shards:,} shards; a larger mine.encode.shard_rows makes fewer")
    size = max((PREPARED_DOCUMENT * (c.documents or 0) + PREPARED_EXAMPLE * (c.queries or 0) for c in known), default=0)
    if size > 2**30:
        notes.append(f"prepare, one process, takes {size_text(size)} for the largest of these sets")
    for retriever in config.more_retrievers:
        if isinstance(retriever, Bm25Retriever):
            largest = max((corpus.documents or 0 for corpus in known), default=0)
            size = index_bytes(largest, int(largest * length * TEXT_BYTES))
            notes.append(f"bm25 takes {size_text(size)} of each actor's memory; its time is not planned")
    if config.cross_encoder is not None:
        notes.append(f"the cross-encoder reads up to {config.depth} pairs of every query; its time is not planned")
    if not isinstance(config.search.index, ExactIndex):
        notes.append("search is planned as exact; FAISS' own time was not measured")
    gpus = on_gpus(config.encode.gpus_per_actor, hardware)
    if config.search.device != "cpu" and not gpus:
        why = "mine.encode.gpus_per_actor is 0" if hardware.kind == "gpu" else f"{hardware.name} has no GPU"
        notes.append(
            f"mine.search.device is {config.search.device}, but {why}; planned on cores; a run would be refused"
        )
    elif config.search.device != "cpu":
        notes.append(
            "searching on a GPU was measured with up to 1 M documents on one H100: merging on the host bounds it"
        )
    elif hardware.kind == "gpu" and known:
        notes.append("search runs on CPUs: --set mine.search.device=cuda")
    return notes


def _power(rows: int) -> int:
    return 1 << max(rows - 1, 1).bit_length()


# -- shown ------------------------------------------------------------------------------------------------------------


def as_json(plan: MinePlan) -> dict[str, Any]:
    """The plan as plain values; bytes, seconds, operations."""
    return {
        "corpora": {
            corpus.name: {
                "queries": corpus.queries,
                "documents": corpus.documents,
                **(asdict(cut) | {"tasks": cut.tasks} if (cut := plan.divisions.get(corpus.name)) else {}),
            }
            for corpus in plan.corpora
        },
        "models": [asdict(model) for model in plan.models],
        "tokens": plan.tokens,
        "text_bytes": plan.text_bytes,
        "memory_bytes_per_actor": {"encode": plan.encode_memory, "search": plan.search_memory},
        "unknown_rows": list(plan.unknown),
        "unknown_models": list(plan.missing),
        "seconds": plan.seconds,
    }


def as_text(plan: MinePlan, step: str = "mine") -> list[str]:
    """The plan as text; `step` is `mine` or `mine_again`."""
    partly = ", of the sets with known rows only" if plan.unknown else ""
    if not plan.models or not plan.divisions:
        lines = [f"{step}: nothing is encoded or searched"] if not (plan.unknown or plan.missing) else []
    else:
        lines = [f"{step}: {plan.tokens:,.0f} tokens, {size_text(plan.text_bytes)} of text (assumed)" + partly]
    for corpus in plan.corpora:
        if plan.models and (cut := plan.divisions.get(corpus.name)):
            lines += [
                f"  {corpus.name}: about {corpus.queries:,} queries x {corpus.documents:,} documents, "
                f"{cut.query_shards:,} + {cut.document_shards:,} shards; {cut.passes:,} pass(es) over the documents "
                f"of {cut.group_rows:,} queries, each in {cut.parts:,} part(s)"
            ]
    for model in plan.models:
        lines.append(
            f"  {model.place} {model.name}, {model.dim} dimensions: encode {flops_text(model.encode_flops)} in "
            f"{time_text(model.encode_seconds)}; vectors {size_text(model.vector_bytes)}, "
            f"in shards {size_text(model.shard_bytes)}"
        )
        if model.search_flops is not None and model.search_seconds is not None:
            lines.append(
                f"    search {flops_text(float(model.search_flops))} in {time_text(model.search_seconds)}; "
                f"all passes read {size_text(model.read_bytes)}"
            )
    if plan.models and plan.divisions:
        encode, search = size_text(plan.encode_memory), size_text(plan.search_memory)
        lines.append(f"  memory of an actor on its host: encoding {encode}, searching {search}")
    if plan.unknown:
        shown = ", ".join(plan.unknown[:3]) + (", ..." if len(plan.unknown) > 3 else "")
        lines.append(
            f"{step}: rows of {shown} are not known; give them: --rows NAME=QUERIESxDOCUMENTS, such as 100kx1M"
        )
    return lines
