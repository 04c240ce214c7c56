"""``lr="auto"``: Lightning's learning-rate finder before the first step, after which nothing but the rate is new."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import lr_finder
from torch import Generator
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_peft.analysis.rates_curve import rates_png
from lightning_peft.analysis.run_files import FOUND_RATE
from lightning_peft.callbacks.randomness import random_state, restore_random_state
from lightning_peft.callbacks.steps import going_by
from lightning_peft.formats.reading import naming
from lightning_peft.formats.writing import write_json, written_file
from lightning_peft.tasks.optimization import AUTO, check_optimization

PICTURE = "lr_find.png"
STEPS = 100
_LEFT_OUT = 10  # of the first steps, in which the finder's mean of losses is still that of a few
_BEGUN = "_peft_begun_from"


class FindLearningRate(Callback):
    """Finds the rate of a `PeftModule` whose optimizer has ``lr="auto"``; such a module brings it along.

    Lightning's finder trains `STEPS` steps from a thousandth of the method's own rate up to 1, on what the method
    trains, and takes the rate at which the loss falls fastest. Then parameters, method, optimizer, schedule, loaders
    and random generators are as at the beginning, so that the run is the one with that rate written out. A run that
    goes on from a checkpoint goes on with the rate that was found.

    Args:
        folder: where to write ``lr_find.json`` (rates and losses) and ``lr_find.png``; None writes nothing.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        quick: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        begun = module.__dict__.pop(_BEGUN, None)
        # fast_dev_run is to see that all runs; the method's own rate does for that
        if begun is None or module.optimizer["lr"] != AUTO or quick:
            return
        own = module.method.learning_rate
        instead = f"write the method's own, optimizer.lr={own:g}"
        if trainer._checkpoint_connector._loaded_checkpoint:
            raise ValueError(f"the checkpoint is from before a learning rate was found; begin anew, or {instead}")
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise ValueError(
                f"optimizer.lr=auto searches on one device, but got {type(trainer.strategy).__name__}; search on one "
                f"and write the rate that is found, or {instead}"
            )
        finder = _searched(trainer, module, own)
        rates, losses = finder.results["lr"], finder.results["loss"]
        seen = sum(math.isfinite(loss) for loss in losses[_LEFT_OUT:-1])
        found = finder.suggestion(_LEFT_OUT) if seen > 1 else None
        if self.folder is not None:
            _write(Path(self.folder), rates, losses, found and _rounded(found), own)
        if found is None:
            raise ValueError(
                f"optimizer.lr=auto found no rate: of {len(losses)} steps that were tried, {seen} after the first "
                f"{_LEFT_OUT} had a finite loss, and it takes two; {instead}"
            )
        module.lr = _rounded(found)
        _begin_anew(trainer, begun)
        print(
            f"learning rate {module.lr:g}, found in {len(rates)} steps; {type(module.method).__name__}'s own is {own:g}"
        )


def note_beginning(module: LightningModule) -> None:
    """To be called before loaders and optimizers are made that a search will make anew.

    Args:
        module: the module; it trains with ``lr="auto"``.
    """
    generators = _generators(module.trainer.fit_loop._data_source.instance)
    module.__dict__[_BEGUN] = random_state(), [(g, g.get_state()) for g in generators]


def take_found(module: Any, checkpoint: dict[str, Any]) -> None:
    """To be called when a checkpoint is loaded: goes on with its run's rate, so that there is nothing to search for.

    Args:
        module: the module; it trains with ``lr="auto"``.
        checkpoint: the checkpoint; one that the search itself made has no rate yet.

    Raises:
        ValueError: if what stands there is no rate.
    """
    saved = checkpoint["hyper_parameters"].get("optimizer")
    rate = saved.get("lr") if isinstance(saved, dict) else None
    if rate == AUTO:
        return
    with naming("the checkpoint's hyper_parameters"):
        check_optimization({**module.optimizer, "lr": rate}, module.scheduler)
    module.lr = module.method.learning_rate if rate is None else rate  # None: the method's, which is the same one here


