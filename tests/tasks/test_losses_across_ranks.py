"""Losses of tokens that count, packed, in two processes: under DDP and FSDP2 what one process gives for all rows."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_peft import IA3, BottleneckAdapter, LoRA, adapt
from lightning_peft.core.adapters import adapters_of
from lightning_peft.tasks.counted import counted

LENGTHS = ((12, 3, 7, 5), (4, 8, 10, 6))  # the rows of each rank
METHODS = {
    "LoRA": lambda: LoRA(r=4, target_modules="all-linear"),
    "DoRA": lambda: LoRA(r=4, target_modules="all-linear", use_dora=True),
    "IA3": IA3,
    "bottleneck": lambda: BottleneckAdapter(mh_adapter=True, output_adapter=True, reduction_factor=4),
}


def _model(method):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=97, pad_token_id=0))
    adapt(model, METHODS[method]())
    with torch.no_grad():
        for i, p in enumerate(adapters_of(model).parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    return model.train()


def _batch(rank):
    lengths = torch.tensor(LENGTHS[rank])[:, None]
    ids = torch.randint(3, 97, (len(lengths), 12), generator=torch.Generator().manual_seed(rank))
    mask = (torch.arange(12) < lengths).long()
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


class _Loss(torch.nn.Module):
    """What DDP wraps, as Lightning's strategy wraps a LightningModule: its forward is the step."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return counted(self.model, batch).total()


def _shapes(module):
    """Shapes of what a module is called with, from now on."""
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


def _gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def _run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for method in METHODS:
        for strategy in ("ddp", "fsdp2"):
            model = _model(method)
            if strategy == "fsdp2":
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
            step = _Loss(model)
            shapes = _shapes(model.get_input_embeddings())
            step = DistributedDataParallel(step) if strategy == "ddp" else step
            total = step(_batch(rank))
            total.backward()
            found = {"total": total.detach(), "gradients": _gradients(model), "shape": shapes[-1]}
            torch.save(found, f"{folder}/{method}-{strategy}-{rank}.pt")
    dist.barrier()  # nobody leaves while another one still reduces
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each of two processes finds."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_run, (str(folder),), nprocs=2)
    return folder


def _plain(model, batch):
    """The sum of cross-entropies of the padded batch, from all logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_losses_and_gradients_of_one(folder, method, strategy):
    model = _model(method)
    totals = [_plain(model, _batch(rank)) for rank in (0, 1)]
    (sum(totals) / 2).backward()  # both strategies take the mean of the ranks' gradients
    for rank, total in enumerate(totals):
        found = torch.load(folder / f"{method}-{strategy}-{rank}.pt", weights_only=True)
        assert found["shape"][0] < len(LENGTHS[rank])  # packed
        torch.testing.assert_close(found["total"], total.detach(), rtol=1e-5, atol=1e-5)
        expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert found["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-5)
