"""The Ray cluster a run computes on: the one `RAY_ADDRESS` names, or a private local one.

`ray.init()` without an address joins any cluster it finds on the machine, another user's included; hence
`address="local"` here. A private cluster is private to its user: its ports are open on the loopback interface only,
clients need a token, and token, sockets and logs lie in a folder that no other user can enter. A process that
reaches a port of Ray and has the token runs code as its owner.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import tempfile
from pathlib import Path

from nvembed.types import UserError

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 200 * 2**20  # vectors go file -> actor -> file; the store only carries shard names and counters
SPARE_CPUS = 2
_LONGEST_TEMPORARY = 35  # bytes; a socket's path has 107 (AF_UNIX), and Ray adds some 65 of its own
_LOOPBACK = "127.0.0.1"
RAYS_TOKEN = Path("~/.ray/auth_token")


def ensure_ray(num_cpus: int | None = None, *, object_store_bytes: int = OBJECT_STORE_BYTES) -> None:
    """Connect to Ray if this process is not connected yet.

    A local cluster declares more *logical* CPUs than the machine has (physical + 2): actor pools that ask for every
    core would otherwise leave Ray Data's own small tasks and Ray Train's controller waiting for a slot for ever. The
    real number of threads is bounded by each actor's `threads_per_actor`.

    Args:
        num_cpus: logical CPUs of a local cluster; ignored when `RAY_ADDRESS` names one.
        object_store_bytes: shared memory of a local cluster.

    Raises:
        UserError: there is no folder for the private files of a local cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Ray replaces a loopback address by the machine's own, unless it takes the platform for one without clusters;
        # read when ray is first imported
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        return
    if address:
        # as locally: workers' lines stay in Ray's session directory, errors reach the driver as exceptions
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        logger.info("Ray: joined the cluster at %s", address)
        return
    folder = private_folder()
    use_token(folder)
    logical = num_cpus or max(os.cpu_count() or 1, 2) + SPARE_CPUS
    ray.init(
        address="local",
        num_cpus=logical,
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        logging_level=logging.WARNING,
        log_to_driver=False,  # workers' lines are in Ray's session directory; errors reach the driver as exceptions
        _node_ip_address=_LOOPBACK,
        _temp_dir=os.environ.get("RAY_TMPDIR") or str(folder / "ray"),  # Ray opens this one to everybody
    )
    if ray.util.get_node_ip_address() != _LOOPBACK:
        logger.warning("Ray was imported before nvembed started it: its ports are open on every interface")
    logger.info("Ray: started a local cluster with %d logical CPUs", logical)


def private_folder() -> Path:
    """The folder of this user's local clusters, which no other user can enter: `nvembed-ray-UID` below TMPDIR or /tmp.

    Raises:
        UserError: neither can be written, or another user has taken the name.
    """
    problems = []
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        if len(os.fsencode(parent)) > _LONGEST_TEMPORARY:
            problems.append(f"{parent} is too long for the names of sockets ({_LONGEST_TEMPORARY} bytes at most)")
            continue
        folder = Path(parent, f"nvembed-ray-{os.getuid()}")
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise PermissionError("it belongs to another user, or is a link")
            folder.chmod(0o700)
            return folder
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    raise UserError(
        f"no place for Ray's sockets: {'; '.join(problems)}. Set TMPDIR to a short path that can be written."
    )


def use_token(folder: Path) -> None:
    """Name the token of a local cluster: the one of the environment, else one in a private folder.

    Ray asks for it by itself, unless RAY_AUTH_MODE is `disabled`. Ray's own `~/.ray/auth_token` is made readable by its
    owner only where it is not.
    """
    tighten(RAYS_TOKEN)
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(make_token(folder / "auth_token"))


def make_token(path: Path) -> Path:
    """The file with a token, made if it is missing, readable by its owner only; returns its path."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(part, path)  # whole or not at all: another run may read it at this moment
    except FileExistsError:
        tighten(path)
    finally:
        part.unlink()
    return path


def tighten(path: Path) -> bool:
    """Remove the rights of group and others to a file of this user; True where they had some."""
    path = Path(os.path.expanduser(path))  # unlike Path.expanduser, it takes a user without a home
    try:
        found = path.stat()
        if found.st_uid != os.getuid() or not found.st_mode & 0o077:
            return False
        path.chmod(0o600)
    except OSError:
        return False
    logger.warning("%s was readable by other users of this machine; now by its owner only", path)
    return True
