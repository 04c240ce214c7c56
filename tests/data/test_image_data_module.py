"""From images where they lie to batches: sources, kinds of images, those that do not open, augmentation, resuming."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from lightning_peft import ImageClassification, ImageDataModule, LoRA, PeftModule, TextClassification, TextDataModule
from lightning_peft.data.images import as_rgb
from lightning_peft.data.summary import summarise


@pytest.fixture(scope="session", autouse=True)
def _own_tables(tmp_path_factory):
    """What `datasets` keeps of image folders lies in a folder of the test run."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("tables"))
        yield


@pytest.fixture
def module(vit_folder):
    def make(source=None, stage="fit", task=None, **options):
        data = ImageDataModule(None if source is None else str(source), **{"batch_size": 4, **options})
        data.connect(task or ImageClassification(), AutoImageProcessor.from_pretrained(vit_folder))
        data.setup(stage)
        return data

    return make


def _labelled(data, split="train"):
    return sorted((Path(row["image"]).name, row["label"]) for row in data.rows(split))


def test_an_image_folder_has_its_classes_and_perhaps_its_splits(draw, module, tmp_path):
    data = module(draw(each=5), validation_fraction=0.2)
    assert data.task.labels == ["blue", "green", "red"]
    assert (len(data.rows("train")), len(data.rows("validation"))) == (12, 3)
    for name, each in (("train", 4), ("val", 2), ("test", 1)):
        draw(f"parts/{name}", each=each)
    data = module(tmp_path / "parts")
    data.setup("test")
    assert [len(data.rows(s)) for s in ("train", "validation", "test")] == [12, 6, 3]
    assert _labelled(data, "test") == [("0.png", "blue"), ("0.png", "green"), ("0.png", "red")]


@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning", "ignore:Exception ignored in.*metadata")
def test_a_file_beside_the_images_may_name_their_classes(draw, module, tmp_path):
    for colour in ("red", "blue"):
        for path in draw("drawn", (colour,), each=3).rglob(f"{colour}/*.png"):
            (tmp_path / "flat").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "flat" / f"{colour}{path.name}")
    names = sorted(path.name for path in (tmp_path / "flat").iterdir())
    lines = [f"{name},{'warm' if name.startswith('r') else 'cold'}\n" for name in names]
    (tmp_path / "flat" / "metadata.csv").write_text("file_name,feeling\n" + "".join(lines))
    data = module(tmp_path / "flat", columns={"label": "feeling"}, validation_fraction=0.3)
    assert sorted(data.task.labels) == ["cold", "warm"]
    assert len(data.rows("train")) + len(data.rows("validation")) == 6


