"""The declaration of a pipeline: its function, its default recipe, the sections it reads.

    PIPELINE = Pipeline(nv_embed, recipe="quickstart.yaml", needs=("stage_1",))

Standard library only: `nvembed submit` reads the declaration from a file's source, and importing a pipeline file must
not load torch.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "PIPELINE"


@dataclass(frozen=True)
class Pipeline:
    """A pipeline.

    Attributes:
        function: takes a `PipelineRun` (or a `DryRun`) and runs its steps; its docstring is the help text.
        recipe: default recipe, a file in `recipes/` beside the function's file.
        needs: sections of the recipe that the function reads and that are optional elsewhere.
    """

    function: Callable[[Any], None]
    recipe: str = "quickstart.yaml"
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its function."""
        return self.function.__name__

    @property
    def recipe_path(self) -> str:
        """Path of the default recipe."""
        return str(Path(inspect.getfile(self.function)).resolve().parent / "recipes" / self.recipe)


def load_pipeline(path: str) -> Pipeline:
    """The pipeline that a Python file declares; runs the file's module level.

    Raises:
        UserError: there is no such file, it cannot be imported, or it has no `PIPELINE = Pipeline(...)`.
    """
    from nvembed.core.messages import nearest
    from nvembed.types import UserError

    spec = importlib.util.spec_from_file_location(f"nvembed_pipeline_{Path(path).stem}", path)
    if not Path(path).is_file():
        folder = Path(path).parent
        near = nearest(Path(path).name, [file.name for file in folder.glob("*.py")] if folder.is_dir() else [])
        what = "a folder; give the pipeline file in it" if Path(path).is_dir() else "no such pipeline file"
        raise UserError(f"{path}: {what}.{near} Check the path.")
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: a pipeline file is a Python file, NAME.py; a recipe is the second argument.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look their module up
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be imported ({type(error).__name__}: {error}). Correct the file.") from error
    finally:
        del sys.modules[spec.name]  # Ray's workers cannot import it, so its functions are pickled by value
    pipeline = getattr(module, NAME, None)
    if not isinstance(pipeline, Pipeline):
        raise UserError(f"{path}: no pipeline: it has no module-level `{NAME} = Pipeline(...)`")
    return pipeline
