"""Direct preference optimization: of two answers to a prompt the chosen one is to become more likely."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.core.disable import disabled
from lightning_peft.core.mode import evaluating
from lightning_peft.core.problems import nearest, raise_problems
from lightning_peft.tasks.columns import Columns
from lightning_peft.tasks.conversing import Conversing
from lightning_peft.tasks.counted import counted
from lightning_peft.tasks.language_model import write
from lightning_peft.tasks.padding import IGNORED, pad, pad_inputs
from lightning_peft.tasks.preferences import pair_of, prompt_of

LossType = Literal["sigmoid", "ipo", "hinge"]


class LogRatios(NamedTuple):
    """How much likelier each answer is to the model than to the base, in nats.

    Attributes:
        chosen: ``(pairs,)``.
        rejected: ``(pairs,)``.
    """

    chosen: Tensor
    rejected: Tensor


@dataclass
class DPO(Conversing):
    r"""Learns from pairs of answers which of two is preferred (arXiv 2305.18290).

    $$ \text{loss} = -\log \sigma\big(\beta\,(r_c - r_r)\big), \qquad r = \log \pi(y \mid x) - \log \pi_0(y \mid x) $$

    c is the chosen answer y to a prompt x and r the rejected one; the loss is the mean over pairs. The reference
    \(\pi_0\) is the model with its adapter disabled, run in evaluation mode and without a graph in the same step: no
    second model is held. Dropout layers of the model are set to zero when training begins, as the paper's code and TRL
    do: in the difference of two log-likelihoods it is noise. That of an adapter's layers is the method's option.

    Args:
        beta: above 0, how much a pair counts before it is satisfied; small values let the model move far from the
            reference. 0.1 is the paper's. For ``ipo`` it is the paper's tau.
        loss_type: ``"sigmoid"`` is the above. ``"ipo"`` (arXiv 2310.12036) draws the difference of the ratios' means
            over tokens to ``1 / (2 beta)``; ``"hinge"`` (arXiv 2305.10425) is content with a margin of 1.
        label_smoothing: for ``sigmoid``, the share of pairs that are taken to be the wrong way round, from 0 on and
            below 0.5.
        chat_template: the form of conversations: ``"chatml"``, ``"zephyr"`` or ``"alpaca"``, a ``.jinja`` file, or
            Jinja; after construction it is the template's text. None takes the tokenizer's own.
        all_logits: whether logits are computed for all tokens, as the model does by itself, not only for those that
            the loss counts and in chunks. Results are the same; it takes more memory and time.
        packing: whether rows of a batch are put one behind the other instead of padded, where the model keeps them
            apart. Results are the same; without it padding takes memory and time too.

    Raises:
        ValueError: if an option is out of its range, or the template's name is unknown.
        FileNotFoundError: if the template's file is not there.
    """

    beta: float = 0.1
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    chat_template: str | None = None
    all_logits: bool = False
    packing: bool = True

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[str] = "min"
    columns: ClassVar[tuple[Columns, ...]] = (
        Columns(("prompt",), ("chosen", "rejected"), ("tools",)),
        Columns((), ("chosen", "rejected"), ("tools",)),
    )
    whole_texts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        losses = get_args(LossType)
        raise_problems(
            "DPO",
            [
                f"beta must be above 0, but got {self.beta}" if self.beta <= 0 else None,
                f"loss_type {self.loss_type!r} is unknown{nearest(self.loss_type, losses)}"
                if self.loss_type not in losses
                else None,
                f"label_smoothing must be at least 0 and below 0.5, but got {self.label_smoothing}"
                if not 0 <= self.label_smoothing < 0.5
                else None,
                f"label_smoothing is for loss_type='sigmoid', not {self.loss_type!r}"
                if self.label_smoothing and self.loss_type != "sigmoid"
                else None,
            ],
        )

    def to_config(self) -> dict[str, Any]:
        """The task's name and what is learnt, as plain values."""
        learnt = {k: v for k, v in asdict(self).items() if k not in ("all_logits", "packing")}
        return {"name": "dpo", **learnt}

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: a language model's head has the vocabulary's size."""
        return {}

    def learn_from(self, rows: list[dict[str, Any]]) -> None:
        """Nothing: the task knows all that it needs."""

    def check_model(self, model: Any) -> None:
        """Refuses a model whose base cannot be given back.

        Raises:
            ValueError: if the method trains the base in place without its originals.
        """
        try:
            with disabled(model):
                pass
        except RuntimeError as error:
            raise ValueError(f"DPO compares with the base, which is gone once training begins: {error}") from error

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: Any, max_length: int, *, training: bool
    ) -> list[dict[str, Any]]:
        """Token ids of both conversations with labels that are -100 on the prompt, or of the prompt alone.

        Raises:
            ValueError: if a row is no pair of answers to one prompt.
            RuntimeError: if there is no chat template for conversations, or none that can be learnt from.
        """
        chat_for = functools.cache(functools.partial(self._chat, tokenizer))
        if not training:
            return [{"input_ids": prompt_of(row, tokenizer, chat_for, max_length)} for row in rows]
        features = []
        for row in rows:
            prompt, chosen, rejected = pair_of(row, tokenizer, chat_for, max_length)
            hidden = [IGNORED] * len(prompt)
            features.append(
                {
                    "input_ids": prompt + chosen.ids,
                    "labels": hidden + chosen.labels,
                    "rejected_input_ids": prompt + rejected.ids,
                    "rejected_labels": hidden + rejected.labels,
                }
            )
        return features

    def collate(self, features: list[dict[str, Any]], tokenizer: Any, *, training: bool) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: ``(2 pairs, tokens)``, the chosen ones first."""
        if not training:
            return pad_inputs(features, tokenizer, left=True)
        both = [
            {"input_ids": f[f"{which}input_ids"], "labels": f[f"{which}labels"]}
            for which in ("", "rejected_")
            for f in features
        ]
        return {**pad_inputs(both, tokenizer), "labels": pad([f["labels"] for f in both], IGNORED)}

    def outputs(self, model: Any, batch: dict[str, Any]) -> LogRatios:
        """The model's log-likelihood of each answer less the reference's; means over tokens for ``ipo``."""
        if model.training:
            _leave_out_dropout(model)
        # the reference first: what it swaps in the base must not lie between a forward and its backward
        with torch.no_grad(), evaluating(model), disabled(model):
            reference = self._log_likelihoods(model, batch)
        ratios = self._log_likelihoods(model, batch) - reference
        return LogRatios(*ratios.chunk(2))

    def _log_likelihoods(self, model: Any, batch: dict[str, Any]) -> Tensor:
        said = counted(model, batch, all_logits=self.all_logits, packing=self.packing)
        rows = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        lost = said.losses()
        return -lost.new_zeros(len(batch["labels"])).index_add(0, rows, lost)

    def loss(self, outputs: LogRatios, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum of the pairs' losses and the number of pairs."""
        return self._losses(outputs, batch).sum(), torch.tensor(len(outputs.chosen), device=outputs.chosen.device)

    def _losses(self, ratios: LogRatios, batch: dict[str, Any]) -> Tensor:
        if self.loss_type == "ipo":
            chosen, rejected = (batch["labels"][:, 1:] != IGNORED).sum(1).clamp_min(1).chunk(2)
            difference: Tensor = ratios.chosen / chosen - ratios.rejected / rejected
            return (difference - 1 / (2 * self.beta)).square()
        margin = self.beta * (ratios.chosen - ratios.rejected)
        if self.loss_type == "hinge":
            return F.relu(1 - margin)
        wrong = self.label_smoothing
        return -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)

    def metrics(self) -> MetricCollection:
        """The share of pairs that the model orders right, its rewards of both answers, and the margin between them."""
        names = ("accuracy", "margin", "reward_chosen", "reward_rejected")
        return MetricCollection({name: MeanMetric() for name in names}, compute_groups=False)

    def update(self, metrics: MetricCollection, outputs: LogRatios, batch: dict[str, Any]) -> None:
        """Adds a batch to the metrics."""
        chosen, rejected = self.beta * outputs.chosen.detach(), self.beta * outputs.rejected.detach()
        metrics["accuracy"].update((chosen > rejected).float())
        metrics["margin"].update(chosen - rejected)
        metrics["reward_chosen"].update(chosen)
        metrics["reward_rejected"].update(rejected)

    def predict(self, model: Any, batch: dict[str, Any], tokenizer: Any, **generation: Any) -> list[dict[str, Any]]:
        """The answer that the model writes to each prompt; greedy, 64 tokens at most, unless told otherwise."""
        return [{"completion": t} for t in write(model, batch, tokenizer, self._ends(tokenizer), **generation)]


def _leave_out_dropout(model: Module) -> None:
    """For good and not for a block: activations that are checkpointed are computed again in the backward pass."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
