"""Cross-checks of a recipe: rules that span several sections. Pure: valid sections in, problems out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nvembed.core.messages import nearest
from nvembed.core.secrets import why_refused
from nvembed.mining.config import RandomNegatives
from nvembed.modeling.config import FoldedLatentAttentionConfig, LatentAttentionConfig, RandomBackbone
from nvembed.modeling.shapes import known_shape
from nvembed.recipe.document import Document, Path, Problem
from nvembed.text.instructions import CATALOGUE

Sections = Mapping[Path, Any]


def cross_checks(sections: Sections, document: Document) -> list[Problem]:
    """Problems between sections that are valid by themselves."""

    def problem(path: Path, message: str) -> Problem:
        return Problem(document.position(path), path, message)

    wrong = [
        *_datasets(document),
        *_instructions(document),
        *_leaks(sections, document),
        *_backbone(sections),
        *_student(sections),
        *_mining(sections),
        *_mine_again(sections, document),
        *_names(sections),
        *_secrets(document.data, ()),
        *_floors(sections, document),
    ]
    for stage in ("stage_1", "stage_2", "student"):
        wrong += [*_stage(stage, sections), *_widths((stage, "train", "objective", "matryoshka_dims"), sections)]
    for stage in ("stage_1", "stage_2"):
        wrong += [*_weights(stage, sections, document), *_class_sets(stage, sections)]
    for path in (("evaluate", "dims"), ("student", "evaluate", "dims"), ("baselines", "evaluate", "dims")):
        wrong += _widths(path, sections)
    if document.data.get("stage_1") is not None and document.data.get("initialise") is None:
        wrong.append((("initialise",), "missing; stage_1 trains the model that it makes"))
    if document.data.get("stage_2") is not None and document.data.get("stage_1") is None:
        wrong.append((("stage_1",), "missing; stage_2 goes on from it"))
    return [problem(path, message) for path, message in wrong]


Mistakes = Iterator[tuple[Path, str]]


def _attribute(sections: Sections, path: Path) -> Any:
    """The value at a path, through the deepest valid section above it; None where there is none."""
    for end in range(len(path), 0, -1):
        if path[:end] in sections:
            value = sections[path[:end]]
            for part in path[end:]:
                value = getattr(value, str(part), None)
            return value
    return None


def _secrets(value: Any, path: Path) -> Mistakes:
    """Values that are secrets: a recipe is stored in every artifact."""
    if isinstance(value, str):
        if why := why_refused(value):
            yield path, why
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _secrets(item, (*path, key))


def _source_names(document: Document) -> list[tuple[Path, str]]:
    sources = document.get(("prepare", "sources"))
    listed = enumerate(sources) if isinstance(sources, list) else ()
    return [
        (("prepare", "sources", index, "name"), source["name"])
        for index, source in listed
        if isinstance(source, dict) and isinstance(source.get("name"), str)
    ]


def _datasets(document: Document) -> Mistakes:
    if document.get(("prepare", "sources")) == []:
        yield ("prepare", "sources"), "empty; name at least one data set"
    seen: set[str] = set()
    for path, name in _source_names(document):
        if name in seen:
            yield path, f"{name!r} names two data sets; names must differ"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            yield path, f"{name!r} cannot name a folder; use letters, digits, _ . -"
        seen.add(name)


def _instructions(document: Document) -> Mistakes:
    sources = document.get(("prepare", "sources"))
    for index, source in enumerate(sources) if isinstance(sources, list) else ():
        instruction = source.get("instruction") if isinstance(source, dict) else None
        if not isinstance(instruction, str) or instruction in CATALOGUE or " " in instruction.strip():
            continue
        hint = f"{nearest(instruction, CATALOGUE)} Keys: {', '.join(CATALOGUE)}."
        message = f"{instruction!r} is no key of the catalogue and no sentence.{hint}"
        yield ("prepare", "sources", index, "instruction"), message


def _leaks(sections: Sections, document: Document) -> Mistakes:
    names = [name for _, name in _source_names(document)]
    for index, name in enumerate(_attribute(sections, ("prepare", "decontaminate", "allow")) or ()):
        if names and name not in names:
            path: Path = ("prepare", "decontaminate", "allow", index)
            yield path, f"no data set of this name.{nearest(name, names)} prepare.sources has: {', '.join(names)}."


def _weights(stage: str, sections: Sections, document: Document) -> Mistakes:
    weights = _attribute(sections, (stage, "stream", "weights"))
    names = [name for _, name in _source_names(document)]
    if not weights or not names:
        return
    for name, weight in weights.items():
        path: Path = (stage, "stream", "weights", name)
        if name not in names:
            yield path, f"no data set of this name.{nearest(name, names)} prepare.sources has: {', '.join(names)}."
        if not 0 < weight < float("inf"):
            yield path, f"{weight}: must be a number above 0; leave the data set out instead"
    for name in _attribute(sections, (stage, "stream", "caps")) or {}:
        if name not in weights:
            yield (stage, "stream", "caps", name), f"not among {stage}.stream.weights.{nearest(name, weights)}"


def _class_sets(stage: str, sections: Sections) -> Mistakes:
    """Class sets under an in-batch objective: it does not know the classes of a batch."""
    if _attribute(sections, (stage, "train", "objective", "in_batch")) is not True:
        return
    weights = _attribute(sections, (stage, "stream", "weights"))
    for source in _attribute(sections, ("prepare", "sources")) or ():
        if source.has_classes and (not weights or source.name in weights):
            yield (
                (stage, "train", "objective", "in_batch"),
                f"true with {source.name}, whose positives are texts of the query's class: in-batch negatives would be "
                f"of that class too (half of them with two classes). Set it to false, or leave {source.name} out of "
                f"{stage}.stream.weights",
            )


def _floors(sections: Sections, document: Document) -> Mistakes:
    names = [name for _, name in _source_names(document)]
    for name in _attribute(sections, ("register", "gate", "floors")) or {}:
        if names and name not in names:
            path: Path = ("register", "gate", "floors", name)
            yield path, f"no data set of this name.{nearest(name, names)} prepare.sources has: {', '.join(names)}."


def _stage(stage: str, sections: Sections) -> Mistakes:
    def value(*path: str) -> Any:
        return _attribute(sections, (stage, *path))

    wanted = "distill" if stage == "student" else "contrastive"
    objective = value("train", "objective", "type")
    if objective not in (None, wanted):
        yield (stage, "train", "objective", "type"), f"{objective!r}: {stage} takes the objective {wanted!r}"
    size, workers = value("stream", "global_batch_size"), value("train", "num_workers")
    if size and workers and size % workers:
        fits = sorted({size - size % workers, size + workers - size % workers} - {0})
        yield (
            (stage, "stream", "global_batch_size"),
            f"{size} examples cannot be divided over {stage}.train.num_workers = {workers}; "
            f"nearest that can: {' or '.join(map(str, fits))}",
        )
    steps, warmup = value("stream", "steps"), value("train", "optimiser", "warmup_steps")
    if steps and warmup and warmup > steps:
        yield (stage, "train", "optimiser", "warmup_steps"), f"{warmup} is more than {stage}.stream.steps = {steps}"
    if value("train", "objective", "in_batch") is False and value("stream", "num_negatives") == 0:
        message = f"0 negatives with {stage}.train.objective.in_batch false: nothing is contrasted with a positive"
        yield (stage, "stream", "num_negatives"), message


def _widths(path: Path, sections: Sections) -> Mistakes:
    dims = _attribute(sections, path)
    backbone = _attribute(sections, ("initialise", "backbone"))
    shape = known_shape(backbone) if backbone is not None else None
    for index, dim in enumerate(dims or ()):
        if dim < 1 or (shape is not None and dim > shape.hidden):
            bound = f" to {shape.hidden}, the backbone's width" if shape is not None else ""
            yield (*path, index), f"{dim}: a Matryoshka prefix is from 1{bound}"
        if dim in dims[:index]:
            yield (*path, index), f"{dim}: listed twice"


def _backbone(sections: Sections) -> Mistakes:
    backbone, pooling = (
        _attribute(sections, ("initialise", *path)) for path in (("backbone",), ("embedder", "pooling"))
    )
    if isinstance(pooling, FoldedLatentAttentionConfig):
        yield ("initialise", "embedder", "pooling", "type"), "a folded head cannot be trained; use latent_attention"
    shape = known_shape(backbone) if backbone is not None else None
    if shape is None:
        return
    here: Path = ("initialise", "backbone")
    if backbone.num_layers is not None and backbone.num_layers > shape.layers_available:
        yield (*here, "num_layers"), f"{backbone.num_layers}: the backbone has {shape.layers_available} layers"
    if isinstance(backbone, RandomBackbone):
        if backbone.hidden_size % backbone.num_heads:
            yield (*here, "num_heads"), f"{backbone.num_heads} does not divide hidden_size = {backbone.hidden_size}"
        if backbone.num_heads % backbone.num_key_value_heads:
            message = f"{backbone.num_key_value_heads} does not divide num_heads = {backbone.num_heads}"
            yield (*here, "num_key_value_heads"), message
    if isinstance(pooling, LatentAttentionConfig) and pooling.head_dim is None and shape.hidden % pooling.num_heads:
        message = f"{pooling.num_heads} does not divide the width {shape.hidden}; choose another, or give head_dim"
        yield ("initialise", "embedder", "pooling", "num_heads"), message


def _student(sections: Sections) -> Mistakes:
    backbone, layers = (
        _attribute(sections, ("initialise", "backbone")),
        _attribute(sections, ("student", "init", "num_layers")),
    )
    shape = known_shape(backbone) if backbone is not None else None
    if layers is not None and shape is not None and layers >= shape.layers:
        message = f"{layers}: a student has fewer layers than its teacher, which has {shape.layers}"
        yield ("student", "init", "num_layers"), message


def _mining(sections: Sections) -> Mistakes:
    num_negatives, depth = _attribute(sections, ("mine", "num_negatives")), _attribute(sections, ("mine", "depth"))
    if num_negatives and depth and num_negatives > depth:
        yield ("mine", "num_negatives"), f"{num_negatives}: only mine.depth = {depth} candidates are searched"
    for stage in ("stage_1", "stage_2"):
        wanted = _attribute(sections, (stage, "stream", "num_negatives"))
        if wanted and num_negatives and wanted > num_negatives:
            message = f"{wanted}: mine.num_negatives keeps only {num_negatives} per example"
            yield (stage, "stream", "num_negatives"), message


def _mine_again(sections: Sections, document: Document) -> Mistakes:
    if document.data.get("mine_again") is not True:
        return
    if document.data.get("stage_2") is None:
        yield ("mine_again",), "true: only stage_2 learns from what is mined again, and there is none"
    if isinstance(_attribute(sections, ("mine", "rule")), RandomNegatives):
        yield ("mine_again",), "true: mine.rule draws at random, which no model changes"


def _names(sections: Sections) -> Mistakes:
    teacher, student = (_attribute(sections, ("register", f"{model}_name")) for model in ("teacher", "student"))
    if teacher is not None and teacher == student:
        yield ("register", "student_name"), f"{student!r} is the teacher's name too; models need their own"
