"""What the runs of a sweep came to, whichever processes they ran in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from hydra.core.singleton import Singleton
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from typing_extensions import override

from lightning_peft.formats.writing import write_json


@dataclass(frozen=True)
class Outcome:
    """What a run of a sweep came to.

    Attributes:
        run: its number.
        chosen: the words that the sweep chose for it.
        failed: why it failed, in a line; None where it did not.
        folder: the run's; empty where it failed.
        monitor: the metric by which its best checkpoint was chosen; None where nothing is trained.
        score: that metric's best value; None where there is none.
    """

    run: int
    chosen: str
    failed: str | None = None
    folder: str = ""
    monitor: str | None = None
    score: float | None = None

    @property
    def name(self) -> str:
        """The run as messages call it."""
        return f"run {self.run} ({self.chosen})" if self.chosen else f"run {self.run}"


class Sweep(Callback, metaclass=Singleton):  # type: ignore[misc, metaclass]  # Hydra has no types here
    """Where the runs of a sweep leave what they came to; Hydra makes it, and its launchers send it along to each run.

    Each run has a file of its own: several machines that append to one may lose lines on a network's file system
    (``O_APPEND`` in open(2)).

    Attributes:
        folder: of these files; None where nothing is swept.
    """

    folder: Path | None = None

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Names a folder for this sweep alone, as other sweeps may write into the same ``hydra.sweep.dir``."""
        self.folder = Path(config.hydra.sweep.dir).absolute() / ".runs" / uuid4().hex

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A run by itself is none of a sweep's that this process made before."""
        self.folder = None

    def note(self, outcome: Outcome) -> None:
        """Keeps what a run came to.

        Args:
            outcome: of one run, which is known by its number.
        """
        assert self.folder is not None
        write_json(self.folder / f"{outcome.run}.json", asdict(outcome))

    def outcomes(self) -> list[Outcome]:
        """What the runs came to that have ended, in their order."""
        files = self.folder.glob("*.json") if self.folder is not None else ()
        return sorted((Outcome(**json.loads(f.read_text(encoding="utf-8"))) for f in files), key=lambda o: o.run)