def _written(folder, kind, tmp_path):
    """The images of a folder as files of a kind, with their bytes or their paths."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = sorted(folder.rglob("*.png"))
    paths = [str(path.relative_to(tmp_path)) for path in images]
    labels = [path.parent.name for path in images]
    file = tmp_path / f"rows.{kind.partition(' ')[0]}"
    rows = [{"image": path, "label": label} for path, label in zip(paths, labels, strict=True)]
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        file.write_text("image,label\n" + "".join(f"{p},{label}\n" for p, label in zip(paths, labels, strict=True)))
    elif kind == "parquet":
        pq.write_table(pa.table({"image": [path.read_bytes() for path in images], "label": labels}), file)
    elif kind == "parquet of paths":
        pq.write_table(pa.table({"image": paths, "label": labels}), file)
    else:
        found = datasets.Dataset.from_dict({"image": [str(path) for path in images], "label": labels})
        found = found.cast_column("image", datasets.Image()).class_encode_column("label")
        if kind == "saved":
            found.save_to_disk(tmp_path / "saved")
            return {"source": tmp_path / "saved"}
        found.to_parquet(file)
    return {"train_files": file}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "parquet of paths", "parquet by datasets", "saved"])
def test_every_kind_of_file_gives_the_same_batches_as_the_folder(kind, draw, module, tmp_path):
    folder = draw(each=4)
    other = _written(folder, kind, tmp_path)
    if kind in ("parquet", "saved"):  # the bytes lie within
        folder = folder.rename(tmp_path / "kept")
    first, second = module(folder, seed=3), module(**other, seed=3)
    for name in ("train", "validation"):
        one, two = (
            sorted((row["labels"], row["image"].tobytes()) for row in data.features(name)) for data in (first, second)
        )
        assert one == two
    assert first.task.labels == second.task.labels == ["blue", "green", "red"]
    assert all(isinstance(row["image"], str) for row in second.rows("train"))


def test_images_are_held_by_where_they_lie(draw, module, tmp_path, monkeypatch):
    from lightning_peft.data import images

    data = module(**_written(draw(each=4), "parquet", tmp_path))
    opened = []
    monkeypatch.setattr(images, "as_rgb", lambda content: opened.append(len(content)) or as_rgb(content))
    loader = data.train_dataloader()
    assert not opened
    next(iter(loader))
    assert len(opened) == 4
    assert not any(isinstance(v, bytes) for image in data.features("train").images for v in vars(image).values())


def test_single_images_and_folders_of_them_can_be_predicted_without_labels(draw, module, tmp_path):
    folder = draw(each=2) / "red"
    for given in (folder, f"{folder}/*.png", [folder / "0.png", folder / "1.png"]):
        data = module(stage="predict", predict_files=given, task=ImageClassification(["red", "blue"]))
        assert [Path(row["image"]).name for row in data.rows("predict")] == ["0.png", "1.png"]
        assert next(iter(data.predict_dataloader()))["pixel_values"].shape == (2, 3, 12, 12)


def _bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _with_palette(transparency):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    return _bytes(image, transparency=transparency)


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (_bytes(Image.new("L", (4, 4), 90)), (90, 90, 90)),
        (_bytes(Image.new("LA", (4, 4), (90, 5))), (90, 90, 90)),
        (_bytes(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (_bytes(Image.new("RGBA", (4, 4), (10, 20, 30, 0))), (10, 20, 30)),
        (_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        (_with_palette(0), (200, 0, 0)),
        (_with_palette(b"\x00\xff"), (200, 0, 0)),
        (_bytes(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))), (156, 156, 156)),
        (_bytes(Image.new("RGB", (4, 4), "blue"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4))]),
         (0, 0, 255)),
    ],
    ids=["grey", "grey with transparency", "bits", "transparency", "print", "palette", "palette with transparency",
         "sixteen bits", "moving"],
)  # fmt: skip
def test_an_image_of_every_kind_comes_in_red_green_and_blue(content, colour):
    image = as_rgb(content)
    assert image.mode == "RGB"
    assert np.abs(np.array(image.getpixel((0, 0))) - colour).max() <= 3


def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path, draw, module):
    whole = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    exif = whole.getexif()
    exif[0x0112] = 6
    content = _bytes(whole, "JPEG", exif=exif, quality=95)
    turned = as_rgb(content)
    assert turned.size == (20, 30)
    plain = Image.open(io.BytesIO(_bytes(whole, "JPEG", quality=95)))
    assert np.array_equal(np.array(turned), np.array(plain.rotate(-90, expand=True)))
    assert np.array_equal(np.array(turned), np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))))


def _damaged(folder):
    """Five images that cannot be opened, each for another reason."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3)).astype(np.uint8))
    (folder / "red" / "cut.jpg").write_bytes(_bytes(noise, "JPEG")[:-200])
    (folder / "red" / "cut.png").write_bytes(_bytes(noise)[:2000])
    (folder / "red" / "empty.png").write_bytes(b"")
    (folder / "blue" / "text.png").write_bytes(b"no image at all")


def test_images_that_do_not_open_are_named_before_training_or_left_out(draw, module):
    folder = draw(each=6)
    _damaged(folder)
    with pytest.raises(ValueError, match=r"(?s)4 of \d+ rows cannot be used\n.*on_error=skip") as said:
        module(train_files=folder, validation_files=folder)
    lines = str(said.value)
    assert "text.png cannot be opened: its content is none of an image that Pillow knows" in lines
    for name in (
        "cut.jpg cannot be opened: image file is truncated",
        "cut.png",
        "empty.png cannot be opened: it is em",
    ):
        assert name in lines
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = module(train_files=folder, validation_files=folder, on_error="skip")
    assert sum("4 of 22 rows cannot be used" in str(w.message) for w in told) == 2
    assert sum(len(b["labels"]) for b in data.train_dataloader()) == len(data.rows("train")) == 18


def test_a_row_is_named_with_the_image_that_it_lacks(draw, module, tmp_path):
    draw(each=2)
    rows = [{"image": f"images/{c}/{i}.png", "label": c} for c in ("red", "blue") for i in (0, 1)]
    rows += [{"image": "images/red/9.png", "label": "red"}, {"image": 3, "label": "red"}, {"label": "red"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    options = {"train_files": tmp_path / "rows.jsonl", "validation_files": tmp_path / "rows.jsonl"}
    said = r"line 5 names the image '.*images/red/9\.png', which cannot be opened: there is no such file"
    with pytest.raises(ValueError, match=rf"(?s){said}\n.*line 6 has an int as its image; expected a path"):
        module(**options)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:4], rows[6]]))
    with pytest.raises(ValueError, match=r"line 5 has no column 'image'.*data\.columns\.image"):
        module(**options)


