"""What is seen of images that are to be trained on: their sizes, and a few of them as the model sees them."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_peft.analysis.data_summary import Shown, ShownImage, Spread
from lightning_peft.data.files import Example
from lightning_peft.data.image_module import IMAGE, ImageDataModule
from lightning_peft.data.views import Look, View

_SHOWN = 224  # pixels of the longer side on the page


def look_at_images(data: ImageDataModule) -> Look:
    """What is seen of images.

    Args:
        data: the data, set up.
    """
    processor = data.processing_class
    splits = [s for s in ("train", "validation", "test") if s in data.splits]
    rows = {s: data.train_rows if s == "train" else data.features(s) for s in splits}
    height, width = _pixels(processor, rows[splits[0]][0][IMAGE]).shape[:2]
    return Look(
        seen_as=f"as {width} x {height} pixels",
        made_by=type(processor).__name__ + (" after data.transform in training" if data.transform is not None else ""),
        views={split: _view(data, data.examples(split), rows[split], split) for split in splits},
        notes=[],
    )


def _view(data: ImageDataModule, examples: Sequence[Example], rows: Any, split: str) -> View:
    columns = sorted({c for shape in data.task.columns for c in shape.targets})
    labels = Counter(str(example.row[c]) for example in examples if example.row for c in columns)
    seen = [image.seen for image in rows.images]

    def show(number: int) -> Shown:
        example = examples[number]
        pixels = _pixels(data.processing_class, rows[number][IMAGE])
        return Shown(
            split=split,
            place=example.place,
            targets={c: str((example.row or {})[c]) for c in columns},
            image=ShownImage(seen[number].width, seen[number].height, _png(pixels)),
        )

    return View(
        examples=examples,
        count=len(examples),
        spreads={
            "width": Spread.of([s.width for s in seen], "pixels"),
            "height": Spread.of([s.height for s in seen], "pixels"),
        },
        labels=dict(labels.most_common()),
        show=show,
    )


def _pixels(processor: Any, image: Any) -> Any:
    """What a model is given of an image, in colours again: ``(height, width, 3)``; else the image as it comes."""
    values = np.asarray(processor([image], return_tensors="pt").get("pixel_values", [0])[0], dtype=np.float32)
    if values.ndim != 3 or len(values) != 3:  # patches, or numbers of colours
        return np.asarray(image)
    if getattr(processor, "do_normalize", False):
        deviation, mean = (np.reshape(numbers, (-1, 1, 1)) for numbers in (processor.image_std, processor.image_mean))
        values = values * deviation + mean
    if getattr(processor, "do_rescale", False):
        values = values / processor.rescale_factor
    return values.transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8)


def _png(pixels: Any) -> str:
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    scale = _SHOWN / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # small ones are enlarged pixel by pixel: what the model has to go by is to be seen
    image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR).save(
        file, "PNG"
    )
    return base64.b64encode(file.getvalue()).decode()
