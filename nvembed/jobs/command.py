"""The command after `--` and its job: pipeline file and recipe are checked here, before anything is sent."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.runtime import git_revision, user_name
from nvembed.core.secrets import texts_in
from nvembed.jobs.config import CloudTarget, KubeRayTarget, RayTarget, SlurmTarget
from nvembed.jobs.target import Target, inside, is_loopback_url
from nvembed.jobs.uploads import leaks
from nvembed.recipe.schema import Recipe, load_recipe
from nvembed.types import UserError

USAGE = "nvembed submit TARGET -- python pipelines/nv_embed.py RECIPE [--set a.b=c]... [--out URI]"
WITH_VALUE = ("--set", "--out")  # the options of a pipeline file that take a value
FINGERPRINT = 10  # hex digits in a job's id


@dataclass(frozen=True)
class Job:
    """A submission, the same for every kind of target.

    Attributes:
        name: name of the recipe.
        fingerprint: hash of the resolved recipe and the command; the same run has the same one.
        interpreter, script, options: the command in parts: `script` is the pipeline file, `options` are those besides
            `--set` and `--out`.
        recipe_path, settings: recipe and `--set` values of the command; the path is "" for the default recipe.
        recipe: the recipe, checked and resolved.
        out: output root, on storage that every node sees.
        folder: working directory of the check and the dry run; for Ray and clouds its files are uploaded.
        code: the checkout whose code the job runs; None where it runs the code of an image.
    """

    name: str
    fingerprint: str
    interpreter: str
    script: str
    options: tuple[str, ...]
    recipe_path: str
    settings: tuple[str, ...]
    recipe: Recipe
    out: str
    folder: Path
    code: Path | None = None

    @property
    def base(self) -> str:
        """The job's id without the try; also a DNS label of at most 37 characters."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:17].strip("-") or "run"
        return f"nvembed-{slug}-{self.fingerprint}"

    @property
    def argv(self) -> list[str]:
        """The command as it runs in the checkout."""
        recipe = [self.recipe_path] if self.recipe_path else []
        settings = [part for setting in self.settings for part in ("--set", setting)]
        return [self.interpreter, self.script, *recipe, *settings, "--out", self.out, *self.options]

    def with_resolved_recipe(self, recipe_path: str, script: str) -> list[str]:
        """The command with the resolved recipe at `recipe_path`."""
        return [self.interpreter, script, recipe_path, "--out", self.out, *self.options]

    @property
    def metadata(self) -> dict[str, str]:
        """The labels of a job; they hold no secrets."""
        return {
            "nvembed_recipe": self.name,
            "nvembed_recipe_sha256": storage.hash_json(self.recipe.model_dump(mode="json")),
            "nvembed_fingerprint": self.fingerprint,
            "nvembed_out": self.out,
            "git_revision": (git_revision(self.code) if self.code else None) or "none",
            "user": user_name(),
        }


def read_job(target: Target, command: Sequence[str]) -> Job:
    """The job of a command, for a target.

    Raises:
        UserError: it is not a pipeline file, its recipe is wrong, its output is not shared, it holds a secret.
    """
    folder = Path(target.working_dir if isinstance(target, RayTarget | CloudTarget) else ".").absolute()
    interpreter, script, rest = _split(command, folder)
    declaration = _declaration(folder / script)
    recipe_path, settings, out, options = _options(rest)
    if recipe_path is None:
        recipe_file = str(_default_recipe(declaration, folder / script))
    else:  # as the pipeline reads it, which runs in that folder
        recipe_file = recipe_path if "://" in recipe_path else str(folder / recipe_path)
    recipe = load_recipe(recipe_file, settings, declaration.needs)
    uri = _output(target, recipe, out)
    resolved = recipe.model_dump(mode="json")
    identity = {"recipe": resolved, "pipeline": script, "out": uri, "options": options}
    if secrets := leaks([*command, uri, *texts_in(resolved)]):
        raise UserError(
            f"the command, recipe or output holds {' and '.join(secrets)}: everyone who sees the job would see it. "
            "Leave it out; name the variable under `secrets` in the target."
        )
    return Job(
        recipe.name,
        storage.hash_json(identity)[:FINGERPRINT],
        interpreter,
        script,
        tuple(options),
        _inside(recipe_path or "", folder),
        tuple(settings),
        recipe,
        uri,
        folder,
        _code(target, folder, script),
    )


def _code(target: Target, folder: Path, script: str) -> Path | None:
    """The checkout whose code the job runs."""
    if isinstance(target, KubeRayTarget):
        return None
    if not isinstance(target, SlurmTarget):
        return folder
    code = Path(target.working_dir)
    if code.is_dir() and not (code / script).is_file():
        raise UserError(f"{script}: no such file in the target's working_dir, {code}, from where the job runs it")
    return code


def _inside(path: str, folder: Path) -> str:
    """A path inside the working directory relative to it, as the job sees it; any other path unchanged."""
    given = Path(path)
    return given.relative_to(folder).as_posix() if given.is_absolute() and given.is_relative_to(folder) else path