def test_a_label_that_training_lacks_and_an_empty_folder_are_said(draw, module, tmp_path):
    train, held_out = draw("train", ("red", "blue")), draw("held_out", ("red", "green"), each=2)
    with pytest.raises(
        ValueError, match=r"(?s)2 of 4 rows .*green/0\.png has the label 'green', which training does not"
    ):
        module(train_files=train, validation_files=held_out)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no image; expected a subfolder with images for each class"):
        module(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no file that can be read"):
        module(train_files=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"red/0\.png has no column 'label'"):  # one class says nothing
        module(draw("one", ("red",)))


def test_equal_images_stay_on_one_side_whatever_their_files_are_called(draw, module, tmp_path):
    folder = draw(each=4)
    for path in list(folder.rglob("*.png")):
        shutil.copy(path, path.with_name(f"again_{path.name}"))
    data = module(folder, validation_fraction=0.3)
    train, validation = ({e.row["image"].digest for e in data.examples(s)} for s in ("train", "validation"))
    assert not train & validation
    assert len(train) + len(validation) == 12
    again, other = (
        module(folder, validation_fraction=0.3, seed=5),
        module(folder, validation_fraction=0.3, split_seed=5),
    )
    assert _labelled(again) == _labelled(data)
    assert {r["image"] for r in other.rows("train")} != {r["image"] for r in data.rows("train")}


def _jittered(image):
    """Draws from all three random states."""
    array = np.asarray(image).astype(np.int64)
    noise = int(torch.randint(20, (1,))) + random.randrange(20) + np.random.randint(20)
    return Image.fromarray((array + noise).clip(0, 255).astype(np.uint8))


def test_an_augmentation_depends_on_seed_epoch_and_image_alone_and_only_training_gets_it(draw, module):
    folder = draw(each=4)

    def batches(epoch=0, **options):
        data = module(folder, transform=_jittered, **options)
        loader = data.train_dataloader()
        loader.batch_sampler.sampler.set_epoch(epoch)
        return [b["pixel_values"] for b in loader], data

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, data = batches()
    assert torch.equal(torch.get_rng_state(), before)
    for options in ({}, {"num_workers": 2}):
        again, _ = batches(**options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for options in ({"epoch": 1}, {"seed": 1}):
        other, _ = batches(**options)
        assert not torch.equal(torch.cat(first).sort(0).values, torch.cat(other).sort(0).values)
    plain = module(folder)
    for one, two in zip(data.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_run_that_is_resumed_within_an_epoch_sees_what_it_would_have_seen(draw, vit_folder, trainer, tmp_path):
    folder = draw(each=8)

    def run(path=None, workers=0, steps=-1):
        seen = []

        class Seen(L.Callback):
            def on_train_batch_start(self, trainer, module, batch, index):
                seen.append(batch["pixel_values"].sum().item())

        L.seed_everything(0, verbose=False)
        module = PeftModule(str(vit_folder), LoRA(r=2), "image_classification", scheduler={"name": "constant"})
        data = ImageDataModule(str(folder), batch_size=4, transform=_jittered, num_workers=workers)
        keep = L.pytorch.callbacks.ModelCheckpoint(
            tmp_path / f"kept{steps}", "{step}", every_n_train_steps=3, save_top_k=-1
        )
        callbacks = [Seen()] if path else [Seen(), keep]
        length = {"max_epochs": 2} if steps < 0 else {"max_epochs": -1, "max_steps": steps}
        t = trainer(*callbacks, **length, limit_val_batches=0, enable_checkpointing=not path)
        t.fit(module, data, ckpt_path=path, weights_only=True if path else None)
        t.save_checkpoint(tmp_path / "last.ckpt")
        return seen

    whole = run()  # five batches an epoch
    assert len(whole) == 10
    for step, workers in ((3, 0), (3, 1), (6, 0)):
        assert run(tmp_path / "kept-1" / f"step={step}.ckpt", workers) == whole[step:]
    run(steps=7)  # ended within an epoch, not only saved there
    assert run(tmp_path / "last.ckpt", workers=1, steps=10) == whole[7:]


@pytest.mark.parametrize(("limit", "left"), [(0.25, 6), (5, 5), (400, 24)])
def test_a_number_or_a_share_of_the_images(draw, module, limit, left):
    folder = draw()
    assert len(module(train_files=folder, validation_files=folder, limit=limit).rows("train")) == left


def test_data_and_task_of_different_kinds_are_told_apart_before_anything_is_loaded(vit_folder, bert_folder, trainer):
    images = PeftModule(str(vit_folder), LoRA(r=2), "image_classification")
    with pytest.raises(ValueError, match=r"image_classification takes those of an AutoImageProcessor: give it Image"):
        trainer().fit(images, TextDataModule())
    texts = PeftModule(str(bert_folder), LoRA(r=2))
    with pytest.raises(ValueError, match=r"text_classification takes those of an AutoTokenizer: give it TextDataMod"):
        trainer().fit(texts, ImageDataModule("anything"))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, ValueError, "ImageDataModule: give a source or train_files"),
        ({"source": "x", "batch_size": 0}, ValueError, "batch_size must be 1 or more, but got 0"),
        ({"source": "x", "on_error": "ignore"}, ValueError, "on_error must be raise or skip, but got 'ignore'"),
        ({"source": "x", "transform": "flip"}, TypeError, "transform must take an image and give one.*got 'flip'"),
    ],
)
def test_options_out_of_their_range_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        ImageDataModule(**options)


