"""Whether a run was made or begun before, in the folder that it would have, and with which settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from lightning_peft.analysis.run_files import CONFIG, METRICS, found_rate, read_config
from lightning_peft.analysis.runs import settings_of
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


def _settings(config: Any) -> dict[str, Any]:
    plain = cast(dict[str, Any], config)
    return {**settings_of(plain), "seed": plain.get("seed")}