def _split(command: Sequence[str], folder: Path) -> tuple[str, str, list[str]]:
    if not command:
        raise UserError(f"no command. Usage: {USAGE}")
    interpreter, *rest = command
    if interpreter.endswith(".py"):
        interpreter, rest = "python", [*command]
    elif not re.fullmatch(r"(.*/)?python[0-9.]*", interpreter):
        raise UserError(f"{interpreter}: a job is a pipeline file run by python. Usage: {USAGE}")
    if not rest or rest[0].startswith("-"):
        raise UserError(f"{shlex.join(command)}: no pipeline file after {interpreter}. Usage: {USAGE}")
    script = Path(os.path.normpath(rest[0]))
    if script.is_absolute():
        if not script.is_relative_to(folder):
            raise UserError(f"{script}: outside the working directory {folder}, so the job would not have it")
        script = script.relative_to(folder)
    if script.parts[0] == "..":
        raise UserError(f"{script}: outside the working directory {folder}, so the job would not have it")
    if not (folder / script).is_file():
        raise UserError(f"{script}: no such file in {folder}")
    return interpreter, script.as_posix(), rest[1:]


@dataclass(frozen=True)
class _Declaration:
    """`PIPELINE = Pipeline(...)` of a file: default recipe, needed sections, and the place `file:line`."""

    recipe: str
    needs: tuple[str, ...]
    place: str


def _declaration(path: Path) -> _Declaration:
    """The pipeline that a file declares, read from its source; nothing of the file is executed.

    Raises:
        UserError: no Python file, no declaration, two of them, or one whose arguments are not literals.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a Python file ({error})") from error
    calls = [call for node in tree.body if (call := _declaring_call(node)) is not None]
    if not calls:
        raise UserError(
            f"{path}: declares no pipeline: it has no module-level `PIPELINE = Pipeline(function, recipe=..., "
            "needs=(...))`. See pipelines/ for examples."
        )
    if len(calls) > 1:
        lines = " and ".join(str(call.lineno) for call in calls)
        raise UserError(
            f"{path}:{calls[1].lineno}: PIPELINE is declared on lines {lines}; a file declares one pipeline"
        )
    call, place = calls[0], f"{path}:{calls[0].lineno}"
    arguments = dict(zip(("function", "recipe", "needs"), call.args, strict=False))
    arguments |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    recipe = _literal(arguments.get("recipe"), "quickstart.yaml", place, "recipe")
    needs = _literal(arguments.get("needs"), (), place, "needs")
    if not isinstance(recipe, str) or not isinstance(needs, tuple | list):
        raise UserError(f"{place}: Pipeline(...) takes a file name as recipe= and a tuple of section names as needs=")
    return _Declaration(recipe, tuple(map(str, needs)), place)


def _default_recipe(declaration: _Declaration, script: Path) -> Path:
    path = script.parent / "recipes" / declaration.recipe
    if not path.is_file():
        raise UserError(f"{declaration.place}: recipe={declaration.recipe!r}: no such file, {path}")
    return path


def _declaring_call(node: ast.stmt) -> ast.Call | None:
    """The call in `PIPELINE = Pipeline(...)`; None for any other statement."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    if not any(isinstance(target, ast.Name) and target.id == "PIPELINE" for target in targets):
        return None
    value = getattr(node, "value", None)
    is_call = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "Pipeline"
    return value if is_call else None


def _literal(node: ast.expr | None, default: Any, place: str, name: str) -> Any:
    if node is None:
        return default
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise UserError(
            f"{place}: {name}={ast.unparse(node)} is not a literal; the file is read without running it, so write the "
            "value out"
        ) from error


def _options(rest: Sequence[str]) -> tuple[str | None, list[str], str | None, list[str]]:
    """Recipe, `--set` values, `--out` and the other options of a pipeline's command line."""
    recipe, settings, out, others = None, list[str](), None, list[str]()
    parts = list(rest)
    while parts:
        part = parts.pop(0)
        name, equals, value = part.partition("=")
        if name in WITH_VALUE:
            if not equals:
                if not parts:
                    raise UserError(f"{part} needs a value")
                value = parts.pop(0)
            if name == "--set":
                settings.append(value)
            else:
                out = value
        elif part.startswith("-"):
            others.append(part)
        elif recipe is None:
            recipe = part
        else:
            raise UserError(f"{part}: a second recipe after {recipe}; options with values are written --name=value")
    return recipe, settings, out, others


def _output(target: Target, recipe: Recipe, out: str | None) -> str:
    """Output root: `--out`, or the target's `outputs` with the recipe's name; refused unless every node sees it."""
    if out is None:
        if target.outputs is None:
            raise UserError(
                "no --out: the job runs on other machines, so its output must be a URI or a path that they share. "
                "Add --out to the command, or `outputs:` to the target."
            )
        return storage.join(target.outputs, recipe.name)
    if "://" in out and not out.startswith("file:"):
        if isinstance(target, CloudTarget):
            raise UserError(
                f"--out {out}: model folders need files; write below {target.mount_path}, the bucket's mount"
            )
        return out.rstrip("/")
    roots = _shared_roots(target)
    if not out.startswith("/") or not (roots is None or any(inside(out, root) for root in roots)):
        where = f"below {' or '.join(roots)}" if roots else "with / at its beginning"
        raise UserError(f"--out {out}: not on storage that every node sees. Give a URI, or a path {where}.")
    return out.rstrip("/")


def _shared_roots(target: Target) -> Sequence[str] | None:
    """Directories that every node sees; None when any absolute path may be one."""
    if isinstance(target, RayTarget):
        return None if is_loopback_url(target.address) and not target.shared_paths else target.shared_paths
    if isinstance(target, KubeRayTarget):
        return (target.storage.mount_path,) if target.storage.type == "claim" else ()
    if isinstance(target, CloudTarget):
        return (target.mount_path,)
    return None
