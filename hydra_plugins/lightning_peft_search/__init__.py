"""Lets Optuna choose what the runs of a sweep are made with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


class Search(Sweeper):
    """Hydra's side of a search; Hydra takes plugins from this package alone, so what it does lies elsewhere.

    Args:
        params: option to what is tried for it, in the words of Hydra's command line.
    """

    def __init__(self, params: DictConfig | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Makes what starts the runs."""
        from hydra.core.plugins import Plugins

        self.config, self.loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Makes the runs."""
        # Hydra imports all plugins for every application, and this needs torch
        from lightning_peft.cli.search import search

        words = [*(f"{option}={tried}" for option, tried in self.params.items()), *arguments]
        search(self.config, words, self.loader, self.launcher.launch)
