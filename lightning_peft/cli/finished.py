"""Whether a run was made before, in the folder that it would have, with the settings that it would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from lightning_peft.analysis.runs import settings_of
from lightning_peft.cli.report import METRICS
from lightning_peft.tasks.optimization import AUTO

_SHOWN = 5


def is_finished(config: DictConfig) -> bool:
    """Whether the run's folder holds the same run, trained to its end.

    Args:
        config: of the run.

    Raises:
        FileExistsError: if it holds a finished run with other settings.
    """
    folder = Path(config.run_dir)
    if not (folder / METRICS).is_file() or not (folder / "config.yaml").is_file():
        return False
    then, now = _settings(OmegaConf.load(folder / "config.yaml")), _settings(config)
    if now.get("optimizer.lr") == AUTO:  # which the run replaced by what it found
        then["optimizer.lr"] = AUTO
    told = [
        f"{key} was {then.get(key, 'not there')}, now {now.get(key, 'not there')}"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    if told:
        more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        raise FileExistsError(
            f"{folder} holds a finished run with other settings ({'; '.join(told[:_SHOWN])}{more}); name another "
            "folder, as in hydra.sweep.dir=multirun/others, or move that one away"
        )
    return True


def finished_score(config: DictConfig) -> float | None:
    """The best value of the metric by which the finished run was judged; None where it was not.

    Args:
        config: of the run.
    """
    found = json.loads((Path(config.run_dir) / METRICS).read_text(encoding="utf-8"))
    score = found.get(f"best/{config.monitor}")
    return None if score is None else float(score)


def _settings(config: Any) -> dict[str, Any]:
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    return {**settings_of(plain), "seed": plain.get("seed")}
