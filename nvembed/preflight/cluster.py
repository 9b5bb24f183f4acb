"""Findings about a Ray cluster, each with its fix, from the facts of its nodes. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping

from nvembed.preflight.facts import Cluster, Node
from nvembed.preflight.findings import NOTE, OK, PROBLEM, Finding
from nvembed.preflight.needs import Needs, Pool, pip_line

MIN_STORE_BYTES = 80 * 2**20  # the lower bound of `cluster.object_store_mb` in a recipe
MIN_SHARED_BYTES = 300 * 2**20
FULL_DISK = 0.95  # fuller, Ray does not spill and does not start tasks that need the disk
SKEW_NOTE, SKEW_PROBLEM = 2.0, 20.0  # seconds; a lease expires after 60
WITHOUT_BF16 = ("V100", "P100", "T4", "P4", "K80")


def cluster_findings(cluster: Cluster, needs: Needs, driver: Mapping[str, object], out: str) -> list[Finding]:
    """All findings about a cluster.

    Args:
        cluster: facts of the nodes.
        needs: what the recipe needs.
        driver: `versions` and `source` of the driver.
        out: the output, for the messages.
    """
    answered = [node for node in cluster.nodes if not node.error]
    return [
        *_answers(cluster),
        *_storage(cluster, answered, out),
        *_versions(answered, driver),
        *_packages(answered, needs),
        *_models(answered, needs),
        *_network(answered),
        *_authentication(answered),
        *_dashboard(cluster),
        *_memory(answered),
        *_disk(answered),
        *_clocks(answered),
        *_room(cluster, needs),
    ]


def _answers(cluster: Cluster) -> Iterator[Finding]:
    for node in cluster.nodes:
        if node.error:
            fix = "look at the node (`ray status`, its logs) or take it out of the cluster"
            yield Finding("nodes", PROBLEM, f"{node.name} does not answer: {node.error}", fix)
    silent = sum(bool(node.error) for node in cluster.nodes)
    if not silent:
        yield Finding("nodes", OK, f"{len(cluster.nodes)} answered")


def _storage(cluster: Cluster, nodes: list[Node], out: str) -> Iterator[Finding]:
    bad = False
    for node in nodes:
        storage = str(node.facts["storage"])
        if storage != "ok":
            bad = True
            fix = "give the node the mount, the permissions or the credentials (environment) to write there"
            yield Finding("storage", PROBLEM, f"{node.name} cannot write, rename and list at {out}: {storage}", fix)
        elif node.id not in cluster.seen:
            bad = True
            fix = "use storage that all nodes share: a network mount at the same path, s3://, gs://"
            yield Finding("storage", PROBLEM, f"the driver does not see what {node.name} writes at {out}", fix)
    if nodes and not bad:
        yield Finding("storage", OK, f"written, renamed and listed at {out} from {len(nodes)} nodes")


def _versions(nodes: list[Node], driver: Mapping[str, object]) -> Iterator[Finding]:
    bad = False
    ours = driver["versions"]
    assert isinstance(ours, Mapping)
    for node in nodes:
        theirs = node.facts["versions"]
        wrong = [f"{name} {theirs.get(name) or 'missing'} (driver: {want})" for name, want in ours.items()
                 if theirs.get(name) != want]  # fmt: skip
        if wrong:
            bad = True
            yield Finding(
                "versions", PROBLEM, f"{node.name}: {', '.join(wrong)}", "start every node from one image or lock file"
            )
        if node.facts["source"] != driver["source"]:
            bad = True
            what = f"has another source ({node.facts['source']})" if node.facts["source"] else "is not installed"
            fix = f"install the driver's ({driver['source']}) there, or send it: nvembed submit, or a working_dir"
            yield Finding("nvembed", PROBLEM, f"{node.name}: nvembed {what}", fix)
    if nodes and not bad:
        yield Finding("versions", OK, f"the same everywhere, nvembed {driver['source']}")


def _packages(nodes: list[Node], needs: Needs) -> Iterator[Finding]:
    for node in nodes:
        lacking = {name: wants for name, wants in needs.node_packages.items() if not node.facts["packages"].get(name)}
        if lacking:
            listed = ", ".join(f"{name} (for {', '.join(wants)})" for name, wants in lacking.items())
            yield Finding("packages", PROBLEM, f"{node.name} lacks {listed}", f"in its image: {pip_line(lacking)}")


def _models(nodes: list[Node], needs: Needs) -> Iterator[Finding]:
    for section, name, revision in needs.node_models:
        yield from unpinned(section, name, revision)
        for node in nodes:
            state = next(m["state"] for m in node.facts["models"] if (m["name"], m["revision"]) == (name, revision))
            if state != "ok":
                yield Finding(f"model {section}", PROBLEM, f"{node.name}: {name}: {state}", model_fix(name))


def unpinned(section: str, name: str, revision: str | None) -> Iterator[Finding]:
    """A note about a hub name without a revision."""
    if revision is None and "://" not in name and not name.startswith("/"):
        fix = f"set {section}.revision to a commit: what the hub serves may change between two attempts"
        yield Finding(f"model {section}", NOTE, f"{name} has no revision", fix)


def model_fix(name: str) -> str:
    """The fix for a model that cannot be opened."""
    if "://" in name or name.startswith("/"):
        return "put it at this path on storage that the node reaches"
    return "check name and revision; give the node HF_TOKEN or network, or fill its cache (huggingface-cli download)"


def _network(nodes: list[Node]) -> Iterator[Finding]:
    bad = False
    for node in nodes:
        for other, error in node.unreachable.items():
            bad = True
            fix = "open all TCP ports between the nodes: ranks connect to each other on ports the system chooses"
            yield Finding("network", PROBLEM, f"{node.name} cannot reach a port of {other}: {error}", fix)
    if len(nodes) > 1 and not bad:
        yield Finding("network", OK, "every node reaches the ports that the others open")


def _authentication(nodes: list[Node]) -> Iterator[Finding]:
    open_nodes = [node.name for node in nodes if node.facts["authentication"] != "token"]
    fix = "start Ray on every node with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (anyone who reaches a port can run code)"
    if open_nodes:
        yield Finding("authentication", PROBLEM, f"off on {', '.join(open_nodes)}", fix)
    elif nodes:
        yield Finding("authentication", OK, "token, on every node")


def _dashboard(cluster: Cluster) -> Iterator[Finding]:
    if cluster.dashboard is None:
        yield Finding("dashboard", OK, "none")
        return
    if cluster.dashboard_answer in (401, 403):
        yield Finding("dashboard", OK, f"{cluster.dashboard} requires the token")
        return
    host = cluster.dashboard.removeprefix("http://").rpartition(":")[0].strip("[]")
    if is_loopback_host(host):
        yield Finding("dashboard", OK, f"{cluster.dashboard}, this machine only")
        return
    fix = "ray start --dashboard-host=127.0.0.1, or RAY_AUTH_MODE=token: its job API runs any code"
    message = (
        "answers without a token" if cluster.dashboard_answer == 200 else "listens beyond its machine, did not answer"
    )
    yield Finding(
        "dashboard", PROBLEM if cluster.dashboard_answer == 200 else NOTE, f"{cluster.dashboard} {message}", fix
    )


def is_loopback_host(host: str) -> bool:
    """Whether an address is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _memory(nodes: list[Node]) -> Iterator[Finding]:
    bad = False
    for node in nodes:
        store, shared = node.resources.get("object_store_memory", 0.0), node.facts["shared_memory"]
        if store < MIN_STORE_BYTES:
            bad = True
            message = f"{node.name}: {store / 2**20:.0f} MiB, at least {MIN_STORE_BYTES / 2**20:.0f} are needed"
            yield Finding("object store", PROBLEM, message, "ray start --object-store-memory=209715200")
        wanted = max(MIN_SHARED_BYTES, store)
        if shared is None or shared["total"] < wanted:
            bad = True
            message = f"{node.name}: {(shared or {'total': 0})['total'] / 2**20:.0f} MiB for {wanted / 2**20:.0f}"
            fix = "docker run --shm-size, or an emptyDir of medium Memory at /dev/shm: objects lie on disk otherwise"
            yield Finding("/dev/shm", PROBLEM, message, fix)
    if nodes and not bad:
        smallest = min(node.resources.get("object_store_memory", 0.0) for node in nodes)
        yield Finding("object store", OK, f"{smallest / 2**20:.0f} MiB or more on every node, within /dev/shm")


