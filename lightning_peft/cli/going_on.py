"""Runs that were made or begun before: whether one is finished, and from where one goes on."""

from __future__ import annotations

import json
import warnings
from itertools import count
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_peft.analysis.run_files import CONFIG, METRICS, found_rate, read_config
from lightning_peft.analysis.runs import settings_of
from lightning_peft.callbacks.checkpoint_files import last_checkpoint, read_resumable
from lightning_peft.cli.report import short
from lightning_peft.core.problems import nearest_path
from lightning_peft.tasks.optimization import AUTO

_SHOWN = 5
_OF_THE_CHECKPOINT = ("optimizer.", "scheduler.")
"""Settings that a run which goes on has from its checkpoint, whatever is written."""


def refuse_other_settings(config: DictConfig) -> None:
    """Refuses a folder in which another run was made or begun: one that goes on would be filed under these settings.

    Where ``skip_finished`` makes the folder that of one run, all settings have to be the same; else those that a
    checkpoint decides.

    Args:
        config: of the run, which has ``skip_finished`` or goes on from ``last``.

    Raises:
        FileExistsError: if it holds a run with other settings.
    """
    folder = Path(config.run_dir)
    begun = is_finished(config) or any((folder / "checkpoints").glob("*"))
    if not begun or not (folder / CONFIG).is_file():
        return
    then, now = _settings(read_config(folder / CONFIG)), _settings(OmegaConf.to_container(config, resolve=True))
    if now.get("optimizer.lr") == AUTO and (then.get("optimizer.lr") == AUTO or found_rate(folder) is not None):
        then["optimizer.lr"] = AUTO
    told = [
        f"{key} was {then.get(key, 'not there')}, now {now.get(key, 'not there')}"
        for key in {**then, **now}
        if then.get(key) != now.get(key) and (config.skip_finished or key.startswith(_OF_THE_CHECKPOINT))
    ]
    if told:
        more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        raise FileExistsError(
            f"{folder} holds a run with other settings ({'; '.join(told[:_SHOWN])}{more}); name another "
            "folder, as in hydra.sweep.dir=multirun/others, or move that one away"
        )


def is_finished(config: DictConfig) -> bool:
    """Whether the run's folder holds one that was trained to its end.

    Args:
        config: of the run.
    """
    return (Path(config.run_dir) / METRICS).is_file()


def finished_score(config: DictConfig) -> float | None:
    """The best value of the metric by which the finished run was judged; None where it was not.

    Args:
        config: of the run.
    """
    found = json.loads((Path(config.run_dir) / METRICS).read_text(encoding="utf-8"))
    score = found.get(f"best/{config.monitor}")
    return None if score is None else float(score)


def to_go_on_from(config: DictConfig) -> str | None:
    """The checkpoint that a run is to go on from; ``last`` is that of the same folder, if the run was there before.

    Args:
        config: of the run.

    Returns:
        Its path; None where there is none.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if ``last`` is asked for in a folder that is a new one each time.
    """
    path: str | None = config.ckpt_path
    if path == "last":
        _require_own_folder()
        folder = Path(config.run_dir) / "checkpoints"
        found = last_checkpoint(folder)
        _set_logs_aside(Path(config.run_dir) / "logs" / "metrics.csv")
        if found:
            print(f"goes on from {short(found)}")
        elif not config.skip_finished:  # of a sweep's runs most begin
            print(f"begins anew: no whole checkpoint is in {short(folder)}")
        return None if found is None else str(found)
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"ckpt_path={path}: there is no such checkpoint{nearest_path(Path(path))}")
    if path is not None:
        read_resumable(Path(path))
    return path


@rank_zero_only
def _set_logs_aside(file: Path) -> None:
    """Keeps what a run logged before it was interrupted, which Lightning's CSVLogger would delete."""
    if file.exists():
        file.rename(next(p for n in count(1) if not (p := file.with_name(f"{file.stem}.{n}.csv")).exists()))
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


def _require_own_folder() -> None:
    """Refuses to look for checkpoints in a folder that is another one each time."""
    given = HydraConfig.get().overrides if HydraConfig.initialized() else None
    words = [*given.hydra, *given.task] if given is not None else ["run_dir="]
    names = ("hydra.run.dir=", "hydra.sweep.dir=", "run_dir=", "sweep=")  # a file of the group sweep names a folder
    if not any(w.lstrip("+").startswith(names) for w in words):
        raise ValueError(
            "ckpt_path=last goes on in the run's own folder, which is a new one each time; name it, as in "
            "hydra.run.dir=outputs/mine, from the first time on, or give the path of a checkpoint"
        )


def _settings(config: Any) -> dict[str, Any]:
    plain = cast(dict[str, Any], config)
    return {**settings_of(plain), "seed": plain.get("seed")}
