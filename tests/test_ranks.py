"""More devices give the run of one device with the same rows in each optimizer step."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys, logging, warnings
warnings.filterwarnings("ignore")
import lightning as L, torch
from lightning_peft import LoRA, PeftModule, TextDataModule

if __name__ == "__main__":
    model, files, devices, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    L.seed_everything(0, verbose=False)
    module = PeftModule(model, LoRA(r=2), "sft", {"name": "SGD", "lr": 0.5}, {"name": "constant"})
    data = TextDataModule(train_files=files, validation_files=files, batch_size=8 // devices, max_length=24)
    strategy = "ddp" if devices > 1 else "auto"
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_epochs=2, limit_val_batches=0,
                        use_distributed_sampler=False, **quiet)
    trainer.fit(module, data)
    trainer.save_checkpoint(out)
"""


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(llama_folder, tmp_path):
    """Completions of very different lengths, so that a mean of the ranks' means would be another gradient."""
    rows = [{"prompt": f"say {i}", "completion": "red " * (1 + (i * 7) % 13)} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "run.py").write_text(SCRIPT)
    states = []
    for devices in (1, 2):
        words = [llama_folder, tmp_path / "pairs.jsonl", devices, tmp_path / f"{devices}.ckpt"]
        done = subprocess.run(
            [sys.executable, tmp_path / "run.py", *map(str, words)], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        states.append(torch.load(tmp_path / f"{devices}.ckpt", weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert any(t.abs().max() > 0 for n, t in states[0].items() if n.endswith("lora_B"))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)
