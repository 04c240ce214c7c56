"""Lightning's rich progress bar, with what a person watches while a model is fine-tuned."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.progress import BarColumn
from typing_extensions import override

_NAMES = {"train/loss": "loss", "train/tokens_per_second": "tokens/s", "train/supervised_tokens": "supervised"}
_BAR = 16  # characters: the rest of a line is for the metrics


class ProgressBar(RichProgressBar):
    """Batches, time passed and left, and the metrics in short: names that fit, and as many digits as say something."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_text_delimiter="  "))

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = _BAR
        return columns

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)  # which run of the logger this is: the folder's name says it
        return {_NAMES.get(name, name): said(value) for name, value in found.items()}


def said(value: Any) -> str:
    """A metric in four digits, or whole where it is large.

    Args:
        value: a number; anything else is said as it is.
    """
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
