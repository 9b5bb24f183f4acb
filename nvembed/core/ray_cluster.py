"""The Ray cluster a run computes on: the one `RAY_ADDRESS` names, or a private local one.

`ray.init()` without an address joins any cluster it finds on the machine, another user's included; hence
`address="local"` here. Token authentication stays on (Ray's default), as Ray's ports listen on every interface.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 200 * 2**20  # vectors go file -> actor -> file; the store only carries shard names and counters
SPARE_CPUS = 2


def ensure_ray(num_cpus: int | None = None, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> None:
    """Connect to Ray if this process is not connected yet.

    A local cluster declares more *logical* CPUs than the machine has (physical + 2): actor pools that ask for every
    core would otherwise leave Ray Data's own small tasks and Ray Train's controller waiting for a slot for ever. The
    real number of threads is bounded by each actor's `threads_per_actor`.

    Args:
        num_cpus: logical CPUs of a local cluster; ignored when `RAY_ADDRESS` names one.
        object_store_bytes: shared memory of a local cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # as locally: workers' lines stay in Ray's session directory, errors reach the driver as exceptions
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        logger.info("Ray: joined the cluster at %s", address)
        return
    logical = num_cpus or max(os.cpu_count() or 1, 2) + SPARE_CPUS
    ray.init(
        address="local",
        num_cpus=logical,
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        logging_level=logging.WARNING,
        log_to_driver=False,  # workers' lines are in Ray's session directory; errors reach the driver as exceptions
    )
    logger.info("Ray: started a local cluster with %d logical CPUs", logical)
