"""Gives every Hydra application the config groups of lightning_peft, behind its own."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningPeftSearchPath(SearchPathPlugin):
    """Appends ``pkg://lightning_peft.conf`` to the search path, so an application's own files win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the package."""
        search_path.append(provider="lightning_peft", path="pkg://lightning_peft.conf")
