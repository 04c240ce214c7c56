"""Labels for images: metrics, heads, training, and what is saved."""

from __future__ import annotations

import json

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lightning_peft import ImageClassification, ImageDataModule, LoRA, PeftModule
from lightning_peft.formats.merged import save_merged


def _measured(task, logits, labels):
    metrics = task.metrics()
    for part, expected in zip(logits.split(37), labels.split(37), strict=True):
        task._target().update(metrics, part, expected)
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize("classes", [2, 5, 6, 12])
def test_metrics_are_those_of_scikit_learn_and_the_top_five_of_five_are_left_out(classes):
    from sklearn import metrics as sk

    torch.manual_seed(0)
    logits, labels = torch.randn(200, classes), torch.randint(classes, (200,))
    logits[torch.arange(200), labels] += 0.7
    found = _measured(ImageClassification([f"c{i}" for i in range(classes)]), logits, labels)
    said = logits.argmax(-1)
    expected = {
        "accuracy": sk.accuracy_score(labels, said),
        "f1_macro": sk.f1_score(labels, said, average="macro"),
    }
    if classes > 5:
        every = list(range(classes))
        expected["top5"] = sk.top_k_accuracy_score(labels, logits.softmax(-1), k=5, labels=every)
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_likeliest_five_are_counted_although_the_first_batch_is_all_right():
    labels = torch.arange(8)
    sure = torch.eye(8)
    second = sure + 2 * sure.roll(1, 1)  # the class is the second likeliest
    metrics = (task := ImageClassification([f"c{i}" for i in range(8)])).metrics()
    for logits in (sure, second):
        task._target().update(metrics, logits, labels)
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        {"accuracy": 0.5, "f1_macro": 0.5, "top5": 1.0}
    )


@pytest.mark.parametrize("classes", [3, 8])
def test_an_answer_has_the_likeliest_five_in_their_order(classes):
    logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
    names = [f"c{i}" for i in range(classes)]
    said = ImageClassification(names)._target().answers(logits)
    for row, answer in zip(logits.softmax(-1), said, strict=True):
        order = row.argsort(descending=True)[:5].tolist()
        assert list(answer["probabilities"]) == [names[i] for i in order]
        assert answer["label"] == names[order[0]]
        assert list(answer["probabilities"].values()) == pytest.approx(row[order].tolist())
        assert answer["score"] == pytest.approx(float(row.max()))


@pytest.mark.parametrize(("labels", "said"), [([], "labels is empty"), (["a", "b", "a"], "labels names 'a' twice")])
def test_names_without_meaning_are_refused(labels, said):
    with pytest.raises(ValueError, match=rf"ImageClassification.*{said}"):
        ImageClassification(labels)


def test_a_batch_is_what_the_models_own_image_processor_makes_of_the_images(vit_folder):
    processor = AutoImageProcessor.from_pretrained(vit_folder)
    images = [Image.new("RGB", size, "red") for size in ((30, 20), (8, 40))]
    task = ImageClassification(["cat", "dog"])
    features = task.encode([{"label": "dog"}, {"label": 0}], training=True)
    rows = [{"image": image, **feature} for image, feature in zip(images, features, strict=True)]
    batch = task.collate(rows, processor, training=True)
    assert batch["labels"].tolist() == [1, 0]
    torch.testing.assert_close(batch["pixel_values"], processor(images, return_tensors="pt")["pixel_values"])
    assert task.collate([{"image": images[0]}], processor, training=False).keys() == {"pixel_values"}


def test_a_base_whose_head_has_other_classes_gets_a_new_one_that_is_trained_and_saved(
    build, draw, trainer, tmp_path, vit_folder
):
    folder = tmp_path / "with_a_head"
    build("vit").save_pretrained(folder)
    AutoImageProcessor.from_pretrained(vit_folder).save_pretrained(folder)
    data = ImageDataModule(str(draw(colours=("red", "blue"), each=4)), batch_size=4)
    module = PeftModule(str(folder), LoRA(r=2), "image_classification")
    trainer(max_epochs=1).fit(module, data)
    assert module.model.classifier.out_features == 2
    assert module.adapter.tree.record.copies == ["classifier"]
    module.save_adapter(tmp_path / "adapter")
    again = PeftModule.from_adapter(tmp_path / "adapter")
    assert trainer().predict(again, data) == trainer().predict(module, data)


