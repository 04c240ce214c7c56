"""A loss that is NaN or infinite: the run stops, leaves the step out or goes back, and nothing good is overwritten."""

from __future__ import annotations

import json
import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import AdaLoRA, LoRA, NonFiniteLoss, PeftCallback, PeftModule, TextDataModule, last_checkpoint


class Net(L.LightningModule):
    """One layer; rows of some batches hold what spoils a loss."""

    def __init__(self, optimizer=torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=0.1)


def _rows(spoilt=None, value=float("nan")):
    """Eight batches; the batch of that number is spoilt, or left away for False."""
    rows = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(1))
    if spoilt is not None:
        rows[spoilt, 0, 0] = value
    return rows


def _fit(trainer, rows, *callbacks, method=None, optimizer=torch.optim.AdamW, **options):
    net = Net(optimizer)
    peft = PeftCallback(method or LoRA(r=2), model="layer")
    t = trainer(peft, *callbacks, max_epochs=1, **options)
    t.fit(net, DataLoader(rows, batch_size=None))
    return net, t


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_stops_before_the_step_and_the_last_checkpoint_is_the_last_good_state(trainer, tmp_path, value):
    every = ModelCheckpoint(tmp_path / "c", filename="last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(RuntimeError, match=r"step 4 \(epoch 0\): the loss is NaN or infinite\. The step was not made"):
        _fit(trainer, _rows(3, value), every, NonFiniteLoss(), enable_checkpointing=True)
    good, _ = _fit(trainer, _rows()[:3])
    saved = torch.load(last_checkpoint(tmp_path / "c"), weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.equal(t, good.state_dict()[n]) for n, t in saved["state_dict"].items())


@pytest.mark.filterwarnings("ignore:.*loss is NaN")
@pytest.mark.parametrize("order", [1, -1])
def test_a_step_that_is_skipped_leaves_what_a_run_without_its_batch_comes_to(trainer, order):
    rows = _rows(3)
    guard = NonFiniteLoss("skip")
    net, t = Net(), None
    callbacks = [PeftCallback(LoRA(r=2), model="layer"), guard][::order]
    t = trainer(*callbacks, max_epochs=1)
    with pytest.warns(UserWarning, match=r"step 4 .* the step is left out. A lower learning rate"):
        t.fit(net, DataLoader(rows, batch_size=None))
    without, _ = _fit(trainer, torch.cat([rows[:3], rows[4:]]))
    assert guard.skipped == 1
    assert t.global_step == 8
    assert _same(net, without)


@pytest.mark.filterwarnings("ignore:.*loss is NaN")
def test_of_accumulated_batches_the_whole_step_is_skipped(trainer):
    net, _ = _fit(trainer, _rows(3), NonFiniteLoss("skip"), accumulate_grad_batches=2)
    without, _ = _fit(trainer, torch.cat([_rows()[:2], _rows()[4:]]), accumulate_grad_batches=2)
    assert _same(net, without)


@pytest.mark.filterwarnings("ignore:.*loss is NaN")
@pytest.mark.parametrize("order", [1, -1])
def test_a_scheduled_method_makes_no_step_of_its_own_where_one_is_skipped(trainer, order):
    class Watch(L.Callback):
        states: list

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.states.append({n: t.clone() for n, t in pl_module.state_dict().items()})

    watch = Watch()
    watch.states = []
    method = AdaLoRA(target_r=1, init_r=2, tinit=1, tfinal=1)
    callbacks = [PeftCallback(method, model="layer"), NonFiniteLoss("skip")][::order]
    trainer(*callbacks, watch, max_epochs=1).fit(Net(), DataLoader(_rows(3), batch_size=None))
    assert all(torch.equal(t, watch.states[2][n]) for n, t in watch.states[3].items())
    assert not all(torch.equal(t, watch.states[3][n]) for n, t in watch.states[4].items())


@pytest.mark.filterwarnings("ignore:.*loss is NaN")
def test_rolling_back_puts_parameters_and_optimizer_to_where_they_were(trainer):
    """Steps 1 to 4 are made, 5 and 6 are undone by the seventh, and 8 goes on from 4."""
    rows = _rows(6)
    with pytest.warns(UserWarning, match="put back to those of step 4; the step is left out"):
        net, _ = _fit(trainer, rows, NonFiniteLoss("roll_back", every_n_steps=4))
    expected, _ = _fit(trainer, torch.cat([rows[:4], rows[7:]]))
    assert _same(net, expected)


@pytest.mark.filterwarnings("ignore:.*loss is NaN")
def test_a_run_in_which_nothing_gets_better_ends(trainer):
    rows = _rows()
    rows[2:] = float("nan")
    with pytest.raises(RuntimeError, match=r"step 5 .*, as in 2 steps before it\. ") as stop:
        _fit(trainer, rows, NonFiniteLoss("skip", patience=3))
    assert "NonFiniteLoss('skip')" not in str(stop.value), "which it does"


@pytest.mark.filterwarnings("ignore:.*loss is NaN")
@pytest.mark.parametrize("action", ["stop", "skip", "roll_back"])
def test_weights_that_a_step_has_spoilt_are_no_checkpoint_where_a_validation_shows_it(trainer, tmp_path, action):
    class Spoils(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.layer(batch).square().mean())

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 6:  # the last one before the second validation
                with torch.no_grad():
                    self.get_parameter("layer.adapters.default.lora_B").fill_(1e30)

    best = ModelCheckpoint(tmp_path / "c", monitor="val/loss", filename="{step}", save_top_k=-1)
    peft = PeftCallback(LoRA(r=2), model="layer")
    t = trainer(peft, NonFiniteLoss(action), best, max_epochs=2, limit_val_batches=2, enable_checkpointing=True)
    rows = DataLoader(_rows()[:3], batch_size=None)
    with pytest.raises(RuntimeError, match=r"step 6 \(epoch 1\): val/loss is inf in the validation"):
        t.fit(Spoils(), rows, rows)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step=3.ckpt"]


def test_a_gradient_counts_as_well_as_the_loss(trainer):
    class Root(Net):
        def training_step(self, batch, batch_idx):
            return self.layer(batch).mul(0).sqrt().sum()  # 0, with an infinite slope

    with pytest.raises(RuntimeError, match=r"step 1 .*: the gradient is NaN or infinite"):
        trainer(PeftCallback(LoRA(r=2), model="layer"), NonFiniteLoss()).fit(
            Root(), DataLoader(_rows(), batch_size=None)
        )


class Normed(Net):
    """Batch norms before and behind what is adapted: statistics that every forward moves."""

    def __init__(self, optimizer=torch.optim.AdamW) -> None:
        super().__init__(optimizer)
        self.before, self.behind = nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None)

    def training_step(self, batch, batch_idx):
        return self.behind(self.layer(self.before(batch))).square().mul(torch.arange(4.0)).mean()


