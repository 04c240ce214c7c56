"""PeftCallback on LightningModules that know nothing of adapters."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PeftCallback, PromptTuning, Selective, adapt, load_from_checkpoint
from lightning_peft.core.adapters import adapters_of
from tests.conftest import BUILDERS


class Net(L.LightningModule):
    """A backbone and a head, built where ``where`` says."""

    def __init__(self, where: str = "__init__", lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        if where == "__init__":
            self.make()

    def make(self) -> None:
        if not hasattr(self, "backbone"):
            torch.manual_seed(0)
            kind = {"dtype": torch.get_default_dtype()}
            self.backbone = nn.Sequential(nn.Linear(6, 16, **kind), nn.ReLU(), nn.Linear(16, 8, **kind))
            self.head = nn.Linear(8, 3, **kind)

    def setup(self, stage: str) -> None:
        if self.hparams.where == "setup":
            self.make()

    def configure_model(self) -> None:
        if self.hparams.where == "configure_model":
            self.make()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.backbone(x)), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.head(self.backbone(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


WHERE = pytest.mark.parametrize("where", ["__init__", "setup", "configure_model"])


@WHERE
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_model_is_found_wherever_it_is_built_and_trains_in_float32(where, precision, loader, trainer):
    net = Net(where)
    trainer(PeftCallback(LoRA(r=2), model="backbone"), precision=precision).fit(net, loader, loader)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {
        *(f"backbone.adapters.default.{i}.lora_{m}" for i in (0, 2) for m in "AB"),
        "head.weight",
        "head.bias",
    }
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    states = net.trainer.optimizers[0].state.values()
    assert {t.dtype for s in states for n, t in s.items() if n != "step"} == {torch.float32}
    if precision == "bf16-true":
        assert net.backbone[0].weight.dtype == torch.bfloat16
        assert net.backbone(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16


@WHERE
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("method", [LoRA(r=2), Selective(parameter_types=["bias"]), Selective(keep_originals=False)])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(where, precision, method, loader, trainer, tmp_path):
    whole, first, after = Net(where), Net(where), Net(where)
    torch.manual_seed(5)
    trainer(PeftCallback(method, "backbone"), precision=precision, max_epochs=4).fit(whole, loader)
    torch.manual_seed(5)
    half = trainer(PeftCallback(method, "backbone"), precision=precision, max_epochs=2)
    half.fit(first, loader)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = trainer(PeftCallback(method, "backbone"), precision=precision, max_epochs=4)
    resumed.fit(after, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    expected = whole.state_dict()
    assert after.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in after.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.filterwarnings("ignore:this run goes on in the middle of an epoch")
@pytest.mark.parametrize("every", ["epoch", "step"])
def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(every, loader, trainer, tmp_path):
    """Dropout, and the loader's order where the interruption lies between two epochs."""
    method = LoRA(r=2, lora_dropout=0.3)
    x, y = loader.dataset.tensors
    if every == "step":  # a plain loader that goes on in the middle of an epoch begins anew: all batches are alike
        x, y = x[:8].repeat(4, 1), y[:8].repeat(4)
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=every == "epoch")
    keep = {"every_n_train_steps": 6} if every == "step" else {"every_n_epochs": 1}
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **keep)
    whole, again = Net(), Net()
    torch.manual_seed(5)
    t = trainer(PeftCallback(method, "backbone"), checkpoint, enable_checkpointing=True, max_epochs=4)
    t.fit(whole, data, loader)
    torch.manual_seed(123)
    path = tmp_path / ("step=6.ckpt" if every == "step" else "step=8.ckpt")
    resumed = trainer(PeftCallback(method, "backbone"), max_epochs=4)
    resumed.fit(again, data, loader, ckpt_path=path, weights_only=True)
    expected = whole.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in again.state_dict().items())


@WHERE
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_what_trains_and_rebuilds_the_module(where, weights_only, loader, trainer, tmp_path):
    net = Net(where)
    t = trainer(PeftCallback(LoRA(r=2), model="backbone"))
    t.fit(net, loader)
    t.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert "backbone.0.weight" not in saved["state_dict"]
    assert set(saved["state_dict"]) == set(saved["lightning_peft"]["tensors"])
    assert saved["lightning_peft"]["methods"]["default"]["_target_"] == "lightning_peft.LoRA"
    again = load_from_checkpoint(Net, tmp_path / "a.ckpt")
    assert type(again) is Net
    x = torch.randn(3, 6)
    assert torch.equal(again.head(again.backbone(x)), net.head(net.backbone(x)))
    assert load_from_checkpoint(Net, tmp_path / "a.ckpt", lr=0.5).hparams.lr == 0.5


