"""Configuration of mining."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nvembed.retrieval.config import CrossEncoderModel, EncodeConfig, PackageModel, RetrieverConfig, SearchConfig
from nvembed.types import Config


class TopK(Config):
    """The best-scored documents, known positives excluded: the baseline of the other rules."""

    type: Literal["topk"] = Field("topk", description="Kind of the rule.")


class TopKShifted(Config):
    """NV-Retriever's TopK shifted by N: the first `shift` ranks are passed over (ranks count positives too)."""

    type: Literal["topk_shifted"] = Field("topk_shifted", description="Kind of the rule.")
    shift: int = Field(
        10, ge=0, description="Number of best ranks that are skipped (N of TopK shifted by N), positives counted."
    )


class TopKAbs(Config):
    """NV-Retriever's TopK-Abs: keep candidates with s < `max_score`."""

    type: Literal["topk_abs"] = Field("topk_abs", description="Kind of the rule.")
    max_score: float = Field(0.7, description="Score that a negative must be below.")


class TopKMarginPos(Config):
    """NV-Retriever's TopK-MarginPos: keep candidates with s < p - `margin`, p the lowest positive's score."""

    type: Literal["topk_margin_pos"] = Field("topk_margin_pos", description="Kind of the rule.")
    margin: float = Field(
        0.05, ge=0, description="Least distance of a negative's score below that of the lowest positive."
    )


class TopKPercPos(Config):
    """NV-Retriever's TopK-PercPos: keep candidates with s < p - (1 - ratio) * |p|, p the lowest positive's score."""

    type: Literal["topk_perc_pos"] = Field("topk_perc_pos", description="Kind of the rule.")
    max_negative_to_positive_ratio: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Share of the lowest positive's score that a negative's must be below: 0.95 is the paper's 95 %.",
    )


class RankWindow(Config):
    """Candidates of the ranks `first` to `last` (1-based, positives count), best first; e.g. 30 to 100."""

    type: Literal["rank_window"] = Field("rank_window", description="Kind of the rule.")
    first: int = Field(30, ge=1, description="Best rank of a negative, 1-based, positives counted.")
    last: int = Field(100, ge=1, description="Worst rank of a negative, 1-based, positives counted.")

    @model_validator(mode="after")
    def _ordered(self) -> "RankWindow":
        if self.last < self.first:
            raise ValueError(f"last = {self.last} comes before first = {self.first}")
        return self


CeilingRule = Annotated[TopKAbs | TopKMarginPos | TopKPercPos, Field(discriminator="type")]


class SampledTopK(Config):
    """A seeded draw without replacement from the best `top` candidates under a ceiling.

    `temperature` weighs them by softmax(score / temperature); without it all are equally likely.
    """

    type: Literal["sampled_topk"] = Field("sampled_topk", description="Kind of the rule.")
    top: int = Field(
        10, ge=1, description="Candidates under the ceiling from which negatives are drawn, the best ones."
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="Temperature of the softmax over scores that weighs the draw; null: all are equally likely.",
    )
    ceiling: CeilingRule = Field(TopKPercPos(), description="Rule for the score that a candidate must be below.")


class RandomNegatives(Config):
    """Uniform draw from the corpus, known positives excluded; the control in the mined-against-random measurement."""

    type: Literal["random"] = Field("random", description="Kind of the rule.")


SearchedRule = TopK | TopKShifted | TopKAbs | TopKMarginPos | TopKPercPos | RankWindow | SampledTopK
RuleConfig = Annotated[SearchedRule | RandomNegatives, Field(discriminator="type")]


class CandidateFilter(Config):
    """A second model: candidates that it scores at or above the ceiling, on its own scale, are refused.

    An embedder encodes every text once; a cross-encoder (scores from 0 to 1) reads each candidate with its query.
    """

    model: Annotated[RetrieverConfig | CrossEncoderModel, Field(discriminator="type")] = Field(
        description="Embedder or cross-encoder that scores the candidates again."
    )
    ceiling: CeilingRule = Field(
        TopKPercPos(), description="Rule for the score, on this model's scale, that a candidate must be below."
    )


