"""Labels for texts and pairs of texts: one, several, and numbers."""

from __future__ import annotations

import json
import math
import shutil

import lightning as L
import numpy as np
import pytest
import torch
from transformers import BertModel

from lightning_peft import LoRA, PeftModule, TextClassification, TextDataModule
from lightning_peft.tasks import task_from_config

MULTI, REGRESSION = "multi_label_classification", "regression"
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def write(tmp_path):
    """Writes rows as a file of JSON lines."""

    def make(rows, name="rows"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(path)

    return make


def _learnt(labels, /, **options):
    task = TextClassification(**options)
    task.learn_from([{"text": "a", "label": label} for label in labels])
    return task


def _numbers(task, labels, tokenizer):
    rows = [{"text": "a", "label": label} for label in labels]
    return [f["labels"] for f in task.encode(rows, tokenizer, 8, training=True)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["no", "yes", "maybe"], ["maybe", "no", "yes"]),
        ([10, 9, 0], ["0", "9", "10"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_labels_are_names_or_numbers_and_are_learnt_in_their_order(labels, names, tokenizer):
    task = _learnt(labels)
    assert task.labels == names
    assert task.model_kwargs()["id2label"] == dict(enumerate(names))
    assert sorted(_numbers(task, labels, tokenizer)) == list(range(len(names)))


def test_rows_may_hold_the_numbers_of_names_that_were_given_but_not_of_names_that_were_learnt(tokenizer):
    given = TextClassification(labels=["negative", "positive"])
    assert _numbers(given, [1, "0", "positive"], tokenizer) == [1, 0, 1]
    with pytest.raises(ValueError, match="has the label '2', which training does not know; known: negative, positive"):
        _numbers(given, [2], tokenizer)
    with pytest.raises(ValueError, match="has the label '1', which training does not know"):
        _numbers(_learnt(["negative", "positive"]), [1], tokenizer)
    with pytest.raises(ValueError, match="has the label '0', which training does not know"):
        _numbers(TextClassification(labels=[1, 2, 3]), [0], tokenizer)


def test_several_labels_are_a_list_that_may_be_empty(tokenizer):
    task = _learnt([["red", "blue"], [], ["green"]], problem_type=MULTI)
    assert task.labels == ["blue", "green", "red"]
    rows = [{"text": "a", "label": label} for label in (["red", "blue"], [])]
    batch = task.collate(task.encode(rows, tokenizer, 8, training=True), tokenizer, training=True)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(("label", "count"), [(0.5, 1), ("2.5", 1), ([1, 2.5], 2)])
def test_a_regression_takes_one_number_or_as_many_in_every_row(label, count, tokenizer):
    task = _learnt([label] * 3, problem_type=REGRESSION)
    assert task.num_labels == count
    features = task.encode([{"text": "a", "label": label}], tokenizer, 8, training=True)
    assert task.collate(features, tokenizer, training=True)["labels"].shape == (1, count)


def test_a_pair_of_texts_is_read_as_one_row_with_two_types(tokenizer):
    rows = [{"text": "red green", "text_pair": "blue"}, {"text": "red"}]
    task = TextClassification(labels=["a", "b"])
    batch = task.collate(task.encode(rows, tokenizer, 8, training=False), tokenizer, training=False)
    expected = tokenizer([("red green", "blue")])
    assert batch["input_ids"][0].tolist() == expected["input_ids"][0]
    assert batch["token_type_ids"].tolist() == [expected["token_type_ids"][0], [0] * 6]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    cut = task.encode([{"text": "red " * 20, "text_pair": "blue green"}], tokenizer, 10, training=False)[0]
    assert tokenizer.decode(cut["input_ids"]).count("red") == 5, "of the longer text"
    alone = task.collate(task.encode(rows[1:], tokenizer, 8, training=False), tokenizer, training=False)
    assert "token_type_ids" not in alone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"problem_type": "multi_label"}, "problem_type 'multi_label' is unknown; did you mean 'multi_label_class"),
        ({"problem_type": REGRESSION, "labels": ["a"]}, "labels names classes, and a regression has none"),
        ({"num_labels": 3}, "num_labels counts the numbers of a regression; how many classes there are, labels says"),
        ({"problem_type": REGRESSION, "num_labels": 0}, "num_labels must be 1 or more, but got 0"),
        ({"labels": []}, "labels is empty"),
        ({"labels": ["a", "b", "a"]}, "labels names 'a' twice"),
    ],
)
def test_options_without_meaning_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        TextClassification(**options)