def test_a_folder_without_an_image_processor_says_so(draw, trainer, tmp_path, build):
    build("vit").save_pretrained(tmp_path / "bare")
    module = PeftModule(str(tmp_path / "bare"), LoRA(r=2), "image_classification")
    with pytest.raises(FileNotFoundError, match=r"has no image processor \(preprocessor_config.json\)"):
        trainer().fit(module, ImageDataModule(str(draw())))


def test_a_model_without_a_head_for_images_is_refused(bert_folder, trainer, draw, vit_folder):
    model = {"name_or_path": str(bert_folder), "tokenizer": str(vit_folder)}
    module = PeftModule(model, LoRA(r=2), "image_classification")
    with pytest.raises(ValueError, match="no AutoModelForImageClassification; the task needs one that has, such as"):
        trainer().fit(module, ImageDataModule(str(draw())))


def _shapes(folder, each):
    """Bright discs, squares and crosses on dark grounds, each at its place."""
    generator = np.random.default_rng(0)
    for shape in ("cross", "disc", "square"):
        (folder / shape).mkdir(parents=True)
        for i in range(each):
            image = Image.new("RGB", (24, 24), tuple(generator.integers(60, size=3).tolist()))
            x, y, r = *generator.integers(2, 8, size=2).tolist(), int(generator.integers(11, 15))
            fill, pen = tuple(generator.integers(150, 256, size=3).tolist()), ImageDraw.Draw(image)
            if shape == "disc":
                pen.ellipse((x, y, x + r, y + r), fill=fill)
            elif shape == "square":
                pen.rectangle((x, y, x + r, y + r), fill=fill)
            else:
                pen.line((x, y, x + r, y + r), fill=fill, width=3)
                pen.line((x + r, y, x, y + r), fill=fill, width=3)
            image.save(folder / shape / f"{i}.png")
    return folder


@pytest.mark.slow
def test_shapes_are_learnt_and_what_is_saved_says_the_same(vit_folder, trainer, tmp_path):
    L.seed_everything(0, verbose=False)
    data = ImageDataModule(str(_shapes(tmp_path / "shapes", 100)), batch_size=16)
    module = PeftModule(str(vit_folder), LoRA(r=8), "image_classification", {"lr": 1e-2})
    t = trainer(max_epochs=12)
    t.fit(module, data)
    held_out = [row["label"] for row in data.rows("validation")]
    most = max(held_out.count(label) for label in set(held_out)) / len(held_out)
    reached = float(t.callback_metrics["val/accuracy"])
    assert reached > most + 0.25, "what the commonest would reach"

    said = [row for batch in t.predict(module, data) for row in batch]
    assert all(row.keys() == {"label", "score", "probabilities"} for row in said)
    right = np.mean([row["label"] == label for row, label in zip(said, held_out, strict=True)])
    assert right == pytest.approx(reached)
    t.save_checkpoint(tmp_path / "a.ckpt")
    module.save_adapter(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] is None
    for again in (
        PeftModule.from_adapter(tmp_path / "adapter"),
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True),
    ):
        assert again.task.to_config() == {"name": "image_classification", "labels": ["cross", "disc", "square"]}
        assert trainer().predict(again, data) == t.predict(module, data)
    save_merged(module.model.eval(), "default", tmp_path / "merged", module.processing_class)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged")
    image = Image.open(data.rows("predict")[0]["image"])
    with torch.no_grad():
        shares = merged(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert merged.config.id2label[int(shares.argmax())] == said[0]["label"]
    assert float(shares.max()) == pytest.approx(said[0]["score"], abs=1e-5)
