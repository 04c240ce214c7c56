"""LoRA on layers that tensor parallelism has split: the losses and gradients of one process, in the one right order."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_peft import IA3, BottleneckAdapter, LoRA, PromptTuning, Selective, adapt
from lightning_peft.core.adapters import adapters_of
from lightning_peft.core.sharded import cut_like

pytestmark = pytest.mark.slow

METHODS = {
    "lora": LoRA(r=4, lora_alpha=6, target_modules="all-linear"),
    "lora_fa": LoRA(r=4, lora_alpha=6, lora_fa=True, target_modules="all-linear"),
    "rslora": LoRA(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "o_proj"]),
    "saved head": LoRA(r=4, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = torch.arange(48).view(4, 12) % 90 + 3


def _base():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=97, pad_token_id=0))


def _split(model, mesh):
    """As the heads of attention and the inner width of the feed-forward are split commonly."""
    for layer in model.model.layers:
        plan = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
        plan |= {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        if layer is model.model.layers[0]:  # the other's is whole, and so is the adapter on it
            plan = {n: style for n, style in plan.items() if "mlp" not in n}
        parallelize_module(layer, mesh, plan)


def _adapted(model, method, rank=0):
    torch.manual_seed(1 + rank)  # as processes draw that nobody seeds: the first one's numbers count
    adapt(model, METHODS[method])
    for i, (name, p) in enumerate(adapters_of(model).named_parameters()):
        if name.endswith("lora_B"):  # which starts at zero
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1
            with torch.no_grad():
                p.add_(cut_like(noise, p))
    return model


def _step(model, rows):
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {
        "loss": loss.detach(),
        "gradients": {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()},
    }


def _error(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def _run(rank, folder, processes):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{processes}", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes // 2, 2), mesh_dim_names=("data", "tensor"))
    found = {}
    for method in METHODS:
        model = _base()
        _split(model, mesh["tensor"])
        _adapted(model, method, rank if processes == 2 else rank % 2)
        rows = ROWS
        if processes == 4:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh["data"])
            fully_shard(model, mesh=mesh["data"])
            rows = ROWS.chunk(2)[mesh["data"].get_local_rank()]
        found[method] = _step(model, rows)
    if processes == 2:
        found["errors"] = _errors(mesh)
    torch.save(found, f"{folder}/{processes}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _errors(mesh):
    """What is said of other orders, other methods, and calls that want the whole."""
    late, sharded, split = _base(), _base(), _base()
    adapt(late, METHODS["lora"])
    _split(late, mesh["tensor"])
    fully_shard(sharded, mesh=mesh["tensor"])
    _split(split, mesh["tensor"])
    errors = {
        "split after": _error(lambda: late(input_ids=ROWS)),
        "sharded before": _error(lambda: adapt(sharded, METHODS["lora"])),
        "another method": _error(lambda: adapt(split, IA3())),
        "bottleneck": _error(lambda: adapt(split, BottleneckAdapter())),
        "prompt": _error(lambda: adapt(split, PromptTuning(num_virtual_tokens=2))),
        "in place": _error(lambda: adapt(split, Selective(parameter_types=["norm"]))),
        "split copy": _error(lambda: adapt(split, LoRA(modules_to_save=["o_proj"], target_modules=["q_proj"]))),
        "dora": _error(lambda: adapt(split, LoRA(use_dora=True))),
    }
    adapter = adapt(split, METHODS["lora"])
    return errors | {call: _error(getattr(adapter, call)) for call in ("merge", "remove")}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes find, and four."""
    folder = tmp_path_factory.mktemp("split")
    for processes in (2, 4):
        multiprocessing.spawn(_run, (str(folder), processes), nprocs=processes)
    return {n: [torch.load(folder / f"{n}-{r}.pt", weights_only=True) for r in range(n)] for n in (2, 4)}


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_split_layers_have_the_losses_and_gradients_of_one_process(found, method, processes):
    expected = _step(_adapted(_base(), method), ROWS)
    ranks = [f[method] for f in found[processes]]
    torch.testing.assert_close(torch.stack([r["loss"] for r in ranks]).mean(), expected["loss"])
    for rank in ranks:
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "split after",
            "call parallelize_module(model, ...) first, then adapt(model, method), then fully_shard(model)",
        ),
        ("sharded before", "call adapt(model, method) first and fully_shard(model) then"),
        ("another method", "there only LoRA on linear modules trains"),
        ("bottleneck", "there only LoRA on linear modules trains"),
        ("prompt", "there only LoRA on linear modules trains"),
        ("in place", "there only LoRA on linear modules trains"),
        ("split copy", "and modules_to_save that are whole"),
        ("dora", "leave them out"),
        ("merge", "merge() needs whole tensors"),
        ("remove", "remove() needs whole tensors"),
    ],
)
def test_other_orders_and_calls_are_refused_with_what_to_write(found, case, said):
    assert said in found[2][0]["errors"][case]