@pytest.mark.filterwarnings("ignore:.*loss is NaN")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_statistics_of_batch_norms_are_put_back_where_a_step_is_skipped(trainer, tmp_path, accumulated):
    """Of accumulated batches those of all, the good ones too; and checkpoints go on being written."""
    whole, rows = Normed(), _rows(3)
    every = ModelCheckpoint(tmp_path / "c", filename="last", every_n_train_steps=1, enable_version_counter=False)
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulated}
    guard = NonFiniteLoss("skip")
    t = trainer(PeftCallback(LoRA(r=2), model="layer"), guard, every, enable_checkpointing=True, **options)
    t.fit(whole, DataLoader(rows, batch_size=None))
    left = torch.cat([rows[: 4 - accumulated], rows[4:]])
    without = Normed()
    trainer(PeftCallback(LoRA(r=2), model="layer"), **options).fit(without, DataLoader(left, batch_size=None))
    assert guard.skipped == 1
    assert whole.before.num_batches_tracked == 8 - accumulated
    assert _same(whole, without)
    assert torch.load(last_checkpoint(tmp_path / "c"), weights_only=True)["global_step"] == 8 // accumulated


def test_statistics_are_those_before_the_step_where_the_run_stops(trainer):
    net = Normed()
    with pytest.raises(RuntimeError, match="step 4"):
        trainer(PeftCallback(LoRA(r=2), model="layer"), NonFiniteLoss()).fit(net, DataLoader(_rows(3), batch_size=None))
    good = Normed()
    trainer(PeftCallback(LoRA(r=2), model="layer"), max_epochs=1).fit(good, DataLoader(_rows()[:3], batch_size=None))
    assert _same(net, good)


