"""Embeddings: the losses and metrics of sentence-transformers, which also loads what is exported."""

from __future__ import annotations

import json
import random
from itertools import combinations, permutations

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from lightning_peft import Embedding, LoRA, PeftModule, PromptTuning, TextDataModule
from lightning_peft.formats.merged import save_merged
from lightning_peft.tasks import task_from_config
from lightning_peft.tasks.embedding import pooled
from lightning_peft.tasks.retrieval import Retrieval, key_of

# what belongs together has no word in common
OTHER = {"red": "one", "car": "two", "dog": "three", "house": "four", "river": "five", "book": "six", "tree": "seven"}
SOME = list(combinations(OTHER, 2)) + list(combinations(OTHER, 3)) + list(combinations(OTHER, 4))
PAIRS = [{"anchor": " ".join(words), "positive": " ".join(OTHER[w] for w in words)} for words in SOME]
TRIPLETS = [{**row, "negative": f"{row['positive'].split()[0]} nine"} for row in PAIRS]
SCORED = [
    {"sentence1": f"{a} {b}", "sentence2": f"{OTHER[c]} {OTHER[d]}", "score": ((a == c) + (b == d)) / 2}
    for a, b in permutations(OTHER, 2)
    for c, d in dict.fromkeys([(a, b), (a, "dog"), ("red", b), ("car", "tree")])
]
METRICS = {"recall_at_1", "recall_at_5", "recall_at_10", "mrr"}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def theirs(bert_folder):
    """The base in sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def make(pooling="mean", folder=bert_folder):
        transformer = Transformer(str(folder))
        size = transformer.get_embedding_dimension()
        return SentenceTransformer(modules=[transformer, Pooling(size, pooling_mode=pooling)], device="cpu").eval()

    return make


def _batch(task, rows, tokenizer):
    return task.collate(task.encode(rows, tokenizer, 32, training=True), tokenizer, training=True)


def _columns(rows, names, tokenizer):
    return [dict(tokenizer([r[n] for r in rows], padding=True, return_tensors="pt")) for n in names]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize(
    ("rows", "names", "loss", "scale"),
    [
        (PAIRS, ("anchor", "positive"), "MultipleNegativesRankingLoss", 20.0),
        (TRIPLETS, ("anchor", "positive", "negative"), "MultipleNegativesRankingLoss", 7.0),
        (SCORED, ("sentence1", "sentence2"), "CoSENTLoss", 20.0),
    ],
    ids=["pairs", "triplets", "scores"],
)
def test_losses_and_gradients_are_those_of_sentence_transformers(
    bert_folder, theirs, tokenizer, rows, names, loss, scale, pooling
):
    from sentence_transformers.sentence_transformer import losses
    from transformers import AutoModel

    task = Embedding(pooling=pooling, scale=scale)
    task.learn_from(rows)
    model = AutoModel.from_pretrained(bert_folder, add_pooling_layer=False).eval()
    reference = theirs("lasttoken" if pooling == "last" else pooling)
    criterion = getattr(losses, loss)(reference, scale=scale)
    for start in range(0, 24, 8):
        some = rows[start : start + 8]
        batch = _batch(task, some, tokenizer)
        total, count = task.loss(task.outputs(model, batch), batch)
        scores = torch.tensor([r.get("score", 0.0) for r in some])
        expected = criterion(_columns(some, names, tokenizer), scores)
        torch.testing.assert_close(total / count, expected, rtol=0, atol=1e-5)
    model.zero_grad()
    (total / count).backward()
    reference.zero_grad()
    expected.backward()
    found = dict(model.named_parameters())
    other = {n.split("model.", 1)[-1]: p for n, p in reference.named_parameters() if "pooler" not in n}
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-3, atol=1e-5)


def test_retrieval_has_the_numbers_of_sentence_transformers_evaluator(theirs):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    model, count = theirs(), len(PAIRS)
    evaluator = InformationRetrievalEvaluator(
        {str(i): r["anchor"] for i, r in enumerate(PAIRS)},
        {str(i): r["positive"] for i, r in enumerate(PAIRS)},
        {str(i): {str(i)} for i in range(count)},
        mrr_at_k=[count],
        precision_recall_at_k=[1, 5, 10],
        write_csv=False,
    )
    expected = evaluator(model)
    vectors = [F.normalize(model.encode([r[k] for r in PAIRS], convert_to_tensor=True), dim=1) for k in PAIRS[0]]
    metric = Retrieval()
    keys = torch.tensor([[key_of([1, i]), key_of([2, i])] for i in range(count)])
    for start in range(0, count, 7):
        metric.update(*(part[start : start + 7] for part in (*vectors, keys)))
    found = metric.compute()
    for k in (1, 5, 10):
        assert float(found[f"recall_at_{k}"]) == pytest.approx(expected[f"cosine_recall@{k}"], abs=1e-6)
    assert float(found["mrr"]) == pytest.approx(expected[f"cosine_mrr@{count}"], abs=1e-6)
    assert 0 < found["recall_at_5"] < 1


def test_equal_texts_are_right_answers_too():
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    anchors, positives = vectors[[0, 0, 2]], vectors[[1, 0, 2]]
    # the first two anchors are one text with two positives: the second's does not push the first's down
    metric = Retrieval()
    metric.update(anchors, positives, torch.tensor([[1, 2], [1, 3], [4, 5]]))
    assert metric.compute()["recall_at_1"] == 1
    metric.reset()
    metric.update(anchors, positives, torch.tensor([[1, 2], [6, 3], [4, 5]]))
    assert metric.compute()["recall_at_1"] == pytest.approx(2 / 3)


def test_pairs_that_come_twice_push_nothing_down():
    torch.manual_seed(0)
    anchors, positives = (F.normalize(torch.randn(30, 4), dim=1) for _ in range(2))
    keys = torch.arange(60).view(30, 2)
    once, twice = Retrieval(), Retrieval()
    once.update(anchors, positives, keys)
    for _ in range(2):  # as two devices that both see all rows
        twice.update(anchors, positives, keys)
    assert {n: float(v) for n, v in twice.compute().items()} == {n: float(v) for n, v in once.compute().items()}


def test_a_model_that_tells_no_text_from_another_finds_nothing():
    vectors = F.normalize(torch.ones(50, 3), dim=1)
    metric = Retrieval()
    metric.update(vectors, vectors, torch.arange(100).view(50, 2))
    found = metric.compute()
    assert found["recall_at_10"] == 0
    assert found["mrr"] == pytest.approx(1 / 50)


def test_spearman_is_that_of_scipy(bert_folder, tokenizer):
    from scipy.stats import spearmanr
    from transformers import AutoModel

    task = Embedding()
    task.learn_from(SCORED)
    model = AutoModel.from_pretrained(bert_folder, add_pooling_layer=False).eval()
    metrics, cosines = task.metrics(), []
    for start in range(0, 32, 8):
        batch = _batch(task, SCORED[start : start + 8], tokenizer)
        with torch.no_grad():
            vectors = task.outputs(model, batch)
        task.update(metrics, vectors, batch)
        cosines += F.cosine_similarity(vectors[:8], vectors[8:]).tolist()
    expected = spearmanr(cosines, [r["score"] for r in SCORED[:32]]).statistic
    assert float(metrics.compute()["spearman"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_on_either_side_changes_no_vector(pooling):
    hidden = torch.randn(1, 3, 4)
    left = torch.cat([torch.randn(1, 2, 4), hidden], 1)
    right = torch.cat([hidden, torch.randn(1, 2, 4)], 1)
    expected = {"mean": hidden.mean(1), "cls": hidden[:, 0], "last": hidden[:, -1]}[pooling]
    torch.testing.assert_close(pooled(left, torch.tensor([[0, 0, 1, 1, 1]]), pooling), expected)
    torch.testing.assert_close(pooled(right, torch.tensor([[1, 1, 1, 0, 0]]), pooling), expected)


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"text": "red"}, {"loss_type": "ranking"}, "has no 'anchor', which loss_type='ranking' learns from"),
        (PAIRS[0], {"loss_type": "cosent"}, "has no 'sentence1', which loss_type='cosent' learns from, but .'anchor'"),
        (SCORED[0], {"loss_type": "ranking"}, "has no 'anchor', which loss_type='ranking' learns from"),
        ({**PAIRS[0], "positive": " "}, {"loss_type": "ranking"}, "has an empty text"),
        ({**SCORED[0], "score": "much"}, {"loss_type": "cosent"}, "has the score 'much', which is no number"),
        ({**SCORED[0], "score": "nan"}, {"loss_type": "cosent"}, "has the score 'nan', which is no number"),
    ],
)
def test_a_row_that_the_loss_cannot_learn_from_is_refused_with_its_reason(tokenizer, row, options, said):
    with pytest.raises(ValueError, match=said):
        Embedding(**options).encode([row], tokenizer, 16, training=True)


def test_data_that_is_neither_kind_and_options_out_of_their_range_are_refused():
    with pytest.raises(ValueError, match=f"{len(SCORED)} of {len(PAIRS + SCORED)} rows have a score"):
        Embedding().learn_from(PAIRS + SCORED)
    with pytest.raises(ValueError, match="does not know its loss yet"):
        Embedding().metrics()
    with pytest.raises(ValueError, match=r"pooling 'men' is unknown; did you mean 'mean'"):
        task_from_config({"name": "embedding", "pooling": "men"})
    with pytest.raises(ValueError, match="loss_type 'cosine' is unknown"):
        Embedding(loss_type="cosine")
    with pytest.raises(ValueError, match="scale must be above 0, but got 0"):
        Embedding(scale=0)


def _file(path, rows):
    rows = list(rows)
    random.Random(0).shuffle(rows)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "metric", "loss"),
    [(PAIRS, "recall_at_1", "ranking"), (TRIPLETS, "mrr", "ranking"), (SCORED, "spearman", "cosent")],
    ids=["pairs", "triplets", "scores"],
)
def test_held_out_rows_are_better_placed_than_by_the_untrained_base(bert_folder, trainer, tmp_path, rows, metric, loss):
    L.seed_everything(0, verbose=False)
    data = TextDataModule(
        train_files=_file(tmp_path / "a.jsonl", rows), batch_size=8, max_length=16, validation_fraction=0.3
    )
    module = PeftModule(str(bert_folder), LoRA(r=8), Embedding(), {"lr": 3e-3})
    t = trainer(max_epochs=45)
    before = t.validate(module, data, verbose=False)[0]
    t.fit(module, data)
    after = t.validate(module, data, verbose=False)[0]
    assert module.task.loss_type == loss
    assert after[f"val/{metric}"] > before[f"val/{metric}"] + 0.1
    assert after["val/loss"] < before["val/loss"]
    expected = {"spearman"} if loss == "cosent" else METRICS
    assert set(after) == {f"val/{m}" for m in expected | {"loss"}}
    assert PeftModule(str(bert_folder), LoRA(r=8), module.task.to_config()).task == module.task


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_what_is_exported_gives_the_same_vectors_in_sentence_transformers(
    bert_folder, theirs, trainer, tmp_path, perturb, form
):
    module = PeftModule(str(bert_folder), LoRA(r=4), Embedding(loss_type="ranking"))
    module.configure_model()
    perturb(module.adapter)
    module.eval()
    texts = [{"text": r["anchor"]} for r in PAIRS]
    data = TextDataModule(source=None, predict_files=_file(tmp_path / "t.jsonl", texts), batch_size=9, max_length=16)
    said = [row["embedding"] for batch in trainer().predict(module, data) for row in batch]
    if form == "adapter":
        module.save_adapter(tmp_path / "out")
        model = theirs()
        model.load_adapter(str(tmp_path / "out"))
    else:
        save_merged(module.model, "default", tmp_path / "out", module.tokenizer)
        model = theirs(folder=tmp_path / "out")
    found = model.encode([r["text"] for r in data.rows("predict")], normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(torch.tensor(said), found.cpu(), rtol=0, atol=1e-5)
    plain = theirs().encode([r["text"] for r in data.rows("predict")], normalize_embeddings=True)
    assert not torch.allclose(torch.tensor(said), torch.tensor(plain), atol=1e-3)


def test_two_sentences_are_written_with_their_cosine(bert_folder, trainer, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "score"} for row in SCORED[:10]]
    module = PeftModule(str(bert_folder), PromptTuning(2), Embedding(loss_type="cosent", normalize=False))
    data = TextDataModule(source=None, predict_files=_file(tmp_path / "t.jsonl", rows), batch_size=4, max_length=16)
    said = [row for batch in trainer().predict(module, data) for row in batch]
    assert len(said) == 10
    one, two = (torch.tensor([row[k] for row in said]) for k in ("embedding1", "embedding2"))
    torch.testing.assert_close(F.cosine_similarity(one, two), torch.tensor([row["cosine"] for row in said]))
    assert (one.norm(dim=1) - 1).abs().min() > 0.1


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_causal_model_embeds_too(llama_folder, trainer, tmp_path, pooling):
    module = PeftModule(str(llama_folder), LoRA(r=2), Embedding(pooling=pooling))
    data = TextDataModule(train_files=_file(tmp_path / "a.jsonl", PAIRS), batch_size=9, max_length=16)
    t = trainer(max_epochs=1)
    t.fit(module, data)
    assert {k for k in t.callback_metrics if k.startswith("val/")} == {f"val/{m}" for m in METRICS | {"loss"}}


@pytest.mark.slow
def test_the_embedded_data_has_pairs_for_it():
    from lightning_peft.data.docstrings import examples_with

    train, validation = examples_with("anchor", "positive")
    assert set(train[0]) == set(validation[0]) == {"anchor", "positive"}
    assert len(train) > 1000
