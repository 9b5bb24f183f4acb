"""kill -9 in every write phase of mining: the rerun goes on from what is there and ends with a clean run's bytes.

The runs are processes of their own with `mining_kit.py`'s in-process pool; each kills itself at a chosen write: before
it, with half of the file written, or right after. Killing an actor, and the driver under Ray: `test_step.py`.
"""

import os
import random
import signal
import subprocess
import sys

import mining_kit
import pytest

from nvembed.mining.step import mine_step

DRIVER = """
import os, re, signal, sys
import pyarrow.parquet as pq
import mining_kit
from nvembed.core import storage
prepared, out, phase, moment, left = *sys.argv[1:5], int(sys.argv[5])
write, write_table = storage.write_bytes, pq.ParquetWriter.write_table

def dying(uri, data):
    global left
    if not phase or not re.search(phase, uri):
        return write(uri, data)
    left -= 1
    if left:
        return write(uri, data)
    if moment == "half":
        os.makedirs(os.path.dirname(uri), exist_ok=True)
        with open(f"{uri}.half.tmp", "wb") as file:
            file.write(data[: len(data) // 2])
    if moment == "after":
        write(uri, data)
    os.kill(os.getpid(), signal.SIGKILL)

def dying_table(self, *arguments, **options):
    if phase == "joined":
        os.kill(os.getpid(), signal.SIGKILL)
    return write_table(self, *arguments, **options)

from nvembed.core.steps import load_artifact
storage.write_bytes, pq.ParquetWriter.write_table = dying, dying_table
settings = {"more_retrievers": [{"type": "bm25"}], "search": {"query_rows": 12, "document_rows": 15}}
config = mining_kit.MineConfig.model_validate({**mining_kit.CONFIG.model_dump(), **settings})
mining_kit.MINE.run(config, {"prepare": load_artifact(prepared)}, out)
"""
PHASES = (
    "step.json",
    "texts/set/queries",
    "texts/set/documents",
    "checkpoints/vectors",
    "retriever-0-positives",
    "retriever-1-segment",
    "retriever-0-segment",
    r"select/set/part-\d+.json",
    r"select/set/part-\d+.searched",
    r"select/set/part-\d+.parquet",
    "joined",
    "audit.json",
    "manifest.json",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Where the data lies, the files of a clean run (in this process), and its parts of the search."""
    root = tmp_path_factory.mktemp("killed")
    prepared = mining_kit.prepare(str(root))
    searched = []

    def counted(factory, arguments, tasks, **options):
        searched.extend(tasks)
        return mining_kit.pool(factory, arguments, tasks, **options)

    settings = {"more_retrievers": [{"type": "bm25"}], "search": {"query_rows": 12, "document_rows": 15}}
    config = mining_kit.MineConfig.model_validate({**mining_kit.CONFIG.model_dump(), **settings})
    mine_step(mining_kit.encode, counted).run(config, {"prepare": prepared}, str(root / "clean"))
    return root, files(root / "clean"), len(searched)


def start(root, out, phase="", moment="", left=1):
    arguments = [sys.executable, "-c", DRIVER, str(root / "prepare"), str(root / out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*arguments, phase, moment, str(left)], env=environment, timeout=250).returncode


def files(out):
    """Every file of an artifact: not its manifest, whose timings differ, nor half a file that a kill left behind."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(out): path.read_bytes() for path in paths if path.suffix != ".tmp"}


def test_killed_while_writing_what_was_searched(world):
    root, clean, parts = world
    assert start(root, "once", "retriever-0-segment", "half", 3) == -signal.SIGKILL
    assert not (root / "once" / "manifest.json").exists()
    assert len(list((root / "once").rglob("retriever-0-segment-*.parquet"))) == 2  # the third was never whole
    assert start(root, "once", "retriever-0-segment", "", parts - 1) == 0  # two are not searched again
    assert files(root / "once") == clean


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_26_times_over_every_write_phase(world):
    root, clean, _ = world
    generator = random.Random(4)
    plan = [(phase, moment) for phase in PHASES for moment in generator.sample(("before", "half", "after"), 2)]
    generator.shuffle(plan)
    kills, number = 0, 0
    while plan:
        number += 1
        out = f"out{number}"
        for phase, moment in list(plan):
            code = start(
                root, out, phase, moment, generator.choice((1, 1, 2)) if "segment" in phase or "part" in phase else 1
            )
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break  # complete before it came to that write
            kills += 1
            plan.remove((phase, moment))
        assert start(root, out) == 0
        assert files(root / out) == clean
        assert number < 40
    assert kills == 26