def _disk(nodes: list[Node]) -> Iterator[Finding]:
    for node in nodes:
        disk = node.facts["temporary"]
        if disk is None or disk["free"] < (1 - FULL_DISK) * disk["total"]:
            free = f"{disk['free'] / 2**30:.1f} of {disk['total'] / 2**30:.0f} GiB free" if disk else "not there"
            fix = "free some, or `ray start --temp-dir` on a larger disk: Ray does not spill to a disk 95 % full"
            yield Finding("disk", PROBLEM, f"{node.name}: Ray's temporary directory: {free}", fix)


def _clocks(nodes: list[Node]) -> Iterator[Finding]:
    known = [(node.name, node.skew) for node in nodes if node.skew is not None]
    for node in nodes:
        if node.skew is None:
            yield Finding("clock", NOTE, f"{node.name} did not report its time", "check its clock")
    for name, skew in known:
        if abs(skew) > SKEW_NOTE:
            state = PROBLEM if abs(skew) > SKEW_PROBLEM else NOTE
            message = f"{name} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'} of the driver"
            yield Finding("clock", state, message, "run NTP on every node: leases and credentials depend on the clock")
    worst = max((abs(skew) for _, skew in known), default=0.0)
    if known and worst <= SKEW_NOTE:
        yield Finding("clock", OK, f"within {max(worst, 0.1):.1f} s")


