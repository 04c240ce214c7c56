"""Tags for words: pieces, entities, truncated and odd words, and what is learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_peft import LoRA, PeftModule, TextDataModule, TokenClassification
from lightning_peft.tasks.entities import EntityScores, entities, mark_entities

REFERENCE = json.loads((Path(__file__).parents[1] / "parity" / "seqeval_reference.json").read_text())["cases"]
TAGS = ["O", "B-PER", "I-PER", "B-LOC"]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer of GPT-2's kind, which puts the space before a word into the word's first piece."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<pad>"], initial_alphabet=alphabet)
    built.train_from_iterator(["red green blue"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>")


def _encode(task, row, tokenizer, max_length=32, training=True):
    return task.encode([row], tokenizer, max_length, training=training)[0]


def test_the_first_piece_of_a_word_is_labelled_and_nothing_else(tokenizer):
    task = TokenClassification(TAGS)
    rows = [
        {"tokens": ["Unbelievably", "Rome"], "tags": ["O", "B-LOC"]},
        {"tokens": ["Ada", "Lovelace", "!"], "tags": ["B-PER", "I-PER", "O"]},
    ]
    batch = task.collate(task.encode(rows, tokenizer, 32, training=True), tokenizer, training=True)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        expected = tokenizer(row["tokens"], is_split_into_words=True)
        words, wanted, seen = expected.word_ids(), [], set()
        for word in words:
            wanted.append(-100 if word is None or word in seen else TAGS.index(row["tags"][word]))
            seen.add(word)
        assert ids[: len(words)].tolist() == expected["input_ids"]
        assert labels.tolist() == wanted + [-100] * (len(labels) - len(words))
    assert (batch["labels"] != -100).sum() == 5
    assert "tags" not in _encode(task, rows[0], tokenizer, training=False)


def test_a_byte_level_tokenizer_cuts_words_as_it_cuts_them_in_a_text(byte_level):
    feature = _encode(TokenClassification(TAGS), {"tokens": ["red", "green", "blue"], "tags": [0, 1, 2]}, byte_level)
    assert feature["input_ids"] == byte_level("red green blue")["input_ids"]
    pieces = byte_level.convert_ids_to_tokens(feature["input_ids"])
    assert [pieces[start][:2] for start in feature["starts"]] == ["re", "Ġg", "Ġb"]


def test_words_that_are_cut_off_or_vanish_are_counted_as_missed(tokenizer):
    task = TokenClassification(TAGS)
    row = {"tokens": ["Ada", "\u200b", "saw", "Rome"], "tags": ["B-PER", "O", "O", "B-LOC"]}
    feature = _encode(task, row, tokenizer, max_length=4)
    assert feature["starts"] == [1, -1, 2, -1]
    batch = task.collate([feature], tokenizer, training=True)
    assert batch["labels"].tolist() == [[-100, 1, 0, -100]]

    class Outputs:
        logits = torch.nn.functional.one_hot(batch["labels"].clamp_min(0), 4) * 9.0

    metrics = task.metrics()
    task.update(metrics, Outputs, batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found["recall"] == 0.5
    assert found["precision"] == 1
    assert found["accuracy"] == 0.5
    assert found["words_lost"] == 0.5
    said = task.predict(lambda **inputs: Outputs, batch, tokenizer)[0]
    assert said["tags"] == ["B-PER", None, "O", None]
    assert said["scores"][1] is None
    assert said["entities"] == [{"type": "PER", "start": 0, "end": 1}]


def test_tags_are_learnt_with_o_first_or_given_and_then_met_by_number(tokenizer):
    task = TokenClassification()
    task.learn_from([{"tokens": ["a", "b", "c"], "tags": ["B-PER", "O", "B-LOC"]}])
    assert task.labels == ["O", "B-LOC", "B-PER"]
    assert task.model_kwargs()["id2label"] == {0: "O", 1: "B-LOC", 2: "B-PER"}
    given = TokenClassification(TAGS)
    assert _encode(given, {"tokens": ["a", "b"], "tags": [2, "O"]}, tokenizer)["tags"] == [2, 0]
    with pytest.warns(UserWarning, match="the tags are numbers, so where entities begin and end is not known"):
        TokenClassification().learn_from([{"tokens": ["a", "b"], "tags": [0, 1]}])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": "Ada", "tags": ["O"]}, "has the tokens 'Ada', but a list of words is expected"),
        ({"tokens": ["Ada", 3], "tags": ["O", "O"]}, r"has the tokens \['Ada', 3\], but a list of words"),
        ({"tokens": [], "tags": []}, "has an empty list of tokens"),
        ({"tokens": ["Ada", "saw"], "tags": ["O"]}, "has 2 words, but 1 tags; a list with one for each word"),
        ({"tokens": ["Ada"], "tags": "O"}, "has 1 words, but the tags 'O'; a list with one for each word"),
        ({"tokens": ["Ada"], "tags": ["B-PRE"]}, "has the label 'B-PRE', which training does not know; did you mean"),
        ({"tokens": ["\u200b"], "tags": ["O"]}, "has no supervised token: no word of it is left"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        _encode(TokenClassification(TAGS), row, tokenizer)


def test_options_and_training_rows_without_meaning_are_refused():
    with pytest.raises(ValueError, match="labels names 'O' twice"):
        TokenClassification(["O", "O"])
    with pytest.raises(ValueError, match="labels needs two tags or more"):
        TokenClassification(["O"])
    with pytest.raises(ValueError, match=r"needs two tags or more, but the training data has only \['O'\]"):
        TokenClassification().learn_from([{"tokens": ["a"], "tags": ["O"]}])
    with pytest.raises(ValueError, match="the first has the tags 'O', but a list with one for each word is expected"):
        TokenClassification().learn_from([{"tokens": ["a"], "tags": "O"}])


def test_a_tokenizer_that_does_not_know_words_is_refused_before_any_row(tmp_path):
    from transformers import CanineTokenizer

    with pytest.raises(TypeError, match="CanineTokenizer is written in Python and does not: choose a model with a"):
        _encode(TokenClassification(TAGS), {"tokens": ["a"], "tags": ["O"]}, CanineTokenizer())


@pytest.mark.parametrize("name", REFERENCE)
def test_entities_and_scores_are_those_of_seqeval_malformed_tags_included(name):
    case = REFERENCE[name]
    assert mark_entities(case["tags"])
    read = [[list(entity) for entity in entities(row, marked=True)] for row in case["said"]]
    assert read == case["entities"]
    metric = EntityScores(case["tags"])
    for half in (slice(0, 15), slice(15, None)):
        metric.update(case["said"][half], case["expected"][half])
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found["accuracy"] == pytest.approx(case["accuracy"], abs=1e-6)
    for kind, scores in case["types"].items():
        for score, value in scores.items():
            ours = found[score if kind == "micro avg" else f"{kind}/{score}"]
            assert ours == pytest.approx(value, abs=1e-6), (kind, score)


def test_counts_of_ranks_add_up():
    case = REFERENCE["BIOES"]
    whole = EntityScores(case["tags"])
    whole.update(case["said"], case["expected"])
    parts = [EntityScores(case["tags"]) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 7), slice(7, None)), strict=True):
        part.update(case["said"][rows], case["expected"][rows])
    reductions = {state: parts[0]._reductions[state] for state in parts[0]._defaults}
    for state, reduce in reductions.items():
        gathered = torch.stack([getattr(part, state) for part in parts])
        setattr(parts[0], state, reduce(gathered))
    assert {k: float(v) for k, v in parts[0].compute().items()} == {k: float(v) for k, v in whole.compute().items()}


def test_bilou_is_read_as_bioes_and_other_tags_are_words_of_their_own():
    assert entities(["U-A", "U-A", "B-A", "L-A"], marked=True) == [("A", 0, 1), ("A", 1, 2), ("A", 2, 4)]
    assert not mark_entities(["O", "NOUN", "VERB"])
    assert entities(["NOUN", "NOUN", "O", None], marked=False) == [("NOUN", 0, 1), ("NOUN", 1, 2)]
    metric = EntityScores(["NOUN", "VERB"])
    metric.update([["NOUN", "NOUN", "VERB"]], [["NOUN", "VERB", "VERB"]])
    found = metric.compute()
    assert float(found["f1"]) == pytest.approx(float(found["accuracy"])) == pytest.approx(2 / 3)


def test_a_type_that_occurs_nowhere_has_no_score_of_its_own():
    metric = EntityScores(TAGS)
    metric.update([["O", "B-PER"]], [["O", "O"]])
    found = metric.compute()
    assert torch.isnan(found["LOC/f1"])
    assert float(found["PER/f1"]) == float(found["f1"]) == 0


def _sentences(count):
    """Somebody goes somewhere: names of one or two words, of people after a title and of places after a preposition."""
    dice = random.Random(0)
    names = ("york", "lincoln", "sydney", "florence", "jackson", "victoria")
    for _ in range(count):
        person, place = ([dice.choice(names) for _ in range(dice.randint(1, 2))] for _ in range(2))
        tokens = [dice.choice(("doctor", "lady")), *person, dice.choice(("left", "saw")), "near", *place]
        tags = ["O", "B-PER", *["I-PER"] * (len(person) - 1), "O", "O", "B-LOC", *["I-LOC"] * (len(place) - 1)]
        yield {"tokens": tokens, "tags": tags}


@pytest.mark.slow
def test_tagging_learns_by_context_is_saved_with_its_tags_and_finds_the_entities(bert_folder, trainer, tmp_path):
    L.seed_everything(0, verbose=False)
    path = tmp_path / "sentences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _sentences(240)))
    data = TextDataModule(train_files=str(path), batch_size=8, max_length=24, validation_fraction=0.25)
    module = PeftModule(str(bert_folder), LoRA(r=8), "token_classification", {"lr": 1e-2})
    t = trainer(max_epochs=8)
    t.fit(module, data)
    reached = {name: float(value) for name, value in t.callback_metrics.items()}
    tags = [tag for row in data.rows("validation") for tag in row["tags"]]
    assert reached["val/accuracy"] > tags.count("O") / len(tags) + 0.2, "what the commonest tag would reach"
    assert reached["val/f1"] > 0.6
    assert {"val/PER/f1", "val/LOC/recall"} <= reached.keys()
    said = [row for batch in t.predict(module, data) for row in batch]
    rows = data.rows("predict")
    assert [len(row["tags"]) for row in said] == [len(row["tokens"]) for row in rows]
    right = sum(
        a == b for row, ours in zip(rows, said, strict=True) for a, b in zip(row["tags"], ours["tags"], strict=True)
    )
    assert right / len(tags) == pytest.approx(reached["val/accuracy"], abs=1e-6)
    module.save_adapter(tmp_path / "adapter")
    again = PeftModule.from_adapter(tmp_path / "adapter")
    assert again.task == module.task
    assert trainer().predict(again, data) == t.predict(module, data)
