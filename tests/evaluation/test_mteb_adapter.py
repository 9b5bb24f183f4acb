"""mteb runs a local task of its own with our encoder, without network; the vectors are ours."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from nvembed.evaluation.mteb_adapter import TASKS, TYPES, MtebEncoder
from nvembed.modeling.assemble import build_embedder
from nvembed.modeling.backbones import random_decoder, train_byte_level_bpe
from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig, RandomBackbone
from nvembed.modeling.folder import save_embedder
from nvembed.text.config import TextConfig
from nvembed.text.instructions import CATALOGUE
from nvembed.types import UserError

pytestmark = [
    pytest.mark.slow,  # importing mteb takes seconds, so it is done inside the tests
    pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="mteb is not installed: nvembed[mteb]"),
]
README = Path(__file__).resolve().parents[2] / "README.md"
TEXTS = ("sort a list", "heap overflow", "nervous system", "parse images")
DOCUMENTS = {f"d{i}": text for i, text in enumerate(TEXTS)}
QUERIES = {"q0": "sort a list", "q1": "heap overflow", "q2": "nervous system"}
OWN = "Given a thing, find the same thing"


def metadata(name="NvembedLocalRetrieval", kind="Retrieval", prompt=None):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name=name,
        description="four documents",
        type=kind,
        prompt=prompt,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        dataset={"path": "local/none", "revision": "1"},
    )


def local_task():
    """A retrieval task whose data are in this file."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class LocalTask(AbsTaskRetrieval):
        def load_data(self, **kwargs):
            corpus = [{"id": i, "title": "", "text": text} for i, text in DOCUMENTS.items()]
            split = {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list([{"id": i, "text": text} for i, text in QUERIES.items()]),
                "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(3)},
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    LocalTask.metadata = metadata(prompt={"query": OWN})
    return LocalTask()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train_byte_level_bpe([*DOCUMENTS.values(), OWN], 400)
    config = EmbedderConfig(pooling=LatentAttentionConfig(num_latents=8, num_heads=4), text=TextConfig(max_length=64))
    embedder = build_embedder(random_decoder(RandomBackbone(), tokenizer, 0), tokenizer, config, 0)
    place = tmp_path_factory.mktemp("teacher") / "model"
    save_embedder(embedder, place)
    return place


def test_a_local_task_end_to_end(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import mteb
    from mteb.models.models_protocols import EncoderProtocol

    encoder = MtebEncoder(str(folder), training_datasets={"MSMARCO"})
    assert isinstance(encoder, EncoderProtocol)
    result = mteb.evaluate(encoder, local_task(), cache=None, show_progress_bar=False, co2_tracker=False)
    scores = result.task_results[0].scores["test"][0]
    queries = encoder.embedder.encode(list(QUERIES.values()), OWN)
    documents = encoder.embedder.encode(list(DOCUMENTS.values()))
    order = (queries @ documents.T).argsort(axis=1)[:, ::-1]
    gains = [1 / torch.log2(torch.tensor(2.0 + list(row).index(i))).item() for i, row in enumerate(order)]
    assert scores["ndcg_at_10"] == pytest.approx(sum(gains) / 3, abs=1e-4)
    meta = encoder.mteb_model_meta
    assert (
        meta.training_datasets == {"MSMARCO"}
        and meta.embed_dim == 64
        and meta.name == "nvembed/" + "-".join([folder.parent.name, "model"])
    )


def test_the_readmes_example_runs(folder, tmp_path, monkeypatch):
    """As it is written, on the local task instead of the one it names."""
    import mteb

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [local_task()])
    (tmp_path / "runs/quickstart/train_stage_2").mkdir(parents=True)
    (tmp_path / "runs/quickstart/train_stage_2/model").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = {}
    exec(next(block for block in blocks if "MtebEncoder" in block), names)
    assert names["result"].task_results[0].scores["test"][0]["ndcg_at_10"] > 0


def test_instructions_by_task_and_role(folder):
    from mteb.types import PromptType

    encoder = MtebEncoder(str(folder), instructions={"Mine": "Find what is mine", "NQ": "code_search"})
    assert encoder.mteb_model_meta.training_datasets is None
    query, document = PromptType.query, PromptType.document
    for given, role, expected in [
        (metadata("Mine"), query, "Find what is mine"),
        (metadata("Mine", prompt={"query": OWN}), query, "Find what is mine"),
        (metadata("NQ", prompt=OWN), query, CATALOGUE["code_search"]),
        (metadata("FiQA2018", prompt=OWN), query, CATALOGUE["financial_question"]),
        (metadata("Other", prompt=OWN), query, OWN),
        (metadata("Other"), query, CATALOGUE["web_search"]),
        (metadata("Other", kind="STS"), None, CATALOGUE["similar_text"]),
        (metadata("Other", kind="Clustering"), None, CATALOGUE["topic"]),
    ]:
        assert encoder.instruction(given, role) == expected
    assert encoder.instruction(metadata("NQ", prompt=OWN), document) == ""
    assert {*TASKS.values(), *TYPES.values()} <= set(CATALOGUE)
    with pytest.raises(UserError, match="unknown instruction 'nonsense'"):
        MtebEncoder(str(folder), instructions={"NQ": "nonsense"})


def test_vectors_and_similarities_are_ours(folder):
    encoder = MtebEncoder(str(folder))
    batches = [{"text": ["sort a list", "x"]}, {"text": ["heap overflow"]}]
    found = encoder.encode(batches, task_metadata=metadata(), hf_split="test", hf_subset="default")
    ours = encoder.embedder.encode(["sort a list", "x", "heap overflow"], "web_search")
    assert abs(found - ours).max() <= 1e-6
    assert torch.allclose(encoder.similarity(found, ours).diagonal(), encoder.similarity_pairwise(found, ours))
    assert encoder.similarity(found[0], ours).shape == (1, 3)
