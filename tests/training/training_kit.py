"""Tiny models, batches and streams for the training tests, and a launcher of real gloo ranks.

Run as a script it is one rank: `python training_kit.py CASE RANK WORLD FOLDER`; see `run_ranks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from nvembed.core.distributed import rank, world_size
from nvembed.core.steps import Step, StepResult
from nvembed.losses.objectives import build_objective
from nvembed.modeling.adapters import apply_adapter
from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.folder import save_embedder
from nvembed.stream.layout import STREAM_SCHEMA
from nvembed.text.config import TextConfig
from nvembed.text.tokenise import Tokeniser
from nvembed.training.build import TrainingSpec
from nvembed.training.chunked import backward_global_batch
from nvembed.training.config import TrainConfig
from nvembed.training.engine import build_engine
from nvembed.training.errors import NonFiniteError
from nvembed.training.loop import optimiser_step, train
from nvembed.training.model import TrainedModel
from nvembed.training.sharding import shard
from nvembed.training.worker import PlainContext
from nvembed.types import Artifact, Batch, Config

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("NVEMBED_TEST_DEVICE", "cpu"))  # set by `run_ranks` for the ranks it starts
DIM = 32
INSTRUCTION = "Instruct: find it\nQuery: "


def engine_section(engine: str, zero_stage: int = 0) -> dict[str, Any]:
    """`train.engine` of a recipe: `zero_stage` is a key of DeepSpeed only."""
    return {"type": engine, "zero_stage": zero_stage} if engine == "deepspeed" else {"type": engine}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with nothing but bytes and an end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator([INSTRUCTION, "one two three four five six"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def tiny_embedder(seed: int = 0) -> Embedder:
    """Two Llama layers and latent attention, float32, the same weights for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=DIM, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    pooling = LatentAttentionConfig(num_latents=8, num_heads=4)
    embedder_config = EmbedderConfig(pooling=pooling, text=TextConfig(max_length=48))
    return Embedder(LlamaModel(config), Tokeniser(tiny_tokenizer(), embedder_config.text), embedder_config)


def tiny_model(config: TrainConfig, teacher_dim: int | None = None, seed: int = 0) -> TrainedModel:
    """What `build_model` makes, without a folder; LoRA's B is not zero, so that A has a gradient from the start."""
    embedder = tiny_embedder(seed)
    apply_adapter(embedder, config.adapter)
    for name, parameter in embedder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    objective = build_objective(config.objective, dim=DIM, teacher_dim=teacher_dim)
    if config.engine.gradient_checkpointing:
        embedder.embedding_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return TrainedModel(embedder, objective, "bf16" if config.precision == "bf16" else "fp32").train()


def tiny_folder(folder: Path) -> Path:
    """A model folder of the tiny embedder."""
    save_embedder(tiny_embedder(), folder)
    return folder


def make_batch(tokeniser: Tokeniser, step: int, size: int = 8, group: int = 3, teacher_dim: int | None = None) -> Batch:
    """A batch of unequal lengths with an absent negative, an empty text, a copy and a known positive elsewhere."""
    rng = np.random.default_rng(1000 + step)
    letters = np.array(list("abcdefghij klmnop "))
    texts = ["".join(rng.choice(letters, rng.integers(2, 40))) for _ in range(size * group)]
    instructions = [INSTRUCTION if t % group == 0 else "" for t in range(size * group)]
    present = np.ones((size, group), bool)
    ids = np.arange(size * group).reshape(size, group) + 1 + step * 1000
    ids[:, 0] = 0
    if group > 2:
        present[1, 2] = False
        ids[1, 2] = 0
        texts[1 * group + 2] = instructions[1 * group + 2] = ""
        texts[2 * group + 2] = ""
        ids[3, 2] = ids[0, 1]
        texts[3 * group + 2] = texts[1]
    known = [ids[i, 1:2].copy() for i in range(size)] if group > 1 else [np.zeros(0, np.int64)] * size
    if group > 2:
        known[4] = np.append(known[4], ids[5, 1])
    lengths = tokeniser.lengths(texts, instructions)
    lengths[~present.ravel()] = 0
    return Batch(
        step=step,
        example_ids=[f"step{step}-example{i}" for i in range(size)],
        texts=texts,
        instructions=instructions,
        token_lengths=lengths,
        present=present,
        document_ids=ids.astype(np.int64),
        positive_ids=[np.asarray(k, np.int64) for k in known],
        teacher_vectors=rng.normal(size=(size, teacher_dim)).astype(np.float32) if teacher_dim else None,
    )