@pytest.mark.parametrize(
    ("options", "labels", "said"),
    [
        ({}, ["yes", "yes"], r"needs two labels or more, but the training data has only \['yes'\]"),
        ({}, [["yes"], ["no"]], r"the first has the label \['yes'\], but one name or whole number is expected"),
        ({}, [0.5, 0.7], "the first has the label 0.5, but one name or whole number is expected"),
        ({"problem_type": MULTI}, ["red,blue"], "the label 'red,blue', but several labels are a list such as"),
        ({"problem_type": MULTI}, [[], []], "the labels of all training rows are empty lists"),
        (
            {"problem_type": REGRESSION},
            ["good"],
            "the label 'good', but a finite number, or a list of them",
        ),
    ],
)
def test_training_rows_of_another_kind_are_refused(options, labels, said):
    with pytest.raises(ValueError, match=said):
        _learnt(labels, **options)


@pytest.mark.parametrize(
    ("options", "good", "bad", "said"),
    [
        ({}, ["yes", "no"], "yess", "line 3 has the label 'yess', which training does not know; did you mean 'yes'"),
        ({}, ["yes", "no"], "", "line 3 has an empty label"),
        ({"problem_type": MULTI}, [["a"], ["b"]], "a,b", "line 3 has the label 'a,b', but several labels are a list"),
        ({"problem_type": MULTI}, [["a"], ["b"]], ["c"], "line 3 has the label 'c', which training does not know"),
        ({"problem_type": MULTI}, [[0], [1, 2]], [0, 1, 1], "line 3 names a class twice in its label"),
        ({"problem_type": REGRESSION}, [0, 1], "high", "line 3 has the label 'high', but a finite number"),
        ({"problem_type": REGRESSION}, [0, 1], True, "line 3 has the label True, but a finite number"),
        ({"problem_type": REGRESSION}, [0, 1], "nan", "line 3 has the label 'nan', but a finite number"),
        ({"problem_type": REGRESSION}, [0, 1], [], "line 3 has an empty list as its label"),
        ({"problem_type": REGRESSION}, [0, 1], [1, 2], "line 3 has 2 numbers as its label, but 1 are expected"),
    ],
)
def test_a_row_of_another_kind_is_named_with_its_place(options, good, bad, said, write, tokenizer, tmp_path):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(good)]
    files = {"train_files": write(rows), "validation_files": write([*rows, {"text": "x", "label": bad}], "held_out")}
    data = TextDataModule(**files, cache_dir=tmp_path / "kept")
    data.connect(TextClassification(**options), tokenizer)
    with pytest.raises(ValueError, match=said):
        data.setup("fit")


@pytest.mark.parametrize("options", [{}, {"problem_type": MULTI}])
def test_labels_that_were_given_and_no_row_has_are_told(options):
    labels = [["red"], ["blue"]] if options else ["red", "blue"]
    with pytest.warns(UserWarning, match="no training row has the label 'green', of the 3 that were given"):
        _learnt(labels, labels=["blue", "green", "red"], **options)


def _measured(task, logits, labels):
    metrics = task.metrics()
    for part, expected in zip(logits.split(37), labels.split(37), strict=True):
        task._target().update(metrics, part, expected)
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_of_single_labels_are_those_of_scikit_learn(classes):
    from sklearn import metrics as sk

    torch.manual_seed(0)
    logits, labels = torch.randn(200, classes), torch.randint(classes, (200,))
    logits[torch.arange(200), labels] += 0.7
    found = _measured(TextClassification(labels=[f"c{i}" for i in range(classes)]), logits, labels)
    said, shares = logits.argmax(-1), logits.softmax(-1)
    auroc = (
        sk.roc_auc_score(labels, shares[:, 1]) if classes == 2 else sk.roc_auc_score(labels, shares, multi_class="ovr")
    )
    assert found == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, said),
            "f1_macro": sk.f1_score(labels, said, average="macro"),
            "mcc": sk.matthews_corrcoef(labels, said),
            "auroc": auroc,
        },
        abs=1e-5,
    )


def test_metrics_of_several_labels_are_those_of_scikit_learn():
    from sklearn import metrics as sk

    torch.manual_seed(0)
    logits, labels = torch.randn(200, 4), (torch.rand(200, 4) < 0.4).float()
    logits += labels
    found = _measured(TextClassification(MULTI, labels=list("abcd")), logits, labels)
    said = (logits > 0).int()
    assert found == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, said),
            "f1_micro": sk.f1_score(labels, said, average="micro"),
            "f1_macro": sk.f1_score(labels, said, average="macro"),
            "auroc": sk.roc_auc_score(labels, logits, average="macro"),
        },
        abs=1e-5,
    )


@pytest.mark.parametrize("values", [1, 3])
def test_metrics_of_a_regression_are_those_of_scipy_ties_and_far_outliers_included(values):
    from scipy import stats

    torch.manual_seed(0)
    labels = torch.randint(5, (200, values)).float()
    labels[3] = 1e4
    logits = labels + torch.randn(200, values)
    found = _measured(TextClassification(REGRESSION, num_labels=values), logits, labels)
    columns = list(zip(logits.T.numpy(), labels.T.numpy(), strict=True))
    assert found == pytest.approx(
        {
            "pearson": np.mean([stats.pearsonr(x, y).statistic for x, y in columns]),
            "spearman": np.mean([stats.spearmanr(x, y).statistic for x, y in columns]),
            "mse": float((logits - labels).square().mean()),
        },
        abs=1e-5,
    )


