"""A run with ``lr="auto"`` is the run with the rate that was found, and nothing else."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import AdaLoRA, LoRA, PeftModule, Selective, SparseTuning, TextDataModule
from lightning_peft.callbacks.learning_rate import FindLearningRate

WORDS = ("red", "green", "blue", "small", "large")
ROWS = [{"text": " ".join([WORDS[i % 5]] * (1 + i % 7)), "label": "odd" if i % 2 else "even"} for i in range(32)]


@pytest.fixture
def data(tmp_path):
    """Makes a data module of 24 rows to train on and 8 to validate with."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return lambda: TextDataModule(train_files=str(path), batch_size=4, max_length=16, validation_fraction=0.25)


@pytest.fixture
def module(bert_folder):
    """Makes the same module each time."""

    def make(rate, method=None, **optimizer):
        L.seed_everything(0, verbose=False)
        method = LoRA(r=2, lora_dropout=0.1) if method is None else method
        return PeftModule(str(bert_folder), method, optimizer={"lr": rate, **optimizer})

    return make


class Seen(L.Callback):
    """Notes what one would see of a run from outside, step for step."""

    def __init__(self):
        self.batches, self.losses, self.rates, self.draws = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch["input_ids"])
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.draws.append(torch.get_rng_state())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"])

    def on_train_end(self, trainer, pl_module):
        self.states = trainer.optimizers[0].state_dict()["state"]
        self.metrics = dict(trainer.callback_metrics)


