"""A model folder as mteb 2 takes it (`EncoderProtocol`), with our instructions per task. Needs the extra `mteb`.

    import mteb
    from nvembed.evaluation.mteb_adapter import MtebEncoder

    encoder = MtebEncoder("runs/quickstart/train_stage_2/model", training_datasets={"MSMARCO"})
    mteb.evaluate(encoder, mteb.get_tasks(["NFCorpus"]))

Retrieval and reranking put the instruction on queries alone; all other tasks compare like with like, so every text
carries it (NV-Embed 4.2).
Shapes: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvembed.modeling.embedder import encode_prompted
from nvembed.modeling.folder import describe_folder, load_embedder
from nvembed.text.instructions import choose_prompts, task_sentence
from nvembed.types import UserError

# mteb's tasks whose wording our catalogue has; keys of `text.instructions.CATALOGUE`
TASKS = {
    "MSMARCO": "web_search",
    "NQ": "question_passages",
    "HotpotQA": "multi_hop_question",
    "FEVER": "claim_evidence",
    "ClimateFEVER": "claim_evidence",
    "SciFact": "claim_evidence",
    "FiQA2018": "financial_question",
    "QuoraRetrieval": "duplicates",
}
# where neither the catalogue nor the task's own metadata has a sentence
TYPES = {
    "Retrieval": "web_search",
    "Reranking": "web_search",
    "STS": "similar_text",
    "PairClassification": "similar_text",
    "Summarization": "similar_text",
    "BitextMining": "similar_text",
    "Clustering": "topic",
    "Classification": "topic",
    "MultilabelClassification": "topic",
}
ASYMMETRIC = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")


class MtebEncoder:
    """`EncoderProtocol` over a model folder; its vectors are `Embedder.encode`'s.

    Args:
        model_name: the model folder.
        revision: of the model, for mteb's records.
        device: where it runs, "cpu" by default.
        instructions: mteb task name -> key of our catalogue or a sentence; goes before everything else.
        training_datasets: mteb's names of the data sets it was trained on; None says "not known".
        token_budget: tokens of one forward, padding included.

    Raises:
        UserError: no model folder there, or an instruction that is neither key nor sentence.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        instructions: Mapping[str, str] | None = None,
        training_datasets: Collection[str] | None = None,
        token_budget: int = 4096,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise UserError(f"MtebEncoder does not know: {', '.join(sorted(kwargs))}.")
        self.instructions = {task: task_sentence(given) for task, given in (instructions or {}).items()}
        self.embedder = load_embedder(model_name).to(device or "cpu")
        self.token_budget = token_budget
        self._meta = _model_meta(Path(model_name), revision, training_datasets)

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's `ModelMeta`: name, sizes, and the data sets it was trained on."""
        return self._meta

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Unit vectors, float32 [N, D], of a loader of batches with `text`.

        Args:
            inputs: batches of mteb's loader.
            task_metadata: decides the instruction.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: query, document, or None where the task compares like with like.
            **kwargs: mteb's batch size and bar; batches are cut by tokens here.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = self.instruction(task_metadata, prompt_type)
        # tasks hold empty texts, which `Embedder.encode` refuses
        prompts = choose_prompts(len(texts), instruction)
        return encode_prompted(self.embedder, texts, prompts, token_budget=self.token_budget)

    def instruction(self, task_metadata: Any, prompt_type: Any) -> str:
        """The task sentence of a task's queries or documents; "" for documents of asymmetric tasks.

        In this order: given for the task, our catalogue's, the task's own prompt, that of the task's type.
        """
        role = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
        if task_metadata.type in ASYMMETRIC and role not in (None, "query"):
            return ""
        instruction = self.instructions.get(task_metadata.name) or TASKS.get(task_metadata.name)
        if instruction is None:
            own = task_metadata.prompt
            instruction = own.get("query") if isinstance(own, Mapping) else own
        return task_sentence(instruction or TYPES.get(task_metadata.type, "web_search"))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines [N1, N2] of unit vectors."""
        return _rows(embeddings1) @ _rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines [N] of unit vectors, pair by pair."""
        return (_rows(embeddings1) * _rows(embeddings2)).sum(dim=-1)


def _rows(vectors: Any) -> torch.Tensor:
    return torch.atleast_2d(torch.as_tensor(vectors, dtype=torch.float32))


def _model_meta(folder: Path, revision: str | None, training_datasets: Collection[str] | None) -> Any:
    try:
        from mteb.models.model_meta import ModelMeta, ScoringFunction
    except ImportError as error:
        raise UserError(f"this needs {error.name}: pip install 'nvembed[mteb]'") from error
    described = describe_folder(folder)
    return ModelMeta(
        loader=None,
        name=f"nvembed/{folder.absolute().parent.name}-{folder.absolute().name}",
        revision=revision or "local",
        release_date=None,
        languages=None,
        n_parameters=described["parameters"],
        memory_usage_mb=round(described["parameters"] * 4 / 2**20),
        max_tokens=described["embedder"]["text"]["max_length"],
        embed_dim=described["dim"],
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None if training_datasets is None else set(training_datasets),
    )
