"""A driver of the `train` step that dies at a given place: real Ray Train, real SIGKILL.

    python -c 'import kill_kit; kill_kit.drive()'     with KILL_KIT set, see `drive_once`

Every worker wraps a function of the loop with "kill -9 now". Which process dies, where, and at which step, is in the
specification; it happens once (a marker file), so the run after it goes through.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvembed.core.steps import load_artifact

HERE = Path(__file__).parent
ENVIRONMENT = "KILL_KIT"

# place -> (module, attribute, step it belongs to, before or after the call)
PLACES: dict[str, tuple[str, str, Callable[..., int], str]] = {
    "before step": ("loop", "optimiser_step", lambda engine, sharding, factor: sharding.batch.step, "before"),
    "after metrics": ("metrics", "MetricsLog.append", lambda log, row: row["step"], "after"),
    "before save": ("checkpoint", "CheckpointStore.save", lambda store, engine, step, context: step, "before"),
    "between files": (
        "checkpoint",
        "_write_file",
        lambda tensors, uri: _step(uri) if "exp_avg-" in uri else -1,
        "before",
    ),
    "before manifest": ("checkpoint", "_publish", lambda uri: _step(uri), "before"),
    "after manifest": ("checkpoint", "_publish", lambda uri: _step(uri), "after"),
    "in export": ("build", "save_embedder", lambda *args, **kwargs: 0, "before"),
}


def _step(uri: str) -> int:
    return int(uri.split("step-")[1][:6])


def drive_once(
    folder: Path, config: Mapping[str, Any], kill: Mapping[str, Any] | None = None, **popen: Any
) -> subprocess.Popen[bytes]:
    """Start a driver of `folder`/out/stage.

    Args:
        folder: holds the artifacts `stream` and `start`.
        config: a TrainConfig.
        kill: `place` of PLACES, `step`, and `victim`: "rank0", "rank1", "driver" or "driver, orphans go on".
    """
    specification = {"folder": str(folder), "config": dict(config), "kill": kill}
    environment = os.environ | {ENVIRONMENT: json.dumps(specification), "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import kill_kit; kill_kit.drive()"]
    log = open(folder / "driver.log", "ab")  # noqa: SIM115
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, **popen)


def drive() -> None:
    """The driver process: a lease, a local Ray, the train step. Exit code 130 on Ctrl-C."""
    import ray

    from nvembed.core.lease import Lease
    from nvembed.training import worker
    from nvembed.training.config import TrainConfig
    from nvembed.training.launch import TRAIN

    specification = json.loads(os.environ[ENVIRONMENT])
    folder, kill = Path(specification["folder"]), specification["kill"]
    if kill:
        kill |= {"driver": os.getpid(), "marker": str(folder / "killed")}
        worker.run_worker = functools.partial(run_armed_worker, kill)
    inputs = {
        "stream": load_artifact(str(folder / "stream")),
        "model": load_artifact(str(folder / "start")),
    }
    try:
        ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20)
        with Lease(str(folder / "out")):
            TRAIN.run(TrainConfig.model_validate(specification["config"]), inputs, str(folder / "out" / "stage"))
        print("driver finished", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        ray.shutdown()


def run_armed_worker(kill: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """`run_worker` with one function of the loop wrapped."""
    module_name, attribute, step_of, side = PLACES[kill["place"]]
    module = importlib.import_module(f"nvembed.training.{module_name}")
    owner, _, name = attribute.rpartition(".")
    holder = getattr(module, owner) if owner else module
    original = getattr(holder, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        here = step_of(*args, **kwargs) == kill["step"]
        if here and side == "before":
            strike(kill)
        result = original(*args, **kwargs)
        if here and side == "after":
            strike(kill)
        return result

    setattr(holder, name, wrapped)
    for user in ("loop", "checkpoint", "build"):  # modules that imported the function by name
        target = importlib.import_module(f"nvembed.training.{user}")
        if getattr(target, name, None) is original:
            setattr(target, name, wrapped)
    from nvembed.training.worker import run_worker

    run_worker(settings)


def strike(kill: Mapping[str, Any]) -> None:
    """SIGKILL the victim, once.

    The worker of a killed driver waits here for its own end (Ray's processes die with the driver), so that the step
    the next run starts at is certain; victim "driver, orphans go on" lets it run on instead.
    """
    from nvembed.core.distributed import rank

    victim, marker = kill["victim"], Path(kill["marker"])
    if marker.exists() or rank() != (1 if victim == "rank1" else 0):
        return
    marker.write_text(victim)
    os.kill(kill["driver"] if victim.startswith("driver") else os.getpid(), signal.SIGKILL)
    if victim == "driver":
        time.sleep(60)
