"""What each command does, in the order in which it happens; thin over the library."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from lightning_peft.analysis.data_page import NUMBERS, write_data_page
from lightning_peft.analysis.data_report import print_data
from lightning_peft.analysis.run_files import CONFIG, METRICS
from lightning_peft.callbacks.check_monitor import CheckMonitor
from lightning_peft.callbacks.epoch_lines import EpochLines
from lightning_peft.callbacks.learning_rate import FindLearningRate
from lightning_peft.callbacks.progress_bar import ProgressBar
from lightning_peft.callbacks.validate_at_end import ValidateAtEnd
from lightning_peft.cli.going_on import finished_score, is_finished, refuse_other_settings, to_go_on_from
from lightning_peft.cli.jobs import reason_kept
from lightning_peft.cli.report import TRAINABLE, print_exported, print_metrics, print_training, short
from lightning_peft.cli.targets import made
from lightning_peft.core.method import Method
from lightning_peft.core.problems import nearest_path
from lightning_peft.data.summary import summarise
from lightning_peft.formats.folder import OF_A_RUN, refuse_occupied
from lightning_peft.formats.serving import consumer_of
from lightning_peft.formats.writing import write_json, written_file
from lightning_peft.module import PeftModule
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.base_model import BaseModel
from lightning_peft.tasks.optimization import AUTO

if TYPE_CHECKING:
    from lightning_peft.data.rows import RowDataModule


def train(config: DictConfig) -> float | None:
    """Trains, keeps the best checkpoint, exports the adapter; returns the monitored metric for a sweeper."""
    target = Path(config.run_dir) / OF_A_RUN
    monitor_as_the_task_says(config)
    if config.skip_finished or config.ckpt_path == "last":
        refuse_other_settings(config)
    if config.skip_finished and is_finished(config):
        print(f"finished before: {short(Path(config.run_dir))}")
        return finished_score(config)
    refuse_occupied(target)
    _keep_config(config)
    with reason_kept(Path(config.run_dir)):
        return _trained(config, target)


def _trained(config: DictConfig, target: Path) -> float | None:
    _require_steps(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    method = _method(config)
    data: RowDataModule = made(config.data)
    options = OmegaConf.to_container(config, resolve=True)
    assert isinstance(options, dict)
    module = PeftModule(
        options["model"],
        method,
        options["task"],
        options["optimizer"],
        options["scheduler"],
        options["generation"],
        check_base=options["check_base"],
    )
    trainer = _trainer(config)
    _refuse_sweep_over_devices(trainer)
    try:
        trainer.fit(module, data, ckpt_path=to_go_on_from(config), weights_only=True)
    finally:
        _end(trainer.loggers)
        _note_found_rate(config, module)
    if trainer.state.status != "finished" or config.trainer.fast_dev_run or not trainer.is_global_zero:
        return None
    for stopper in trainer.early_stopping_callbacks:
        if stopper.stopping_reason_message is not None:
            print(f"stopped early: {stopper.stopping_reason_message}")
    score, written = _reached(config, trainer, module)
    kept = getattr(trainer.checkpoint_callback, "best_model_path", "")
    best = Path(kept) if kept else None
    if best is not None and best.is_dir():
        print(
            f"\nbest checkpoint      {best}, in parts; one file of them, which lightning-peft export takes, makes\n"
            f"  python -m lightning.pytorch.utilities.consolidate_checkpoint {shlex.quote(str(best))}"
        )
        write_json(Path(config.run_dir) / METRICS, written)
        return score
    if best is not None:
        whole = module.adapter.tree.record
        own = BaseModel.of(options["model"]).to_config()  # which is the user's word, not the file's
        module = PeftModule.load_from_checkpoint(best, map_location="cpu", weights_only=True, model=own)
        kept = module.adapter.tree.record
        kept.training = whole.training.at(kept.training.step)  # the curves of all of it, as people look at them
    folder = module.save_adapter(target)
    write_json(Path(config.run_dir) / METRICS, written)  # by which a run is known to have ended
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    print_training(config.monitor, score, best, module, folder, list(words), swept=_is_swept())
    return score


def _is_swept() -> bool:
    return HydraConfig.initialized() and bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _reached(config: DictConfig, trainer: L.Trainer, module: PeftModule) -> tuple[float | None, dict[str, Any]]:
    """The best value of the monitored metric, and what ``metrics.json`` holds."""
    record = module.adapter.tree.record.training
    # one that goes on behind its last step measures nothing anew
    metrics = {**(record.reached if record is not None else {}), **_numbers(trainer.callback_metrics)}
    best = getattr(trainer.checkpoint_callback, "best_model_score", None)
    score = metrics.get(config.monitor) if best is None else float(best)
    found = {**metrics, TRAINABLE: module.adapter.plan.trainable}
    if score is not None:
        found[f"best/{config.monitor}"] = score
    return score, _defined(found)


def _require_steps(config: DictConfig) -> None:
    """Refuses a training without a step."""
    epochs = config.trainer.get("max_epochs")
    if epochs is not None and epochs != -1 and epochs < 1:
        raise ValueError(f"trainer.max_epochs must be 1 or more, or -1 for no end, but got {epochs}")
    for option in ("max_steps", "limit_train_batches"):
        if config.trainer.get(option) == 0:
            raise ValueError(f"trainer.{option}=0 trains nothing; lightning-peft data and eval do without training")


def _note_found_rate(config: DictConfig, module: PeftModule) -> None:
    """Has the run's configuration say the rate that it was made with."""
    if config.optimizer.lr == AUTO and module.optimizer["lr"] != AUTO:
        config.optimizer.lr = module.lr
        _keep_config(config)


