"""The `train` step: checks before the start, then Ray Train workers that run the loop.

Ray starts the workers and reports the death of one. The step a run continues from comes from our own scan of
`checkpoints/`, never from Ray's records: those lag behind the disk, and Ray then starts at step 0 (STACK.md 5). Hence
every attempt is a fresh Ray run, and a mistake of the user is not tried again.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Mapping
from typing import Any

from nvembed.core import lease, storage
from nvembed.core.messages import first_line
from nvembed.core.ray_cluster import ensure_ray
from nvembed.core.steps import METRICS, Step, StepResult
from nvembed.training.config import TrainConfig
from nvembed.training.errors import TrainingError
from nvembed.types import Artifact, UserError

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = "300"  # Ray's default of 60 is too short for an autoscaled node


def _build(config: TrainConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    from nvembed.stream.reader import StreamReader
    from nvembed.training.build import TrainingSpec
    from nvembed.training.checkpoint import CheckpointStore, Identity
    from nvembed.training.loop import check_batch
    from nvembed.training.progress import Progress

    stream = StreamReader(inputs["stream"].uri)
    check_batch(stream.batch_size, config.num_workers)
    fence, lease_uri = _fence(work_uri)
    spec = TrainingSpec(
        config=config,
        stream_uri=inputs["stream"].uri,
        model_uri=inputs["model"].path("model"),
        work_uri=work_uri,
        inputs={name: artifact.manifest_hash for name, artifact in sorted(inputs.items())},
        lease_uri=lease_uri,
        fence=fence,
    )
    # The workers check again; here the user sees at once where the run continues, or why it is refused.
    start = CheckpointStore(work_uri, Identity(config, spec.inputs, "fp32", config.num_workers)).preview()
    if start:
        logger.info("continuing at step %d of %d", start, stream.num_steps)
    metrics_uri = storage.join(work_uri, METRICS)
    with Progress(work_uri.rsplit("/", 1)[-1], metrics_uri, stream.num_steps):
        fit(spec)
    return StepResult(
        rows={"steps": stream.num_steps, "examples": stream.num_steps * stream.batch_size},
        metrics=_summary(storage.read_bytes(metrics_uri)),
    )


TRAIN = Step("train", 1, _build, cleared=False)


def _fence(work_uri: str) -> tuple[int, str | None]:
    """The fencing number of the run that holds the output, and the output; (0, None) where no lease exists."""
    out = work_uri.rsplit("/", 1)[0]
    file = storage.join(out, lease.LEASE)
    return (int(storage.read_json(file)["fence"]), out) if storage.exists(file) else (0, None)


def _summary(lines: bytes) -> dict[str, Any]:
    import json

    rows = [json.loads(line) for line in lines.splitlines()]
    return {
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "tokens": sum(row["tokens"] for row in rows),
        "step_seconds": sum(row["seconds"] for row in rows),
    }


def fit(spec: Any) -> None:
    """Train under Ray, again from the newest checkpoint when a worker dies, at most `max_failures` times.

    Raises:
        UserError: the cluster cannot hold the workers, or a worker raised it for a mistake of the user.
        TrainingError: a worker failed; the message is that rank's own.
        KeyboardInterrupt: on Ctrl-C, after the workers were stopped.
    """
    connect(spec.config)
    from ray.train import TrainingFailedError

    for attempt in range(spec.config.max_failures + 1):
        try:
            _fit_once(spec)
            return
        except TrainingFailedError as failure:
            error, again = explain(failure)
            if not again or attempt == spec.config.max_failures:
                raise error from None
            logger.warning("%s; restarting from the newest checkpoint (failure %d)", error, attempt + 1)


def _fit_once(spec: Any) -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig

    from nvembed.training.worker import run_worker

    config: TrainConfig = spec.config
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_SECONDS)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if not os.environ.get("RAY_ADDRESS"):  # the nodes of a local cluster are never taken away
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    gpu = config.gpus_per_worker > 0
    resources = {"CPU": float(config.threads_per_worker)} | ({"GPU": config.gpus_per_worker} if gpu else {})
    run_config: Any = RunConfig(
        name=f"nvembed-{uuid.uuid4().hex[:12]}",
        storage_path=storage.join(spec.work_uri, ".tmp", "ray"),
        failure_config=FailureConfig(max_failures=0),
        worker_runtime_env={"env_vars": worker_environment(config)},
        logging_config=LoggingConfig(log_level="ERROR"),
    )
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=gpu, resources_per_worker=resources),
        run_config=run_config,
    )
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        trainer.fit()
    except SystemExit as stopped:  # Ray's SIGINT handler stops the workers and then exits, with code 0
        raise KeyboardInterrupt from stopped
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def connect(config: TrainConfig) -> None:
    """Connect to Ray (`ensure_ray`) and check its size.

    Raises:
        UserError: a cluster that does not grow has fewer CPUs or GPUs than the workers ask for.
    """
    need = {
        "CPU": float(config.num_workers * config.threads_per_worker),
        "GPU": float(config.num_workers * config.gpus_per_worker),
    }
    ensure_ray(max(int(need["CPU"]), os.cpu_count() or 1) + 1)
    if os.environ.get("RAY_ADDRESS"):
        return  # the cluster may grow; Ray waits for it
    import ray

    have = ray.cluster_resources()
    for kind, amount in need.items():
        if amount > have.get(kind, 0.0):
            raise UserError(
                f"train.num_workers {config.num_workers} need {amount:g} {kind}s together, this Ray has "
                f"{have.get(kind, 0.0):g}. Lower num_workers or {'threads' if kind == 'CPU' else 'gpus'}_per_worker."
            )


def worker_environment(config: TrainConfig) -> dict[str, str]:
    """Environment of a worker process, set before it imports torch."""
    threads = str(config.threads_per_worker)
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        # Texts differ in length from step to step, so freed blocks do not fit the next ones: a worker's heap grew from
        # 2.2 to 4 GB in 50 steps. Blocks over 4 MB become maps of their own and go back at once; on huge pages, as
        # ordinary ones would cost a third of the time in page faults.
        "MALLOC_MMAP_THRESHOLD_": str(2**22),
        "MALLOC_TRIM_THRESHOLD_": str(2**26),
        "THP_MEM_ALLOC_ENABLE": "1",
        # A process killed while it compiles leaves a lock that later ones wait for without end: one folder a process.
        "TORCH_EXTENSIONS_DIR": os.path.join(tempfile.gettempdir(), f"nvembed-extensions-{uuid.uuid4().hex[:12]}"),
    }
    return variables if config.gpus_per_worker else variables | {"DS_ACCELERATOR": "cpu"}


def explain(failure: Any) -> tuple[Exception, bool]:
    """The short error of a failed Ray run, and whether another attempt may help.

    A user's mistake or a numerical failure would only happen again. A dead worker, a broken connection or storage
    that is away may not; when one worker dies the others fail with a broken connection.
    """
    failures: dict[int, BaseException] = dict(getattr(failure, "worker_failures", {}))
    causes = {rank: getattr(error, "_base_exc", error) for rank, error in failures.items()}
    for rank, cause in sorted(causes.items()):
        if isinstance(cause, UserError | TrainingError | lease.LeaseLostError):
            return cause, False
        if not _passing(cause):
            return TrainingError(f"rank {rank} failed: {type(cause).__name__}: {first_line(cause)}"), False
    listed = "; ".join(f"rank {rank}: {type(c).__name__}: {first_line(c)}" for rank, c in sorted(causes.items()))
    return TrainingError(f"training failed: {listed or first_line(failure)}"), True


def _passing(cause: BaseException) -> bool:
    from ray.exceptions import RayError

    return isinstance(cause, RayError | RuntimeError | OSError) or type(cause).__module__.startswith("ray.")
