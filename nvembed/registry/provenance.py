"""The hash chain of a model: data -> mined -> stream -> checkpoint -> folder, collected from the manifests.

`provenance.json` of a version holds the nodes of the chain: of every step its identity, its inputs' hashes and its
files' checksums. Each hash can be computed again from that alone, so a cut or changed chain is detected without the
artifacts. Where artifacts lie is left out; what a recipe names (a teacher's folder, the files of a source) is named
here too. Manifests hold no texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.formats import FormatError, check_format, stamp
from nvembed.core.steps import MANIFEST, load_artifact
from nvembed.modeling.origin import UNKNOWN, card_facts, content_hash, model_licence
from nvembed.types import Artifact

PROVENANCE, FORMAT_VERSION = "provenance.json", 1
MODEL_FOLDER = "model"
_DATASET_KEYS = (
    "task", "licence", "synthetic", "split_rule", "train", "dev", "test", "documents", "documents_shared",
    "near_duplicates_dropped", "near_duplicates_left", "evaluation_hash",
)  # fmt: skip
_NEEDS = {
    "stream": ("prepare", "mine", "model"),
    "distill_stream": ("teacher_embeddings", "model"),
    "train": ("stream", "model"),
}
Provenance = Mapping[str, Any]


def trace(model: Artifact, scores: Artifact) -> dict[str, Any]:
    """The chain of a model artifact and of its evaluation, the content of `provenance.json`.

    An input that is gone or has changed since is left out; `chain_problems` then reports it.
    """
    nodes: dict[str, dict[str, Any]] = {}

    def visit(artifact: Artifact) -> None:
        if artifact.manifest_hash in nodes:
            return
        nodes[artifact.manifest_hash] = _node(artifact)
        for source in _inputs(artifact):
            visit(source)

    visit(model)
    visit(scores)
    return {
        **stamp(FORMAT_VERSION),
        "model": model.manifest_hash,
        "scores": scores.manifest_hash,
        "nodes": nodes,
    }


def _inputs(artifact: Artifact) -> Iterator[Artifact]:
    uris = artifact.manifest.get("input_uris", {})
    for role, wanted in artifact.manifest["inputs"].items():
        uri = str(uris.get(role, ""))
        parent = artifact.uri.rsplit("/", 1)[0]
        for place in (uri, storage.join(parent, uri.rsplit("/", 1)[-1])):  # the output may have been moved
            if place and storage.exists(storage.join(place, MANIFEST)):
                source = load_artifact(place, verify=False)
                if source.manifest_hash == wanted:
                    yield source
                    break


def _node(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    keys = ("kind", "logic_version", "config", "inputs", "fingerprint", "files", "rows", "git_revision")
    node = {"step": artifact.uri.rsplit("/", 1)[-1], **{key: manifest[key] for key in keys}}
    if manifest["kind"] == "prepare":
        datasets = manifest["metrics"].get("datasets", {})
        node["datasets"] = {
            name: {key: row[key] for key in _DATASET_KEYS if key in row} for name, row in datasets.items()
        }
    if manifest["kind"] == "import_model":
        given = manifest["metrics"].get("licences")  # of a folder that a run of ours had made
        if storage.is_local(artifact.uri):
            node["card"] = card_facts(Path(storage.local_path(artifact.path(MODEL_FOLDER))))
        if given:
            node["card"] = {"nvembed": {"licences": given}, **node.get("card", {})}
    if "started_from" in manifest["metrics"]:
        node |= manifest["metrics"]["started_from"]
    return node


def _elsewhere(node: Mapping[str, Any]) -> str | None:
    """The model of another run that a step starts from: its folder or its name in the registry."""
    if node["kind"] == "import_model":
        return str(node["config"]["reference"])
    backbone = node["config"].get("backbone") or {}
    return str(backbone["name"]) if backbone.get("type") == "nvembed" else None


# -- checking -------------------------------------------------------------------------------------------------------


def chain_problems(provenance: Provenance | None, content: str | None) -> list[str]:
    """Problems of a chain; empty when it is complete from the data to the folder with this content."""
    if provenance is None:
        return [f"the version has no {PROVENANCE}: register it again with this nvembed"]
    try:
        check_format(provenance, PROVENANCE, newest=FORMAT_VERSION)
    except FormatError as error:
        return [str(error)]
    nodes: Mapping[str, Mapping[str, Any]] = provenance["nodes"]
    problems = [
        f"{node['step']}: its hash is not that of its contents"
        for digest, node in nodes.items()
        if not _whole(digest, node)
    ]
    for node in nodes.values():
        missing = [role for role, digest in node["inputs"].items() if digest not in nodes]
        problems += [f"{node['step']}: its input {role} is gone (moved, deleted or built again)" for role in missing]
        needed = [role for role in _NEEDS.get(node["kind"], ()) if role not in node["inputs"]]
        problems += [f"{node['step']}: it had no input {role}" for role in needed]
    model, scores = nodes.get(provenance["model"]), nodes.get(provenance["scores"])
    if model is None or scores is None:
        return [*problems, "the model's own step, or that of its scores, is missing"]
    if scores["inputs"].get("model") != provenance["model"]:
        problems.append(f"{scores['step']} scored another model")
    if content is not None and _folder_of(model) != content:
        problems.append(f"the folder of {model['step']} is not the one that was registered")
    kinds = {nodes[digest]["kind"] for digest in reachable(provenance, provenance["model"])}
    if not kinds & {"prepare", "import_model"}:
        problems.append("the chain does not lead back to data (no prepare step)")
    return problems


def _whole(digest: str, node: Mapping[str, Any]) -> bool:
    identity = {key: node[key] for key in ("kind", "logic_version", "config", "inputs")}
    fingerprint = storage.hash_json(identity)
    content = storage.hash_json({"fingerprint": fingerprint, "files": node["files"]})
    return bool(fingerprint == node["fingerprint"] and content == digest)


def _folder_of(node: Mapping[str, Any]) -> str:
    prefix = MODEL_FOLDER + "/"
    inside = {name: entry["xxh3_128"] for name, entry in node["files"].items() if name.startswith(prefix)}
    return content_hash({name.removeprefix(prefix): checksum for name, checksum in inside.items()})


def reachable(provenance: Provenance, start: str) -> list[str]:
    """Hashes of `start` and of everything it was made from, in the order data -> folder."""
    nodes, order, seen = provenance["nodes"], list[str](), set[str]()

    def visit(digest: str) -> None:
        if digest in seen or digest not in nodes:
            return
        seen.add(digest)
        for _, below in sorted(nodes[digest]["inputs"].items()):
            visit(below)
        order.append(digest)

    visit(start)
    return order


# -- facts of the chain ---------------------------------------------------------------------------------------------


def chain(provenance: Provenance) -> list[tuple[str, str]]:
    """(step, manifest hash) from the data to the folder."""
    return [(provenance["nodes"][digest]["step"], digest) for digest in reachable(provenance, provenance["model"])]


def evaluated_datasets(provenance: Provenance) -> dict[str, dict[str, Any]]:
    """Records of `prepare` about the data sets of the evaluation, by data set."""
    scores = provenance["nodes"].get(provenance["scores"], {"inputs": {}})
    node = provenance["nodes"].get(scores["inputs"].get("prepare"), {})
    return dict(node.get("datasets", {}))


def training_datasets(provenance: Provenance) -> dict[str, dict[str, Any]]:
    """Records of every `prepare` in the model's chain, by data set."""
    nodes = (provenance["nodes"][digest] for digest in reachable(provenance, provenance["model"]))
    return {name: row for node in nodes for name, row in node.get("datasets", {}).items()}


