"""What saves time and memory changes no result: every combination of switches against plain PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from lightning_peft import LoRA, PeftModule
from lightning_peft.core.adapters import adapters_of

LENGTHS = [(12, 4), (3, 2), (7, 7), (5, 1), (4, 3), (8, 5)]  # tokens of a row, and how many of them are answers
SWITCHES = [*itertools.product((False, True), (False, True), (0, 1, 2))]


def _batch():
    generator = torch.Generator().manual_seed(2)
    ids, mask, labels = (torch.zeros(len(LENGTHS), 12, dtype=torch.long) for _ in range(3))
    labels.fill_(-100)
    for row, (length, answers) in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(3, 90, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, length - answers : length] = ids[row, length - answers : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _module(folder, dtype, all_logits, packing, every):
    task = {"name": "sft", "all_logits": all_logits, "packing": packing}
    base = {"name_or_path": str(folder), "activation_checkpointing": every}
    module = PeftModule(base, LoRA(r=4, lora_alpha=8), task)
    module.configure_model()
    module.model.to(dtype).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapters_of(module.model).named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def _gradients(module):
    return {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def expected(request, llama_folder):
    """The mean loss over all answers from the model's logits, row by row without padding, and its gradients."""
    module = _module(llama_folder, request.param, True, False, 0)
    batch, total, count = _batch(), 0.0, 0
    for row, (length, _) in enumerate(LENGTHS):
        logits = module.model(input_ids=batch["input_ids"][row : row + 1, :length]).logits
        answers = batch["labels"][row, 1:length]
        total = total + functional.cross_entropy(logits[0, :-1], answers, reduction="sum")
        count += int((answers != -100).sum())
    loss = total / count
    loss.backward()
    return request.param, loss.detach(), _gradients(module)


@pytest.mark.parametrize(("all_logits", "packing", "every"), SWITCHES)
@pytest.mark.filterwarnings("ignore:.*Caching is incompatible")
def test_losses_and_gradients_are_the_same_whatever_is_switched_on(llama_folder, expected, all_logits, packing, every):
    dtype, loss, gradients = expected
    module = _module(llama_folder, dtype, all_logits, packing, every)
    batch = _batch()
    total, count = module.task.loss(module.task.outputs(module.model, batch), batch)
    found = total / count
    found.backward()
    exact = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.detach(), loss, rtol=exact, atol=0, check_dtype=False)
    # what trains is in 32 bits in either case, and so is its gradient
    largest = max(g.abs().max() for g in gradients.values())
    mine = _gradients(module)
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5 * float(largest))