def test_the_same_model_is_seen_by_fit_validate_test_and_predict(loader, trainer):
    net, callback = Net("configure_model"), PeftCallback(LoRA(r=2), model="backbone")
    trainer(callback).fit(net, loader, loader)
    base = copy.deepcopy(net)
    base.backbone = Net().backbone
    for run in ("validate", "test", "predict"):
        getattr(trainer(PeftCallback(LoRA(r=2), model="backbone")), run)(net, loader)
        assert len(adapters_of(net.backbone)) == 1
    (first, *_) = trainer(PeftCallback(LoRA(r=2), model="backbone")).predict(net, loader)
    x = next(iter(loader))[0]
    assert not torch.allclose(first, base.head(base.backbone(x)))


def test_an_adapted_module_is_not_adapted_twice(loader, trainer):
    net = Net()
    for _ in range(2):
        trainer(PeftCallback(LoRA(r=2), model="backbone"), max_epochs=1).fit(net, loader)
    assert list(adapters_of(net.backbone)) == ["default"]
    with pytest.raises(ValueError, match="already adapted by another method: r was 2 and is 4 here; remove"):
        trainer(PeftCallback(LoRA(r=4), model="backbone")).fit(net, loader)
    with pytest.raises(ValueError, match="use one PeftCallback"):
        trainer(PeftCallback(LoRA(r=2))).fit(net, loader)


def test_a_refused_method_leaves_the_module_usable(loader, trainer):
    """Refused beside another, or by the model itself: what follows is as if it had not been asked for."""
    net = Net()
    with pytest.raises(ValueError, match="nowhere"):
        trainer(PeftCallback(LoRA(target_modules=["nowhere"]), "backbone")).fit(net, loader)
    trainer().test(net, loader, verbose=False)
    assert adapters_of(net.backbone) is None
    trainer(PeftCallback(LoRA(r=2, target_modules=["backbone.0"]))).fit(net, loader)

    adapted = Net()
    trainer(PeftCallback(LoRA(r=2), "backbone")).fit(adapted, loader)
    expected = adapted.backbone(torch.ones(1, 6))
    with pytest.raises(ValueError, match="already adapted by another method: r was 2 and is 4 here"):
        trainer(PeftCallback(LoRA(r=4), "backbone")).fit(adapted, loader)
    trainer().test(adapted, loader, verbose=False)
    assert torch.equal(adapted.backbone(torch.ones(1, 6)), expected)
    by_hand = Net()
    adapt(by_hand, LoRA(r=2))
    with pytest.raises(ValueError, match="already adapted at 'its root', but got model='backbone'"):
        trainer(PeftCallback(LoRA(r=2), "backbone")).fit(by_hand, loader)
    trainer().test(by_hand, loader, verbose=False)


def test_without_model_the_whole_module_is_the_base(loader, trainer):
    net = Net()
    trainer(PeftCallback(LoRA(r=2, target_modules=["backbone.0"], modules_to_save=["head"]))).fit(net, loader)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {
        "adapters.default.backbone.0.lora_A",
        "adapters.default.backbone.0.lora_B",
        "adapters.default.head.weight",
        "adapters.default.head.bias",
    }


def test_the_printed_plan_names_places_from_the_module_and_lists_what_trains_beside(loader, trainer, capsys):
    class Guided(Net):
        def make(self):
            super().make()
            self.teacher = nn.Linear(6, 3).requires_grad_(False)

    net = Guided()
    trainer(PeftCallback(LoRA(r=2), model="backbone"), max_epochs=1).fit(net, loader)
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("LoRA:", "  "))]
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    total = sum(p.numel() for n, p in net.named_parameters() if "adapters" not in n)
    assert printed[0][2:4] == [str(trained), "parameters"]
    assert f"the model's {total}," in " ".join(printed[0])
    assert " ".join(printed[1]) == "backbone.* LoRA, 2 x, 92 parameters"
    assert " ".join(printed[2]) == "head outside the adapted submodule, trains as before, 1 x, 27 parameters"
    assert not any("teacher" in line for line in printed)


def test_a_checkpoint_of_another_base_or_method_is_refused(loader, trainer, tmp_path):
    t = trainer(PeftCallback(LoRA(r=2), model="backbone"))
    t.fit(Net(), loader)
    t.save_checkpoint(tmp_path / "a.ckpt")
    other = Net()
    nn.init.normal_(other.backbone[0].weight)
    with pytest.raises(ValueError, match=r"another base: fingerprint \w+, but this model has"):
        trainer(PeftCallback(LoRA(r=2), model="backbone")).fit(other, loader, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="another method: lora_alpha was 16 and is 1 here"):
        trainer(PeftCallback(LoRA(r=2, lora_alpha=1), model="backbone")).fit(
            Net(), loader, ckpt_path=tmp_path / "a.ckpt"
        )
    plain = trainer()
    plain.fit(Net(), loader)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="says nothing of an adapter"):
        load_from_checkpoint(Net, tmp_path / "plain.ckpt")


