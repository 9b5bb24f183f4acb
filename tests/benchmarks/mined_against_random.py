"""Mined against random negatives: the one measurement behind the README's line.

    python tests/benchmarks/mined_against_random.py QUICKSTART_OUT RANDOM_OUT

QUICKSTART_OUT is a finished quickstart. RANDOM_OUT is made here by the teacher's story with the same recipe but random
negatives. Prints, per retrieval set and for their mean, nDCG@10 of both and the paired-bootstrap 95 % interval of
mined - random (same held-out queries).
"""

import subprocess
import sys
from pathlib import Path

from nvembed.evaluation.significance import compare
from nvembed.storage import load_artifact

ROOT = Path(__file__).resolve().parents[2]


def main(mined: str, random: str) -> None:
    """Train the random arm and print the comparison."""
    command = [
        sys.executable, str(ROOT / "pipelines/nv_embed.py"), str(ROOT / "pipelines/recipes/quickstart.yaml"),
        "--set", "mine.rule={type: random}", "--set", "register.enabled=false", "--out", random,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    for row in compare(load_artifact(f"{mined}/evaluate_teacher"), load_artifact(f"{random}/evaluate_teacher"), "mined - random"):
        delta = row["delta"]
        print(f"{row['dataset']:>16} {row['metric']:>12}  {delta['value']:+.4f} [{delta['low']:+.4f}, {delta['high']:+.4f}]")


if __name__ == "__main__":
    main(*sys.argv[1:3])
