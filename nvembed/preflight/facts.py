"""Facts about the nodes of a Ray cluster, gathered by one actor per node in a few seconds."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvembed.core.messages import first_line

ANSWER_SECONDS = 60.0  # the first process of Ray on a busy node takes many seconds
HTTP_SECONDS = 5.0
FULL_MESH = 16  # above so many nodes each reaches the next ones in a ring only
RING = 8
MAX_CHARACTERS = 300  # of an error


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        name: address and the start of Ray's id.
        id: Ray's id.
        resources: what Ray may place there.
        facts: the result of `Probe.look`; empty where it did not answer.
        skew: seconds its clock is ahead of the driver's, the uncertainty taken off; 0 within it; None: not known.
        unreachable: name of another node -> error.
        error: why it did not answer.
    """

    name: str
    id: str
    resources: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict)
    skew: float | None = 0.0
    unreachable: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Cluster:
    """All nodes, and the facts that only the driver sees.

    Attributes:
        seen: names below the scratch directory as the driver sees them.
        maximum: resources an autoscaler may reach; None where the cluster does not grow.
        grows: whether an autoscaler is at work.
        dashboard: host:port; None where there is none.
        dashboard_answer: HTTP status of a request without a token; None without a request or an answer.
    """

    nodes: Sequence[Node]
    seen: frozenset[str] = frozenset()
    maximum: Mapping[str, float] | None = None
    grows: bool = False
    dashboard: str | None = None
    dashboard_answer: int | None = None


def gather(order: Mapping[str, Any], listed: Callable[[str], set[str]]) -> Cluster:
    """Gather the facts of every live node; Ray must be connected. The nodes' scratch files are removed.

    Args:
        order: see `Probe.look`, without `node`.
        listed: names below a URI as the driver sees them.
    """
    import ray
    from ray import cloudpickle

    from nvembed.preflight import probe

    cloudpickle.register_pickle_by_value(probe)
    alive = [node for node in ray.nodes() if node["Alive"]]
    actors = {node["NodeID"]: _actor(ray, probe.Probe, node["NodeID"]) for node in alive}
    try:
        looked = _ask(ray, {key: actor.look.remote({**order, "node": key}) for key, actor in actors.items()})
        answering = {key: actor for key, actor in actors.items() if not isinstance(looked[key], Exception)}
        skews = {key: _skew(ray, actor) for key, actor in answering.items()}
        unreachable = _mesh(ray, answering, {node["NodeID"]: _name(node) for node in alive})
        seen = frozenset(listed(order["scratch"]))
    finally:
        _ask(ray, {key: actor.close.remote(order["scratch"]) for key, actor in actors.items()}, 5.0)
        for actor in actors.values():
            with contextlib.suppress(Exception):
                ray.kill(actor)
        cloudpickle.unregister_pickle_by_value(probe)
    nodes = []
    for node in alive:
        key = node["NodeID"]
        answer = looked[key]
        failed = isinstance(answer, Exception)
        nodes.append(
            Node(
                name=_name(node),
                id=key,
                resources=node["Resources"],
                facts={} if failed else answer,
                skew=skews.get(key),
                unreachable=unreachable.get(key, {}),
                error=f"{type(answer).__name__}: {first_line(answer)[:MAX_CHARACTERS]}" if failed else "",
            )
        )
    return Cluster(nodes, seen, *_growth(ray), *_dashboard(ray))


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"


def _actor(ray: Any, body: type, node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    # several calls at a time: listen, reach, clock
    return ray.remote(body).options(num_cpus=0, scheduling_strategy=strategy, max_concurrency=4).remote()


def _ask(ray: Any, calls: Mapping[str, Any], seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Answer or exception by key; all calls share one timeout."""
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds) if calls else ([], [])
    done = set(ready)
    answers: dict[str, Any] = {}
    for key, reference in calls.items():
        if reference not in done:
            answers[key] = TimeoutError(f"no answer within {seconds:.0f} s")
            continue
        try:
            answers[key] = ray.get(reference)
        except Exception as error:
            answers[key] = error
    return answers


def _skew(ray: Any, actor: Any) -> float | None:
    """Seconds that a node's clock is ahead, less the uncertainty of the round trip; best of three. None: no answer."""
    best = None
    for _ in range(3):
        before = time.time()
        try:
            there = float(ray.get(actor.clock.remote(), timeout=5.0))
        except Exception:
            continue
        after = time.time()
        doubt = (after - before) / 2
        ahead = there - (before + after) / 2
        value = 0.0 if abs(ahead) <= doubt else ahead - doubt if ahead > 0 else ahead + doubt
        best = value if best is None or abs(value) < abs(best) else best
    return best


def _mesh(ray: Any, actors: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Nodes that cannot reach others: each opens a port as rank 0 would, the others connect."""
    if len(actors) < 2:
        return {}
    opened = _ask(ray, {key: actor.listen.remote() for key, actor in actors.items()})
    failed = {
        key: {names[key]: f"no port could be opened: {e}"} for key, e in opened.items() if isinstance(e, Exception)
    }
    addresses = {key: value for key, value in opened.items() if not isinstance(value, Exception)}
    order = list(addresses)
    calls = {}
    for index, key in enumerate(order):
        others = order[index + 1 :] + order[:index]
        others = others if len(order) <= FULL_MESH else others[:RING]
        calls[key] = actors[key].reach.remote({names[other]: addresses[other] for other in others})
    for key, answer in _ask(ray, calls).items():
        if not isinstance(answer, Exception) and answer:
            failed.setdefault(key, {}).update(answer)
    return failed


def _growth(ray: Any) -> tuple[Mapping[str, float] | None, bool]:
    """Resources an autoscaler may reach (None: unknown), and whether there is one."""
    from ray.experimental.internal_kv import _internal_kv_get

    with contextlib.suppress(Exception):
        maximum = ray._private.state.state.get_max_resources_from_cluster_config()
        if maximum:
            return {name: float(amount) for name, amount in maximum.items()}, True
    with contextlib.suppress(Exception):
        return None, autoscales(json.loads(_internal_kv_get("__autoscaling_status") or b"{}"))
    return None, False


def autoscales(status: Mapping[str, Any]) -> bool:
    """Whether the status that Ray's monitor publishes comes from an autoscaler that can add nodes.

    The monitor of a cluster that was started by hand publishes one too; it names node types after their nodes.
    """
    report = status.get("autoscaler_report") or {}
    types = {*(report.get("active_nodes") or {}), *(report.get("idle_nodes") or {})}
    return any(not re.fullmatch(r"node_[0-9a-f]{56}", name) for name in types)


def _dashboard(ray: Any) -> tuple[str | None, int | None]:
    """Address of the dashboard, and its HTTP status for a request without a token."""
    from ray._private.services import get_webui_url_from_internal_kv

    url = None
    with contextlib.suppress(Exception):
        url = get_webui_url_from_internal_kv()
    if not url:
        return None, None
    request = urllib.request.Request(f"http://{url.removeprefix('http://')}/api/jobs/")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=HTTP_SECONDS) as answer:
            return url, int(answer.status)
    except urllib.error.HTTPError as error:
        return url, int(error.code)
    except OSError:
        return url, None