def tiny_stream(folder: Path, num_steps: int) -> Artifact:
    """The batches of `MemoryStream`, published as a stream step publishes them."""

    def build(config: Config, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
        rows: list[dict[str, Any]] = []
        for batch in MemoryStream(num_steps).batches(0):
            size, group = batch.batch_size, batch.group_size
            for i in range(size):
                texts = [batch.texts[i * group + k] if batch.present[i, k] else None for k in range(group)]
                rows.append(
                    {
                        "step": batch.step,
                        "slot": i,
                        "example_id": batch.example_ids[i],
                        "dataset": "tiny",
                        "task": "retrieval",
                        "instruction": INSTRUCTION,
                        "symmetric": False,
                        "texts": texts,
                        "document_ids": batch.document_ids[i].tolist(),
                        "positive_ids": batch.positive_ids[i].tolist(),
                        "token_lengths": batch.token_lengths[i * group : (i + 1) * group].tolist(),
                    }
                )
        path = Path(work_uri, "shards", "part-00000.parquet")
        path.parent.mkdir(parents=True)
        with pq.ParquetWriter(path, STREAM_SCHEMA) as writer:
            for step in range(num_steps):
                group_rows = [row for row in rows if row["step"] == step]
                writer.write_table(pa.Table.from_pylist(group_rows, schema=STREAM_SCHEMA))
        metrics = {"steps": num_steps, "global_batch_size": 8, "group_size": 3, "teacher_dim": None}
        return StepResult(metrics={**metrics, "steps_per_shard": num_steps})

    return Step("stream", 1, build).run(Config(), {}, str(folder))


def tiny_start(folder: Path) -> Artifact:
    """The tiny model folder, published as the initialise step publishes it."""

    def build(config: Config, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
        tiny_folder(Path(work_uri, "model"))
        return StepResult()

    return Step("initialise", 1, build).run(Config(), {}, str(folder))


class MemoryStream:
    """A stream of `make_batch`."""

    def __init__(self, num_steps: int, size: int = 8, group: int = 3, teacher_dim: int | None = None) -> None:
        self.num_steps, self.batch_size, self.group_size, self.teacher_dim = num_steps, size, group, teacher_dim
        self._tokeniser = tiny_embedder().tokeniser

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.num_steps):
            yield make_batch(self._tokeniser, step, self.batch_size, self.group_size, self.teacher_dim)


def run_steps(
    config: TrainConfig, *, steps: int = 3, naive: bool = False, slice_budget: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a fresh tiny model on this process's ranks.

    Returns:
        Facts (JSON) and tensors: `initial/*`, `gradient/*` of the first step, `parameters/*` and moments at the end.
    """
    distil = config.objective.type == "distill"
    teacher_dim = 48 if distil else None
    model = tiny_model(config, teacher_dim)
    engine = build_engine(model, config.optimiser, config.engine, DEVICE)
    if naive:
        engine.multi_backward = nullcontext  # type: ignore[method-assign]
    facts: dict[str, Any] = {"losses": [], "norms": [], "partition": partition(engine)}
    tensors = {f"initial/{name}": tensor for name, tensor in engine.tensors("parameters")}
    for batch in MemoryStream(steps, group=1 if distil else 3, teacher_dim=teacher_dim).batches(0):
        sharding = shard(batch, config.token_budget, rank(), world_size(), slice_budget=slice_budget)
        facts["chunks"] = [len(chunks) for chunks in sharding.chunks]
        parts = [part for chunks in sharding.chunks for chunk in chunks for part in chunk]
        facts["slices"], facts["empty_slices"] = len(parts) // world_size(), sum(len(part) == 0 for part in parts)
        if batch.step == 0:
            loss = backward_global_batch(engine, sharding, model.embedder.tokeniser)
            if world_size() > 1:
                dist.all_reduce(loss)
            if not naive:
                tensors |= {f"gradient/{name}": tensor for name, tensor in engine.gradients().items()}
            facts["losses"].append(float(loss))
            facts["norms"].append(engine.step(1.0))
        else:
            value, norm = optimiser_step(engine, sharding, 1.0)
            facts["losses"].append(value)
            facts["norms"].append(norm)
    for kind in ("parameters", *engine.moments):
        tensors |= {f"{kind}/{name}": tensor for name, tensor in engine.tensors(kind)}
    return facts, tensors


def partition(engine: Any) -> dict[str, Any]:
    """How much of the state this rank holds, read from DeepSpeed's own structures."""
    inner = getattr(engine, "_engine", None)
    if inner is None or engine.config.zero_stage == 0:
        return {}
    trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.model.trainable())
    held = sum(tensor.numel() for tensor in engine._masters())
    facts: dict[str, Any] = {"stage": int(inner.zero_optimization_stage()), "trained": trained, "held": held}
    if engine.config.zero_stage == 3:
        parameters = list(engine.model.parameters())
        facts["whole"] = sum(p.ds_numel for p in parameters)
        facts["resident"] = sum(p.ds_tensor.numel() for p in parameters)
        facts["gathered"] = sum(p.numel() for p in parameters if not p.ds_persist)
    else:
        facts["gradients_partitioned"] = bool(inner.optimizer.partition_gradients)
    return facts


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((ours.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


# -- real ranks -------------------------------------------------------------------------------------------------------


def run_ranks(
    case: str, jobs: Mapping[str, Any], folder: Path, *, world: int = 2, device: str = "cpu", timeout: float = 240
) -> None:
    """Start `world` processes that run every job of a case, one after the other; raise if one fails.

    Rank 0 writes `<job>.json` and `<job>.safetensors` into `folder` (see `read_result`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": device,
        "NVEMBED_TEST_DEVICE": device,
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "PYTHONWARNINGS": "ignore",
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    logs = [open(folder / f"rank{r}.log", "w") for r in range(world)]  # noqa: SIM115
    command = [sys.executable, __file__, case]
    ranks = [
        subprocess.Popen([*command, str(r), str(world), str(folder)], env=environment, stdout=log, stderr=log)
        for r, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=timeout) for process in ranks]
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    tails = "\n".join((folder / f"rank{r}.log").read_text()[-3000:] for r in range(world))
    assert codes == [0] * world, f"exit codes {codes}\n{tails}"


def read_result(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What rank 0 wrote for one job."""
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def _equality(job: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    options = {key: job[key] for key in ("naive", "slice_budget") if key in job}
    return run_steps(TrainConfig.model_validate(job["config"]), **options)


def _infinite(job: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A gradient that is not finite on one rank only; every rank has to stop."""
    config = TrainConfig.model_validate(job["config"])
    model = tiny_model(config)
    if rank() == 1:
        next(model.trainable())[1].register_hook(lambda gradient: gradient * float("inf"))
    engine = build_engine(model, config.optimiser, config.engine, DEVICE)
    batch = next(MemoryStream(1).batches(0))
    try:
        optimiser_step(engine, shard(batch, config.token_budget, rank(), world_size()), 1.0)
    except NonFiniteError as error:
        messages: list[Any] = [None] * world_size()
        dist.all_gather_object(messages, str(error))
        return {"messages": messages}, {}
    raise AssertionError("the step went through")


class Interrupted(RuntimeError):
    """The stand-in for a kill where processes go on to the next job."""


class InterruptedStream(MemoryStream):
    """Ends the run when it asks for a certain step; remembers where the run started."""

    def __init__(self, num_steps: int, interrupt: int | None) -> None:
        super().__init__(num_steps)
        self.interrupt = interrupt
        self.start: int | None = None

    def batches(self, start: int) -> Iterator[Batch]:
        self.start = start
        for batch in super().batches(start):
            if batch.step == self.interrupt:
                raise Interrupted
            yield batch


def train_job(
    config: Mapping[str, Any], model: str | Path, work: str | Path, *, steps: int = 6, interrupt: int | None = None
) -> int | None:
    """The real loop on this process's ranks; returns the step it started at (None: all steps were done before)."""
    stream = InterruptedStream(steps, interrupt)
    spec = TrainingSpec(
        TrainConfig.model_validate(config), "memory", str(model), str(work), {"stream": "s", "model": "m"}
    )
    try:
        train(spec, stream, PlainContext())
    except Interrupted:
        assert interrupt is not None
    return stream.start


def _train(job: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    starts = [train_job(job["config"], job["model"], work, interrupt=stop) for work, stop in job["runs"]]
    return {"starts": starts}, {}


CASES = {"equality": _equality, "infinite": _infinite, "train": _train}


def _main() -> None:
    case, own_rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory():
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=own_rank, world_size=world)
        for name, job in json.loads((folder / "jobs.json").read_text()).items():
            facts, tensors = CASES[job.get("case", case)](job, folder)
            if own_rank == 0:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
                (folder / f"{name}.json").write_text(json.dumps(facts))
        dist.barrier()
    os._exit(0)  # DeepSpeed engines of many jobs: nothing of their teardown is tested here


if __name__ == "__main__":
    _main()
