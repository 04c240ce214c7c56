"""Metrics on texts that a model wrote, each with the numbers of the package that the field quotes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SacreBLEUScore

_CHARACTERS = 6  # the longest run that chrF compares
_ROUGE = ("rouge1", "rouge2", "rougeL")
_BETA = 2  # recall counts twice as much as precision


def written_metrics() -> MetricCollection:
    """``exact_match``, ``bleu``, ``chrf``, ``rouge1``, ``rouge2`` and ``rougeL``, all from 0 to 1."""
    metrics: dict[str, Any] = {"exact_match": ExactMatch(), "bleu": Bleu(), "chrf": ChrF(), "rouge": Rouge()}
    return MetricCollection(metrics, compute_groups=False)


def update_written(metrics: MetricCollection, written: Sequence[str], expected: Sequence[str]) -> None:
    """Adds texts to those of a collection's metrics that compare texts.

    Args:
        metrics: some that `written_metrics` gave are among them.
        written: what the model wrote.
        expected: what it should have written, one for each.
    """
    for metric in metrics.values():
        if isinstance(metric, (Bleu, ChrF, Rouge)):
            metric.update(written, [[text] for text in expected])
        elif isinstance(metric, ExactMatch):
            metric.update_texts(written, expected)


class ExactMatch(MeanMetric):
    """The share of texts that are what was expected, white space at the ends aside."""

    def update_texts(self, written: Sequence[str], expected: Sequence[str]) -> None:
        """Adds texts.

        Args:
            written: what the model wrote.
            expected: what it should have written.
        """
        same = [a.strip() == b.strip() for a, b in zip(written, expected, strict=True)]
        self.update(torch.tensor(same, dtype=torch.float32))


class Bleu(SacreBLEUScore):
    """Corpus BLEU with sacrebleu's defaults: its 13a tokenizer, and exponential smoothing of orders without a match.

    torchmetrics counts n-grams the same way, but gives 0 where one order has no match.
    """

    def compute(self) -> Tensor:
        """The score, from 0 to 1."""
        return torch.tensor(
            _bleu(self.numerator.tolist(), self.denominator.tolist(), float(self.preds_len), float(self.target_len))
        )


def _bleu(matches: list[float], totals: list[float], written: float, expected: float) -> float:
    if not any(matches) or not all(totals):
        return 0.0
    halved, logs = 1.0, 0.0
    for match, total in zip(matches, totals, strict=True):
        if not match:
            halved /= 2
        logs += math.log((match or halved) / total)
    return math.exp(logs / len(matches) + min(0.0, 1 - expected / written))


class ChrF(Metric):
    """Corpus chrF2 with sacrebleu's defaults: runs of up to six characters, white space left out.

    torchmetrics has the mean over the lengths of each one's F score; sacrebleu has the F score of the mean precision
    and recall.
    """

    matches: Tensor
    written: Tensor
    expected: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("matches", "written", "expected"):
            self.add_state(name, torch.zeros(_CHARACTERS, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, written: Sequence[str], expected: Sequence[Sequence[str]]) -> None:
        """Adds texts.

        Args:
            written: what the model wrote.
            expected: what it should have written, one text for each.
        """
        for ours, (theirs,) in zip(written, expected, strict=True):
            for n in range(1, _CHARACTERS + 1):
                found, wanted = _runs(ours, n), _runs(theirs, n)
                self.matches[n - 1] += (found & wanted).total()
                self.written[n - 1] += found.total() if wanted else 0
                self.expected[n - 1] += wanted.total()

    def compute(self) -> Tensor:
        """The score, from 0 to 1."""
        counted = (self.written > 0) & (self.expected > 0)
        if not self.matches.any():
            return torch.tensor(0.0)
        precision = (self.matches[counted].double() / self.written[counted]).mean()
        recall = (self.matches[counted].double() / self.expected[counted]).mean()
        return ((1 + _BETA**2) * precision * recall / (_BETA**2 * precision + recall)).float()


def _runs(text: str, n: int) -> Counter[str]:
    characters = "".join(text.split())
    return Counter(characters[i : i + n] for i in range(len(characters) - n + 1))


class Rouge(Metric):
    """The mean F measures of ROUGE-1, ROUGE-2 and ROUGE-L, as rouge_score has them without a stemmer.

    Words are runs of ASCII letters and digits: texts in other scripts have none. `torchmetrics.text.ROUGEScore` holds
    each text's measures, and its processes wait for each other forever where one has more texts than another.
    """

    measures: Tensor
    texts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("measures", torch.zeros(len(_ROUGE)), dist_reduce_fx="sum")
        self.add_state("texts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, written: Sequence[str], expected: Sequence[Sequence[str]]) -> None:
        """Adds texts.

        Args:
            written: what the model wrote.
            expected: what it should have written, one text for each.
        """
        for ours, (theirs,) in zip(written, expected, strict=True):
            found = rouge_score(ours, theirs, rouge_keys=_ROUGE)
            self.measures += torch.stack([found[f"{key}_fmeasure"] for key in _ROUGE]).to(self.measures)
            self.texts += 1

    def compute(self) -> dict[str, Tensor]:
        """The three, from 0 to 1."""
        means = self.measures / self.texts.clamp_min(1)
        return dict(zip(_ROUGE, means, strict=True))
