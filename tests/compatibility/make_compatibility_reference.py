"""Makes what later versions must load: adapters and checkpoints of the installed version, and what they give.

    python -m tests.compatibility.make_compatibility_reference

It is run once for each released version, and its folder is never changed afterwards.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file

import lightning_peft as lp
from tests.compatibility.models import Wrapped, base_model, batches, outputs

HERE = Path(__file__).parent
METHODS = {
    "lora": lambda: lp.LoRA(r=2, lora_alpha=3, rank_pattern={"v_proj": 3}, modules_to_save=["lm_head"]),
    "dora": lambda: lp.LoRA(r=2, use_dora=True, target_modules=r".*\.(q|v)_proj"),
    "ia3": lambda: lp.IA3(),
    "vera": lambda: lp.VeRA(r=4),
    "shira": lambda: lp.SparseTuning(r=1),
    "tokens": lambda: lp.TrainableTokens([5, 9]),
    "bottleneck": lambda: lp.BottleneckAdapter(reduction_factor=4),
    "norms": lambda: lp.Selective(parameter_types=["norm"]),
    "prompt": lambda: lp.PromptTuning(4),
    "prefix": lambda: lp.PrefixTuning(4),
    "bridge": lambda: lp.HFPeft({"peft_type": "HRA", "r": 2, "target_modules": ["q_proj"]}),
}


def main() -> None:
    folder = HERE / importlib.metadata.version("lightning_peft")
    if folder.exists():
        raise SystemExit(f"{folder} is there: what a released version wrote stays as it is")
    folder.mkdir()
    torch.manual_seed(0)
    base_model().save_pretrained(folder / "base")
    (folder / "base" / "generation_config.json").unlink()
    expected = {}
    for name, make in METHODS.items():
        torch.manual_seed(1)
        model = base_model(folder)
        adapter = _moved(lp.adapt(model, make()))
        adapter.save(folder / name)
        expected[name] = outputs(model)
    served = base_model(folder)
    _moved(lp.adapt(served, lp.LoRA(r=2, rank_pattern={"v_proj": 3}))).save_for("vllm", folder / "served")
    expected["served"] = outputs(served)
    expected["callback"] = _trained_with_the_callback(folder)
    expected["module"] = _trained_with_the_module(folder)
    for card in folder.glob("*/README.md"):
        card.unlink()
    for picture in folder.glob("*/curves.png"):
        picture.unlink()
    save_file(expected, folder / "outputs.safetensors")


def _moved(adapter: lp.Adapter) -> lp.Adapter:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter


def _trainer(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return L.Trainer(
        callbacks=list(callbacks), max_epochs=1, accelerator="cpu", default_root_dir=folder, deterministic=True, **quiet
    )


def _trained_with_the_callback(folder: Path) -> torch.Tensor:
    L.seed_everything(3, verbose=False)
    module = Wrapped(str(folder))
    callback = lp.PeftCallback(lp.LoRA(r=2), model="backbone", print_plan=False)
    trainer = _trainer(folder, callback)
    trainer.fit(module, batches())
    trainer.save_checkpoint(folder / "callback.ckpt")
    return outputs(module.backbone)


def _trained_with_the_module(folder: Path) -> torch.Tensor:
    L.seed_everything(4, verbose=False)
    module = lp.PeftModule(base_model(folder), lp.LoRA(r=2), "causal_lm", {"lr": 0.1})
    trainer = _trainer(folder)
    trainer.fit(module, batches())
    trainer.save_checkpoint(folder / "module.ckpt")
    module.save_adapter(folder / "exported")
    return outputs(module.model)


if __name__ == "__main__":
    main()