def _begin_anew(trainer: Trainer, begun: tuple[dict[str, Any], list[tuple[Generator, Any]]]) -> None:
    """Makes loaders and optimizers once more, with the random numbers with which they were made before."""
    loop, now = trainer.fit_loop, random_state()
    state, generators = begun
    for parameter in trainer.lightning_module.parameters():
        parameter.grad = None
    loop._combined_loader, loop._combined_loader_states_to_load = None, []
    restore_random_state(state)
    for generator, before in generators:
        generator.set_state(before)
    trainer.strategy.setup_optimizers(trainer)
    restore_random_state(now)
    trainer._logger_connector.reset_metrics()


def _generators(source: Any) -> list[Generator]:
    """Random generators that loaders are made with and that outlive them, of whoever has or makes the loaders."""
    held = vars(source) if hasattr(source, "train_dataloader") else source
    found = []
    for leaf in tree_leaves(held):
        order = getattr(leaf, "sampler", None), getattr(getattr(leaf, "batch_sampler", None), "sampler", None)
        found += [leaf, *(getattr(one, "generator", None) for one in (leaf, *order))]
    return list({id(g): g for g in found if isinstance(g, Generator)}.values())


def _searched(trainer: Trainer, module: Any, own: float) -> Any:
    """The finder after its search; the random generators are where they were."""
    finder = LearningRateFinder(own / 1000, max(1.0, 10 * own), STEPS, update_attr=False)
    total = trainer.estimated_stepping_batches if module.adapter.scheduled is not None else 0
    optimizer = trainer.optimizers[0]
    with _limits_lifted(trainer), _bar_for_people(), _ratios_held(optimizer, own), going_by(module, total):
        finder.lr_find(trainer, module)
    return finder.optimal_lr


@contextmanager
def _limits_lifted(trainer: Trainer) -> Iterator[None]:
    """The search makes its steps however short the run is to be, and validates nothing.

    Where it fails the finder leaves the trainer without its callbacks, who then do not hear of the error.
    """
    loop: Any = trainer.fit_loop
    places = (
        (trainer, "check_val_every_n_epoch", sys.maxsize),
        (trainer, "callbacks", None),
        (trainer, "loggers", None),
        (trainer, "limit_val_batches", None),
        (loop, "max_epochs", -1),
        (loop, "min_epochs", 0),
        (loop.epoch_loop, "max_steps", None),
        (loop.epoch_loop, "min_steps", None),
    )
    before = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        if value is not None:
            setattr(place, name, value)
    loop.epoch_loop.min_steps = None
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def _bar_for_people() -> Iterator[None]:
    """The finder draws a bar into files too."""
    where: Any = lr_finder
    bar = where.tqdm
    where.tqdm = functools.partial(bar, disable=None, leave=False)
    try:
        yield
    finally:
        where.tqdm = bar


@contextmanager
def _ratios_held(optimizer: Optimizer, own: float) -> Iterator[None]:
    """The finder gives all groups one rate; here each has its own multiple of it, as LoRA+'s B has."""
    multiples = [group["initial_lr"] / own for group in optimizer.param_groups]

    def multiply(factors: list[float], optimizer: Optimizer, *rest: Any) -> None:
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] *= factor

    handles = [
        optimizer.register_step_pre_hook(functools.partial(multiply, multiples)),
        optimizer.register_step_post_hook(functools.partial(multiply, [1 / m for m in multiples])),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(rate: float) -> float:
    """A rate that people can write out: the finder's steps are coarser than its digits."""
    return float(f"{rate:.3g}")


def _write(folder: Path, rates: list[float], losses: list[float], found: float | None, own: float) -> None:
    write_json(
        folder / FOUND_RATE,
        {
            "schema": 1,
            "lr": found,
            "default": own,
            "rates": rates,
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
        },
    )
    with written_file(folder / PICTURE) as scratch:
        scratch.write_bytes(rates_png(rates[_LEFT_OUT:], losses[_LEFT_OUT:], found, own))
