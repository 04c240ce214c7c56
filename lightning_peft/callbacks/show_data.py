"""What the model will see, shown before the first step."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_peft.analysis.data_page import write_data_page
from lightning_peft.analysis.data_report import print_data
from lightning_peft.analysis.data_summary import DataSummary
from lightning_peft.data.rows import RowDataModule
from lightning_peft.data.summary import summarise


class ShowData(Callback):
    """Prints a summary of texts or images before they are trained on, and writes it as ``data.html`` and ``data.json``.

    Args:
        folder: where to write; None writes nothing.
        examples: how many training rows to show.
        sample: texts that are encoded once more, to know what the cut to ``max_length`` loses; None takes all.
    """

    def __init__(self, folder: str | Path | None = None, examples: int = 2, sample: int | None = 1000) -> None:
        self.folder = folder
        self.examples = examples
        self.sample = sample
        self.summary: DataSummary | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(data, RowDataModule):
            return
        summary = self.summary = summarise(data, examples=self.examples, sample=self.sample)
        print_data(summary)
        print()
        if self.folder is not None:
            write_data_page(summary, self.folder)