def _refuse_sweep_over_devices(trainer: L.Trainer) -> None:
    """Each further process would run the whole sweep by itself."""
    starts = not getattr(getattr(trainer.strategy, "cluster_environment", None), "creates_processes_externally", True)
    if _is_swept() and starts and trainer.num_devices > 1:
        raise ValueError(
            f"a sweep trains on one device in each run, but got trainer.devices={trainer.num_devices}; leave it at 1, "
            "run the settings one by one, or start the command by torchrun or srun"
        )


def _end(loggers: Sequence[Logger]) -> None:
    """Ends the run of W&B, which would take in the next run of a sweep too, and might lose what is not written yet."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish()


def show_data(config: DictConfig) -> Path:
    """Shows what a model would see of the data, and writes it as a page, without loading the model."""
    _keep_config(config)
    options = OmegaConf.to_container(config, resolve=True)
    assert isinstance(options, dict)
    data: RowDataModule = made(config.data)
    task = task_from_config(options["task"])
    data.connect(task, BaseModel.of(options["model"]).load_processing_class(task))
    for stage in ("fit", "test") if config.data.test_files else ("fit",):
        data.setup(stage)
    summary = summarise(data, examples=config.examples, sample=config.sample)
    print_data(summary)
    page = write_data_page(summary, config.run_dir)
    print(f"\nwith plots           {short(page)}\nas numbers           {short(page.with_name(NUMBERS))}")
    return page


def evaluate(config: DictConfig) -> dict[str, float]:
    """Evaluates a checkpoint or an exported adapter on the validation or test rows."""
    found = evaluated(config)
    write_json(Path(config.run_dir) / METRICS, _defined(found))
    print_metrics(found)
    return found


def evaluated(config: DictConfig) -> dict[str, float]:
    """The metrics of a checkpoint or an exported adapter on the validation or test rows.

    Args:
        config: as of ``eval``.

    Raises:
        ValueError: if the split is unknown.
    """
    if config.split not in ("validation", "test"):
        raise ValueError(f"split must be validation or test, but got {config.split!r}")
    module, data, trainer = _ready(config)
    run = trainer.validate if config.split == "validation" else trainer.test
    try:
        (metrics,) = run(module, data, verbose=False)
    finally:
        _end(trainer.loggers)
    return _numbers(metrics)


def predict(config: DictConfig) -> Path:
    """Writes one line of JSON for each row: its inputs and what the model says."""
    output = Path(config.output)
    if output.exists():
        raise FileExistsError(f"{output} exists; choose another with output=..., or move it away")
    module, data, trainer = _ready(config)
    batches = cast(list[list[dict[str, Any]]], trainer.predict(module, data))
    said = [row for batch in batches for row in batch]
    inputs = [c for shape in module.task.columns for c in (*shape.inputs, *shape.optional)]
    with written_file(output) as scratch, scratch.open("w", encoding="utf-8") as file:
        for example, row, answer in zip(data.examples("predict"), data.rows("predict"), said, strict=True):
            line = {"id": row.get("id", example.number), **{c: row[c] for c in inputs if c in row}, **answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    where = f" of {data.origin('train')!r}" if data.origin("train") else ""
    of = "" if config.data.predict_files else f" of the rows{where} that validate (data.predict_files=... for others)"
    print(f"{len(said)} predictions{of} in {output}")
    return output


def export(config: DictConfig) -> Path:
    """Writes the adapter, or the merged model, from a checkpoint or an adapter's folder."""
    if config.format not in ("peft", "merged"):
        raise ValueError(f"format must be peft or merged, but got {config.format!r}")
    consumer = config["for"]
    if consumer is not None:
        consumer_of(consumer, config.max_lora_rank)
        if config.format == "merged":
            raise ValueError(f"for={consumer} is a form of the adapter; leave it out for format=merged, a whole model")
    _keep_config(config)
    module = load(config.adapter, config.base, check_base=config.check_base)
    folder = Path(config.to)
    if config.format == "merged":
        assert module.model is not None
        if not sys.stderr.isatty():  # transformers draws its bars into files too
            disable_progress_bar()
        module.model.eval()
        module.adapter.save_merged(folder, module.processing_class)
    elif consumer is not None:
        module.adapter.save_for(consumer, folder, max_lora_rank=config.max_lora_rank)
    else:
        module.save_adapter(folder)
    print_exported(folder, consumer or config.format, module)
    return folder


