"""Sentence embeddings: texts as vectors whose cosine says how alike they are."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.regression import SpearmanCorrCoef

from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.padding import pad_inputs
from lightning_peft.tasks.retrieval import Retrieval, key_of

Pooling = Literal["mean", "cls", "last"]
Loss = Literal["ranking", "cosent"]

_COMPARED = ("sentence1", "sentence2")
_IDS = ("input_ids", "second_input_ids", "third_input_ids")


@dataclass
class Embedding:
    r"""Learns vectors of texts from pairs, triplets, or pairs with a score.

    ``ranking`` (in-batch negatives, arXiv 1705.00652; sentence-transformers' MultipleNegativesRankingLoss) tells an
    anchor's positive among all positives and negatives of its batch:

    $$ -\log \frac{e^{s \cos(a_i, p_i)}}{\sum_j e^{s \cos(a_i, p_j)} + \sum_j e^{s \cos(a_i, n_j)}} $$

    ``cosent`` (sentence-transformers' CoSENTLoss, its default) wants cosines in the order of the scores:

    $$ \log \Big( 1 + \sum_{y_i > y_j} e^{s (\cos_j - \cos_i)} \Big) $$

    Either depends on what else is in a batch: larger batches are harder, and gradient accumulation is no larger batch.

    Args:
        loss_type: None takes ``"cosent"`` for data with scores and ``"ranking"`` for the rest.
        pooling: what of the last hidden states is a text's vector: their ``"mean"`` over the text's tokens, that of the
            first token (``"cls"``), or of the last, for causal models.
        normalize: whether the vectors that prediction writes have length 1. Losses and metrics use cosines anyway.
        scale: s, above 0, the inverse of the temperature; 20 is sentence-transformers'.

    Raises:
        ValueError: if an option is out of its range.
    """

    loss_type: Loss | None = None
    pooling: Pooling = "mean"
    normalize: bool = True
    scale: float = 20.0

    auto_class: ClassVar[str] = "AutoModel"
    peft_task_type: ClassVar[str] = "FEATURE_EXTRACTION"
    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[str] = "min"
    columns: ClassVar[tuple[Columns, ...]] = (
        Columns(("anchor",), ("positive",), optional_targets=("negative",)),
        Columns(_COMPARED, ("score",)),
        Columns(("text",)),
    )
    whole_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        kinds = {"loss_type": (self.loss_type, get_args(Loss)), "pooling": (self.pooling, get_args(Pooling))}
        raise_problems(
            "Embedding",
            [
                *(
                    f"{name} {value!r} is unknown{nearest(str(value), known)}"
                    for name, (value, known) in kinds.items()
                    if value is not None and value not in known
                ),
                f"scale must be above 0, but got {self.scale}" if self.scale <= 0 else None,
            ],
        )

    def to_config(self) -> dict[str, Any]:
        """The task's name and options as plain values."""
        return {"name": "embedding", **asdict(self)}

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the model has no head."""
        return {}

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Takes the loss from the columns of the training rows, if none was given.

        Raises:
            ValueError: if some have scores and some have not.
        """
        if self.loss_type is None:
            scored = sum("score" in row for row in rows)
            if scored not in (0, len(rows)):
                raise ValueError(f"{scored} of {len(rows)} rows have a score; train on pairs with or without, not both")
            self.loss_type = "cosent" if scored else "ranking"

    def _loss(self) -> Loss:
        if self.loss_type is None:
            raise ValueError(
                "Embedding does not know its loss yet: give loss_type='ranking' or 'cosent', or let the data's setup "
                "run first, which takes it from the columns"
            )
        return self.loss_type

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids of a row's one to three texts, and its score.

        Raises:
            ValueError: if a text is empty, or the row has not what the loss learns from.
        """
        features = []
        for row in rows:
            texts = [str(row[column]) for column in self._columns(row, training)]
            if not all(text.strip() for text in texts):
                raise ValueError(f"has an empty text: {texts}")
            ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            # empty where there is no text: all rows of a file have the same columns
            feature = {**dict.fromkeys(_IDS, ()), **dict(zip(_IDS, ids, strict=False))}
            if training and self._loss() == "cosent":
                feature["score"] = _number(row["score"])
            features.append({k: list(v) if k in _IDS else v for k, v in feature.items()})
        return features

    def _columns(self, row: dict[str, Any], training: bool) -> tuple[str, ...]:
        if not training:
            return next(columns for columns in (_COMPARED, ("anchor",), ("text",)) if columns[0] in row)
        columns = _COMPARED if self._loss() == "cosent" else ("anchor", "positive")
        lost = next((c for c in (*columns, *(("score",) if columns == _COMPARED else ())) if c not in row), None)
        if lost is not None:
            raise ValueError(f"has no {lost!r}, which loss_type={self.loss_type!r} learns from, but {sorted(row)}")
        return (*columns, "negative") if "negative" in row and columns != _COMPARED else columns

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``: ``(texts, tokens)``, first all first texts, then the second and third.

        ``keys``, ``(rows, 2)``, is equal for equal texts; ``score``: ``(rows,)``.
        """
        texts = [{"input_ids": f[name]} for name in _IDS for f in features if len(f[name])]
        batch = pad_inputs(texts, tokenizer)
        batch["keys"] = torch.tensor([[key_of(f[name]) for name in _IDS[:2]] for f in features])
        if training and self._loss() == "cosent":
            batch["score"] = torch.tensor([float(f["score"]) for f in features])
        return batch

    def outputs(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """The texts' vectors, ``(texts, hidden)``."""
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return pooled(hidden.float(), batch["attention_mask"], self.pooling)

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum over rows and their number; of ``cosent``, the batch's loss counts for each of its rows."""
        count = len(batch["keys"])
        vectors = F.normalize(outputs, dim=1)
        first, others = vectors[:count], vectors[count:]
        if self._loss() == "ranking":
            own = torch.arange(count, device=vectors.device)
            total = F.cross_entropy(self.scale * first @ others.T, own, reduction="sum")
        else:
            total = count * cosent(self.scale * (first * others).sum(1), batch["score"])
        return total, torch.tensor(count, device=vectors.device)

    def metrics(self) -> MetricCollection:
        """Whether anchors find their positives among all, or whether cosines have the order of the scores."""
        if self._loss() == "ranking":
            return MetricCollection({"retrieval": Retrieval()})
        with warnings.catch_warnings():  # that it keeps every value, which is a number for each row
            warnings.filterwarnings("ignore", message=".*will save all targets and predictions.*")
            return MetricCollection({"spearman": SpearmanCorrCoef()})

    def update(self, metrics: MetricCollection, outputs: Tensor, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        count = len(batch["keys"])
        vectors = F.normalize(outputs.detach(), dim=1)
        first, second = vectors[:count], vectors[count : 2 * count]
        if self._loss() == "ranking":
            metrics.update(first, second, batch["keys"])
        else:
            metrics.update((first * second).sum(1), batch["score"])

    @torch.no_grad()
    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """Each row's vector; of two sentences, both vectors and their cosine."""
        vectors = self.outputs(model, batch)
        count = len(batch["keys"])
        cosines = F.cosine_similarity(vectors[:count], vectors[count:]) if len(vectors) > count else None
        written = (F.normalize(vectors, dim=1) if self.normalize else vectors).tolist()
        if cosines is None:
            return [{"embedding": vector} for vector in written]
        return [
            {"embedding1": one, "embedding2": two, "cosine": cosine}
            for one, two, cosine in zip(written[:count], written[count:], cosines.tolist(), strict=True)
        ]


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector for each text.

    Args:
        hidden: the last hidden states, ``(texts, tokens, hidden)``.
        mask: which tokens are the text's, ``(texts, tokens)``; padding may be on either side.
        pooling: what of them is taken.

    Returns:
        ``(texts, hidden)``.
    """
    if pooling == "mean":
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1e-9)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    chosen = mask.long().argmax(1) if pooling == "cls" else (places * mask).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen]


def cosent(scaled: Tensor, scores: Tensor) -> Tensor:
    """How far cosines are from the order of their scores.

    Args:
        scaled: the cosines of the pairs times the scale, ``(pairs,)``.
        scores: what they should be ordered by, ``(pairs,)``.
    """
    differences = (scaled.unsqueeze(1) - scaled.unsqueeze(0))[scores.unsqueeze(1) < scores.unsqueeze(0)]
    return torch.cat([differences.new_zeros(1), differences]).logsumexp(0)


def _number(score: Any) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"has the score {score!r}, which is no number")
    return number
