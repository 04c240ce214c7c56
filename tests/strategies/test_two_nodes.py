"""Two nodes by torchrun: each in a network namespace of its own, with a cable between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONF = Path(__file__).parents[2] / "conf" / "method"


def _ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def nodes():
    """Names of two namespaces that reach each other at 10.77.0.1 and 10.77.0.2."""
    names = [f"peft{os.getpid()}{side}" for side in "ab"]
    try:
        made = [_ip("netns", "add", name) for name in names]
        made.append(_ip("link", "add", names[0][-14:], "type", "veth", "peer", "name", names[1][-14:]))
        for number, name in enumerate(names, start=1):
            cable = name[-14:]
            made.append(_ip("link", "set", cable, "netns", name))
            made.append(_ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", cable))
            made += [_ip("-n", name, "link", "set", link, "up") for link in (cable, "lo")]
        if any(done.returncode for done in made):
            pytest.skip("network namespaces cannot be made here")
        yield names
    finally:
        for name in names:
            _ip("netns", "delete", name)


def _job(kind, folder):
    method = OmegaConf.to_container(OmegaConf.load(CONF / "lora.yaml"))
    return {"method": method, "strategy": kind, "save": str(folder / f"{kind}.ckpt")}


def _started(node, name, folder, model, rows, jobs):
    script = Path(__file__).with_name("train.py")
    meeting = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "10.77.0.1", "--master-port", "29501"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "1"]
    command = ["ip", "netns", "exec", name, *torchrun, str(script), str(model), str(rows), str(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name[-14:]}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(nodes, tmp_path_factory, llama_folder, uneven_answers):
    """What one process trains, and what two nodes do under DDP and FSDP2."""
    folder = tmp_path_factory.mktemp("nodes")
    one, two = folder / "one.json", folder / "two.json"
    one.write_text(json.dumps([_job("one", folder)]))
    two.write_text(json.dumps([_job("ddp", folder), _job("fsdp", folder)]))
    script = Path(__file__).with_name("train.py")
    subprocess.run([sys.executable, script, llama_folder, uneven_answers, one], check=True, cwd=folder)
    both = [_started(node, name, folder, llama_folder, uneven_answers, two) for node, name in enumerate(nodes)]
    said = [process.communicate()[1] for process in both]
    assert not any(process.returncode for process in both), said
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_nodes_train_what_one_process_does(folder, kind):
    found = [json.loads((folder / f"{k}.ckpt.json").read_text()) for k in ("one", kind)]
    assert "error" not in found[1], found[1]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], abs=1e-5)
    one, two = (torch.load(folder / f"{k}.ckpt", weights_only=True)["state_dict"] for k in ("one", kind))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
