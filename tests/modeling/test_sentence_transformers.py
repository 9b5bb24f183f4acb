"""Model folders in sentence-transformers, in a process where nvembed cannot be imported: our own vectors."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nvembed.modeling.config import LastTokenConfig, LatentAttentionConfig, MeanConfig
from nvembed.modeling.embedder import encode_prompted
from nvembed.modeling.folder import save_embedder
from nvembed.text.instructions import instruction_prefix

PREFIX = instruction_prefix("web_search")
OTHER = instruction_prefix("duplicates")
TEXTS = ["how do I sort a list", "", " leading space", "Größe 東京 🙂", "heap overflow " * 60, "x", "a<|endoftext|>b"]

CHILD = """
import json, sys
sys.modules["nvembed"] = None
try:
    import nvembed
except ImportError:
    pass
else:
    raise SystemExit("nvembed can be imported")
import numpy as np
from sentence_transformers import SentenceTransformer

task = json.load(open(sys.argv[1]))
found = {}
for name, job in task["folders"].items():
    if job["code"]:
        try:
            SentenceTransformer(job["folder"], device="cpu")
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise SystemExit(name + " ran custom code without being trusted")
    model = SentenceTransformer(job["folder"], device="cpu", trust_remote_code=job["code"])
    encode = lambda **given: model.encode(task["texts"], batch_size=3, show_progress_bar=False, **given)
    found[name + "/bare"] = encode()
    found[name + "/prompt"] = encode(prompt=task["other"])
    found[name + "/prompt_name"] = encode(prompt_name="query")
    found[name + "/encode_query"] = model.encode_query(task["texts"], show_progress_bar=False)
    found[name + "/encode_document"] = model.encode_document(task["texts"], show_progress_bar=False)
    found[name + "/length"] = np.array([model.max_seq_length, model.get_embedding_dimension()])
    model.save_pretrained(job["folder"] + "-again")
    again = SentenceTransformer(job["folder"] + "-again", device="cpu", trust_remote_code=job["code"])
    found[name + "/again"] = again.encode(task["texts"], prompt_name="query", show_progress_bar=False)
assert sys.modules["nvembed"] is None and not [name for name in sys.modules if name.startswith("nvembed.")]
np.savez(sys.argv[2], **found)
"""

VARIANTS = {
    "latent": {"pooling": LatentAttentionConfig(num_latents=8, num_heads=2), "text": {"add_bos": True}},
    "folded": {"pooling": LatentAttentionConfig(num_latents=8, num_heads=2)},
    "latent_qwen3": {"family": "qwen3", "pooling": LatentAttentionConfig(num_latents=8, num_heads=2, head_dim=24)},
    "masked_mean": {"pooling": MeanConfig()},
    "student": {"pooling": MeanConfig(), "text": {"mask_instruction": False}},
    "student_causal": {"pooling": MeanConfig(), "text": {"mask_instruction": False}, "bidirectional": False},
    "last_token": {"pooling": LastTokenConfig(), "family": "mistral"},
}
STOCK = {"student", "student_causal", "last_token"}


def run_without_nvembed(child, arguments, folder):
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HOME")},
        **{"PYTHONSAFEPATH": "1", "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    }
    result = subprocess.run(
        [sys.executable, "-c", child, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    from nvembed.modeling.assemble import build_embedder
    from nvembed.modeling.backbones import random_decoder
    from nvembed.modeling.config import EmbedderConfig, RandomBackbone
    from nvembed.modeling.exports.folding import fold_embedder
    from nvembed.text.config import TextConfig

    root = tmp_path_factory.mktemp("folders")
    embedders = {}
    for name, variant in VARIANTS.items():
        rest = dict(variant)
        backbone = random_decoder(RandomBackbone(family=rest.pop("family", "llama")), tokenizer, 0)
        config = EmbedderConfig(**{**rest, "text": TextConfig(**{"max_length": 48, **rest.pop("text", {})})})
        embedders[name] = build_embedder(backbone, tokenizer, config, 0)
        if name == "folded":
            embedders[name] = fold_embedder(embedders[name])
        save_embedder(embedders[name], root / name, prompts={"query": PREFIX})
    folders = {name: {"folder": str(root / name), "code": name not in STOCK} for name in VARIANTS}
    (root / "task.json").write_text(json.dumps({"folders": folders, "texts": TEXTS, "other": OTHER}))
    run_without_nvembed(CHILD, [root / "task.json", root / "found.npz"], root)
    return embedders, dict(np.load(root / "found.npz"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("call", "instruction"),
    [
        ("bare", ""),
        ("prompt", OTHER),
        ("prompt_name", PREFIX),
        ("encode_query", PREFIX),
        ("encode_document", ""),
        ("again", PREFIX),
    ],
)
def test_gives_our_own_vectors(variant, call, instruction, made):
    embedders, found = made
    expected = encode_prompted(embedders[variant], TEXTS, [instruction] * len(TEXTS))  # one text is empty
    assert found[f"{variant}/{call}"].dtype == np.float32
    assert np.abs(found[f"{variant}/{call}"] - expected).max() <= 1e-5
    assert found[f"{variant}/length"].tolist() == [48, 64]


def test_the_vectors_of_the_calls_differ(made):
    _, found = made
    for variant in VARIANTS:
        assert np.linalg.norm(found[f"{variant}/bare"] - found[f"{variant}/prompt"], axis=1)[0] > 1e-2
        assert np.linalg.norm(found[f"{variant}/prompt"] - found[f"{variant}/prompt_name"], axis=1)[0] > 1e-3


def test_stock_folders_hold_no_code(made, tmp_path_factory):
    embedders, _ = made
    folder = tmp_path_factory.mktemp("student")
    save_embedder(embedders["student"], folder / "model")
    assert not list((folder / "model").rglob("*.py"))
    kinds = [module["type"] for module in json.loads((folder / "model" / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
