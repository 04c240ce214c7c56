"""What the tests of strategies run in several processes: fits, one after the other.

    torchrun --standalone --nproc-per-node 2 train.py LLAMA ROWS JOBS

JOBS is a JSON file with a list of dictionaries: ``method`` (plain values), ``strategy`` (``one``, ``ddp``, ``fsdp``
with whole checkpoints, ``fsdp_distributed`` with one file a process), ``middle`` and ``save``, where checkpoints go in
the middle of an epoch and at the end, ``resume``, ``base`` for options of the model, and ``own`` for a LightningModule
that shards its model itself, ``seeds`` for processes that draw with seeds of their own. What a job finds is written to
``<save>.json``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_peft import PeftCallback, PeftModule, TextDataModule, adapt
from lightning_peft.methods.config import method_from_config

ROWS = 8  # in a step, over all processes: three steps are an epoch
MIDDLE, STEPS = 2, 5


def _strategy(name, processes):
    if name.startswith("fsdp"):
        distributed = name == "fsdp_distributed"
        return ModelParallelStrategy(processes, 1, save_distributed_checkpoint=distributed)
    return {"one": "auto", "ddp": "ddp"}[name]


class _SaveInTheMiddle(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.path and trainer.global_step == MIDDLE:
            trainer.save_checkpoint(self.path)


class _Own(L.LightningModule):
    """What the guide shows: adapted first, sharded then."""

    def __init__(self, folder, method):
        super().__init__()
        self.folder, self.method, self.model = folder, method, None

    def configure_model(self):
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder)
            adapt(self.model, self.method)
            if self.device_mesh is not None:
                for block in self.model.model.layers:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, eps=1e-2)


def _trainer(job, processes, callbacks):
    return L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        strategy=_strategy(job["strategy"], processes),
        max_steps=STEPS,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def _run_own(module, job, processes):
    trainer = _trainer(job, processes, [PeftCallback(module.method, model="model", print_plan=False)])
    rank = int(os.environ.get("RANK", "0"))
    rows = (torch.arange(ROWS * STEPS * 12).view(STEPS, ROWS, 12) % 90 + 3).tensor_split(processes, 1)[rank]
    trainer.fit(module, DataLoader(rows.flatten(0, 1), ROWS // processes))
    trainer.save_checkpoint(job["save"])
    return {"loss": 0.0}


def run(model, rows, job, processes):
    """Trains, saves, and says what the validation loss is then."""
    L.seed_everything(int(os.environ.get("RANK", "0")) if job.get("seeds") else 0, verbose=False)
    method = method_from_config(job["method"])
    if job.get("own"):
        return _run_own(_Own(model, method), job, processes)
    # smooth where a gradient is nearly zero, so that the order of sums does not decide a step
    optimizer = {"name": "AdamW", "lr": 0.01, "eps": 1e-2}
    module = PeftModule({"name_or_path": model, **job.get("base", {})}, method, "sft", optimizer, {"name": "constant"})
    data = TextDataModule(
        train_files=rows, validation_files=rows, batch_size=ROWS // processes, max_length=24, cache_dir=f"{rows}.cache"
    )
    trainer = _trainer(job, processes, [_SaveInTheMiddle(job.get("middle"))])
    trainer.fit(module, data, ckpt_path=job.get("resume"), weights_only=True)
    trainer.save_checkpoint(job["save"])
    trainer.limit_val_batches = 1.0
    found = trainer.validate(module, data, verbose=False)[0]
    return {"loss": found["val/loss"], "fixed": _fixed_of_all(module)}


def _fixed_of_all(module):
    """What each process has in the fixed tensors of the adapter, as one number."""
    if not torch.distributed.is_initialized():
        return []
    sums = [float(b.double().abs().sum()) for n, b in module.model.named_buffers() if "adapters" in n]
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sums)
    return gathered


def main():
    """Runs the jobs; a job that fails says why, and the next one begins."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, rows, jobs = sys.argv[1:]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for job in json.loads(Path(jobs).read_text()):
        try:
            found = run(model, rows, job, processes)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        if os.environ.get("RANK", "0") == "0":
            Path(f"{job['save']}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stderr.flush()
        os._exit(0)  # taking down the process groups of several Trainers aborts now and then, when all is written


if __name__ == "__main__":
    main()
