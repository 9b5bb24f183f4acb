"""The lock file: exact versions that satisfy pyproject.toml, hashes, and nothing of the machine that made it."""

import contextlib
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "cluster/requirements.lock").read_text()
IMAGE = {
    "python_version": "3.11",
    "python_full_version": "3.11.13",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
}
EXTRAS = ("quickstart", "s3", "gcs", "aws", "gcp")  # what an image has
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", LOCK, flags=re.MULTILINE)
}


def test_the_lock_satisfies_what_is_declared() -> None:
    """Dependencies, the image's extras and the build backend, which the image installs nvembed with."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, backend = pyproject["project"], pyproject["build-system"]["requires"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *backend, *(line for name in EXTRAS for line in extras[name])]
    for requirement in map(Requirement, declared):
        if requirement.name == "nvembed":
            assert requirement.extras <= set(EXTRAS)
            continue
        pinned = PINS.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} is not locked"
        assert requirement.specifier.contains(pinned), f"{requirement.name}: {pinned} is not {requirement.specifier}"


def test_every_pin_is_exact_and_has_a_hash() -> None:
    logical = re.sub(r"\\\n\s*", "", LOCK)
    lines = [line for line in logical.splitlines() if line and not line.startswith("#")]
    wrong = [
        line
        for line in lines
        if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.!-]+( --hash=sha256:[0-9a-f]{64})+", line)
    ]
    assert wrong == [] and len(lines) == len(PINS) > 100


def test_what_the_environment_of_the_tests_has_is_what_is_locked() -> None:
    """By the packages' own words: a locked package's requirements are locked, at versions that it takes."""
    import importlib.metadata

    known = {}
    for name, version in PINS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            distribution = importlib.metadata.distribution(name)
            if distribution.version == version:
                known[name] = distribution
    if len(known) < len(PINS) // 2:
        pytest.skip(f"only {len(known)} of {len(PINS)} locked versions are installed here")
    wrong = []
    for name, distribution in known.items():
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": "", **IMAGE}):
                continue
            pinned = PINS.get(canonicalize_name(requirement.name))
            if pinned is None or not requirement.specifier.contains(pinned, prereleases=True):
                wrong.append(f"{name} wants {requirement}; locked: {pinned}")
    assert wrong == []


def test_the_lock_names_no_host_and_no_path() -> None:
    lines = "\n".join(line for line in LOCK.splitlines() if not line.startswith("#"))
    assert "://" not in lines and "/" not in lines and "index" not in lines and "+" not in lines
    assert PINS["torch"] == "2.13.0"


def test_setuptools_is_a_build_requirement_only() -> None:
    """torch itself requires it where operators are built at run time; nvembed imports none of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any(Requirement(line).name == "setuptools" for line in project["dependencies"])
    lines = [line for path in (ROOT / "nvembed").rglob("*.py") for line in path.read_text().splitlines()]
    assert not any(re.match(r"\s*(import|from) (setuptools|pkg_resources)\b", line) for line in lines)


def test_the_image_and_the_targets_agree_with_the_lock() -> None:
    import yaml

    docker = (ROOT / "cluster/Dockerfile").read_text()
    assert "--require-hashes" in docker and "USER " in docker
    assert yaml.safe_load((ROOT / "cluster/kuberay.yaml").read_text()).get("ray_version", "2.60.0") == PINS["ray"]
