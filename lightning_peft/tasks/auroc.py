"""The area under the ROC curve, averaged over the classes for which there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override


class MacroAUROC(Metric):
    """The mean over classes of the area under each class's ROC curve against all others.

    A class that no row has, or every row, has no curve and is left out: `torchmetrics.classification.MulticlassAUROC`
    counts it as 0. Where no class is left the value is NaN. All probabilities are held until the epoch ends.
    """

    full_state_update: bool | None = False
    higher_is_better: bool | None = True
    is_differentiable: bool | None = False
    probabilities: list[Tensor]
    labels: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    @override
    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            probabilities: ``(rows, classes)``.
            labels: each row's class ``(rows,)``, or 1 for each class that it has ``(rows, classes)``.
        """
        self.probabilities.append(probabilities)
        self.labels.append(labels)

    @override
    def compute(self) -> Tensor:
        """The mean, a scalar."""
        probabilities, labels = dim_zero_cat(self.probabilities), dim_zero_cat(self.labels)
        has = (F.one_hot(labels, probabilities.shape[1]) if labels.dim() == 1 else labels).bool()
        curves = (has.any(0) & ~has.all(0)).nonzero().flatten().tolist()
        if not curves:
            return torch.tensor(torch.nan, device=probabilities.device)
        return torch.stack([binary_auroc(probabilities[:, c], has[:, c].long()) for c in curves]).mean()