def test_loading_stays_strict_for_what_was_saved(loader, trainer, tmp_path):
    t = trainer(PeftCallback(LoRA(r=2), model="backbone"))
    t.fit(Net(), loader)
    t.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del saved["state_dict"]["backbone.adapters.default.0.lora_A"]
    torch.save(saved, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=r"lacks 1 of the tensors that it lists, such as backbone\.adapters"):
        load_from_checkpoint(Net, tmp_path / "cut.ckpt")


def test_parameters_without_a_gradient_are_named(loader, trainer):
    class Unused(Net):
        def training_step(self, batch, batch_idx):
            return self.head(self.backbone[0](batch[0])[:, :8]).pow(2).mean()

    with pytest.warns(UserWarning, match=r"no gradient reached 2 trainable parameters: backbone.adapters.default.2"):
        trainer(PeftCallback(LoRA(r=2), model="backbone"), max_epochs=1).fit(Unused(), loader)


def test_a_copied_or_pickled_module_goes_on_with_its_adapter_and_small_checkpoints(loader, trainer, tmp_path):
    net = Net("configure_model")
    trainer(PeftCallback(LoRA(r=2), model="backbone"), max_epochs=1).fit(net, loader)
    net.trainer = None
    x = torch.randn(3, 6)
    before = net.backbone(x)
    torch.save(net, tmp_path / "net.pt")
    stored = torch.load(tmp_path / "net.pt", weights_only=False)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), stored):
        assert torch.equal(twin.backbone(x), before)
        t = trainer(max_epochs=1)
        t.fit(twin, loader)
        assert list(adapters_of(twin.backbone)) == ["default"]
        assert not torch.equal(twin.backbone(x), before)
        t.save_checkpoint(tmp_path / "twin.ckpt")
        assert "backbone.0.weight" not in torch.load(tmp_path / "twin.ckpt", weights_only=True)["state_dict"]
        again = load_from_checkpoint(Net, tmp_path / "twin.ckpt")
        assert torch.equal(again.backbone(x), twin.backbone(x))
    assert torch.equal(net.backbone(x), before)


class Rebuilt(Net):
    """Its ``setup`` builds the layers at every call."""

    def setup(self, stage: str) -> None:
        for name in [n for n in ("backbone", "head") if hasattr(self, n)]:
            delattr(self, name)
        self.make()


@pytest.mark.parametrize("method", [LoRA(r=2), Selective(parameter_types=["bias"])])
@pytest.mark.parametrize("again", [True, False])
def test_a_submodule_that_setup_builds_anew_keeps_its_adapter(method, again, loader, trainer):
    net, callback = Rebuilt(), PeftCallback(method, model="backbone")
    trainer(callback).fit(net, loader)
    before, x = net.backbone, torch.randn(3, 6)
    trainer(*([callback] if again else [])).test(net, loader, verbose=False)
    assert net.backbone is not before
    assert torch.equal(net.backbone(x), before(x))
    assert not torch.equal(net.backbone(x), Net().backbone(x))


@pytest.mark.parametrize("method", [LoRA(r=2, target_modules=["backbone.0"]), Selective(parameter_types=["bias"])])
@pytest.mark.parametrize("again", [True, False])
def test_an_adapter_that_parts_built_anew_would_lose_is_an_error(method, again, loader, trainer):
    net, callback = Rebuilt(), PeftCallback(method)
    trainer(callback).fit(net, loader)
    with pytest.raises(RuntimeError, match=r"'backbone.0' has been built anew, so the adapter .* is gone; build it"):
        trainer(*([callback] if again else [])).test(net, loader, verbose=False)


def test_a_submodule_that_setup_builds_with_other_weights_is_an_error(loader, trainer):
    class Random(Rebuilt):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            nn.init.constant_(self.backbone[0].bias, 0.1 if stage == "fit" else 0.2)

    net, callback = Random(), PeftCallback(LoRA(r=2), model="backbone")
    trainer(callback).fit(net, loader)
    with pytest.raises(RuntimeError, match="adapted submodule has been built anew, with other weights than those"):
        trainer(callback).test(net, loader, verbose=False)


@pytest.mark.parametrize("other", [LoRA(r=2), LoRA(r=4)])
def test_a_trainer_takes_one_callback(other, loader, trainer):
    first = PeftCallback(LoRA(r=2), model="backbone")
    with pytest.raises(ValueError, match=r"takes one PeftCallback, but got PeftCallback\(LoRA\(r=.*with adapt\(\)"):
        trainer(first, PeftCallback(other, model="backbone")).fit(Net(), loader)


