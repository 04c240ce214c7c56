"""What breaks elsewhere when checkpoints hold trained parameters only: each of Lightning's features with an adapter."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_peft import Adapter, LoRA, PeftCallback, Selective, activate, adapt, load_from_checkpoint
from tests.callbacks import ways
from tests.callbacks.ways import Net, Rows, everything, is_small, keys_of, same, unchanged, without_batch_norm
from tests.conftest import BUILDERS

way = ways.way


def test_files_of_weights_alone_hold_what_trains_and_load_everywhere(way, trainer, tmp_path):
    """Lightning skips the callbacks' hooks in them, when they are written and when they are read."""
    module = way.make()
    keep = ModelCheckpoint(tmp_path / "kept", filename="a", save_weights_only=True)
    t = trainer(*way.callbacks(), keep, enable_checkpointing=True)
    t.fit(module, way.data())
    path = tmp_path / "kept" / "a.ckpt"
    assert is_small(way, path)
    assert torch.equal(way.run(way.load(path)), way.run(module))
    expected = t.test(module, way.data(), verbose=False)
    assert trainer(*way.callbacks()).test(way.make(), way.data(), ckpt_path=path, verbose=False) == expected


def test_every_entry_point_loads_a_checkpoint_strictly_and_runs_the_adapter(way, trainer, tmp_path):
    module = way.make()
    t = trainer(*way.callbacks())
    t.fit(module, way.data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    for run in ("validate", "test"):
        fresh = way.make()
        expected = getattr(t, run)(module, way.data(), verbose=False)
        found = getattr(trainer(*way.callbacks()), run)(
            fresh, way.data(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True
        )
        assert found == expected
        assert fresh.strict_loading
        assert same(fresh, module)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del saved["state_dict"][way.adapter]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{way.adapter}"):
        module.load_state_dict(saved["state_dict"])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stray"):
        module.load_state_dict({**module.state_dict(), "stray": torch.ones(1)})


def test_lightnings_own_loading_of_an_adapted_class_does_not_give_back_the_base(trainer, tmp_path):
    module = Net()
    t = trainer(PeftCallback(LoRA(r=2), "backbone"))
    t.fit(module, Rows())
    t.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*backbone\.adapters"):
        Net.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_saving_in_the_background_writes_the_same_files(way, trainer, tmp_path):
    states = []
    for name, plugins in (("now", []), ("later", [AsyncCheckpointIO()])):
        module = way.make()
        keep = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        torch.manual_seed(1)
        trainer(*way.callbacks(), keep, plugins=plugins, enable_checkpointing=True).fit(module, way.data())
        files = sorted((tmp_path / name).iterdir())
        assert len(files) > 2
        assert all(is_small(way, path) for path in files)
        states.append([torch.load(path, weights_only=True)["state_dict"] for path in files])
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_files_are_the_same_whatever_the_order_of_the_callbacks(first, trainer, tmp_path):
    peft, keep = PeftCallback(LoRA(r=2), "backbone"), ModelCheckpoint(tmp_path, filename="a")
    # Lightning moves checkpoint callbacks to the end by itself; a second kind of copy is taken where it is listed
    taken = {}

    class Taking(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            taken.update({n: t.clone() for n, t in pl_module.state_dict().items()})

    others = [Taking(), keep, ModelSummary()]
    callbacks = [peft, *others] if first else [*others, peft]
    module = Net()
    trainer(*callbacks, enable_checkpointing=True).fit(module, Rows())
    assert keys_of(tmp_path / "a.ckpt") == taken.keys()
    assert "backbone.adapter.weight" not in taken


@pytest.fixture
def untrained(way, trainer):
    """A module that is adapted and has not made a step."""
    module = way.make()
    trainer(*way.callbacks(), max_steps=0).fit(module, way.data())
    return module


def test_the_learning_rate_finder_leaves_everything_as_it_was(way, untrained, trainer):
    """It trains, then restores a checkpoint: what is in neither stays as the search has left it."""
    before, tuner = everything(untrained), Tuner(trainer(*way.callbacks(), max_epochs=4))
    assert way.rate(untrained) == 0.01
    found = tuner.lr_find(untrained, datamodule=way.data(), num_training=16, early_stop_threshold=None)
    assert len(found.results["lr"]) > 3
    assert way.rate(untrained) == found.suggestion() != 0.01
    assert unchanged(untrained, before)


def test_the_batch_size_finder_leaves_everything_as_it_was(way, untrained, trainer):
    data, before = way.data(), everything(untrained)
    tuner = Tuner(trainer(*way.callbacks()))
    size = tuner.scale_batch_size(untrained, datamodule=data, init_val=4, steps_per_trial=2, max_trials=2)
    assert size == data.batch_size > 4
    assert unchanged(untrained, before)


def test_statistics_of_the_frozen_base_stay_and_those_beside_it_are_kept(trainer, tmp_path):
    module = Net()
    before = everything(module)
    t = trainer(PeftCallback(LoRA(r=2), "backbone"))
    t.fit(module, Rows())
    t.save_checkpoint(tmp_path / "a.ckpt")
    after = dict(module.named_buffers())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(after[f"backbone.norm.{name}"], before[f"backbone.norm.{name}"])
        assert not torch.equal(after[f"head.0.{name}"], before[f"head.0.{name}"])
        assert {f"backbone.norm.{name}", f"head.0.{name}"} <= keys_of(tmp_path / "a.ckpt")
    module.backbone.norm.running_mean.add_(1)  # whoever trained them otherwise finds them in the file too
    t.save_checkpoint(tmp_path / "b.ckpt")
    again = load_from_checkpoint(Net, tmp_path / "b.ckpt")
    assert same(again, module)


def test_a_frozen_module_is_left_out_whatever_it_is_called_and_a_trained_one_is_not(trainer, tmp_path):
    module = Net()
    module.head.add_module("lora_B", nn.Linear(3, 3))
    t = trainer(PeftCallback(LoRA(r=2), "backbone"))
    t.fit(module, Rows())
    t.save_checkpoint(tmp_path / "a.ckpt")
    beside = {n for n in module.state_dict() if not n.startswith("backbone.")}
    assert {"head.lora_B.weight", "head.lora_B.bias"} <= beside
    buffers = {f"backbone.{n}" for n, _ in module.backbone.named_buffers()}
    adapter = {f"backbone.adapters.default.{n}" for n in Adapter(module.backbone).tree.state_dict()}
    assert keys_of(tmp_path / "a.ckpt") == beside | buffers | adapter


class Tied(Net):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = BUILDERS["gpt2"](), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = (x * 10).long().clamp(0, 96)
        return self.backbone(ids).logits[:, -1, :3]


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), LoRA(r=2, target_modules=["wte"]), Selective(parameter_types=["embedding"])],
    ids=["beside the tie", "on one end", "in place"],
)
def test_tied_weights_stay_tied_and_are_in_no_file_unless_they_train(method, trainer, tmp_path):
    module = Tied()
    t = trainer(PeftCallback(method, "backbone"))
    t.fit(module, Rows())
    t.save_checkpoint(tmp_path / "a.ckpt")
    again = load_from_checkpoint(Tied, tmp_path / "a.ckpt")
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.eval()(x), module.eval()(x))
    for tied in (module, again):
        assert tied.backbone.lm_head.weight is tied.backbone.transformer.wte.weight
    resumed = Tied()
    trainer(PeftCallback(method, "backbone"), max_epochs=3).fit(resumed, Rows(), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.backbone.lm_head.weight is resumed.backbone.transformer.wte.weight
    ends = {"backbone.lm_head.weight", "backbone.transformer.wte.weight"}
    assert bool(ends & keys_of(tmp_path / "a.ckpt")) == isinstance(method, Selective)


def test_two_adapters_are_both_saved_and_the_one_that_trains_goes_on(trainer, tmp_path):
    def make():
        module = Net()
        torch.manual_seed(4)
        adapt(module.backbone, LoRA(r=3), "first").requires_grad_(False)
        adapt(module.backbone, LoRA(r=2, lora_dropout=0.1), "second")
        with torch.no_grad():
            module.backbone.adapters["first"].adapter.lora_B.fill_(0.1)
        activate(module.backbone, "first", "second")
        return module

    def fit(module, epochs, **options):
        t = trainer(PeftCallback(LoRA(r=2, lora_dropout=0.1), "backbone", name="second"), max_epochs=epochs)
        t.fit(module, Rows(), **options)
        return t

    whole, half, again = make(), make(), make()
    torch.manual_seed(1)
    fit(whole, 4)
    torch.manual_seed(1)
    fit(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    kept = keys_of(tmp_path / "half.ckpt")
    assert {f"backbone.adapters.{n}.adapter.lora_B" for n in ("first", "second")} <= kept
    with torch.no_grad():
        again.backbone.adapters["first"].adapter.lora_B.fill_(7.0)  # it comes from the file
    fit(again, 4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(again, whole)


def test_accumulated_gradients_are_those_of_one_large_batch_after_an_interruption_too(trainer, tmp_path):
    def fit(module, batch, accumulated, epochs=4, **options):
        data = Rows(batch)
        data.train_dataloader = data.val_dataloader
        t = trainer(PeftCallback(LoRA(r=2), "backbone"), accumulate_grad_batches=accumulated, max_epochs=epochs)
        torch.manual_seed(3)
        t.fit(module, data, **options)
        return t

    large, small, half, again = (without_batch_norm(Net()) for _ in range(4))
    fit(large, 8, 1)
    assert fit(small, 2, 4).global_step == 16
    fit(half, 2, 4, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(again, 2, 4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(again, small)
    for name, expected in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], expected, rtol=1e-4, atol=1e-5)


def test_everything_that_trains_is_in_the_optimizer_though_values_are_alike(way, untrained):
    """B starts at zero, and so equals every other zero tensor of its shape."""
    held = {id(p) for group in untrained.trainer.optimizers[0].param_groups for p in group["params"]}
    trained = {n for n, p in untrained.named_parameters() if p.requires_grad}
    assert way.adapter in trained
    assert way.base not in trained
    assert {n for n, p in untrained.named_parameters() if id(p) in held} == trained


@pytest.mark.filterwarnings("ignore:this run goes on in the middle of an epoch")  # whose loader is a plain one
def test_a_run_goes_on_in_the_middle_of_an_epoch_with_the_moments_it_had(way, trainer, tmp_path):
    class Interrupted(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                self.moments = states(trainer)

    def states(trainer):
        return [{k: v.clone() for k, v in s.items()} for s in trainer.optimizers[0].state.values()]

    class Resumed(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.moments, self.step = states(trainer), trainer.global_step
            self.state = {n: t.clone() for n, t in pl_module.state_dict().items()}

    note, resumed = Interrupted(), Resumed()
    trainer(*way.callbacks(), note, max_epochs=1).fit(way.make(), way.data())
    t = trainer(*way.callbacks(), resumed, max_epochs=1)
    t.fit(way.make(), way.data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed.step == 3
    assert len(resumed.moments) == len(note.moments) > 1
    for one, other in zip(resumed.moments, note.moments, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in other)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(resumed.state[n], x) for n, x in saved.items())


def test_the_summary_and_the_trainer_see_what_trains_and_keep_their_own_functions(way, trainer):
    """Printed when the fit starts; nothing of the Trainer's is replaced."""

    class Summary(ModelSummary):
        def on_fit_start(self, trainer, pl_module):
            self.counted = self._summary(trainer, pl_module).trainable_parameters

    module, summary, t = way.make(), Summary(), trainer(*way.callbacks(), max_steps=1)
    t.callbacks.insert(0, summary)
    t.fit(module, way.data())
    assert summary.counted == sum(p.numel() for p in module.parameters() if p.requires_grad)
    for part in (t, t.strategy, t._checkpoint_connector, t.fit_loop, t.strategy.checkpoint_io):
        assert not [n for n, value in vars(part).items() if callable(value) and callable(getattr(type(part), n, None))]


COMPILED = {
    "whole": lambda module: torch.compile(module, backend="eager"),
    "submodule in place": lambda module: module.backbone.compile(backend="eager"),
    "layer in place": lambda module: module.backbone.adapter.compile(backend="eager"),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("part", COMPILED)
def test_a_compiled_module_trains_the_same_and_writes_the_same_files(part, before, trainer, tmp_path):
    states = []
    for compiled in (False, True):
        module = given = Net()
        torch.compiler.reset()
        for step in ("first", "second"):
            if compiled and (step == "first") == before:
                made = COMPILED[part](module)
                given = module if made is None else made
            torch.manual_seed(1)
            t = trainer(PeftCallback(LoRA(r=2), "backbone"), max_epochs=1, limit_train_batches=3, limit_val_batches=0)
            t.fit(given, Rows())
        t.save_checkpoint(tmp_path / "a.ckpt")
        states.append(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
        assert same(load_from_checkpoint(Net, tmp_path / "a.ckpt"), module)
    torch.compiler.reset()
    plain, found = states
    assert plain.keys() == found.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("place", ["backbone", "backbone.adapter"])
def test_what_torch_compile_has_wrapped_is_refused_with_the_call_that_keeps_names(place, trainer):
    module = Net()
    module.set_submodule(place, torch.compile(module.get_submodule(place), backend="eager"))
    with pytest.raises(ValueError, match=r"wrapped by torch.compile\(\), which puts _orig_mod .* call its compile\(\)"):
        trainer(PeftCallback(LoRA(r=2), "backbone")).fit(module, Rows())


class Replacing(Precision):
    """Puts a class of its own in place of every Linear, as bitsandbytes' and Transformer Engine's plugins do."""

    class Cast(nn.Linear):
        pass

    def convert_module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            for name, child in part.named_children():
                if type(child) is nn.Linear:
                    made = self.Cast(child.in_features, child.out_features)
                    made.load_state_dict(child.state_dict())
                    setattr(part, name, made.requires_grad_(child.weight.requires_grad))
        return module


def test_a_plugin_that_replaces_linear_layers_takes_no_adapter_with_them(trainer, tmp_path):
    module = Net()
    t = trainer(PeftCallback(LoRA(r=2), "backbone"), plugins=[Replacing()])
    t.fit(module, Rows())
    assert isinstance(module.backbone.adapter, Replacing.Cast)
    adapter = Adapter(module.backbone)
    assert all(p.abs().sum() > 0 for n, p in adapter.tree.named_parameters() if n.endswith("lora_B"))
    x = torch.randn(3, 6)
    with adapter.disabled():
        base = module.eval()(x)
    assert not torch.equal(module(x), base)
    t.save_checkpoint(tmp_path / "a.ckpt")
    assert "backbone.adapter.weight" not in keys_of(tmp_path / "a.ckpt")


def test_the_patched_hook_counts_as_overridden_and_goes_along_with_copies(trainer):
    """Lightning skips a hook that it takes for its own, and a copy must not adapt the original."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    module = Net()
    assert not is_overridden("configure_model", module)
    trainer(PeftCallback(LoRA(r=2), "backbone"), max_steps=1).fit(module, Rows())
    assert is_overridden("configure_model", module)
    twin = copy.deepcopy(module)
    assert twin.configure_model.args == (twin,)
