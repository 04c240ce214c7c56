"""A search's study in its folder: what it is after, how a run takes part in it, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_peft.analysis.runs import Run
from lightning_peft.core.problems import nearest

if TYPE_CHECKING:
    import optuna

Direction = Literal["minimize", "maximize"]

JOURNAL = "study.journal"
"""The file of a sweep's folder in which Optuna keeps its study."""

STUDY = "search"
"""The study's name in that file."""

PRUNED = "pruned"
"""The attribute by which a run tells that its trial was pruned: how many validations it had."""

INSTALL = "pip install 'lightning-peft[optuna]'"
"""How one gets Optuna."""

COSTS = ("trained", "checkpoint_bytes", "step_seconds", "peak_bytes", "forgetting")
"""What a trial can be judged by besides its metrics: attributes of `Run`, of which less is better."""

OBJECTIVES = "objectives"
"""The study's attribute that names what its values are."""

BEST = 0.25
"""The share of the complete trials that importances take for the good ones."""
_ENOUGH = 12  # complete trials, of which three are the best quarter


@dataclass(frozen=True)
class Trial:
    """A trial of a study.

    Attributes:
        number: in the study.
        state: ``"complete"``, ``"pruned"``, ``"failed"``, or ``"running"``, as one that was killed stays.
        values: one an objective; empty where there are none.
        options: what was chosen for it.
    """

    number: int
    state: str
    values: tuple[float, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        folder: the sweep's.
        objectives: by what trials are judged.
        larger: for each objective, whether more of it is better.
        trials: in the order of their numbers.
        on_a_log_scale: options that were searched so.
        importances: for each option its share in what tells the best quarter of the complete trials from all of them
            (PED-ANOVA, arXiv 2304.10255); empty where the trials are too few or too alike.
    """

    folder: Path
    objectives: tuple[str, ...]
    larger: tuple[bool, ...]
    trials: tuple[Trial, ...]
    on_a_log_scale: frozenset[str] = frozenset()
    importances: Mapping[str, float] = field(default_factory=dict)

    def run(self, trial: Trial) -> Path:
        """The folder of a trial's run, as ``conf/sweep/optuna.yaml`` lays it out.

        Args:
            trial: one of the study's.
        """
        return self.folder / str(trial.number)

    @property
    def options(self) -> list[str]:
        """The options that were searched."""
        return list(dict.fromkeys(name for trial in self.trials for name in trial.options))

    @property
    def judged(self) -> list[Trial]:
        """The trials that have values."""
        return [trial for trial in self.trials if trial.values]


def directions(objectives: Sequence[str], monitor: str, mode: str) -> list[Direction]:
    """Where each objective is to go, in Optuna's words.

    Args:
        objectives: the run's metric, ``val/loss``, or `COSTS`.
        monitor: the metric by which runs are judged.
        mode: ``"max"`` or ``"min"``: whether more of it is better.

    Raises:
        ValueError: if there is none, one twice, or another.
    """
    known = (monitor, "val/loss", *COSTS)
    strange = [name for name in objectives if name not in known]
    if not objectives or strange or len(set(objectives)) < len(objectives):
        wrong = f"{strange[0]}{nearest(strange[0], known)}" if strange else f"[{', '.join(objectives)}]"
        raise ValueError(
            f"search.objectives takes, each once, {', '.join(dict.fromkeys(known))}, but got {wrong}; another metric "
            "is named by monitor=... and mode=..."
        )
    return ["maximize" if name == monitor and mode == "max" else "minimize" for name in objectives]


def value_of(run: Run, objective: str) -> float:
    """What a run has to say to an objective.

    Args:
        run: a finished one.
        objective: of `directions`.

    Raises:
        ValueError: if the run did not take that number.
    """
    if objective == run.monitor:
        return run.score
    found = getattr(run, objective) if objective in COSTS else run.metrics.get(objective)
    if found is None:
        raise ValueError(f"{run.folder}: the objective {objective} was not taken in this run")
    return float(found)


def storage(folder: Path) -> optuna.storages.JournalStorage:
    """Where a sweep keeps its study: a file to which lines are added, also by several machines on one file system.

    Args:
        folder: the sweep's.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def load(folder: Path, **options: Any) -> optuna.Study:
    """The study of a sweep's folder.

    Args:
        folder: the sweep's.
        **options: of ``optuna.load_study``.

    Raises:
        FileNotFoundError: if the folder has none.
    """
    import optuna

    if not (folder / JOURNAL).is_file():
        raise FileNotFoundError(f"{folder} has no {JOURNAL}: no search by +sweep=optuna was made there")
    return optuna.load_study(study_name=STUDY, storage=storage(folder), **options)


def made_of(module: Any, name: str, options: Mapping[str, Any]) -> Any:
    """A sampler or a pruner by its class's name.

    Args:
        module: ``optuna.samplers`` or ``optuna.pruners``.
        name: of the class.
        options: its arguments.

    Raises:
        ValueError: if there is no such class, or it does not take these options.
    """
    known = [n for n in module.__all__ if n[:1].isupper() and not n.startswith("Base")]
    if name not in known:
        raise ValueError(f"{module.__name__} has no {name!r}{nearest(name, known)}")
    try:
        return getattr(module, name)(**options)
    except TypeError as error:
        raise ValueError(f"{module.__name__}.{name}: {error}") from error


def read_search(folder: Path) -> Search | None:
    """What the study in a folder came to; None where there is no study.

    Args:
        folder: a sweep's.
    """
    if not (folder / JOURNAL).is_file():
        return None
    from optuna.distributions import FloatDistribution, IntDistribution
    from optuna.study import StudyDirection
    from optuna.trial import TrialState

    study = load(folder)
    found = study.get_trials(deepcopy=False)
    spoken = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    objectives = tuple(study.user_attrs[OBJECTIVES])
    return Search(
        folder=folder.resolve(),
        objectives=objectives,
        larger=tuple(direction == StudyDirection.MAXIMIZE for direction in study.directions),
        trials=tuple(
            Trial(trial.number, spoken.get(trial.state, "running"), tuple(trial.values or ()), trial.params)
            for trial in found
        ),
        on_a_log_scale=frozenset(
            name
            for trial in found
            for name, tried in trial.distributions.items()
            if isinstance(tried, FloatDistribution | IntDistribution) and tried.log
        ),
        importances=_importances(study),
    )


def _importances(study: optuna.Study) -> dict[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < _ENOUGH or len({tuple(trial.values) for trial in complete}) < _ENOUGH // 2:
        return {}
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST))