def assert_same_run(first, one, second, other):
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("batches", "losses", "draws")]
    for found, expected in pairs:
        assert len(found) == len(expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert one.rates == other.rates
    assert one.metrics.keys() == other.metrics.keys()
    assert all(torch.equal(one.metrics[k], other.metrics[k]) for k in other.metrics)
    for number, state in other.states.items():
        assert all(torch.equal(one.states[number][k], v) for k, v in state.items())
    for (name, found), (again, expected) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == again
        assert torch.equal(found, expected), name
    assert all(torch.equal(b, dict(second.named_buffers())[n]) for n, b in first.named_buffers())


METHODS = {
    "lora with dropout": LoRA(r=2, lora_dropout=0.1),
    "a rank that falls": AdaLoRA(init_r=3, target_r=1, tinit=2, tfinal=2, deltaT=2, lora_dropout=0.1),
    "a start from data": LoRA(r=2, init_lora_weights="eva"),
    "entries chosen by data": SparseTuning(r=1, mask_type="gradient", mask_batches=2),
    "layers that join": Selective(unfreeze_until=0.5, keep_originals=False),
    "all weights": Selective(keep_originals=False),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_run_that_finds_a_rate_is_the_run_with_that_rate_to_the_bit(method, module, data, trainer):
    found, one = module("auto", method), Seen()
    trainer(one).fit(found, data())
    assert isinstance(found.lr, float)
    written, other = module(found.lr, method), Seen()
    trainer(other).fit(written, data())
    assert_same_run(found, one, written, other)
    assert len(one.batches) == 12


def test_the_search_goes_far_enough_however_short_the_run(module, data, trainer, tmp_path):
    it = module("auto")
    trainer(FindLearningRate(tmp_path), max_epochs=1, limit_train_batches=1).fit(it, data())
    found = json.loads((tmp_path / "lr_find.json").read_text())
    assert found["schema"] == 1
    assert found["lr"] == it.lr
    assert found["default"] == it.method.learning_rate
    assert found["rates"] == sorted(found["rates"])
    assert len(found["rates"]) == len(found["losses"]) > 50
    assert found["rates"][0] < it.lr < found["rates"][-1]
    assert (tmp_path / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".lr_find*")), "the finder's own checkpoint is gone"


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_with_generators_of_their_own_give_the_batches_that_they_would_have_given(
    workers, module, data, trainer
):
    def fit(rate):
        it, seen, source = module(rate), Seen(), data()
        t = trainer(seen, max_epochs=1)
        source.connect(it.task, it.tokenizer)
        source.setup("fit")
        loader = DataLoader(
            source.features("train"),
            4,
            shuffle=True,
            num_workers=workers,
            generator=torch.Generator().manual_seed(5),
            collate_fn=source._collate(training=True),
        )
        t.fit(it, loader)
        return it, seen

    found, one = fit("auto")
    written, other = fit(found.lr)
    assert_same_run(found, one, written, other)


def test_b_of_lora_plus_is_tried_and_trained_at_its_multiple_of_the_rate(module, data, trainer, monkeypatch):
    inside = []

    class Noting(torch.optim.AdamW):
        def _init_group(self, group, *args, **kwargs):
            inside.append(group["lr"])
            return super()._init_group(group, *args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Noting)
    it, t = module("auto", loraplus_lr_ratio=16), trainer()
    t.fit(it, data())
    slow, fast = inside[::2], inside[1::2]
    assert len(slow) > 50 + 12
    torch.testing.assert_close(torch.tensor(fast[1:]), 16 * torch.tensor(slow[1:]))
    assert slow[0] == pytest.approx(it.method.learning_rate / 1000)
    assert [group["initial_lr"] for group in t.optimizers[0].param_groups] == [it.lr, it.lr * 16]


def test_a_resumed_run_does_not_search_and_goes_on_with_the_rate_that_was_found(module, data, trainer, tmp_path):
    class Saving(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, again = module("auto"), module("auto")
    trainer(Saving()).fit(whole, data())
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["hyper_parameters"]["optimizer"]["lr"] == whole.lr
    t = trainer(FindLearningRate(tmp_path / "searched"))
    t.fit(again, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert not (tmp_path / "searched").exists()
    assert again.lr == again.hparams["optimizer"]["lr"] == whole.lr
    assert t.optimizers[0].param_groups[0]["initial_lr"] == whole.lr
    trained = again.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in whole.state_dict().items())


def test_a_checkpoint_whose_rate_is_none_or_not_found_yet_is_refused(module, data, trainer, tmp_path):
    t = trainer(max_steps=1)
    t.fit(module(0.01), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for rate, said in ((-1, "hyper_parameters.* must be above 0, but got -1"), ("auto", "from before a learning rate")):
        saved["hyper_parameters"]["optimizer"]["lr"] = rate
        torch.save(saved, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=said):
            trainer().fit(module("auto"), data(), ckpt_path=tmp_path / "b.ckpt", weights_only=True)


def test_a_second_fit_goes_on_with_the_rate_of_the_first(module, data, trainer, tmp_path):
    it = module("auto")
    trainer(max_steps=1).fit(it, data())
    rate = it.lr
    trainer(FindLearningRate(tmp_path / "searched"), max_steps=1).fit(it, data())
    assert it.lr == rate
    assert not (tmp_path / "searched").exists()


def test_a_search_without_a_finite_loss_names_the_rate_to_write_and_gives_the_trainer_back(module, data, trainer):
    class Broken(PeftModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    class Heard(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            self.error = exception

    plain = module("auto")
    it = Broken(plain.base.name_or_path, plain.method, optimizer={"lr": "auto"})
    heard = Heard()
    t = trainer(heard)
    with pytest.raises(ValueError, match=r"found no rate.* 0 after .* write the method's own, optimizer.lr=0.002") as e:
        t.fit(it, data())
    assert heard.error is e.value
    assert t.max_steps == -1
    assert it.optimizer["lr"] == "auto"


def test_an_error_within_the_search_reaches_the_callbacks(module, data, trainer):
    class Broken(PeftModule):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no memory")

    class Heard(L.Callback):
        error = None

        def on_exception(self, trainer, pl_module, exception):
            self.error = exception

    plain, heard = module("auto"), Heard()
    t = trainer(heard)
    with pytest.raises(RuntimeError, match="no memory"):
        t.fit(Broken(plain.base.name_or_path, plain.method, optimizer={"lr": "auto"}), data())
    assert str(heard.error) == "no memory"
    assert t.max_epochs == 2


def test_a_search_on_several_devices_is_refused_with_what_to_do(module, data, trainer):
    t = trainer(strategy="ddp", devices=1, use_distributed_sampler=False)
    try:
        with pytest.raises(ValueError, match=r"on one device, but got DDPStrategy; .* optimizer.lr=0.002"):
            t.fit(module("auto"), data())
    finally:
        torch.distributed.destroy_process_group()


def test_a_quick_look_takes_the_methods_own_rate(module, data, trainer, tmp_path):
    it = module("auto")
    t = trainer(FindLearningRate(tmp_path / "searched"), fast_dev_run=True)
    t.fit(it, data())
    assert t.optimizers[0].param_groups[0]["initial_lr"] == it.method.learning_rate
    assert not (tmp_path / "searched").exists()


@pytest.mark.parametrize("rate", ["fast", "0.1", True, [0.1]])
def test_a_rate_that_is_none_is_refused_with_what_it_can_be(rate):
    with pytest.raises(ValueError, match=r"must be a number, auto .* or null .*, but got"):
        PeftModule("x", LoRA(), optimizer={"lr": rate})


@pytest.mark.parametrize("rate", [0, -0.1, float("nan"), float("inf")])
def test_a_rate_must_be_above_zero_and_finite(rate):
    with pytest.raises(ValueError, match=r"optimizer.lr must be above 0, but got"):
        PeftModule("x", LoRA(), optimizer={"lr": rate})
