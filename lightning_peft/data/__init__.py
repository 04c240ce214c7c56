"""Lightning DataModules and what they read, tokenize and batch."""

from lightning_peft.data.module import TextDataModule

__all__ = ["TextDataModule"]