def load(path: str, base: str | None = None, *, check_base: bool = True) -> PeftModule:
    """The module behind a checkpoint or an exported adapter's folder.

    Args:
        path: a ``.ckpt`` file or a folder.
        base: a folder or a name on the hub; None takes what the file names.
        check_base: refuse another base than the one it was trained on.

    Raises:
        FileNotFoundError: if there is neither.
    """
    place = Path(path)
    if place.is_dir():
        return PeftModule.from_adapter(place, base, check_base=check_base)
    if not place.is_file():
        raise FileNotFoundError(f"adapter={path}: there is no such checkpoint or folder{nearest_path(place)}")
    given: dict[str, Any] = {} if base is None else {"model": base}
    return PeftModule.load_from_checkpoint(place, map_location="cpu", weights_only=True, check_base=check_base, **given)


def _ready(config: DictConfig) -> tuple[PeftModule, RowDataModule, L.Trainer]:
    _keep_config(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    module = load(config.adapter, config.base, check_base=config.check_base)
    given = cast(dict[str, Any], OmegaConf.to_container(config.generation, resolve=True))
    module.generation = {**module.generation, **given}
    data: RowDataModule = made(config.data)
    return module, data, _trainer(config)


def monitor_as_the_task_says(config: DictConfig) -> None:
    """Fills in the metric by which checkpoints are chosen, where the user leaves it to the task.

    Args:
        config: of a training; changed in place.

    Raises:
        ValueError: if another metric than the task's is given without its mode.
    """
    options = OmegaConf.to_container(config.task, resolve=True)
    task = task_from_config(cast(dict[str, Any], options))
    if config.monitor is None:
        config.monitor = task.monitor
    if config.mode is None:
        if config.monitor not in (task.monitor, "val/loss"):
            raise ValueError(f"monitor={config.monitor} goes with mode=max or mode=min; the task's is {task.monitor}")
        config.mode = task.mode if config.monitor == task.monitor else "min"
    if config.mode not in ("max", "min"):
        raise ValueError(f"mode must be max or min, but got {config.mode!r}")


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _defined(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON knows no NaN, which a metric has where the data leaves it undefined."""
    return {name: None if value is None or not math.isfinite(value) else value for name, value in metrics.items()}


def _method(config: DictConfig) -> Method:
    if not isinstance(config.method, DictConfig):
        # `+method=lora` outside Hydra's search path gives the bare word
        raise TypeError(f"method is the word {config.method!r}, no configuration; write method=... without '+'")
    method = made(config.method)
    if not isinstance(method, Method):
        raise TypeError(f"method._target_={config.method._target_} is no method of lightning_peft")
    return method


def _trainer(config: DictConfig) -> L.Trainer:
    # which devices there are and what else one could install is no news to somebody who asked for a run
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    watched = sys.stdout.isatty()
    chosen = [c for c in (config.get("callbacks") or {}).values() if c is not None]
    callbacks = [made(_each_named(c)) for c in chosen]
    if config.get("monitor") is not None:
        callbacks += [CheckMonitor(config.monitor), ValidateAtEnd()]
    if OmegaConf.select(config, "optimizer.lr") == AUTO:
        callbacks.append(FindLearningRate(config.run_dir))
    if not watched:
        callbacks.append(EpochLines())
    loggers = [made(c) for c in (config.get("logger") or {}).values()]
    options = dict(config.trainer)
    options["precision"] = _precision(options["precision"])
    if options["enable_progress_bar"] is None:
        options["enable_progress_bar"] = watched
    if options["enable_progress_bar"]:
        callbacks.append(ProgressBar())
    options["enable_checkpointing"] = bool(config.get("callbacks"))
    return cast(L.Trainer, made(options, callbacks=callbacks, logger=loggers or False))


def _each_named(callback: DictConfig) -> DictConfig:
    """A callback that keeps several checkpoints, with a name for each: under one name the last would replace them."""
    kept, name = callback.get("save_top_k", 1), callback.get("filename")
    if kept in (0, 1) or name is None or "{" in name:
        return callback
    return cast(DictConfig, OmegaConf.merge(callback, {"filename": f"{name}-{{step}}"}))


def _precision(given: str | int | None) -> str | int | None:
    """Lightning takes short names too, with a warning, and has the mixed kind for two that could be either."""
    kinds = {"16": ("16-mixed", "16-true"), "bf16": ("bf16-mixed", "bf16-true")}
    if str(given) in kinds:
        mixed, true = kinds[str(given)]
        raise ValueError(
            f"trainer.precision={given} could be {mixed} (weights in 32 bits) or {true} (the base's weights in 16 bits "
            "too); write one of them"
        )
    return {"32": "32-true", "64": "64-true"}.get(str(given), given)


@rank_zero_only
def _keep_config(config: DictConfig) -> None:
    """Writes what the run was made with, every reference to another value replaced by that value."""
    with written_file(Path(config.run_dir) / CONFIG) as scratch:
        scratch.write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