# -- room for the stages ----------------------------------------------------------------------------------------------


def _room(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    bad = False
    for pool in needs.pools:
        for finding in (_fits(cluster, pool, "CPU", pool.cpus), _fits(cluster, pool, "GPU", pool.gpus)):
            if finding is not None:
                bad = True
                yield finding
        yield from _kinds(cluster, pool)
    if not bad and needs.pools:
        have = ", ".join(f"{amount:g} {kind}s" for kind in ("CPU", "GPU") if (amount := total(cluster, kind)))
        yield Finding("room", OK, f"{have} for {len(needs.pools)} stages and steps")


def total(cluster: Cluster, kind: str) -> float:
    """Amount of a resource over all nodes."""
    return sum(node.resources.get(kind, 0.0) for node in cluster.nodes)


def places(cluster: Cluster, kind: str, each: float) -> int:
    """Number of processes that the nodes have room for, each needing `each`: none spans two nodes."""
    return sum(int(node.resources.get(kind, 0.0) / each + 1e-9) for node in cluster.nodes)


def _fits(cluster: Cluster, pool: Pool, kind: str, each: float) -> Finding | None:
    if not each:
        return None
    capacity = places(cluster, kind, each)
    if capacity >= pool.count:
        return None
    message = (
        f"{pool.section}: {pool.count} processes of {each:g} {kind}s, the nodes have room for {capacity} "
        f"({total(cluster, kind):g} {kind}s)"
    )
    workers = pool.section.endswith(".train")
    fix = f"start more nodes, or lower {pool.section}.{'num_workers' if workers else 'actors'}"
    if cluster.maximum is not None and cluster.maximum.get(kind, 0.0) < pool.count * each:
        most = cluster.maximum.get(kind, 0.0)
        return Finding("room", PROBLEM, f"{message}; the autoscaler reaches {most:g} {kind}s at most", fix)
    if cluster.grows:
        return Finding("room", NOTE, f"{message}; the autoscaler should add some, Ray waits for it")
    return Finding("room", PROBLEM, message, fix)


def _kinds(cluster: Cluster, pool: Pool) -> Iterator[Finding]:
    if not pool.gpus:
        return
    kinds = {
        name.removeprefix("accelerator_type:")
        for node in cluster.nodes
        if node.resources.get("GPU")
        for name in node.resources
        if name.startswith("accelerator_type:")
    }
    old = sorted(kinds & set(WITHOUT_BF16))
    if pool.bf16 and old:
        fix = f"set {pool.section}.precision to fp32, or use Ampere or later"
        yield Finding("GPU kind", PROBLEM, f"{pool.section} needs bf16, which {', '.join(old)} does not support", fix)
    if len(kinds) > 1:
        fix = "keep one kind: the slowest sets the pace, and a resumed run is bit-equal on one machine type only"
        yield Finding("GPU kind", NOTE, f"{pool.section} may run on {', '.join(sorted(kinds))} together", fix)
