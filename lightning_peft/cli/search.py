"""A sweep whose runs are trials of an Optuna study: what is tried, by what it is judged, and how it goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from omegaconf import DictConfig

from lightning_peft.analysis.called import program
from lightning_peft.analysis.runs import read_run
from lightning_peft.analysis.study import (
    INSTALL,
    JOURNAL,
    OBJECTIVES,
    PRUNED,
    STUDY,
    directions,
    made_of,
    storage,
    value_of,
)
from lightning_peft.cli.jobs import stop
from lightning_peft.cli.report import short

if TYPE_CHECKING:
    import optuna

    Ranges = dict[str, optuna.distributions.BaseDistribution]

FIXED = "words"
"""The study's attribute with the words that all its runs share."""

Launch = Callable[..., Sequence[Any]]


def search(config: DictConfig, words: Sequence[str], loader: Any, launch: Launch) -> None:
    """Makes the trials that a study is short of.

    Args:
        config: of the sweep.
        words: overrides for its runs, those that are searched among them.
        loader: Hydra's loader of configurations, which knows what a ``glob`` stands for.
        launch: starts runs and gives what they came to, as Hydra's launchers do.
    """
    try:
        _refuse_several_processes()
        ranges, fixed = asked(words, loader)
        study = _study(config, fixed)
        missing = config.search.trials - _made(study)
        while missing > 0:
            count = min(missing, config.search.parallel)
            _try([study.ask(ranges) for _ in range(count)], study, config, fixed, launch)
            missing -= count
    except ModuleNotFoundError as error:
        stop(f"a search is made by Optuna: {INSTALL} ({error})")
    except ValueError as error:
        stop(str(error))
    _print(study, config)


def _refuse_several_processes() -> None:
    """Each process of a run would make a search of its own."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect() and environment().world_size() > 1:
            raise ValueError("a search trains on one device in each run; start it once, without torchrun or srun")


def asked(words: Sequence[str], loader: Any) -> tuple[Ranges, list[str]]:
    """What is searched, and what is the same in all runs.

    Args:
        words: overrides; the last one for an option counts.
        loader: Hydra's.

    Raises:
        ValueError: if nothing is searched.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(words))
    last = {word.key_or_group: word for word in parsed}
    ranges = {word.get_key_element(): _range(word) for word in last.values() if word.is_sweep_override()}
    if not ranges:
        raise ValueError(
            "nothing is searched; write choice(4,8,16), interval(0.0,0.3), range(1,5) or tag(log,interval(1e-5,1e-2)) "
            "for an option, as in 'optimizer.lr=tag(log,interval(1e-5,1e-2))'"
        )
    return ranges, [str(word.input_line) for word in last.values() if not word.is_sweep_override()]


def _range(word: Override) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = word.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind = IntDistribution if whole else FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    choices = list(word.sweep_iterator(transformer=Transformer.encode))
    if isinstance(value, RangeSweep) and all(isinstance(choice, int) for choice in choices):
        return IntDistribution(min(choices), max(choices), step=abs(int(value.step)))
    return CategoricalDistribution(choices)


def _study(config: DictConfig, fixed: Sequence[str]) -> optuna.Study:
    """The study of the sweep's folder, a new one where there is none.

    Raises:
        ValueError: if the study there was made with other words.
    """
    import optuna

    from lightning_peft.cli.commands import monitor_as_the_task_says

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a run's own report is printed
    told = copy.deepcopy(config)
    monitor_as_the_task_says(told)
    chosen = told.search
    for name in ("trials", "parallel"):
        if not isinstance(chosen[name], int) or chosen[name] < 1:
            raise ValueError(f"search.{name} must be a whole number from 1 on, but got {chosen[name]}")
    objectives = [told.monitor] if chosen.objectives is None else list(chosen.objectives)
    where = directions(objectives, told.monitor, told.mode)
    pruner = None if chosen.pruner is None else made_of(optuna.pruners, chosen.pruner, chosen.pruner_options)
    folder = Path(config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=STUDY, storage=storage(folder), pruner=pruner, directions=where, load_if_exists=True
    )
    now = {
        OBJECTIVES: objectives,
        FIXED: sorted(w for w in fixed if not w.lstrip("+").startswith(("search.", "hydra"))),
    }
    for name, value in now.items():
        if study.user_attrs.get(name, value) != value:
            raise ValueError(
                f"{folder} holds a study with other {name}: they were {_listed(study.user_attrs[name])}, now "
                f"{_listed(value)}; name another folder, as in hydra.sweep.dir=multirun/another"
            )
        study.set_user_attr(name, value)
    # one seed would draw the same first options again where a study goes on
    seed = {"seed": chosen.seed + len(study.get_trials(deepcopy=False))}
    study.sampler = made_of(optuna.samplers, chosen.sampler, {**seed, **chosen.sampler_options})
    return study


def _listed(words: Sequence[str]) -> str:
    return " ".join(words) or "none"


def _made(study: optuna.Study, *, pruned: bool = True) -> int:
    """Trials that have a value; those that failed or were killed are made anew, as others."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED) if pruned else (TrialState.COMPLETE,)
    return len(study.get_trials(deepcopy=False, states=states))


def _try(
    trials: Sequence[optuna.Trial], study: optuna.Study, config: DictConfig, fixed: Sequence[str], launch: Launch
) -> None:
    from optuna.trial import TrialState

    words = [[*fixed, *_words(trial.params), f"search.trial={trial.number}"] for trial in trials]
    try:
        returned = launch(words, initial_job_idx=trials[0].number)
        for trial, ended in zip(trials, returned, strict=True):
            if ended.status.name != "COMPLETED":  # which the run has told of
                study.tell(trial, state=TrialState.FAIL)
            elif PRUNED in study.get_trials(deepcopy=False)[trial.number].user_attrs:
                study.tell(trial, state=TrialState.PRUNED)
            else:
                _judge(trial, study, Path(config.hydra.sweep.dir) / str(trial.number))
    finally:
        for trial in trials:  # of a launch that was interrupted
            if not study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                study.tell(trial, state=TrialState.FAIL)


def _words(params: Mapping[str, Any]) -> list[str]:
    # a sampler's 17 digits would be in every name, and tell a training nothing
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in params.items()}
    return [f"{name}={'null' if value is None else value}" for name, value in shown.items()]


def _judge(trial: optuna.Trial, study: optuna.Study, folder: Path) -> None:
    """Tells the study what a run reached.

    Raises:
        ValueError: if an objective was not taken in the run, as it will be in none.
    """
    from optuna.trial import TrialState

    run = read_run(folder)
    values = [value_of(run, objective) for objective in study.user_attrs[OBJECTIVES]]
    if all(map(math.isfinite, values)):
        study.tell(trial, values)
    else:
        study.tell(trial, state=TrialState.FAIL)


def _print(study: optuna.Study, config: DictConfig) -> None:
    folder = Path(config.hydra.sweep.dir)
    objectives = study.user_attrs[OBJECTIVES]
    several = len(objectives) > 1
    best = study.best_trials if several else study.best_trials[:1]
    if not best:
        print(f"\nno trial was trained to its end: {short(folder / JOURNAL)}")
        return
    made, pruned = _made(study), _made(study) - _made(study, pruned=False)
    told = f"{made} trials" + (f" ({pruned} pruned)" if pruned else "")
    print(f"\n{told}; " + ("no other is better in all than" if several else "the best is"))
    for trial in best:
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives, trial.values, strict=True))
        print(f"  trial {trial.number}: {values} with {' '.join(_words(trial.params))}")
    print(f"compared, with plots:  {program()} compare {short(folder)}")
