"""What commands have at hand when they are forked: imports, and the embedded data as read from its sources."""

import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import sklearn  # noqa: F401
import transformers  # noqa: F401

import lightning_peft.cli.commands  # noqa: F401
from lightning_peft.data.docstrings import classification_examples

classification_examples()
