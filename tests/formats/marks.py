"""What shows that a pickle was opened."""

from __future__ import annotations


class Marks:
    """What a pickle that is opened leaves behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