def test_the_auroc_leaves_out_classes_that_do_not_occur():
    from sklearn.metrics import roc_auc_score

    torch.manual_seed(0)
    task = TextClassification(labels=list("abc"))
    logits, labels = torch.randn(50, 3), torch.randint(2, (50,))
    shares = logits.softmax(-1)
    expected = np.mean([roc_auc_score(labels == c, shares[:, c]) for c in (0, 1)])
    assert _measured(task, logits, labels)["auroc"] == pytest.approx(expected, abs=1e-5)
    assert math.isnan(_measured(task, logits, torch.zeros_like(labels))["auroc"])
    several = TextClassification(MULTI, labels=list("abc"))
    has = torch.stack([labels, labels * 0, labels * 0 + 1], 1).float()
    expected = roc_auc_score(labels, logits[:, 0])
    assert _measured(several, logits, has)["auroc"] == pytest.approx(expected, abs=1e-5)


def test_values_that_never_change_have_no_correlation():
    found = _measured(TextClassification(REGRESSION, num_labels=1), torch.randn(50, 1), torch.ones(50, 1))
    assert math.isnan(found["pearson"])
    assert math.isnan(found["spearman"])
    assert found["mse"] > 0


@pytest.fixture
def wide_folder(bert_folder, tmp_path):
    """The tiny BERT with weights of the size of trained ones: with its own most of what it reads is lost on the way."""
    folder = shutil.copytree(bert_folder, tmp_path / "wide")
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    return folder


def _labelled(kind):
    """Texts of coloured words: the one colour among others, which colours there are, or how many words are red."""
    generator = np.random.default_rng(0)
    for _ in range(480):
        one, other = generator.choice(COLOURS, 2).tolist()
        if kind == "single_label_classification":
            rest = generator.choice((one, "small", "large", "old"), generator.integers(4)).tolist()
            words = generator.permutation([one, *rest]).tolist()
        else:
            words = generator.choice((one, other), generator.integers(1, 5)).tolist()
        yield {
            "text": " ".join(words),
            "text_pair": " ".join(reversed(words)),
            "label": {
                "single_label_classification": one,
                MULTI: sorted(set(words)),
                REGRESSION: words.count("red") / len(words),
            }[kind],
        }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single_label_classification", MULTI, REGRESSION])
def test_each_kind_learns_is_saved_with_its_options_and_says_what_it_is_for(
    kind, wide_folder, trainer, write, tmp_path
):
    L.seed_everything(0, verbose=False)
    rows = list(_labelled(kind))
    data = TextDataModule(train_files=write(rows), batch_size=8, max_length=16, validation_fraction=0.25)
    module = PeftModule(
        str(wide_folder), LoRA(r=8), {"name": "text_classification", "problem_type": kind}, {"lr": 1e-2}
    )
    t = trainer(max_epochs=4)
    t.fit(module, data)
    reached = {name.partition("/")[2]: float(value) for name, value in t.callback_metrics.items()}
    held_out = [row["label"] for row in data.rows("validation")]
    if kind == REGRESSION:
        assert reached["mse"] < 0.5 * np.var(held_out), "what the mean of all would reach"
        assert reached["mse"] == pytest.approx(reached["loss"], abs=1e-5)
        assert reached["pearson"] > 0.7
        assert reached["spearman"] > 0.7
    elif kind == MULTI:
        likely = np.array([[c in row for c in COLOURS] for row in held_out])
        always = 2 * likely.sum() / (likely.sum() + likely.size)
        assert reached["f1_micro"] > always + 0.05, "what naming all of them would reach"
        assert reached["auroc"] > 0.9
    else:
        most = max(held_out.count(c) for c in COLOURS) / len(held_out)
        assert reached["accuracy"] > most + 0.2, "what the commonest would reach"
        assert reached["mcc"] > 0.5

    said = [row for batch in t.predict(module, data) for row in batch]
    keys = {REGRESSION: {"value"}, MULTI: {"labels", "probabilities"}}.get(kind, {"label", "score", "probabilities"})
    assert all(row.keys() == keys for row in said)
    if kind != REGRESSION:
        assert all(row["probabilities"].keys() == set(COLOURS) for row in said)
    assert module.model.config.problem_type == kind
    t.save_checkpoint(tmp_path / "a.ckpt")
    module.save_adapter(tmp_path / "adapter")
    options = module.task.to_config()
    for again in (
        PeftModule.from_adapter(tmp_path / "adapter"),
        PeftModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True),
    ):
        assert again.task.to_config() == options
        assert trainer().predict(again, data) == t.predict(module, data)
    assert task_from_config(options).model_kwargs() == module.task.model_kwargs()
