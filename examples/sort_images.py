"""Sorting images: discs, squares and crosses, drawn into a folder, with a small vision transformer.

python examples/sort_images.py --epochs 10

The transformer is an untrained one of three layers; ``--model google/vit-base-patch16-224-in21k`` takes a trained one.
"""

import argparse
import random
import tempfile
from pathlib import Path

import lightning as L
from PIL import Image, ImageDraw, ImageOps
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from lightning_peft import ImageDataModule, LoRA, PeftModule


def draw(shape: str, chance: random.Random) -> Image.Image:
    """A bright shape somewhere on a dark ground."""
    image = Image.new("RGB", (32, 32), tuple(chance.randrange(80) for _ in range(3)))
    pen, colour = ImageDraw.Draw(image), tuple(chance.randrange(150, 256) for _ in range(3))
    x, y, size = chance.randrange(2, 12), chance.randrange(2, 12), chance.randrange(14, 18)
    if shape == "disc":
        pen.ellipse((x, y, x + size, y + size), fill=colour)
    elif shape == "square":
        pen.rectangle((x, y, x + size, y + size), fill=colour)
    else:
        pen.line((x, y, x + size, y + size), fill=colour, width=4)
        pen.line((x + size, y, x, y + size), fill=colour, width=4)
    return image


def small_transformer(folder: Path) -> str:
    """An untrained vision transformer with its image processor, as one would be downloaded."""
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def turned(image: Image.Image) -> Image.Image:
    """Another view of a training image, the same in each run; a transform of torchvision does as well."""
    return ImageOps.mirror(image).rotate(random.choice((0, 90, 180, 270)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=60, help="of each shape")
    parser.add_argument("--model", help="a folder or a hub name")
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    folder, chance = Path(tempfile.mkdtemp()), random.Random(0)
    for shape in ("disc", "square", "cross"):
        (folder / "shapes" / shape).mkdir(parents=True)
        for number in range(options.images):
            draw(shape, chance).save(folder / "shapes" / shape / f"{number}.png")

    base = options.model or small_transformer(folder / "base")
    module = PeftModule(base, LoRA(r=8), "image_classification", {"lr": 5e-3})
    data = ImageDataModule(str(folder / "shapes"), transform=turned, batch_size=16)
    trainer = L.Trainer(max_epochs=options.epochs, accelerator="cpu", logger=False, default_root_dir=folder)
    trainer.fit(module, data)
    print(f"held-out accuracy {float(trainer.callback_metrics['val/accuracy']):.3f}")

    again = PeftModule.from_adapter(module.save_adapter("adapter"))
    new = ImageDataModule(predict_files=f"{folder}/shapes/disc/*.png")
    print(f"loaded from adapter/, it takes the first disc for a {trainer.predict(again, new)[0][0]['label']}")


if __name__ == "__main__":
    main()