@pytest.mark.filterwarnings("ignore:.*loss is NaN", "ignore:1 of the parameters that an optimizer trains belong to no")
def test_a_parameter_of_no_module_takes_no_value_from_a_skipped_step_either(trainer):
    class Loose(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.loose[0].square()

        def configure_optimizers(self):
            self.loose = [nn.Parameter(torch.ones(()))]
            return torch.optim.SGD([*(p for p in self.parameters() if p.requires_grad), *self.loose], lr=0.1)

    net = Loose()
    trainer(PeftCallback(LoRA(r=2), model="layer"), NonFiniteLoss("skip"), max_epochs=1).fit(
        net, DataLoader(_rows(3), batch_size=None)
    )
    assert torch.isfinite(net.loose[0])


@pytest.mark.filterwarnings("ignore:.*the gradient is NaN")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("spoilt", [None, float("nan"), float("inf"), -float("inf")])
def test_large_gradients_are_finite_and_no_other_ones(trainer, dtype, spoilt):
    """Finite numbers the squares of which are not, as float16's 60,000 and float32's 1e25."""

    class Steep(Net):
        def __init__(self) -> None:
            super().__init__(lambda parameters, lr: torch.optim.SGD(parameters, lr=0.0))
            self.large = nn.Parameter(torch.zeros(3, 5, dtype=dtype))

        def training_step(self, batch, batch_idx):
            self.large.register_hook(self.steepen)
            return self.layer(batch).square().mean() + self.large.sum().float()

        def steepen(self, gradient):
            gradient = torch.full_like(gradient, 0.9 * torch.finfo(dtype).max)
            if spoilt is not None:
                gradient[1, 2] = spoilt
            return gradient

    guard = NonFiniteLoss("skip")
    t = trainer(PeftCallback(LoRA(r=2), model="layer"), guard, max_steps=1)
    t.fit(Steep(), DataLoader(_rows(), batch_size=None))
    assert guard.skipped == (spoilt is not None)


def test_broken_parameters_are_never_written_over_good_ones(trainer, tmp_path):
    class Breaks(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                next(p for n, p in pl_module.named_parameters() if n.endswith("lora_B")).data[0] = float("inf")

    every = ModelCheckpoint(tmp_path / "c", filename="last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(RuntimeError, match=r"1 of the tensors to be saved .*lora_B; the checkpoint is not written"):
        _fit(trainer, _rows(), Breaks(), every, NonFiniteLoss(), enable_checkpointing=True)
    assert torch.load(last_checkpoint(tmp_path / "c"), weights_only=True)["global_step"] == 2


@pytest.mark.filterwarnings("ignore:.*loss is NaN")
@pytest.mark.parametrize("action", ["stop", "skip", "roll_back"])
def test_peft_module_does_the_same(trainer, tmp_path, bert_folder, action):
    rows = [{"text": "red " * (1 + i % 5), "label": "ab"[i % 2]} for i in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Spoilt(PeftModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1)

    module, guard = Spoilt(str(bert_folder), LoRA(r=2)), NonFiniteLoss(action)
    data = TextDataModule(train_files=str(tmp_path / "texts.jsonl"), batch_size=4, max_length=16)
    t = trainer(guard, max_epochs=1)
    if action == "stop":
        with pytest.raises(RuntimeError, match=r"step 3 .*: the loss is NaN or infinite"):
            t.fit(module, data)
    else:
        t.fit(module, data)
        assert t.global_step == len(t.train_dataloader)
    assert guard.skipped == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_wrong_options_are_named_together():
    with pytest.raises(
        ValueError, match=r"'rollback' is unknown; did you mean 'roll_back'.*patience must be 1 or more"
    ):
        NonFiniteLoss("rollback", patience=0)
    with pytest.raises(ValueError, match="every_n_steps must be 1 or more, but got 0"):
        NonFiniteLoss(every_n_steps=0)


SCRIPT = """
import sys, warnings
warnings.filterwarnings("ignore")
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader
from lightning_peft import LoRA, NonFiniteLoss, PeftCallback

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        return loss * float("nan") if self.global_rank == 1 and batch_idx == 2 else loss
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

if __name__ == "__main__":
    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    guard = NonFiniteLoss(sys.argv[1])
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, **quiet,
                        callbacks=[PeftCallback(LoRA(r=2), model="layer"), guard])
    net = Net()
    trainer.fit(net, DataLoader(rows, batch_size=2))
    whole = torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad])
    both = trainer.strategy.all_gather(whole)
    same = bool(torch.equal(both[0], both[1]) and torch.isfinite(both).all())
    open(f"rank {trainer.global_rank}", "w").write(f"{guard.skipped} {trainer.global_step} {same}")
"""


@pytest.mark.slow
def test_all_ranks_do_what_one_has_to(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    for action in ("skip", "roll_back"):
        done = subprocess.run([sys.executable, "run.py", action], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [(tmp_path / f"rank {rank}").read_text() for rank in (0, 1)] == ["1 4 True", "1 4 True"], action
    stopped = subprocess.run([sys.executable, "run.py", "stop"], capture_output=True, text=True, cwd=tmp_path)
    assert stopped.returncode != 0
    assert "step 3 (epoch 0): the loss" in stopped.stderr
