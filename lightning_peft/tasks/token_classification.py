"""A tag for each word."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection

from lightning_peft.core.problems import raise_problems
from lightning_peft.tasks.class_names import ClassNumbers, class_name, in_order, readable
from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.entities import OUTSIDE, EntityScores, entities, mark_entities
from lightning_peft.tasks.labelled import named_classes
from lightning_peft.tasks.padding import IGNORED, pad, pad_inputs
from lightning_peft.tasks.word_pieces import first_pieces

_NO_WORD, _LOST = -2, -1
_READ = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class TokenClassification:
    """Tags words: entities, parts of speech; the loss is the cross-entropy on the first piece of each word.

    Rows have ``tokens``, a list of words, and ``tags``, one for each of them: names or numbers. Entities are marked by
    IOB1, IOB2, BIOES or BILOU; of other tags each word that is not tagged O counts as an entity of its own. Words that
    a text is cut before have no tag: in an evaluation what they hold counts as missed.

    Args:
        labels: the tags in the order of their numbers. None takes those of the training data, O first. Where they are
            given, rows may hold their numbers.

    Raises:
        ValueError: if labels are given twice or fewer than two.
    """

    labels: list[str] | None = None

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_task_type: ClassVar[str] = "TOKEN_CLS"
    monitor: ClassVar[str] = "val/f1"
    mode: ClassVar[str] = "max"
    columns: ClassVar[tuple[Columns, ...]] = (Columns(("tokens",), ("tags",)),)
    whole_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._given = self.labels is not None
        self.labels, wrong = named_classes(self.labels)
        if self.labels is not None and len(self.labels) == 1:
            wrong.append(f"labels needs two tags or more, but got {self.labels}")
        raise_problems("TokenClassification", wrong)

    def to_config(self) -> dict[str, Any]:
        """The task's name and tags as plain values."""
        return {"name": "token_classification", **asdict(self)}

    def _names(self) -> list[str]:
        if self.labels is None:
            raise ValueError(
                "TokenClassification does not know its tags yet: give labels=[...], or let the data's setup run first, "
                "which takes them from the training examples"
            )
        return self.labels

    def model_kwargs(self) -> dict[str, Any]:
        """The head's size and the names of the tags."""
        return ClassNumbers(self._names(), by_number=self._given).head()

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Takes the tags from the training rows, if none were given.

        Raises:
            ValueError: if there are fewer than two, or none can be read.
        """
        if self.labels is not None:
            return
        found = in_order(name for row in readable((r["tags"] for r in rows), _tag_names) for name in row)
        if len(found) < 2:
            raise ValueError(f"tagging needs two tags or more, but the training data has only {found}")
        if all(name.isdecimal() for name in found):
            warnings.warn(
                "the tags are numbers, so where entities begin and end is not known; name them with labels=[...], as "
                "the data set's page lists them",
                stacklevel=2,
            )
        self.labels = sorted(found, key=lambda name: name != OUTSIDE)

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids, where each word's first piece is among them, and the numbers of the words' tags.

        ``tags`` has those of all words, ``labels`` those of the pieces, -100 on all but the first of a word.

        Raises:
            TypeError: if the tokenizer does not tell which piece belongs to which word.
            ValueError: if a row has no list of words, another number of tags, or a tag that training does not know.
        """
        number = ClassNumbers(self._names(), by_number=self._given)
        tags = [self._tags(row, number) for row in rows] if training else []
        features = first_pieces([_words(row) for row in rows], tokenizer, max_length)
        for feature, numbers in zip(features, tags, strict=False):
            if all(start == _LOST for start in feature["starts"]):
                raise ValueError("has no supervised token: no word of it is left")
            feature["tags"] = numbers
            feature["labels"] = _of_pieces(numbers, feature)
        return features

    def _tags(self, row: dict[str, Any], number: ClassNumbers) -> list[int]:
        words, tags = _words(row), row["tags"]
        if not isinstance(tags, list | tuple) or len(tags) != len(words):
            what = f"{len(tags)} tags" if isinstance(tags, list | tuple) else f"the tags {tags!r}"
            raise ValueError(f"has {len(words)} words, but {what}; a list with one for each word is expected")
        return [number(tag) for tag in tags]

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """Inputs and ``labels`` of ``(batch, tokens)``, ``starts`` and ``tags`` of ``(batch, words)``.

        ``starts`` are the places of the words' first pieces, -1 where a word has none and -2 after the last word;
        ``labels`` are -100 everywhere else.
        """
        batch = pad_inputs(features, tokenizer)
        batch["starts"] = pad([f["starts"] for f in features], _NO_WORD)
        if training:
            batch["tags"] = pad([f["tags"] for f in features], IGNORED)
            batch["labels"] = pad([f["labels"] for f in features], IGNORED)
        return batch

    def outputs(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model says to a batch; the loss is taken outside of it, so that it can be summed."""
        return model(**{name: batch[name] for name in _READ if name in batch})

    def loss(self, outputs: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and the number of words; logits are ``(batch, tokens, tags)``."""
        labels = batch["labels"]
        total = F.cross_entropy(outputs.logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum")
        return total, (labels != IGNORED).sum()

    def metrics(self) -> MetricCollection:
        """Precision, recall and F1 of entities, overall and of each type, and the share of words that are right."""
        return MetricCollection({"entities": EntityScores(self._names())})

    def update(self, metrics: MetricCollection, outputs: Any, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        names = self._names()
        expected = [[names[tag] for tag in row if tag != IGNORED] for row in batch["tags"].tolist()]
        said = [[tag for tag, _ in row] for row in self._said(outputs.logits, batch["starts"])]
        metrics.update(said, expected)

    def _said(self, logits: Tensor, starts: Tensor) -> list[list[tuple[str | None, float | None]]]:
        """The likeliest tag of each word and its probability; both None for a word that was not seen."""
        names = self._names()
        best, which = logits.float().softmax(-1).max(-1)
        places = starts.clamp_min(0)
        rows = zip(starts.tolist(), which.gather(1, places).tolist(), best.gather(1, places).tolist(), strict=True)
        return [
            [
                (None, None) if start == _LOST else (names[tag], score)
                for start, tag, score in zip(*row, strict=True)
                if start != _NO_WORD
            ]
            for row in rows
        ]

    @torch.no_grad()
    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """``tags`` and ``scores`` of the words, and ``entities``: words ``start`` to ``end``, the latter excluded."""
        marked = mark_entities(self._names())
        answers: list[dict[str, Any]] = []
        for row in self._said(self.outputs(model, batch).logits, batch["starts"]):
            tags = [tag for tag, _ in row]
            answer: dict[str, Any] = {"tags": tags, "scores": [score for _, score in row]}
            if marked:
                answer["entities"] = [entity._asdict() for entity in entities(tags, marked=True)]
            answers.append(answer)
        return answers


def _of_pieces(numbers: list[int], feature: dict[str, Any]) -> list[int]:
    labels = [IGNORED] * len(feature["input_ids"])
    for start, number in zip(feature["starts"], numbers, strict=True):
        if start != _LOST:
            labels[start] = number
    return labels


def _tag_names(tags: Any) -> list[str]:
    if not isinstance(tags, list | tuple):
        raise ValueError(f"has the tags {tags!r}, but a list with one for each word is expected")
    return [class_name(tag) for tag in tags]


def _words(row: dict[str, Any]) -> list[str]:
    words = row["tokens"]
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"has the tokens {words!r}, but a list of words is expected")
    if not words:
        raise ValueError("has an empty list of tokens")
    return list(words)
