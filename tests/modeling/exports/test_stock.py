"""Code of a folder is run only where it is our own."""

import json

import numpy as np
import pytest

from nvembed.modeling.config import LatentAttentionConfig
from nvembed.modeling.exports.stock import folder_encoder
from nvembed.modeling.folder import save_embedder
from nvembed.modeling.sentence_folder import runs_only_our_code


@pytest.mark.parametrize("what", ["ours", "changed", "added", "module", "auto_map"])
def test_foreign_code_is_not_run(make_embedder, tmp_path, what):
    embedder, folder = make_embedder(pooling=LatentAttentionConfig(num_latents=8, num_heads=2)), tmp_path / "model"
    save_embedder(embedder, folder)
    if what == "changed":
        path = folder / "pooling.py"
        path.write_text(path.read_text() + "\nraise SystemExit('ran')\n")
    elif what == "added":
        (folder / "more.py").write_text("raise SystemExit('ran')\n")
    elif what == "module":
        modules = json.loads((folder / "modules.json").read_text())
        modules[0]["type"] = "some/repository--code.Module"
        (folder / "modules.json").write_text(json.dumps(modules))
    elif what == "auto_map":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "some/repository--m.M"}}))
    assert runs_only_our_code(folder) == (what == "ours")
    encode, library = folder_encoder(folder, code=True)
    assert library == ("sentence-transformers" if what == "ours" else "nvembed")
    texts, instructions = ["a heap overflow", "x"], ["", "Instruct: Find\nQuery: "]
    assert np.abs(encode(texts, instructions) - embedder.encode(texts, prompt=instructions)).max() <= 1e-5
