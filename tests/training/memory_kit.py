"""Memory of real training workers: gloo ranks that run the real loop on a random decoder, each watching its own size.

Run as a script it is one rank: `python memory_kit.py RANK WORLD FOLDER CASE`; see `measure`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PERIOD_SECONDS = 0.004


@dataclass(frozen=True)
class Case:
    """A worker to be measured: a random decoder, a batch of equally long texts, a training section."""

    train: Mapping[str, Any]
    layers: int = 6
    hidden: int = 512
    intermediate: int = 1536
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 4000
    latents: int = 0
    batch: int = 16
    group: int = 3
    length: int = 80
    steps: int = 2
    shortest: int = 0  # texts of `shortest` to `length` tokens; 0: all have `length`

    @property
    def world(self) -> int:
        """Ranks."""
        return int(self.train.get("num_workers", 2))


def measure(case: Case, folder: Path, timeout: float = 280) -> list[dict[str, float]]:
    """Run a case; per rank `before` (everything imported, no model yet), `peak` while it trained, `whole` with the
    model folder written at the end: MiB."""
    from nvembed.training.config import TrainConfig
    from nvembed.training.launch import worker_environment

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(case.__dict__))
    environment = os.environ | worker_environment(TrainConfig.model_validate(case.train))
    command = [sys.executable, __file__]
    logs = [open(folder / f"rank{r}.log", "w") for r in range(case.world)]  # noqa: SIM115
    ranks = [
        subprocess.Popen([*command, str(r), str(case.world), str(folder)], env=environment, stdout=log, stderr=log)
        for r, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=timeout) for process in ranks]
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    tails = "\n".join((folder / f"rank{r}.log").read_text()[-3000:] for r in range(case.world))
    assert codes == [0] * case.world, f"exit codes {codes}\n{tails}"
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(case.world)]


# -- one rank ---------------------------------------------------------------------------------------------------------


class Watch:
    """Highest resident size since the last `mark`, from a thread."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            time.sleep(PERIOD_SECONDS)


def resident() -> float:
    """Resident MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def build_folder(case: Case, folder: Path) -> None:
    """The model folder a case starts from."""
    from training_kit import tiny_tokenizer

    from nvembed.modeling.backbones import random_decoder
    from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig, MeanConfig, RandomBackbone
    from nvembed.modeling.embedder import Embedder
    from nvembed.modeling.folder import save_embedder
    from nvembed.text.config import TextConfig
    from nvembed.text.tokenise import Tokeniser

    class Wide:
        """A tokenizer's sizes, with the case's vocabulary."""

        def __init__(self, inner: Any) -> None:
            self.bos_token_id = self.eos_token_id = self.pad_token_id = inner.eos_token_id

        def __len__(self) -> int:
            return case.vocab

    backbone = RandomBackbone(
        vocab_size=case.vocab, hidden_size=case.hidden, intermediate_size=case.intermediate, num_layers=case.layers,
        num_heads=case.heads, num_key_value_heads=case.kv_heads,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    pooling = LatentAttentionConfig(num_latents=case.latents) if case.latents else MeanConfig()
    config = EmbedderConfig(pooling=pooling, text=TextConfig(max_length=case.length, mask_instruction=False))
    decoder = random_decoder(backbone, Wide(tokenizer), 0)
    save_embedder(Embedder(decoder, Tokeniser(tokenizer, config.text), config), folder)


class EvenStream:
    """Batches of texts whose lengths are known: letters are tokens."""

    teacher_dim = None

    def __init__(self, case: Case) -> None:
        self.num_steps, self.batch_size, self._case = case.steps, case.batch, case

    def batches(self, start: int) -> Iterator[Any]:
        import numpy as np

        from nvembed.types import Batch

        case = self._case
        count = case.batch * case.group
        for step in range(start, self.num_steps):
            rng = np.random.default_rng(step)
            lengths = np.full(count, case.length, np.int32)
            if case.shortest:
                lengths = rng.integers(case.shortest, case.length + 1, count, dtype=np.int32)
            letters = [rng.choice(list("abcdefghijklmnop"), length - 1) for length in lengths]  # and the end token
            ids = np.arange(count).reshape(case.batch, case.group) + 1 + step * 10_000
            ids[:, 0] = 0
            yield Batch(
                step=step,
                example_ids=[f"{step}-{i}" for i in range(case.batch)],
                texts=["".join(row) for row in letters],
                instructions=[""] * count,
                token_lengths=lengths,
                present=np.ones((case.batch, case.group), bool),
                document_ids=ids.astype(np.int64),
                positive_ids=[row[1:2].copy() for row in ids.astype(np.int64)],
            )


def run(case: Case, folder: Path, start: str, config: Any) -> None:
    """Train a case on this process's ranks, with the real loop."""
    from nvembed.training import loop
    from nvembed.training.build import TrainingSpec
    from nvembed.training.worker import PlainContext

    spec = TrainingSpec(
        config, "memory", str(folder / start), str(folder / f"work-{start}"), {"stream": "s", "model": "m"}
    )
    loop.train(spec, EvenStream(case), PlainContext())


def _main() -> None:
    own_rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    case = Case(**json.loads((folder / "case.json").read_text()))
    import torch
    import torch.distributed as dist

    from nvembed.training import loop
    from nvembed.training.config import TrainConfig
    from nvembed.training.engine_deepspeed import _import_deepspeed

    config = TrainConfig.model_validate(case.train)
    torch.set_num_threads(config.threads_per_worker)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=own_rank, world_size=world)
    if config.engine.type == "deepspeed":
        _import_deepspeed(torch.device("cpu"))
    if own_rank == 0:
        build_folder(case, folder / "start")
    small = replace(case, layers=1, hidden=64, intermediate=64, heads=4, kv_heads=2, vocab=400, batch=4, steps=1)
    if own_rank == 0:
        build_folder(small, folder / "small")
    dist.barrier()
    run(small, folder, "small", config)  # code is read from disk as it is first used: that is the process's size
    dist.barrier()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, watch = resident(), Watch()
    found = {"before": before}
    save = loop.save_trained_model

    def noted(*arguments: Any) -> None:
        found["peak"] = watch.peak
        save(*arguments)

    loop.save_trained_model = noted
    run(case, folder, "start", config)
    found = {"peak": watch.peak, **found, "whole": watch.peak}
    (folder / f"rank{own_rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # nothing of the engine's teardown is measured


if __name__ == "__main__":
    _main()
