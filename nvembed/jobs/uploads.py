"""The files uploaded with a job: what git does not ignore, without outputs, caches, environments and secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from nvembed.core.secrets import has_credentials, has_token, is_secret_name, secret_values
from nvembed.core.steps import MLFLOW_ARTIFACTS, MLFLOW_DB
from nvembed.types import UserError

# never code: outputs and caches of ours, environments, and files whose names say that they hold secrets
NEVER = (
    ".git/", "runs/", "mlruns/", f"{MLFLOW_ARTIFACTS}/", MLFLOW_DB, "__pycache__/", "*.pyc", ".venv/", "venv/",
    "*.egg-info/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/", ".cache/", "node_modules/",
    ".DS_Store", ".env", ".env.*", ".netrc", ".pypirc", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*",
    "auth_token", ".aws/", ".kube/", "credentials.json", "service-account*.json",
)  # fmt: skip
SCANNED_BYTES = 1 << 20  # larger files are data, not settings; they are not searched for secrets
SHOWN = 5


@dataclass(frozen=True)
class WorkingDir:
    """Files to upload, relative to `folder`, with their sizes."""

    folder: Path
    files: Mapping[str, int]

    @property
    def megabytes(self) -> float:
        """Size of everything, uncompressed."""
        return sum(self.files.values()) / 1e6

    @property
    def biggest(self) -> list[tuple[str, int]]:
        """The largest files, largest first."""
        return sorted(self.files.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]

    def stage(self, destination: Path) -> None:
        """Copy the files below `destination`, links as what they point to."""
        for name in self.files:
            target = destination / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.folder / name, target)


def collect(folder: Path, excludes: Sequence[str], max_megabytes: float) -> WorkingDir:
    """The files of a folder to upload.

    Raises:
        UserError: no such folder; together too large (the biggest are named); a link leads out of the folder; a file
            holds a secret of the environment.
    """
    if not folder.is_dir():
        raise UserError(f"working_dir {folder}: no such directory")
    spec = GitIgnoreSpec.from_lines([*NEVER, *_lines(folder / ".rayignore"), *excludes])
    names = _from_git(folder)
    sizes = {}
    for name in sorted(_list_files(folder) if names is None else names):
        path = folder / name
        if spec.match_file(name) or not path.is_file():  # a deleted file is still in git's index
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: a link that leads out of the working directory; add it to `excludes`")
        sizes[name] = path.stat().st_size
    travels = WorkingDir(folder, sizes)
    if travels.megabytes > max_megabytes:
        listed = "\n".join(f"  {size / 1e6:8.1f} MB  {name}" for name, size in travels.biggest)
        raise UserError(
            f"working_dir {folder}: {travels.megabytes:.1f} MB in {len(sizes)} files, more than max_megabytes "
            f"{max_megabytes:g}. The biggest:\n{listed}\nAdd other files than code to `excludes` or .gitignore."
        )
    _refuse_secrets(travels)
    return travels


def _from_git(folder: Path) -> list[str] | None:
    """Tracked files, and untracked ones that git does not ignore; None outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return sorted({os.fsdecode(name) for name in done.stdout.split(b"\0") if name})


def _list_files(folder: Path) -> Iterator[str]:
    """Every file except those that .gitignore files name and those of virtual environments."""
    ignored: dict[Path, GitIgnoreSpec] = {}
    never = GitIgnoreSpec.from_lines(NEVER)
    for here, directories, names in os.walk(folder):
        at = Path(here)
        ignored[at] = GitIgnoreSpec.from_lines(_lines(at / ".gitignore"))
        above = [at, *(parent for parent in at.parents if parent in ignored)]

        def out(name: str, above: list[Path] = above, at: Path = at) -> bool:
            relative = (at / name).relative_to(folder).as_posix() + ("/" if (at / name).is_dir() else "")
            if never.match_file(relative) or (at / name / "pyvenv.cfg").exists():
                return True
            slash = "/" if (at / name).is_dir() else ""
            return any(ignored[root].match_file((at / name).relative_to(root).as_posix() + slash) for root in above)

        directories[:] = [name for name in directories if not out(name)]
        yield from ((at / name).relative_to(folder).as_posix() for name in names if not out(name))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _refuse_secrets(travels: WorkingDir) -> None:
    values = {value.encode(): name for value, name in secret_values().items()}
    for name, size in travels.files.items():
        if not values or size > SCANNED_BYTES:
            continue
        data = (travels.folder / name).read_bytes()
        variables = sorted(variable for value, variable in values.items() if value in data)
        if variables:
            raise UserError(
                f"{travels.folder / name}: holds the value of {variables[0]}, a secret of your environment, and would "
                "be sent. Take it out, or add the file to `excludes`."
            )


# -- secrets ----------------------------------------------------------------------------------------------------------


def leaks(texts: Iterable[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """The secrets in texts, as phrases that name each without showing it.

    A secret reaches a job only as a reference: the name of a variable that the cluster provides, a key of a Kubernetes
    Secret, a file on the cluster.
    """
    joined = "\n".join(texts)
    values = [f"the value of {name}" for value, name in secret_values(environment).items() if value in joined]
    return [
        *sorted(values),
        *(["a password inside a URL"] if has_credentials(joined) else []),
        *(["what has the shape of an access token"] if has_token(joined) else []),
    ]


def wrong_variables(variables: Mapping[str, str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> reason for the plain settings that are secrets."""
    values = secret_values(environment)
    wrong = {}
    for name, value in variables.items():
        if is_secret_name(name):
            wrong[name] = "looks like a secret by its name"
        elif value in values:
            wrong[name] = f"has the value of {values[value]}, a secret of your environment"
        elif has_credentials(value):
            wrong[name] = "holds a URL with a password"
        elif secrets := leaks([value], environment):
            wrong[name] = f"holds {' and '.join(secrets)}"
    return wrong