def test_classes_of_datasets_come_by_their_names_for_texts_too(tmp_path, tokenizer_folder):
    import datasets
    from transformers import AutoTokenizer

    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"]),
         "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"]))}
    )  # fmt: skip
    rows = [{"text": f"red {i}", "label": i % 2, "tags": [0, 1]} for i in range(10)]
    datasets.Dataset.from_list(rows, features=kinds).save_to_disk(tmp_path / "saved")
    data = TextDataModule(str(tmp_path / "saved"), cache_dir=tmp_path / "kept")
    data.connect(TextClassification(), AutoTokenizer.from_pretrained(tokenizer_folder))
    data.setup("fit")
    assert data.task.labels == ["neg", "pos"]
    from lightning_peft.data.sources import from_dataset

    first = next(from_dataset(str(tmp_path / "saved"), "train"))
    assert first.row == {"text": "red 0", "label": "neg", "tags": ["O", "B-X"]}


def test_before_training_sizes_labels_and_leaks_are_counted_and_a_few_images_shown(draw, module, tmp_path):
    train, held_out = draw("train", ("red", "blue"), each=4), draw("held_out", ("red", "blue"), each=1)
    shutil.copy(train / "red" / "3.png", train / "red" / "again.png")
    data = module(train_files=train, validation_files=held_out)
    found = summarise(data, examples=2)
    counted, validation = found.splits["train"], found.splits["validation"]
    assert (counted.examples, counted.rows, counted.labels) == (9, 9, {"red": 5, "blue": 4})
    assert (counted.duplicates, validation.in_training, counted.tokens) == (1, 2, None)
    width, height = counted.spreads["width"], counted.spreads["height"]
    assert (width.smallest, width.median, width.largest, width.unit) == (16, 18, 19, "pixels")
    assert (height.smallest, height.largest) == (12, 12)
    assert found.seen_as == "as 12 x 12 pixels"
    assert "validation: 100.0% of its rows are trained on too, so its metrics flatter the model." in found.notes
    assert len(found.examples) == 2
    for shown in found.examples:
        label = Path(shown.place).parent.name
        assert shown.targets == {"label": label}
        picture = Image.open(io.BytesIO(base64.b64decode(shown.image.png)))
        assert picture.size == (224, 224)
        scaled = Image.open(shown.place).convert("RGB").resize((12, 12), Image.Resampling.BILINEAR)
        expected = np.array(scaled.resize((224, 224), Image.Resampling.NEAREST)).astype(int)
        assert np.abs(np.array(picture).astype(int) - expected).max() <= 1
    json.dumps(found.to_dict())


def test_the_yaml_holds_every_option_with_its_default():
    from inspect import signature

    import yaml

    options = yaml.safe_load((Path(__file__).parents[2] / "conf" / "data" / "images.yaml").read_text())
    assert options.pop("_target_") == "lightning_peft.ImageDataModule"
    defaults = {name: p.default for name, p in signature(ImageDataModule).parameters.items()}
    assert list(options) == list(defaults), "in the same order"
    assert options == {**defaults, "columns": {}, "seed": "${seed}"}
