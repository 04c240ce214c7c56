"""Docstrings as the site's reader expects them: a section `Example:` with doctests is code, as `Examples:` is."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Gives the section the name under which griffe finds doctests."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Renames the section of each object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
