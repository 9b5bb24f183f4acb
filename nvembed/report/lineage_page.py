"""Where each model comes from: a readable chain of results, and the whole table."""

from __future__ import annotations

from nvembed.report.markup import Content, Markup, join, table, tag
from nvembed.report.schema import Report
from nvembed.report.words import Section, section


def lineage_section(report: Report) -> Section | None:
    """A chain for each model, what was registered, and every result with its inputs."""
    if not report.lineage:
        return None
    steps = {role: step for role, model in report.models.items() if (step := _maker(report, model.folder)) is not None}
    chains = [_chain(report, role, step) for role, step in steps.items()]
    registered = [
        tag("li", f"{found['registry_uri']}: ", ", ".join(found["aliases"]) or "no alias", f" ({found['reason']})")
        for found in report.registrations.values()
    ]
    return section(
        "Lineage",
        *chains,
        tag("ul", *registered) if registered else None,
        tag("details", tag("summary", "Every result and what it was made from"), _table(report)),
    )


def _maker(report: Report, folder: str) -> str | None:
    """The step that made a model folder."""
    name = folder.rstrip("/").rsplit("/", 2)[-2]
    return name if name in report.lineage else None


def _owners(report: Report) -> dict[str, str]:
    return {entry.manifest_hash: name for name, entry in report.lineage.items()}


def ancestors(report: Report, step: str) -> list[str]:
    """The steps a result depends on, directly or not, and the step itself, in the order of the run."""
    owners, found, waiting = _owners(report), {step}, [step]
    while waiting:
        for source in report.lineage[waiting.pop()].inputs.values():
            owner = owners.get(source.manifest_hash)
            if owner is not None and owner not in found:
                found.add(owner)
                waiting.append(owner)
    return [name for name in report.lineage if name in found]


def _chain(report: Report, role: str, step: str) -> Markup:
    links = []
    for name in ancestors(report, step):
        entry = report.lineage[name]
        given = ", ".join(_sources(report, name)) or "the recipe's sources"
        links.append(
            tag("li", tag("strong", name), tag("code", entry.manifest_hash[:12]), tag("small", f"from {given}"))
        )
    uri = report.models[role].registry_uri
    end = tag("li", tag("strong", uri), tag("small", f"registered from {step}"), class_="end-of-chain") if uri else None
    return join([tag("h3", f"How the {role} was made"), tag("ol", *links, end, class_="chain")])


def _sources(report: Report, name: str) -> list[str]:
    owners = _owners(report)
    return [owners.get(found.manifest_hash, found.uri) for found in report.lineage[name].inputs.values()]


def _table(report: Report) -> Markup:
    owners = _owners(report)
    rows: list[list[Content]] = []
    for name, entry in report.lineage.items():
        inputs = [
            tag("div", f"{role}: {owners.get(found.manifest_hash, found.uri)} ", tag("code", found.manifest_hash[:12]))
            for role, found in entry.inputs.items()
        ]
        rows.append([name, tag("code", entry.manifest_hash[:12]), join(inputs) if inputs else None])
    caption = "Each result and the results it was made from"
    return table(caption, ["step", "manifest", "inputs"], rows, numeric=False)
