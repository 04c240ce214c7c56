"""A finished run as numbers, out of what it left in its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.analysis.run_files import CONFIG, COST, FORECAST, FORGETTING, METRICS, found_rate, read_config
from lightning_peft.core.problems import nearest_path
from lightning_peft.formats.folder import OF_A_RUN, read_folder
from lightning_peft.formats.reading import read_json
from lightning_peft.formats.training_record import TrainingRecord

_WATCHING = (
    *("cost", "forecast", "forgetting", "generation_samples", "interrupt", "show_data", "throughput"),
    # the trial's number is in it, and what it ends early is told elsewhere
    *("cache_frozen_layers", "last", "pruning"),
)
_PLACES = (
    *("run_dir", "seed", "skip_finished", "ckpt_path", "force", "hydra", "trainer.default_root_dir"),
    *("logger", "search", *(f"callbacks.{name}" for name in _WATCHING)),
)
"""Settings that do not tell what a run is: where it lies, its seed, how it was started and watched."""


@dataclass(frozen=True)
class Run:
    """What a finished run reached, and what it cost.

    Attributes:
        folder: where it lies.
        method: the preset's name, or the class's where no preset is known.
        seed: its seed.
        settings: its configuration by dotted names, without places and the run's seed.
        monitor: the metric by which it was judged.
        mode: ``"max"`` or ``"min"``: whether more of it is better.
        score: the metric's best value.
        metrics: all metrics at its end.
        trained: trained parameters.
        checkpoint_bytes: of the best checkpoint; None where there is none in one file.
        step_seconds: the median time of a step of the optimizer; None where it was not taken.
        peak_bytes: the most memory that a step took; None where it is not known.
        peak_measured: whether that was measured on a GPU; it was counted by the forecast else.
        forgetting: how much of the base's ability was lost; None where it was not measured.
        forgetting_kind: in what: ``"loss"``, how much that of held-out text grew, or ``"cka"``, how far the layers'
            outputs drifted; None where it was not measured.
        layers: how far each layer drifted, 1 - CKA; empty where it was not measured.
        curve: step and value of the metric.
        losses: step and training loss.
        pruned: whether a search ended it early, as it promised little.
    """

    folder: Path
    method: str
    seed: int
    settings: Mapping[str, Any]
    monitor: str
    mode: str
    score: float
    metrics: Mapping[str, float]
    trained: int
    checkpoint_bytes: int | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None
    peak_measured: bool = False
    forgetting: float | None = None
    forgetting_kind: str | None = None
    layers: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    pruned: bool = False


def find_runs(folders: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """The folders of runs that were trained, at or below the given ones.

    Args:
        folders: of runs or sweeps.

    Returns:
        The finished runs, and those that did not end, each in the order of their names.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no run.
    """
    found: dict[Path, bool] = {}
    for folder in map(Path, folders):
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file; a folder of runs is expected")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder{nearest_path(folder)}")
        below = [path.parent for path in sorted(folder.rglob(CONFIG)) if ".hydra" not in path.parts]
        trained = {path.resolve(): (path / METRICS).is_file() for path in below if _is_training(path)}
        if not trained:
            raise FileNotFoundError(f"{folder} holds no run: none below it has the config.yaml of a training")
        found |= trained
    return [path for path, ended in found.items() if ended], [path for path, ended in found.items() if not ended]


def read_run(folder: Path) -> Run:
    """Reads what a finished run left.

    Args:
        folder: the run's.

    Raises:
        ValueError: if a file does not hold what a run writes there, or the run was judged by no metric.
    """
    config = read_config(folder / CONFIG)
    metrics = _numbers(folder / METRICS)
    monitor = config.get("monitor")
    score, trained = metrics.pop(f"best/{monitor}", None), metrics.pop("trainable_parameters", None)
    if score is None or trained is None:
        raise ValueError(f"{METRICS} has no finite best/{monitor}: nothing validated, or the run diverged")
    cost, forecast, forgotten = _numbers(folder / COST), _numbers(folder / FORECAST), _read(folder / FORGETTING)
    measured = cost.get("peak_bytes")
    record = _record(folder)
    return Run(
        folder=folder,
        method=_preset(folder) or str(config["method"].get("_target_", "method")).rpartition(".")[2],
        seed=int(config.get("seed") or 0),
        # a search finds another rate with each seed, under one setting
        settings={**settings_of(config), **({} if found_rate(folder) is None else {"optimizer.lr": "auto"})},
        monitor=str(monitor),
        mode=str(config.get("mode")),
        score=score,
        metrics=metrics,
        trained=int(trained),
        checkpoint_bytes=_bytes(folder / "checkpoints" / "best.ckpt"),
        step_seconds=cost.get("step_seconds"),
        peak_bytes=_whole(measured if measured is not None else forecast.get("peak")),
        peak_measured=measured is not None,
        forgetting=_numbers_of(forgotten).get("forgetting"),
        forgetting_kind=forgotten.get("kind"),
        layers=_layers(forgotten),
        curve=_points(record.metrics.get(str(monitor), ())),
        losses=_points(record.losses),
    )


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run what it is, by dotted names: not where it lies, how it was started or watched, nor its seed.

    Args:
        config: its resolved configuration.
    """
    return {name: value for name, value in _flat(config).items() if not _is_place(name)}


def _flat(node: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A nested dictionary as one of dotted names; an empty one is a value."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{before}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def _is_place(name: str) -> bool:
    folder = name.startswith("callbacks.") and name.endswith((".dirpath", ".folder"))
    return folder or any(name == place or name.startswith(f"{place}.") for place in _PLACES)


def _is_training(folder: Path) -> bool:
    try:
        return {"method", "optimizer", "trainer"} <= read_config(folder / CONFIG).keys()
    except (ValueError, OSError):  # another program's, as config.yaml is a common name
        return False


def _preset(folder: Path) -> str | None:
    """The file of the group ``method`` that was chosen, as Hydra keeps it."""
    import yaml

    path = folder / ".hydra" / "hydra.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["runtime"]["choices"]["method"]
    except (OSError, KeyError, TypeError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return str(found)


def _read(path: Path) -> dict[str, Any]:
    """The entries of a file; one that the run did not write has none."""
    return read_json(path) if path.is_file() else {}


def _numbers(path: Path) -> dict[str, float]:
    return _numbers_of(_read(path))


def _numbers_of(found: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _layers(forgotten: Mapping[str, Any]) -> dict[str, float]:
    found = forgotten.get("layers")
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float)} if isinstance(found, dict) else {}


def _record(folder: Path) -> TrainingRecord:
    """How the training went; runs whose weights lie in parts have no adapter, so nothing is known of it."""
    if not (folder / OF_A_RUN).is_dir():
        return TrainingRecord()
    return read_folder(folder / OF_A_RUN).training or TrainingRecord()


def _points(points: Iterable[Any]) -> tuple[tuple[int, float], ...]:
    return tuple((int(point[0]), float(point[1])) for point in points)


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _whole(count: float | None) -> int | None:
    return None if count is None else int(count)