class Bm25Retriever(Config):
    """Candidates by shared words (characters in pairs for Chinese and Japanese); see `retrieval/bm25.py`."""

    type: Literal["bm25"] = Field("bm25", description="Kind of the retriever.")


class MineConfig(Config):
    """The `mine` step."""

    retriever: RetrieverConfig = Field(
        PackageModel(),
        description="Embedder that proposes candidates; with `mine_again` the stage-1 model takes its place.",
    )
    more_retrievers: tuple[Annotated[RetrieverConfig | Bm25Retriever, Field(discriminator="type")], ...] = Field(
        (), description="Further retrievers; their candidates are merged with the first one's, rank by rank."
    )
    rule: RuleConfig = Field(TopKPercPos(), description="Rule that selects negatives from the candidates.")
    num_negatives: int = Field(8, ge=1, description="Negatives per example.")
    depth: int = Field(50, ge=1, description="Candidates searched per query.")
    max_per_document: int | None = Field(
        None, ge=1, description="Most queries that a document may be a negative of; null: any number."
    )
    near_duplicate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Refuse documents whose Jaccard of word triples with a positive is at least this; null: not "
        "checked.",
    )
    max_positive_rank: int | None = Field(
        None, ge=1, description="Drop examples whose positive ranks below this; null: none."
    )
    candidate_filter: CandidateFilter | None = Field(
        None, description="Second model that refuses likely false negatives among the candidates; null: none."
    )
    sts_positive: float = Field(
        0.8, ge=0, le=1, description="sts pairs at or above this are positives, both directions."
    )
    encode: EncodeConfig = Field(
        EncodeConfig(), description="Encoding of the queries and documents: actors, precision, vector type, cache."
    )
    search: SearchConfig = Field(SearchConfig(), description="Search of the corpus: block sizes, device, index.")
    reuse: str | None = Field(
        None, description="Output of an earlier mine step from whose search negatives are selected; null: search anew."
    )
    audit_samples: int = Field(
        0, ge=0, description="Examples whose texts the audit shows; 0 by default, as texts are private."
    )
    seed: int = Field(
        0, ge=0, description="Seed of drawn negatives: rules random and sampled_topk, classes and clusters."
    )

    @property
    def cross_encoder(self) -> CrossEncoderModel | None:
        """The candidate filter, where it is a cross-encoder."""
        model = self.candidate_filter.model if self.candidate_filter is not None else None
        return model if isinstance(model, CrossEncoderModel) else None

    def embedders(self) -> tuple[tuple[str, RetrieverConfig], ...]:
        """The embedders that the step opens, by their place in the section."""
        models: list[tuple[str, RetrieverConfig]] = [("retriever", self.retriever)]
        for number, retriever in enumerate(self.more_retrievers):
            if not isinstance(retriever, Bm25Retriever):
                models.append((f"more_retrievers.{number}", retriever))
        if self.candidate_filter is not None and not isinstance(self.candidate_filter.model, CrossEncoderModel):
            models.append(("candidate_filter.model", self.candidate_filter.model))
        return tuple(models)

    @model_validator(mode="after")
    def _reachable(self) -> "MineConfig":
        needed = {
            "topk_shifted": lambda rule: rule.shift + self.num_negatives,
            "rank_window": lambda rule: rule.last,
            "sampled_topk": lambda rule: rule.top,
        }.get(self.rule.type, lambda rule: 0)(self.rule)
        if needed > self.depth:
            raise ValueError(f"rule {self.rule.type} needs {needed} ranks; only depth = {self.depth} are searched")
        if self.max_positive_rank is not None and self.max_positive_rank > self.depth:
            raise ValueError(f"max_positive_rank = {self.max_positive_rank} lies below depth = {self.depth}")
        drawn = self.rule.type in ("random", "sampled_topk")
        if drawn and self.max_per_document is not None:
            raise ValueError(f"max_per_document needs candidates in order of preference; {self.rule.type} draws them")
        if self.reuse is not None and (self.rule.type == "random" or self.more_retrievers or self.candidate_filter):
            raise ValueError(
                "reuse selects again from one retriever's search: no random rule, more_retrievers or candidate_filter"
            )
        return self
