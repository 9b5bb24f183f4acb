"""Sizes before anything heavy is loaded: shapes, parameters, batches, operations, against the real models."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.modeling import shapes
from nvembed.modeling.config import FolderBackbone, GgufBackbone, LatentAttentionConfig, MeanConfig, RandomBackbone
from nvembed.modeling.hub_shapes import HUB_SHAPES
from nvembed.plan.hardware import CATALOGUE, find_hardware
from nvembed.plan.hours import count_texts, step_times
from nvembed.plan.memory import stage_memory
from nvembed.plan.recipe_plan import as_json, as_text, plan_recipe, with_price
from nvembed.plan.sizes import Model, StageSizes, stage_sizes
from nvembed.plan.work import forward_flops, stage_flops
from nvembed.recipe.schema import load_recipe
from nvembed.text.batching import plan_chunks
from nvembed.training.arithmetic import deepspeed_config
from nvembed.training.config import TrainConfig
from nvembed.types import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pipelines/recipes/tiny.yaml"
QUICKSTART = ROOT / "pipelines/recipes/quickstart.yaml"
NV_EMBED = ROOT / "pipelines/recipes/nv_embed_v1_7b.yaml"


def stage(train: TrainConfig, shape: shapes.Shape, **changes: Any) -> StageSizes:
    return replace(StageSizes("s", train, 1, 16, 3, 80, Model(shape, MeanConfig())), **changes)


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_the_shape_arithmetic_gives_nv_embeds_published_size() -> None:
    mistral = shapes.known_shape(FolderBackbone(name="mistralai/Mistral-7B-v0.1"))
    assert mistral is not None
    head = shapes.pooling_parameters(LatentAttentionConfig(num_latents=512, num_heads=8, head_dim=4096), 4096)
    assert (mistral.parameters, head) == (7_110_660_096, 740_356_096)
    assert shapes.pooling_parameters(MeanConfig(), 4096) == 0


PUBLISHED = {  # all weights, lm_head included where it is not the embedding itself
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, False), "mistralai/Mistral-7B-v0.3": (7_248_023_552, False),
    "mistralai/Mistral-Nemo-Base-2407": (12_247_782_400, False),
    "Qwen/Qwen3-0.6B": (596_049_920, True), "Qwen/Qwen3-1.7B": (1_720_574_976, True),
    "Qwen/Qwen3-4B": (4_022_468_096, True), "Qwen/Qwen3-8B": (8_190_735_360, False),
    "Qwen/Qwen3-14B": (14_768_307_200, False), "Qwen/Qwen3-32B": (32_762_123_264, False),
    "Qwen/Qwen2.5-0.5B": (494_032_768, True), "Qwen/Qwen2.5-1.5B": (1_543_714_304, True),
    "Qwen/Qwen2.5-3B": (3_085_938_688, True), "Qwen/Qwen2.5-7B": (7_615_616_512, False),
    "meta-llama/Llama-2-7b-hf": (6_738_415_616, False), "meta-llama/Llama-3.1-8B": (8_030_261_248, False),
    "meta-llama/Llama-3.1-70B": (70_553_706_496, False), "meta-llama/Llama-3.2-1B": (1_235_814_400, True),
    "meta-llama/Llama-3.2-3B": (3_212_749_824, True), "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (1_100_048_384, False),
    "HuggingFaceTB/SmolLM2-135M": (134_515_008, True), "HuggingFaceTB/SmolLM2-360M": (361_821_120, True),
    "HuggingFaceTB/SmolLM2-1.7B": (1_711_376_384, True),
}  # fmt: skip


def test_hub_shapes_add_up_to_the_published_sizes() -> None:
    assert set(PUBLISHED) == set(HUB_SHAPES)
    for name, (published, tied) in PUBLISHED.items():
        shape = shapes.known_shape(FolderBackbone(name=name))
        assert shape is not None
        assert shape.parameters + (0 if tied else shape.embedding_parameters) == published, name
    same = shapes.known_shape(FolderBackbone(name="qwen/qwen3-8b-base", num_layers=4))
    assert same is not None and (same.layers, same.layers_available) == (4, 36)


def test_the_gguf_header_is_read_without_the_gguf_package() -> None:
    shape = shapes.known_shape(GgufBackbone(num_layers=6))
    assert shape is not None
    assert (shape.layers, shape.layers_available, shape.hidden, shape.vocab) == (6, 30, 576, 49152)
    whole = shapes.known_shape(GgufBackbone())
    assert whole is not None and whole.parameters == 134_515_008


def test_shapes_that_cannot_be_known_are_none(tmp_path: Path) -> None:
    assert shapes.known_shape(FolderBackbone(name="no-one/no-such-model")) is None
    assert shapes.known_shape(GgufBackbone(package="no-such-package")) is None
    (tmp_path / "config.json").write_text('{"hidden_size": "many"}')
    assert shapes.known_shape(FolderBackbone(name=str(tmp_path))) is None
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(struct.error, match="unpack requires"):
        shapes.read_gguf_header(tmp_path / "model.gguf")


def test_a_hub_name_is_looked_up_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--no-one--small" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        '{"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, '
        '"vocab_size": 10, "model_type": "qwen2"}'
    )
    shape = shapes.known_shape(FolderBackbone(name="no-one/small"))
    assert shape is not None and (shape.layers, shape.kv_heads, shape.family) == (3, 2, "qwen2")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_counted_parameters_equal_the_real_models(family: str) -> None:
    import torch
    import transformers

    shape = shapes.known_shape(RandomBackbone(family=family, num_layers=3))  # type: ignore[arg-type]
    assert shape is not None
    configs = {
        "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }  # fmt: skip
    config = configs[family](
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


# -- batches, parameters ----------------------------------------------------------------------------------------------


@given(
    st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(8, 400), st.integers(8, 80), st.integers(0, 9)
)
def test_planned_chunks_bound_the_real_ones(
    batch: int, group: int, workers: int, budget: int, length: int, seed: int
) -> None:
    train = TrainConfig(num_workers=workers, token_budget=budget)
    plan = StageSizes("s", train, 1, batch, group, length, None)
    lengths = np.random.default_rng(seed).integers(1, length + 1, batch * group)
    assert len(plan_chunks(lengths, budget, workers)[0]) <= plan.chunks_per_rank()
    assert len(plan_chunks(np.full(batch * group, length), budget, workers)[0]) == plan.chunks_per_rank()


def test_the_sizes_of_the_tiny_recipe_by_hand() -> None:
    first, second, student = stage_sizes(load_recipe(str(TINY)))
    assert (first.steps, first.examples_per_rank, first.texts) == (10, 8, 16 * 3)
    assert first.chunks_per_rank() == 3, "512 // 64 = 8 texts a chunk, 6 chunks, 2 workers"
    assert (second.texts, second.chunks_per_rank(), student.texts, student.chunks_per_rank()) == (64, 4, 16, 1)
    assert student.model is not None and first.model is not None and second.trained is not None
    assert student.model.parameters == 2000 * 64 + (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64
    assert student.objective == 64 * 64 + 32 * 64, "a projection for the full width and for the prefix"
    assert first.trained == first.model.parameters and second.trained < first.trained


STAGES = [
    (["stage_1.train.objective.learned_temperature=true"], 0),
    (["stage_1.train.adapter={type: full, freeze_embeddings: true}"], 0),
    (["stage_1.train.adapter={type: lora, r: 8}", "initialise.backbone.family=qwen3"], 0),
    (["student.train.objective.matryoshka_dims=[16, 32]"], 2),
    (["student.train.objective={type: distill, cosine_weight: 0, similarity_weight: 1}"], 2),
]


@pytest.mark.parametrize(("settings", "which"), STAGES, ids=range(len(STAGES)))
def test_the_planned_deepspeed_config_is_the_one_the_engine_would_use(settings: list[str], which: int) -> None:
    from nvembed.losses.objectives import build_objective
    from nvembed.modeling.adapters import apply_adapter
    from nvembed.modeling.assemble import build_embedder
    from nvembed.modeling.backbones import load_backbone
    from nvembed.modeling.config import EmbedderConfig
    from nvembed.plan.dry_run import stage_config
    from nvembed.training.model import TrainedModel

    recipe = load_recipe(str(TINY), ["initialise.backbone.vocab_size=300", *settings])
    planned = stage_sizes(recipe)[which]
    assert planned.model is not None and recipe.initialise is not None
    backbone = recipe.initialise.backbone.model_copy(update={"num_layers": planned.model.shape.layers})
    pooling = EmbedderConfig(pooling=planned.model.pooling)
    embedder = build_embedder(*load_backbone(backbone, ["a few words " * 200] * 20, 0), pooling, 0)
    vocabulary = embedder.embedding_model.get_input_embeddings().num_embeddings
    shape = replace(planned.model.shape, vocab=vocabulary)  # a small text gives a small vocabulary
    planned = replace(planned, model=Model(shape, planned.model.pooling))
    apply_adapter(embedder, planned.train.adapter)
    objective = build_objective(planned.train.objective, dim=64, teacher_dim=64 if which == 2 else None)
    model = TrainedModel(embedder, objective, "fp32")
    trained = sum(parameter.numel() for _, parameter in model.trainable())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert (planned.trained, planned.whole) == (trained, whole)
    train = planned.train
    assert stage_config(planned) == deepspeed_config(train.engine, train.optimiser, trained=trained, whole=whole)


def test_the_nv_embed_recipe_has_the_published_size() -> None:
    first, second = stage_sizes(load_recipe(str(NV_EMBED)))
    assert first.model is not None and first.model.parameters == 7_851_016_192
    assert first.lora == 41_943_040, "r 16 on all linear maps: 42 M (E5-Mistral)"
    assert second.texts == 128 * 9


# -- operations, time, storage ----------------------------------------------------------------------------------------


def test_counted_operations_equal_torchs_own_count() -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaModel

    shape = shapes.Shape(2, 2, 64, 128, 4, 2, 16, 300)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    config.is_causal, config._attn_implementation = False, "eager"  # torch does not count SDPA on CPUs
    model, ids = LlamaModel(config), torch.ones(3, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    ours = forward_flops(Model(shape, MeanConfig()), 120, 40)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_recomputation_counts_as_work() -> None:
    shape = shapes.Shape(6, 30, 576, 1536, 9, 3, 64, 49152)
    once = stage_flops(stage(TrainConfig(), shape), 80)
    chunked = stage_flops(stage(TrainConfig(token_budget=640), shape), 80)
    again = stage_flops(stage(TrainConfig(engine={"type": "deepspeed", "gradient_checkpointing": True}), shape), 80)  # type: ignore[arg-type]
    lora = stage_flops(stage(TrainConfig(adapter={"type": "lora"}), shape), 80)  # type: ignore[arg-type]
    assert chunked / once == again / once == pytest.approx(4 / 3) and 0.66 < lora / once < 0.72


def test_texts_come_from_the_caps() -> None:
    texts = count_texts(load_recipe(str(QUICKSTART)))
    assert (texts.mine, texts.evaluate, texts.dev) == (10_000, 5300, 3 * 140 + 40 + 80)
    assert count_texts(load_recipe(str(NV_EMBED))).evaluate is None


def test_a_plan_of_a_7b_recipe_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(str(NV_EMBED))
    plan = plan_recipe(recipe, with_price(find_hardware("h100x8"), 40.0, 0.5))
    plain = as_json(plan)
    first = plain["stages"]["stage_1"]
    assert first["parameters"] == 7_851_016_192 and first["tokens_most"] == 20_000 * 1152 * 512
    tokens = first["tokens"]
    assert 6 * 7.7e9 * tokens < first["flops"] < 8 * 7.9e9 * tokens
    assert plan.cost == pytest.approx(40 * plan.seconds / 3600)
    assert {step["name"] for step in plain["steps"] if step["seconds"] is None} >= {"mine", "evaluate_teacher"}
    assert "7,851,016,192 parameters" in as_text(plan) and "wider models" in as_text(plan)
    slower = plan_recipe(recipe, with_price(find_hardware("h100x8"), None, 0.25))
    assert slower.stages[0].seconds > 1.9 * plan.stages[0].seconds
    alone = plan_recipe(load_recipe(str(NV_EMBED), ["stage_1.train.engine.zero_stage=0"]), find_hardware("l4x1"))
    assert not alone.stages[0].fits and "DOES NOT FIT" in as_text(alone)


def test_machines(tmp_path: Path) -> None:
    assert all(name == machine.name for name, machine in CATALOGUE.items())
    with pytest.raises(UserError, match=r"Did you mean 'h100x8'\?"):
        find_hardware("h100x9")
    mine = tmp_path / "mine.yaml"
    numbers = "devices: 1, memory_gib: 8, peak_tflops: 1, bandwidth_gb_s: 1, link_gb_s: 1"
    mine.write_text("{name: mine, device: d, " + numbers + "}")
    assert find_hardware(str(mine)).devices == 1
    mine.write_text("name: mine")
    with pytest.raises(UserError, match="peak_tflops"):
        find_hardware(str(mine))


def test_every_step_of_the_quickstart_has_a_time() -> None:
    recipe = load_recipe(str(QUICKSTART))
    steps = step_times(recipe, stage_sizes(recipe), CATALOGUE["laptop"], 0.5)
    assert all(step.seconds is not None for step in steps)
    assert [step.name for step in steps if step.name.startswith("train")] == [
        "train_stage_1", "train_stage_2", "train_student"
    ]  # fmt: skip


# -- memory -----------------------------------------------------------------------------------------------------------


def test_zero_divides_what_it_says() -> None:
    shape = shapes.Shape(6, 6, 512, 1536, 8, 4, 64, 4000)

    def parts(zero: int) -> tuple[float, float, float]:
        train = TrainConfig(num_workers=2, engine={"type": "deepspeed", "zero_stage": zero})  # type: ignore[arg-type]
        memory = stage_memory(stage(train, shape))
        return memory.weights, memory.gradients, memory.optimiser

    sizes = stage(TrainConfig(), shape)
    assert sizes.whole is not None and sizes.trained is not None
    whole, trained = 4 * sizes.whole, 4 * sizes.trained
    assert parts(0) == (whole, trained, 2 * trained)
    assert parts(1) == (whole, trained, 1.5 * trained), "masters and moments of a half"
    assert parts(3)[0] == whole / 2


@given(st.integers(8, 400), st.integers(8, 400), st.sampled_from(["fp32", "bf16"]), st.integers(0, 3))
def test_longer_texts_never_take_less_memory(a: int, b: int, precision: str, zero: int) -> None:
    train = TrainConfig(token_budget=10**6, engine={"type": "deepspeed", "zero_stage": zero})  # type: ignore[arg-type]
    sizes = stage(train, shapes.Shape(2, 2, 64, 128, 4, 2, 16, 300))
    less, more = (stage_memory(sizes, precision=precision, length=length).total for length in sorted((a, b)))
    assert less <= more


def test_counted_activations_are_what_autograd_keeps() -> None:
    import torch

    from nvembed.modeling.adapters import apply_adapter
    from nvembed.modeling.assemble import build_embedder
    from nvembed.modeling.backbones import keep_first_layers, load_backbone
    from nvembed.modeling.config import EmbedderConfig, FullConfig, LoraConfig
    from nvembed.modeling.precision import autocast
    from nvembed.plan.memory import layer_bytes

    backbone = RandomBackbone(hidden_size=64, intermediate_size=192, vocab_size=300, num_layers=2)
    ids = torch.ones(3, 40, dtype=torch.long)

    def saved_bytes(adapter: Any, precision: Any, layers: int) -> float:
        config = EmbedderConfig(pooling=MeanConfig())
        embedder = build_embedder(*load_backbone(backbone, ["some words"] * 9, 0), config, 0)
        keep_first_layers(embedder.embedding_model, layers)
        apply_adapter(embedder.train(), adapter)
        weights = {parameter.untyped_storage().data_ptr() for parameter in embedder.parameters()}
        matrices = {tuple(parameter.shape) for parameter in embedder.parameters()}
        matrices |= {shape[::-1] for shape in matrices}
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tuple(tensor.shape) not in matrices:  # bf16 copies of weights are counted with the weights
                saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(precision, torch.device("cpu")):
            embedder(input_ids=ids, attention_mask=ids, pool_mask=ids)
        return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights) / ids.numel()

    shape = shapes.known_shape(backbone)
    assert shape is not None
    for adapter in (FullConfig(), LoraConfig(r=2), LoraConfig(r=2, dropout=0.0)):
        for precision in ("fp32", "bf16"):
            planned = layer_bytes(stage(TrainConfig(adapter=adapter), shape), precision)
            counted = saved_bytes(adapter, precision, 2) - saved_bytes(adapter, precision, 1)
            assert planned == pytest.approx(counted, rel=0.06), (adapter, precision)
