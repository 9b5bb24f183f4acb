"""Every form of a model: what it gives outside nvembed, what is recorded, what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from nvembed.modeling.adapters import apply_adapter, keep_adapter, merge_adapter, weights_hash
from nvembed.modeling.config import LastTokenConfig, LatentAttentionConfig, LoraConfig, MeanConfig
from nvembed.modeling.exports import backbone_folder
from nvembed.modeling.exports.adapter_folder import load_adapter_folder
from nvembed.modeling.exports.forms import ExportSpec, export_model
from nvembed.modeling.exports.onnx_graph import ONNX_FILE, check_attention
from nvembed.modeling.exports.parity import ParityError
from nvembed.modeling.folder import load_embedder, save_embedder
from nvembed.text.instructions import instruction_prefix
from nvembed.types import UserError

PREFIX = instruction_prefix("web_search")
TEXTS = ("how do I sort a list", "x", "Größe 東京 🙂", "heap overflow " * 30)
STUDENT = {"pooling": MeanConfig(), "text": {"mask_instruction": False}}


def alone(script, folder, *arguments):
    """Run a script where nvembed cannot be imported."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    guard = "import sys; sys.modules['nvembed'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + script, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def saved(make_embedder, tmp_path):
    def save(**variant):
        embedder = make_embedder(**variant)
        save_embedder(embedder, tmp_path / "model", prompts={"query": PREFIX})
        return embedder

    return save


def test_the_whole_form_is_a_plain_copy(saved, tmp_path):
    embedder = saved(**STUDENT)
    record = export_model(ExportSpec(tmp_path / "model", tmp_path / "out", "sentence-transformers", TEXTS))
    assert record["parity"]["given"]["texts"] == 4 and record["parity"]["given"]["max_difference"] <= 1e-5
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record
    assert np.abs(load_embedder(tmp_path / "out").encode(TEXTS) - embedder.encode(TEXTS)).max() <= 1e-5
    with pytest.raises(UserError, match="exists and is not empty"):
        export_model(ExportSpec(tmp_path / "model", tmp_path / "out", "merged"))
    with pytest.raises(UserError, match="--as gguf: choose one of"):
        export_model(ExportSpec(tmp_path / "model", tmp_path / "gguf", "gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_folded_form(saved, tmp_path):
    saved(pooling=LatentAttentionConfig(num_latents=8, num_heads=4, head_dim=64))
    record = export_model(ExportSpec(tmp_path / "model", tmp_path / "out", "folded", TEXTS))
    assert record["head_parameters"]["after"] < record["head_parameters"]["before"]
    assert max(parity["max_difference"] for parity in record["parity"].values()) <= 1e-5


STATES = """
import json, sys
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer
folder, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
assert model.config.is_causal is False and type(model).__module__.startswith("transformers.models."), type(model)
found = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
with torch.no_grad():
    states = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).last_hidden_state
np.savez(out, states=states.numpy(), ids=found["input_ids"].numpy(), mask=found["attention_mask"].numpy())
"""


@pytest.mark.slow
def test_backbone_in_a_fresh_process_with_transformers_alone(saved, tmp_path):
    embedder = saved(family="mistral", text={"max_length": 48})
    record = export_model(ExportSpec(tmp_path / "model", tmp_path / "out", "backbone", TEXTS))
    assert record["architecture"] == "MistralModel" and not record["is_causal"] and not record["head_included"]
    assert not list((tmp_path / "out").rglob("*.py")) and not (tmp_path / "out" / "modules.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MistralModel"] and config["is_causal"] is False and "auto_map" not in config
    alone(STATES, tmp_path, tmp_path / "out", json.dumps(TEXTS), tmp_path / "found.npz")
    found = np.load(tmp_path / "found.npz")
    ours = embedder.tokeniser.collate(embedder.tokeniser.encode(TEXTS, [""] * 4))
    assert np.array_equal(found["ids"], ours["input_ids"]) and np.array_equal(found["mask"], ours["attention_mask"])
    with torch.no_grad():
        inputs = {name: ours[name] for name in ("input_ids", "attention_mask")}
        states = embedder.embedding_model(**inputs).last_hidden_state.numpy()
    assert np.abs((states - found["states"]) * found["mask"][..., None]).max() <= 1e-5
    described = json.loads((tmp_path / "out" / "pooling.json").read_text())
    assert described["head"] == "head/model.safetensors" and (tmp_path / "out" / described["head"]).is_file()


STOCK = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
np.save(sys.argv[3], model.encode(json.loads(sys.argv[2]), prompt_name="query"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("pooling", [MeanConfig(), LastTokenConfig()], ids=["mean", "last_token"])
def test_backbone_of_a_stock_student_carries_its_pooling(saved, tmp_path, pooling):
    embedder = saved(pooling=pooling, text={"mask_instruction": False})
    record = export_model(ExportSpec(tmp_path / "model", tmp_path / "out", "backbone"))
    assert record["head_included"]
    alone(STOCK, tmp_path, tmp_path / "out", json.dumps(TEXTS), tmp_path / "found.npy")
    assert np.abs(np.load(tmp_path / "found.npy") - embedder.encode(TEXTS, prompt=PREFIX)).max() <= 1e-5


def test_a_causal_backbone_is_refused(make_embedder, tmp_path, monkeypatch):
    embedder = make_embedder()
    (tmp_path / "out").mkdir()
    backbone_folder.write_backbone(embedder, tmp_path / "out", {})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["is_causal"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ParityError, match="other direction"):
        backbone_folder.check_states(embedder, tmp_path / "out")


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(make_embedder, tmp_path):
    """A base folder, and a model folder trained (here: stirred) by LoRA on it."""
    save_embedder(make_embedder(), tmp_path / "base")
    embedder = load_embedder(tmp_path / "base")
    apply_adapter(embedder, LoraConfig(r=4, alpha=8, dropout=0.1))
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in embedder.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    kept = keep_adapter(embedder, tmp_path / "base", "initialise/model")
    unmerged = embedder.eval().encode(TEXTS, prompt=PREFIX)
    merge_adapter(embedder)
    save_embedder(embedder, tmp_path / "model", prompts={"query": PREFIX}, adapter=kept)
    return unmerged


def test_adapter_form_comes_back_with_its_base(adapted, tmp_path):
    model, base, out = tmp_path / "model", tmp_path / "base", tmp_path / "adapter"
    record = export_model(ExportSpec(model, out, "adapter", TEXTS, base))
    assert record["base"] == {"name": "initialise/model", "weights_xxh3_128": weights_hash(base)}
    assert max(parity["max_difference"] for parity in record["parity"].values()) <= 1e-5
    assert record["tensor_bytes"] < (model / "model.safetensors").stat().st_size
    assert np.abs(load_adapter_folder(out, base).encode(TEXTS, prompt=PREFIX) - adapted).max() <= 1e-5
    merged = export_model(ExportSpec(out, tmp_path / "merged", "merged", TEXTS, base))
    assert max(parity["max_difference"] for parity in merged["parity"].values()) <= 1e-5
    assert np.abs(load_embedder(tmp_path / "merged").encode(TEXTS, prompt=PREFIX) - adapted).max() <= 1e-5
    assert not (tmp_path / "merged" / "adapter").exists()
    without = export_model(ExportSpec(model, tmp_path / "unmeasured", "adapter"))
    assert without["parity"] == {}


def test_the_wrong_base_is_refused(adapted, tmp_path, make_embedder):
    export_model(ExportSpec(tmp_path / "model", tmp_path / "adapter", "adapter"))
    save_embedder(make_embedder(seed=1), tmp_path / "other")
    with pytest.raises(UserError, match="is not the base of this adapter"):
        load_adapter_folder(tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(UserError, match="give its base folder as --base"):
        export_model(ExportSpec(tmp_path / "adapter", tmp_path / "out", "merged"))
    with pytest.raises(UserError, match="has no adapter"):
        export_model(ExportSpec(tmp_path / "other", tmp_path / "out", "adapter"))
    assert not (tmp_path / "out").exists()


PEFT = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer
base, adapter, texts, out = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
found = tokenizer(texts[:1], return_tensors="pt")
with torch.no_grad():
    states = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).last_hidden_state
np.save(out, states.numpy())
"""


@pytest.mark.slow
def test_peft_itself_loads_the_adapter(adapted, tmp_path):
    export_model(ExportSpec(tmp_path / "model", tmp_path / "adapter", "adapter"))
    arguments = (tmp_path / "base", tmp_path / "adapter", json.dumps(TEXTS), tmp_path / "found.npy")
    alone(PEFT, tmp_path, *arguments)
    merged = load_embedder(tmp_path / "model")
    inputs = merged.tokeniser.collate(merged.tokeniser.encode(TEXTS[:1], [""]))
    with torch.no_grad():
        states = merged.embedding_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
    assert np.abs(np.load(tmp_path / "found.npy") - states.numpy()).max() <= 1e-5


# -- onnx ------------------------------------------------------------------------------------------------------------


def test_onnx_is_for_stock_pooling(saved, tmp_path):
    saved()
    with pytest.raises(UserError, match="Export a student"):
        export_model(ExportSpec(tmp_path / "model", tmp_path / "out", "onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


RUNTIME = """
import json, sys
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
prefix = json.load(open(folder + "/export.json"))["prompts"]["query"]
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_truncation(64)
tokenizer.enable_padding()
found = tokenizer.encode_batch([prefix + text for text in texts])
session = onnxruntime.InferenceSession(folder + "/model.onnx")
ids, mask = (np.array([getattr(e, name) for e in found], dtype=np.int64) for name in ("ids", "attention_mask"))
np.save(out, session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [{**STUDENT, "family": "llama"}, {**STUDENT, "family": "qwen3", "bidirectional": False},
     {"family": "mistral", "pooling": LastTokenConfig()}],
    ids=["llama", "qwen3_causal", "mistral_last_token"],
)  # fmt: skip
def test_onnx_in_a_fresh_process_with_onnxruntime_alone(saved, tmp_path, variant):
    embedder = saved(**variant)
    record = export_model(ExportSpec(tmp_path / "model", tmp_path / "fp32", "onnx", TEXTS))
    assert max(parity["max_difference"] for parity in record["parity"].values()) <= 1e-4
    small = export_model(ExportSpec(tmp_path / "model", tmp_path / "int8", "onnx-int8", TEXTS))
    assert min(parity["min_cosine"] for parity in small["parity"].values()) > 0.98
    assert max(parity["max_difference"] for parity in small["parity"].values()) > 0
    assert (tmp_path / "int8" / ONNX_FILE).stat().st_size < (tmp_path / "fp32" / ONNX_FILE).stat().st_size
    alone(RUNTIME, tmp_path, tmp_path / "fp32", json.dumps(TEXTS), tmp_path / "found.npy")
    assert np.abs(np.load(tmp_path / "found.npy") - embedder.encode(TEXTS, prompt=PREFIX)).max() <= 1e-4


class Causal:
    """A session whose first state hears no later token."""

    def run(self, names, inputs):
        return [np.cumsum(inputs["input_ids"], axis=1)[..., None].astype(np.float32)]


def test_a_graph_of_the_other_direction_is_refused(make_embedder):
    with pytest.raises(ParityError, match="attention is causal without padding"):
        check_attention(make_embedder(**STUDENT), Causal())
    check_attention(make_embedder(**STUDENT, bidirectional=False), Causal())
