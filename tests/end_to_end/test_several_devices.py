"""The command on two devices: one adapter, the same as one device's, and exported once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

COMMAND = [sys.executable, "-m", "lightning_peft.cli.main"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama_folder, uneven_answers):
    """A run each on one device, and on two under DDP and FSDP2."""
    folder = tmp_path_factory.mktemp("devices")
    for name, devices in (("cpu", 1), ("ddp", 2), ("fsdp", 2)):
        measured = ["callbacks=forgetting"] if name != "fsdp" else []
        several = [f"trainer.devices={devices}", "trainer.accelerator=cpu"] if devices > 1 else []
        options = [f"trainer={name}", *several, f"data.batch_size={8 // devices}"]
        said = _run(folder, llama_folder, uneven_answers, *options, *measured, name)
        (folder / f"{name}.txt").write_text(said.stdout)
    return folder


def _run(folder, model, rows, *words):
    *words, name = words
    data = [f"data.{n}={rows}" for n in ("train_files", "validation_files")]
    fixed = ["model=hf", f"model.name_or_path={model}", "task=sft", "data=files", "+optimizer.eps=1e-3"]
    command = [*COMMAND, *fixed, *data, "callbacks.generation_samples=null", "trainer.max_epochs=2", *words]
    done = subprocess.run([*command, f"hydra.run.dir={name}"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_devices_export_the_adapter_of_one_and_say_so_once(folder, name):
    assert (folder / f"{name}.txt").read_text().count("exported adapter") == 1
    one, two = (load_file(folder / n / "adapter" / "adapter_model.safetensors") for n in ("cpu", name))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5)


def test_two_devices_forget_what_one_does_and_the_first_rank_says_so(folder):
    one, two = (json.loads((folder / name / "forgetting.json").read_text()) for name in ("cpu", "ddp"))
    assert two["before"] == one["before"]
    assert two["after"] == pytest.approx(one["after"], rel=1e-4)
    assert (folder / "ddp.txt").read_text().count("nats a token of held-out text") == 1


def test_a_sweep_over_several_devices_is_refused(folder, llama_folder):
    words = ["-m", f"model.name_or_path={llama_folder}", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    done = subprocess.run([*COMMAND, *words, "seed=1"], cwd=folder, capture_output=True, text=True, check=False)
    assert "a sweep trains on one device in each run, but got trainer.devices=2" in done.stderr
