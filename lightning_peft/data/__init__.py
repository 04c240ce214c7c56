"""Lightning DataModules and what they read, make ready and batch."""

from lightning_peft.data.image_module import ImageDataModule
from lightning_peft.data.module import TextDataModule

__all__ = ["ImageDataModule", "TextDataModule"]