def test_a_prompt_goes_to_the_one_language_model_or_the_candidates_are_listed(trainer, loader):
    class Two(Net):
        def make(self):
            super().make()
            self.first, self.second = BUILDERS["bert"](), BUILDERS["gpt2"]()

    with pytest.raises(ValueError, match=r"found \['first', 'second'\]"):
        trainer(PeftCallback(PromptTuning(4))).fit(Two(), loader)
    with pytest.raises(ValueError, match="found none in Net"):
        trainer(PeftCallback(PromptTuning(4))).fit(Net(), loader)


def test_the_learning_rate_finder_works_on_an_adapted_module(loader, trainer, tmp_path):
    from lightning.pytorch.tuner import Tuner

    net = Net()
    finder = Tuner(trainer(PeftCallback(LoRA(r=2), model="backbone"))).lr_find(net, loader, num_training=5)
    assert len(finder.results["lr"]) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_on_a_gpu_what_trains_is_float32_in_every_precision(precision, loader, trainer):
    net = Net("configure_model")
    trainer(PeftCallback(LoRA(r=2), model="backbone"), precision=precision, accelerator="gpu", devices=1).fit(
        net, loader
    )
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    assert any(p.abs().max() > 0 for n, p in net.named_parameters() if n.endswith("lora_B"))


def test_a_word_instead_of_a_method_and_an_unknown_submodule_are_refused(trainer, loader):
    with pytest.raises(TypeError, match=r"a method such as LoRA.* is expected"):
        PeftCallback("lora")
    with pytest.raises(ValueError, match="no submodule 'backbon'; did you mean 'backbone'"):
        trainer(PeftCallback(LoRA(r=2), model="backbon")).fit(Net(), loader)


@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides")
def test_weight_averaging_keeps_to_what_trains(loader, trainer, tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    net = Net()
    t = trainer(PeftCallback(LoRA(r=2), model="backbone"), EMAWeightAveraging(decay=0.5))
    t.fit(net, loader)
    t.save_checkpoint(tmp_path / "ema.ckpt")
    saved = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    assert "backbone.0.weight" not in saved["state_dict"]
    assert "backbone.adapters.default.0.lora_A" in saved["state_dict"]


def test_a_module_whose_adapter_is_merged_for_good_saves_all_of_itself(loader, trainer, tmp_path):
    callback = PeftCallback(LoRA(r=2), model="backbone")
    module, t = Net(), trainer(callback)
    t.fit(module, loader)
    expected = set(Net().state_dict())
    callback.adapter(module).merge_and_unload()
    assert set(module.state_dict()) == expected


def test_biases_that_a_later_adapter_trains_in_place_are_in_the_checkpoint_too(loader, trainer):
    callback = PeftCallback(LoRA(r=2), model="backbone")
    module = Net()
    trainer(callback).fit(module, loader)
    assert "backbone.0.bias" not in module.state_dict()
    adapt(module.backbone, LoRA(r=2, bias="lora_only"), "second")
    assert "backbone.0.bias" in module.state_dict()


def test_a_module_adapted_by_hand_gets_small_checkpoints_and_float32_too(loader, trainer, tmp_path):
    module = Net()
    adapt(module.backbone, LoRA(r=2))
    t = trainer(PeftCallback(LoRA(r=2), model="backbone"), precision="bf16-true")
    t.fit(module, loader)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    t.save_checkpoint(tmp_path / "a.ckpt")
    names = set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert "backbone.0.weight" not in names
    assert {"head.weight", "backbone.adapters.default.0.lora_A"} <= names
    loaded = load_from_checkpoint(Net, tmp_path / "a.ckpt")
    trainer(PeftCallback(LoRA(r=2), model="backbone"), precision="bf16-true").fit(loaded, loader)
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}


def test_a_removed_adapter_does_not_come_back_by_itself_and_another_may_follow_elsewhere(loader, trainer):
    callback = PeftCallback(LoRA(r=2), model="backbone")
    module = Net()
    trainer(callback).fit(module, loader)
    callback.adapter(module).remove()
    trainer().fit(module, loader)
    assert adapters_of(module.backbone) is None
    trainer(PeftCallback(LoRA(r=2, target_modules=["head"]))).fit(module, loader)
    assert adapters_of(module) is not None
    assert adapters_of(module.backbone) is None
    assert "backbone.0.weight" not in module.state_dict()


def test_a_checkpoint_of_two_adapters_says_how_it_is_loaded(loader, trainer, tmp_path):
    t = trainer(PeftCallback(LoRA(r=2), model="backbone"))
    module = Net()
    t.fit(module, loader)
    adapt(module.backbone, LoRA(r=2), "second")
    t.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"holds the adapters \['default', 'second'\]"):
        load_from_checkpoint(Net, tmp_path / "two.ckpt")
