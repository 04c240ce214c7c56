"""A few answers that the model writes at each validation, beside those that were expected."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_peft.data.module import TextDataModule
from lightning_peft.data.parts import parts_of
from lightning_peft.data.text_views import without_cut
from lightning_peft.tasks.padding import IGNORED
from lightning_peft.tasks.task import Joining

SAMPLES = "samples.jsonl"
_NAME = "val/samples"
_SHOWN = 300  # characters of a text on the screen
_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        step: the optimizer steps before it was written.
        epoch: the epoch.
        id: the row's ``id``, or its place in the data.
        prompt: what the model read, with the tokens that the tokenizer adds.
        expected: what training would have it write; None where the task has no answer to a row.
        written: what it wrote.
    """

    step: int
    epoch: int
    id: Any
    prompt: str
    expected: str | None
    written: str


class GenerationSamples(Callback):
    """Has the model answer the same few validation rows at each validation.

    The answers go to the terminal, to TensorBoard, Weights & Biases or MLflow where one of them is the logger, and as a
    line each to ``samples.jsonl``. It needs a module with a task, a tokenizer and a model, as `PeftModule` has them,
    and a `TextDataModule`; a model that cannot generate is left alone. Training is not changed by it: the random
    generators stand where they stood. One rank writes; where no rank holds the whole model nothing is written.

    Args:
        folder: of the file; None writes none.
        rows: how many validation rows, the same ones every time.
        generation: options of ``generate``, above the module's own; greedy unless they say otherwise.
        seed: of the drawing, where ``do_sample`` asks for it: equal weights write equal answers.

    Raises:
        ValueError: if ``rows`` is below 1.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        rows: int = 3,
        generation: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if rows < 1:
            raise ValueError(f"GenerationSamples: rows must be 1 or more, but got {rows}")
        self.folder = None if folder is None else Path(folder)
        self.rows = rows
        self.generation = dict(generation or {})
        self.seed = seed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lacking = [n for n in ("task", "tokenizer", "model") if not hasattr(pl_module, n)]
        if lacking:
            raise TypeError(
                f"GenerationSamples needs a LightningModule with a {' and a '.join(lacking)}, as PeftModule has them, "
                f"but got {type(pl_module).__name__}"
            )
        if isinstance(trainer.strategy, _SHARDED):
            rank_zero_warn("GenerationSamples writes nothing: no rank holds the whole model, and only one would write")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not isinstance(data, TextDataModule):
            return
        if not trainer.is_global_zero or isinstance(trainer.strategy, _SHARDED) or not _writes(pl_module.model):
            return
        samples = self._samples(trainer, pl_module, data)
        _print(samples)
        for logger in trainer.loggers:
            _log(logger, samples)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples)

    def _samples(self, trainer: Trainer, module: Any, data: TextDataModule) -> list[Sample]:
        examples = data.examples("validation")
        chosen = sorted(random.Random(0).sample(range(len(examples)), min(self.rows, len(examples))))
        rows = [examples[i].row or {} for i in chosen]
        prompts = data.task.encode(rows, data.tokenizer, data.max_length, training=False)
        batch = data.task.collate(prompts, data.tokenizer, training=False)
        batch = trainer.strategy.batch_to_device(batch)
        options = {**getattr(module, "generation", {}), **self.generation}
        with isolate_rng(), torch.inference_mode(), trainer.strategy.precision_plugin.val_step_context():
            torch.manual_seed(self.seed)
            answers = data.task.predict(module.model, batch, data.tokenizer, **options)
        return [
            Sample(
                step=trainer.global_step,
                epoch=trainer.current_epoch,
                id=row.get("id", number),
                prompt=_decoded(prompt["input_ids"], data),
                expected=_expected(data, number),
                written=str(next(iter(answer.values()))),
            )
            for number, row, prompt, answer in zip(chosen, rows, prompts, answers, strict=True)
        ]


def _writes(model: Any) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can()) if can is not None else False


def _expected(data: TextDataModule, row: int) -> str | None:
    """What ends the row and is learnt: the answer, whole; None where a row ends with something else."""
    import pyarrow as pa

    if isinstance(data.task, Joining):
        return None
    # the prompt has lost its beginning where a conversation that was cut for training has lost its end
    (feature,) = without_cut(data, [data.examples("validation")[row]])
    parts = [p for p in parts_of(pa.Table.from_pylist([feature])) if p.labels is not None and not p.tags]
    if not parts:
        return None
    labels, ids = feature[str(parts[0].labels)], feature[parts[0].ids]
    end = 1 + max(i for i, wanted in enumerate(labels) if wanted != IGNORED)
    if len(labels) == len(ids) and _decoded(ids[end:], data, skip=True).strip():
        return None  # a conversation that goes on behind the last answer is prompt as a whole
    begin = end
    while begin > 0 and labels[begin - 1] != IGNORED:
        begin -= 1
    return _decoded(labels[begin:end], data, skip=True)


def _decoded(ids: list[int], data: TextDataModule, *, skip: bool = False) -> str:
    return str(data.tokenizer.decode(ids, skip_special_tokens=skip))


def _print(samples: list[Sample]) -> None:
    for sample in samples:
        print(f"\nstep {sample.step}, sample {sample.id}")
        for name in ("prompt", "expected", "written"):
            text = getattr(sample, name)
            if text is not None:
                print(f"  {name:<9} {_shortened(text)}", flush=True)


def _shortened(text: str) -> str:
    half = _SHOWN // 2
    said = text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
    return said.strip().replace("\n", "\n" + " " * 12)


def _log(logger: Logger, samples: list[Sample]) -> None:
    columns = ["id", "prompt", "expected", "written"]
    cells = [[str(getattr(s, c)) for c in columns] for s in samples]
    step = samples[0].step
    if isinstance(logger, TensorBoardLogger):
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_in_a_cell(c) for c in row) + " |" for row in cells]
        logger.experiment.add_text(_NAME, "\n".join(lines), step)
    elif isinstance(logger, WandbLogger):
        logger.log_text(_NAME, columns, cells, step=step)
    elif isinstance(logger, MLFlowLogger):
        text = "\n".join(json.dumps(asdict(s), ensure_ascii=False) for s in samples)
        logger.experiment.log_text(logger.run_id, text, f"samples/step_{step}.jsonl")


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
