"""What released versions wrote is loaded and gives what it gave."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

import lightning_peft as lp
from tests.compatibility.models import Wrapped, base_model, batches, outputs

HERE = Path(__file__).parent
VERSIONS = sorted(p for p in HERE.iterdir() if (p / "outputs.safetensors").exists())
ADAPTERS = [p for v in VERSIONS for p in sorted(v.iterdir()) if (p / "adapter_model.safetensors").exists()]
# other versions of torch may add up in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _name(path: Path) -> str:
    return f"{path.parent.name}-{path.name}" if path.parent != HERE else path.name


def _expected(version: Path, name: str) -> torch.Tensor:
    return load_file(version / "outputs.safetensors")["module" if name == "exported" else name]


def test_there_is_data_of_this_version():
    """If this fails after a release: python -m tests.compatibility.make_compatibility_reference."""
    assert lp.__version__ in [v.name for v in VERSIONS]
    assert len(ADAPTERS) >= 10 * len(VERSIONS)


@pytest.mark.parametrize("folder", ADAPTERS, ids=_name)
def test_an_adapter_loads_and_says_the_same(folder):
    if folder.name == "bridge":
        pytest.importorskip("peft")
    model = base_model(folder.parent)
    plain = outputs(model)
    adapter = lp.load_adapter(model, folder)
    torch.testing.assert_close(outputs(model), _expected(folder.parent, folder.name), **CLOSE)
    assert not torch.equal(outputs(model), plain)
    adapter.remove()
    assert torch.equal(outputs(model), plain)


@pytest.mark.parametrize("folder", [a for a in ADAPTERS if (a / "lightning_peft.json").exists()], ids=_name)
def test_an_adapter_is_still_written_in_the_same_form(folder, tmp_path):
    """Keys may come, with a new number of the format; none goes while the number stays."""
    if folder.name == "bridge":
        pytest.importorskip("peft")
    again = lp.load_adapter(base_model(folder.parent), folder).save(tmp_path / "a")
    before, now = (json.loads((f / "lightning_peft.json").read_text()) for f in (folder, again))
    if before["format"] == now["format"]:
        assert before.keys() <= now.keys()
        assert before["base"].keys() <= now["base"].keys()
        assert before["tensors"] == now["tensors"]
        assert before["base"]["fingerprint"] == now["base"]["fingerprint"]
        assert before["method"].items() <= now["method"].items()


@pytest.mark.parametrize("version", VERSIONS, ids=_name)
@pytest.mark.parametrize("kind", ["callback", "module"])
def test_a_checkpoint_loads_and_goes_on(version, kind, trainer):
    path = version / f"{kind}.ckpt"
    if kind == "callback":
        loaded = lp.load_from_checkpoint(Wrapped, path, folder=str(version))
        model, again, callbacks = loaded.backbone, Wrapped(str(version)), [lp.PeftCallback(lp.LoRA(r=2), "backbone")]
    else:
        loaded = lp.PeftModule.load_from_checkpoint(path, model=base_model(version))
        model, callbacks = loaded.model, []
        again = lp.PeftModule(base_model(version), lp.LoRA(r=2), "causal_lm", {"lr": 0.1})
    torch.testing.assert_close(outputs(model), _expected(version, kind), **CLOSE)
    L.seed_everything(0, verbose=False)
    more = trainer(*callbacks, max_epochs=2)
    more.fit(again, batches(), ckpt_path=path, weights_only=True)
    assert more.global_step == 8
    trained = again.backbone if kind == "callback" else again.model
    assert not torch.allclose(outputs(trained), _expected(version, kind), atol=1e-3)
