"""Every variant that Hugging Face PEFT knows: the same output, the same training, the same files."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import adapt, load_adapter
from lightning_peft.core.method import PeftFormat, PeftRepacked
from tests.method_table import TABLE
from tests.parity.grid import MODELS, PEERS

peft = pytest.importorskip("peft")

# what peft and transformers warn of each other is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")

# every method on every kind of model is in the grid; here is what the table of all methods has beside it
IN_THE_GRID = {(p.name, m) for p in PEERS for m in MODELS}
# peft's layers of this kind know no Conv1D
WITHOUT_PEER = {("shira_magnitude", "gpt2")}
CASES = [
    pytest.param(row.make(), name, id=f"{row.name}-{name}")
    for row in TABLE
    for name in row.models
    if isinstance(row.make(), PeftFormat) and name != "encoder" and (row.name, name) not in IN_THE_GRID | WITHOUT_PEER
]


@pytest.fixture
def build(build):
    """The table's models; peft's convolutions know no padding but zeros, and no dilation."""

    def make(name):
        model = build(name)
        if name == "convnet":
            model.conv1.padding_mode = "zeros"
        if name == "volumes":
            model.conv2.dilation = (1, 1, 1)
        return model

    return make


def _pair(build, perturb, method, name, tmp_path, scale=0.05):
    """Our adapted model and peft's, both in float64, the tensors of ours in both."""
    ours = build(name)
    adapter = adapt(ours, method)
    perturb(adapter, scale)
    adapter.save(tmp_path / "a")
    prompt = "num_virtual_tokens" in {**vars(method), **getattr(method, "config", {})}
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "a", is_trainable=not prompt)
    if prompt:  # peft loads prompts for inference alone
        theirs.prompt_encoder.requires_grad_(True)
    ours.double()
    for tensor in [*adapter.parameters(), *adapter.tree.buffers()]:
        tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data
    return ours, adapter, theirs.double()


def _kept(output, name):
    return output if name == "convnet" else output[:, -7:]


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_output_is_that_of_peft(method, name, build, call, perturb, tmp_path):
    ours, adapter, theirs = _pair(build, perturb, method, name, tmp_path)
    expected = _kept(call(theirs.eval(), name), name)
    torch.testing.assert_close(call(ours.eval(), name), expected, rtol=1e-10, atol=1e-10)
    with adapter.disabled():
        assert not torch.allclose(call(ours, name), expected, rtol=1e-5, atol=1e-5)


# a start that is subtracted is written as a LoRA of twice the rank, all of which peft would train; what peft does with
# such a start of its own is in the grid
TRAINED = [case for case in CASES if not getattr(case.values[0], "starts_apart", False)]


@pytest.mark.parametrize(("method", "name"), TRAINED)
def test_ten_steps_give_the_losses_and_the_parameters_of_peft(method, name, build, call, perturb, tmp_path):
    ours, adapter, theirs = _pair(build, perturb, method, name, tmp_path)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
        seen = []
        for _ in range(10):
            loss = _kept(call(model.eval(), name), name).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    assert losses[0][0] > losses[0][-1]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    trained = peft.get_peft_model_state_dict(theirs)
    state = adapter.state_dict()
    for key, tensor in (method.to_peft(state) if isinstance(method, PeftRepacked) else state).items():
        torch.testing.assert_close(tensor, trained[method.peft_name(key, ours)], rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_folder_that_peft_writes_loads_here(method, name, build, call, perturb, tmp_path):
    _, _, theirs = _pair(build, perturb, method, name, tmp_path)
    theirs.float().eval().save_pretrained(tmp_path / "theirs")
    model = build(name)
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(call(model, name), _kept(call(theirs, name), name), rtol=1e-6, atol=1e-5)
