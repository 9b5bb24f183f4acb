"""Samples of every format of today, a few kilobytes each: `python tests/assets/formats/make.py`, once per new format.

A sample is never written again: what is there stays as the nvembed of its time made it, and `tests/test_formats.py`
reads all of them. When a format's number goes up, run this, and the new version lies beside the old ones.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from nvembed.core import storage
from nvembed.core.steps import FORMAT_VERSION, Step, StepResult
from nvembed.losses.objectives import build_objective
from nvembed.modeling import folder as model_folder
from nvembed.modeling.adapters import apply_adapter, keep_adapter, merge_adapter
from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.exports import adapter_folder
from nvembed.modeling.exports.forms import ExportSpec, export_model
from nvembed.modeling.folder import load_embedder, save_embedder
from nvembed.recipe.schema import RECIPE_VERSION, load_recipe, resolved_yaml
from nvembed.text.config import TextConfig
from nvembed.text.tokenise import Tokeniser
from nvembed.training import checkpoint
from nvembed.training.checkpoint import CheckpointStore, Identity
from nvembed.training.config import TrainConfig
from nvembed.training.engine import build_engine
from nvembed.training.model import TrainedModel
from nvembed.training.worker import PlainContext
from nvembed.types import Config

HERE = Path(__file__).parent
RECIPES = HERE.parents[2] / "pipelines" / "recipes"
TRAIN = {"adapter": {"type": "lora", "r": 2, "alpha": 4, "target_modules": ["q_proj"]}, "precision": "fp32",
         "engine": {"type": "torch"}}  # fmt: skip


class SampleConfig(Config):
    """Of the sample step."""

    rows: int = 3


def tiny_embedder() -> Embedder:
    """One Llama layer of width 8 with latent attention."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=258, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator(["one two"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = EmbedderConfig(pooling=LatentAttentionConfig(num_latents=2, num_heads=2), text=TextConfig(max_length=32))
    backbone = LlamaModel(
        LlamaConfig(
            vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    return Embedder(backbone, Tokeniser(fast, config.text), config).eval()


def make_model(target: Path, base: Path) -> None:
    """A model folder that LoRA was merged into."""
    save_embedder(tiny_embedder(), base)
    embedder = load_embedder(base)
    apply_adapter(embedder, TrainConfig.model_validate(TRAIN).adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in embedder.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    kept = keep_adapter(embedder, base, "base")
    merge_adapter(embedder)
    save_embedder(embedder, target, recipe={"sample": True}, prompts={"query": "Instruct: x\nQuery: "}, adapter=kept)


def make_checkpoint(target: Path) -> None:
    """The checkpoint after one step, as a run writes it."""
    config = TrainConfig.model_validate(TRAIN)
    embedder = tiny_embedder()
    torch.manual_seed(2)
    apply_adapter(embedder, config.adapter)
    objective = build_objective(config.objective, dim=8, teacher_dim=None)
    engine = build_engine(
        TrainedModel(embedder, objective, "fp32"), config.optimiser, config.engine, torch.device("cpu")
    )
    identity = Identity(config, {"model": "m", "stream": "s"}, "fp32", 1)
    CheckpointStore(str(target), identity).save(engine, 1, PlainContext())


def make_artifact(target: Path) -> None:
    """A published step of one small file."""

    def build(config: SampleConfig, inputs: object, work: str) -> StepResult:
        storage.write_bytes(storage.join(work, "rows.txt"), b"one\ntwo\nthree\n")
        return StepResult(rows={"rows": config.rows}, metrics={"mean": 0.5})

    Step("sample", 1, build).run(SampleConfig(), {}, str(target))


def make_recipe(target: Path) -> None:
    """A recipe as a user writes it, and as a run stores it."""
    target.mkdir(parents=True)
    shutil.copy(RECIPES / "tiny.yaml", target / "recipe.yaml")
    (target / "resolved.yaml").write_text(resolved_yaml(load_recipe(str(RECIPES / "tiny.yaml"))))
    assert yaml.safe_load((target / "resolved.yaml").read_text())["version"] == RECIPE_VERSION


def main() -> None:
    """Write what is missing."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_model(work / "model", work / "base")
        export_model(ExportSpec(work / "model", work / "adapter", "adapter", ("one", "two"), work / "base"))
        samples: dict[str, tuple[int, Callable[[Path], object]]] = {
            "model_folder": (model_folder.FORMAT_VERSION, lambda to: shutil.copytree(work / "model", to)),
            "adapter": (adapter_folder.FORMAT_VERSION, lambda to: shutil.copytree(work / "adapter", to)),
            "checkpoint": (checkpoint.FORMAT_VERSION, make_checkpoint),
            "artifact": (FORMAT_VERSION, make_artifact),
            "recipe": (RECIPE_VERSION, make_recipe),
        }
        for kind, (number, make) in samples.items():
            target = HERE / kind / f"v{number}"
            if target.exists():
                print(f"{kind} v{number}: is there and stays", file=sys.stderr)
                continue
            make(target)
            print(f"{kind} v{number}: written")


if __name__ == "__main__":
    main()