def imported(provenance: Provenance) -> list[str]:
    """References of the models of other runs that the model started from."""
    nodes = (provenance["nodes"][digest] for digest in reachable(provenance, provenance["model"]))
    return [reference for node in nodes if (reference := _elsewhere(node)) is not None]


def licences(provenance: Provenance) -> list[dict[str, str]]:
    """Licences of the data, the backbone and the mining model: rows of `kind`, `name`, `licence`."""
    rows = [
        {"kind": "data set", "name": name, "licence": str(row.get("licence", UNKNOWN))}
        for name, row in training_datasets(provenance).items()
    ]
    for digest in reachable(provenance, provenance["model"]):
        node = provenance["nodes"][digest]
        config = node["config"]
        reference = _elsewhere(node)
        if reference is not None:
            rows += _of_card(node.get("card", {}), reference)
        for kind, section in (("backbone", "backbone"), ("mining model", "retriever")):
            if section == "backbone" and reference is not None:
                continue
            licence = model_licence(config[section]) if config.get(section) else None
            if licence is not None:
                rows.append({"kind": kind, "name": licence.name, "licence": licence.licence})
    return list({storage.hash_json(row): row for row in rows}.values())


def _of_card(card: Mapping[str, Any], reference: str) -> list[dict[str, str]]:
    """The licences in an imported model's card; else the model itself, with the licence it states."""
    carried = card.get("nvembed", {}).get("licences") if isinstance(card.get("nvembed"), Mapping) else None
    if isinstance(carried, list):
        return [{key: str(row.get(key, UNKNOWN)) for key in ("kind", "name", "licence")} for row in carried]
    name = reference if reference.startswith("models:/") else Path(reference).name
    return [{"kind": "backbone", "name": name, "licence": str(card.get("license", UNKNOWN))}]
