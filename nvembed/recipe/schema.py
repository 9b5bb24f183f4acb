"""The recipe: every section of a run in one YAML file, checked as a whole before a run starts.

Pydantic only: reading and checking a recipe needs neither torch nor ray nor mlflow. The recipe composes the sections
that the packages own; a step is given its own section and never sees this class.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field

from nvembed.core import storage
from nvembed.core.formats import own_version
from nvembed.core.messages import closest
from nvembed.core.secrets import mask
from nvembed.data.config import PrepareConfig
from nvembed.distill.config import CompareConfig, TeacherEmbeddingsConfig
from nvembed.evaluation.config import BaselineConfig, EvaluateConfig
from nvembed.mining.config import MineConfig
from nvembed.modeling.config import InitialiseConfig, TruncateConfig
from nvembed.recipe.checks import cross_checks
from nvembed.recipe.document import Document, Position, Problem, override, parse
from nvembed.recipe.validation import validate
from nvembed.registry.config import RegisterConfig
from nvembed.stream.config import DistillStreamConfig, StreamConfig
from nvembed.tracking.config import TrackingConfig
from nvembed.training.config import TrainConfig
from nvembed.types import Config, UserError

T = TypeVar("T")
if TYPE_CHECKING:  # `needs` of a pipeline guarantees the sections that it reads: its code does not test for None
    NeededSection = Annotated[T, "absent unless the pipeline needs it"]
else:
    NeededSection = T | None
LEFT_OUT: Any = None
RECIPE_VERSION = 1


class Stage(Config):
    """A stage of training: its stream and how it is trained."""

    stream: StreamConfig = Field(description="Training stream: weights of the data sets, batches, negatives.")
    train: TrainConfig = Field(description="Training: objective, optimiser, engine, workers.")


class StudentStage(Config):
    """The student: how it starts, its stream of teacher vectors, its training and evaluation."""

    init: TruncateConfig = Field(description="Which layers of the teacher the student starts from.")
    stream: DistillStreamConfig = Field(description="Training stream of texts with teacher embeddings.")
    train: TrainConfig = Field(description="Training: objective, optimiser, engine, workers.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="Evaluation of the student.")
    compare: CompareConfig = Field(CompareConfig(), description="Speed and scores of the student beside the teacher's.")


class ClusterConfig(Config):
    """The local Ray cluster a run starts when RAY_ADDRESS names none. Never changes a result."""

    local_cpus: int | None = Field(
        None, ge=1, description="Logical CPUs of the local Ray cluster; null: enough for the recipe's workers."
    )
    object_store_mb: int = Field(200, ge=80, description="Size of Ray's object store in MiB.")


warnings.filterwarnings("ignore", message='Field name "register" in "Recipe" shadows')  # of the metaclass; unharmed


class Recipe(Config):
    """One run. Sections that its pipeline does not need may be left out."""

    version: Literal[1] = Field(1, description="Version of the recipe format.")
    name: str = Field(
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Name of the run, and of its default output, runs/<name>.",
    )
    description: str = Field("", description="Purpose of the recipe, for the report.")
    prepare: PrepareConfig = Field(description="Data sets, their splits, filters and near-duplicate checks.")
    initialise: NeededSection[InitialiseConfig] = Field(
        LEFT_OUT, description="The model before training: backbone, pooling, tokens of a text."
    )
    mine: MineConfig = Field(MineConfig(), description="Hard-negative mining.")
    stage_1: NeededSection[Stage] = Field(LEFT_OUT, description="Stage 1 of NV-Embed: retrieval sets.")
    stage_2: Stage | None = Field(None, description="Stage 2 of NV-Embed: all tasks, from the stage-1 model.")
    mine_again: bool = Field(
        False, description="Mine again with the stage-1 model, by the settings of `mine`; stage 2 learns from that."
    )
    baselines: BaselineConfig = Field(BaselineConfig(), description="BM25, a reference model, the untrained backbone.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="Evaluation of the teacher.")
    teacher: NeededSection[str] = Field(
        LEFT_OUT, min_length=1, description="Model folder or models:/name@alias to distil from."
    )
    teacher_embeddings: NeededSection[TeacherEmbeddingsConfig] = Field(
        LEFT_OUT, description="Texts that the teacher embeds for the student."
    )
    student: NeededSection[StudentStage] = Field(LEFT_OUT, description="The student: its start, training, evaluation.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Runs and metrics in MLflow.")
    register: RegisterConfig = Field(
        RegisterConfig(), description="Names in the registry, and the gate before `champion`."
    )
    cluster: ClusterConfig = Field(ClusterConfig(), description="The local Ray cluster.")


class RecipeError(UserError):
    """An invalid recipe or target; `problems` lists everything wrong with it."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(set(problems), key=_order))
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(mask("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)])))


def load_recipe(path: str, overrides: Sequence[str] = (), needs: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file, local or any fsspec URI.
        overrides: `a.b=c` settings, the value in YAML.
        needs: names of sections that must be there.

    Raises:
        RecipeError: listing everything that is wrong, each with its path, line, value, what is allowed, nearest match.
        UserError: there is no such file.
    """
    return read_recipe(path, overrides, needs)[0]


def read_recipe(path: str, overrides: Sequence[str] = (), needs: Sequence[str] = ()) -> tuple[Recipe, Document]:
    """A checked recipe, and the document that says where each of its values was written; see `load_recipe`."""
    document, problems = parse(read_yaml(path), path)
    if problems and not document.data:
        raise RecipeError(path, problems)
    _refuse_newer(document, path)
    problems += override(document, overrides)
    sections, wrong = validate(Recipe, document)
    problems += wrong
    for name in needs:
        if document.data.get(name) is None:
            problems.append(Problem(document.position(()), (name,), "missing; this pipeline needs the section"))
    problems += cross_checks(sections, document)
    if problems:
        raise RecipeError(path, problems)
    return Recipe.model_validate(document.data), document


def _refuse_newer(document: Document, path: str) -> None:
    """Refuse a recipe of a later format as a whole: its other problems would mislead."""
    version = document.data.get("version")
    if isinstance(version, int) and version > RECIPE_VERSION:
        message = (
            f"{version}: this recipe is for a newer nvembed; {own_version()} reads version {RECIPE_VERSION}. "
            "Run: pip install --upgrade nvembed"
        )
        raise RecipeError(path, [Problem(document.position(("version",)), ("version",), message)])


def _order(problem: Problem) -> tuple[bool, int, int, str]:
    position: Position = problem.position
    return (position.line == 0, position.line, position.column, str(problem))


def read_yaml(path: str, what: str = "recipe") -> str:
    """The text of a recipe or target; a UserError with the nearest name where there is no such file."""
    try:
        return storage.read_bytes(path).decode("utf-8")
    except FileNotFoundError as error:
        folder, _, name = path.rpartition("/")
        try:
            there = [file for file in storage.list_directory(folder or ".") if file.endswith((".yaml", ".yml"))]
        except (OSError, ValueError):
            there = []
        near = closest(name, there)
        hint = f" Did you mean {storage.join(folder, near) if folder else near}?" if near else ""
        raise UserError(f"{path}: no such {what}.{hint}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read as a {what} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; reading it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


__all__ = [
    "ClusterConfig",
    "Document",
    "Recipe",
    "RecipeError",
    "Stage",
    "StudentStage",
    "load_recipe",
    "read_recipe",
    "read_yaml",
    "resolved_yaml",
]
