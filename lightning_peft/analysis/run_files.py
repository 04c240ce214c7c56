"""The plain files of a run's folder: its configuration, its log, and what was summed up as JSON."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.analysis.data_summary import Cut
from lightning_peft.core.options import misfits
from lightning_peft.core.problems import an, and_more, nearest_path, shortened
from lightning_peft.formats.reading import read_json

CONFIG = "config.yaml"
LOG = "logs/metrics.csv"
METRICS = "metrics.json"
DATA = "data.json"
FORECAST = "forecast.json"
COST = "cost.json"
FORGETTING = "forgetting.json"
FOUND_RATE = "lr_find.json"
ERROR = "error.txt"
"""Why a run failed; the command writes it, and takes it away when the run is begun again."""

_LONGEST = 2**20  # bytes of a configuration, some hundred times what one takes
_SHOWN = 8  # runs that are named
_LOSSES = ("train/loss", "val/loss")
_SPLIT: dict[str, Any] = {"labels": dict[str, int] | None, "tokens": dict[str, Any] | None}
_CUT: dict[str, Any] = dict.fromkeys(Cut.__dataclass_fields__, int)


@dataclass
class RunFiles:
    """What a run's folder says in plain files; what is missing or cannot be read is told in `lacking`.

    Attributes:
        folder: the folder.
        config: what the run was made with; empty where it is not there.
        metrics: what the run reached; None where it is not there.
        log: the rows of the log, each a number by name.
        data: the summary of the data; None where it is not there.
        forgetting: what the model forgot; None where that was not measured.
        lacking: a sentence for each file that is missing or cannot be read.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None
    log: list[dict[str, float]] = field(default_factory=list)
    data: dict[str, Any] | None = None
    forgetting: dict[str, Any] | None = None
    lacking: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Reads them.

        Args:
            folder: the run's folder.

        Raises:
            FileNotFoundError: if there is no such folder, or it holds no run.
        """
        refuse_other_folders(folder)
        run = cls(folder)
        run.config = run._tried(CONFIG, read_config) or {}
        run.metrics = run._tried(METRICS, read_json)
        run.data = run._tried(DATA, read_json)
        run.log = run._tried(LOG, read_log) or []
        if (folder / FORGETTING).is_file():
            needed = {"kind": str, "forgetting": float | None}
            run.forgetting = run._tried(FORGETTING, lambda path: read_json(path, needed))
        return run

    def _tried(self, name: str, read: Any) -> Any:
        return tried(self.folder / name, name, read, self.lacking)

    def option(self, *names: str) -> Any:
        """A value of the configuration; None where there is none.

        Args:
            *names: the way to it.
        """
        node: Any = self.config
        for name in names:
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def logged(self, name: str) -> list[tuple[float, float]]:
        """Step and value of what was logged under a name, where it is finite.

        Args:
            name: such as ``"train/loss"``.
        """
        found = [(row.get("step", n), row[name]) for n, row in enumerate(self.log) if name in row]
        return [(step, value) for step, value in found if math.isfinite(value)]

    @property
    def not_finite(self) -> int:
        """How many losses that were logged are NaN or infinite."""
        return sum(not math.isfinite(row[name]) for row in self.log for name in _LOSSES if name in row)

    @property
    def broke(self) -> bool:
        """Whether the last loss of a kind that was logged is NaN or infinite; a single step may have been left out."""
        last = [[row[name] for row in self.log if name in row][-1:] for name in _LOSSES]
        return any(not math.isfinite(value) for values in last for value in values)

    @property
    def labels(self) -> dict[str, int] | None:
        """How often each label occurs among the rows that validate; None where that is not known."""
        found: dict[str, int] | None = self._splits().get("validation", {}).get("labels")
        return found

    @property
    def cuts(self) -> dict[str, Cut]:
        """What is cut off, by split."""
        tokens = {name: split.get("tokens") or {} for name, split in self._splits().items()}
        found = {name: said["cut"] for name, said in tokens.items() if isinstance(said.get("cut"), dict)}
        return {name: Cut(**{k: cut[k] for k in _CUT}) for name, cut in found.items() if not misfits(cut, _CUT)}

    def _splits(self) -> dict[str, dict[str, Any]]:
        splits = (self.data or {}).get("splits")
        if not isinstance(splits, dict):
            return {}
        return {n: s for n, s in splits.items() if isinstance(s, dict) and not misfits(s, _SPLIT)}


def tried(path: Path, name: str, read: Callable[[Path], Any], lacking: list[str]) -> Any:
    """Reads a part of a run's folder; what is missing or cannot be read is told, and stops nothing.

    Args:
        path: where it lies.
        name: as it is told.
        read: what reads it.
        lacking: a sentence is added to it where there is nothing.

    Returns:
        What was read, or None.
    """
    if not path.exists():
        lacking.append(f"{name} is not there")
        return None
    try:
        return read(path)
    except (ValueError, OSError) as error:
        lacking.append(str(error))
        return None


def why_failed(folder: Path) -> str | None:
    """The first line of why a run failed; None where nothing says it.

    Args:
        folder: the run's.
    """
    path = folder / ERROR
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        return shortened(file.readline(_LONGEST).strip(), 300) or None


def refuse_other_folders(folder: Path) -> None:
    """Refuses what is no run's folder.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: if it is none, with the runs that lie below it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; a run's has a {CONFIG} and {LOG} in it{nearest_path(folder)}")
    if any((folder / name).exists() for name in (CONFIG, LOG, METRICS, "checkpoints")):
        return
    below = sorted(path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/{CONFIG}"))
    hint = f"; runs below it: {', '.join(map(str, below[:_SHOWN]))}{and_more(len(below) - _SHOWN)}" if below else ""
    raise FileNotFoundError(f"{folder} is no run's folder: it has no {CONFIG}, {LOG} or checkpoints{hint}")


def read_config(path: Path) -> dict[str, Any]:
    """What a run was made with.

    Args:
        path: its ``config.yaml``.

    Raises:
        ValueError: if it is too long or no mapping.
    """
    import yaml

    if path.stat().st_size > _LONGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: it is no run's configuration")
    try:
        text = path.read_text(encoding="utf-8")
        # a few lines of references to references stand for gigabytes
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError(f"{path} has references (*name), which no run writes")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a mapping, but holds {an(type(found).__name__)}")
    return found


def found_rate(folder: Path) -> float | None:
    """The learning rate that a run searched for (``lr=auto``) and was made with; None where it has another.

    Args:
        folder: the run's folder.

    Raises:
        ValueError: if the search's file cannot be read.
    """
    path = folder / FOUND_RATE
    rate = read_json(path).get("lr") if path.is_file() else None
    used = read_config(folder / CONFIG).get("optimizer", {}).get("lr") if rate is not None else None
    return float(rate) if rate is not None and rate == used else None


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a run's log, those before an interruption first.

    A run that goes on keeps the log that it had as ``metrics.1.csv`` and so on; what that logged after the step from
    which the run went on is left out.

    Args:
        path: the ``metrics.csv``.

    Raises:
        ValueError: if it is no CSV.
    """
    earlier = sorted(path.parent.glob("metrics.*.csv"), key=lambda p: (len(p.name), p.name))
    rows: list[dict[str, float]] = []
    for file in (*earlier, path):
        found = _rows(file)
        begin = min((row["step"] for row in found if "step" in row), default=math.inf)
        rows = [row for row in rows if row.get("step", -1.0) < begin] + found
    return rows


def _rows(path: Path) -> list[dict[str, float]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_numbers(row) for row in csv.DictReader(file)]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV: {error}") from error


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, text in row.items():
        try:
            found[name] = float(text)
        except (TypeError, ValueError):  # an empty field, or a line that was cut short
            continue
    return found
