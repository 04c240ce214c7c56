"""DDP and FSDP2 in several processes: the run of one process, saved by any of them and resumed by any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CONF = Path(__file__).parents[2] / "conf" / "method"
# what the YAML leaves to the user, or what a run of few steps needs
OPTIONS = {
    "trainable_tokens": {"token_indices": [1996, 2709, 1011]},
    "adalora": {"tinit": 1, "tfinal": 1, "deltaT": 1},
    "gradual_unfreezing": {"unfreeze_until": 0.5},
}
FAMILIES = (
    "lora",
    "dora",
    "adalora",
    "vera",
    "boft",
    "ia3",
    "houlsby",
    "prefix_tuning",
    "prompt_tuning",
    "loreft",
    "ladder_side_tuning",
    "norm",
    "last_layers",
    "trainable_tokens",
    "full",
)
RESUMED = ("lora", "adalora", "gradual_unfreezing")
SAVED = ("one-1", "ddp-2", "fsdp-2", "fsdp_distributed-2")
GOING_ON = {
    **{method: ("one-1", "fsdp-2") for method in RESUMED},
    "lora": ("one-1", "ddp-2", "fsdp-2", "fsdp_distributed-1", "ddp-4", "fsdp-4"),
}
ONWARDS = [
    (method, saved, kind)
    for method in RESUMED
    for saved in SAVED
    for kind in GOING_ON[method]
    # shards are read by the strategy that writes them; four processes are slow, and go on from two
    if (kind.startswith("fsdp") or saved != "fsdp_distributed-2") and (kind[-1] != "4" or saved == "fsdp-2")
    if (method, saved) != ("gradual_unfreezing", "fsdp_distributed-2")  # which is refused
]


def _method(name):
    return {**OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")), **OPTIONS.get(name, {})}


class Runs:
    """Jobs by the number of processes that run them, and what they gave."""

    def __init__(self, folder, model, rows):
        self.folder, self.model, self.rows, self.jobs = folder, model, rows, {}

    def add(self, method, kind, resume=None, **more):
        """A run by ``strategy-processes``, from what another one saved in the middle if that is named."""
        strategy, _, processes = kind.partition("-")
        name = "-".join([*more, method, kind])
        job = {"method": _method(method), "strategy": strategy, "save": str(self.folder / f"{name}.ckpt"), **more}
        if resume:
            job["save"] = str(self.folder / f"{name}-from-{resume}.ckpt")
            job["resume"] = str(self.folder / f"{method}-{resume}.middle")
        elif method in RESUMED and not more:
            job["middle"] = str(self.folder / f"{name}.middle")
        self.jobs.setdefault(int(processes), []).append(job)

    def run(self):
        """Runs what was added."""
        script = Path(__file__).with_name("train.py")
        for processes, jobs in sorted(self.jobs.items()):
            path = self.folder / "jobs.json"
            path.write_text(json.dumps(jobs))
            words = [script, self.model, self.rows, path]
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [sys.executable, *torchrun, *map(str, words)]
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            assert done.returncode == 0, done.stderr[-4000:]
        self.jobs = {}

    def loss(self, name):
        """The validation loss at the end of a run."""
        found = json.loads((self.folder / f"{name}.ckpt.json").read_text())
        assert "error" not in found, found["error"]
        return torch.tensor(found["loss"])

    def error(self, name):
        """Why a run failed."""
        return json.loads((self.folder / f"{name}.ckpt.json").read_text())["error"]

    def checkpoint(self, name):
        """A whole checkpoint."""
        return torch.load(self.folder / f"{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llama_folder, uneven_answers):
    """All runs: whole ones first, then those that go on from their middle."""
    runs = Runs(tmp_path_factory.mktemp("strategies"), llama_folder, uneven_answers)
    for method in dict.fromkeys([*FAMILIES, *RESUMED]):
        for kind in ("one-1", "ddp-2", "fsdp-2", *(["fsdp_distributed-2"] if method in RESUMED else [])):
            runs.add(method, kind)
    runs.add("eva", "fsdp-2")
    for kind in ("one-1", "ddp-2", "fsdp-2"):
        runs.add("lora", kind, own=True)
    for kind in ("one-1", "fsdp-2", "fsdp_distributed-2"):
        runs.add("lora", kind, base={"load_in_shards": True})
    runs.add("dora", "fsdp-2", base={"load_in_shards": True})
    for kind in ("ddp-2", "fsdp-2"):
        runs.add("lora_fa", kind, seeds=True)
    runs.run()
    for method, saved, kind in ONWARDS:
        runs.add(method, kind, resume=saved)
    runs.run()
    return runs


@pytest.mark.parametrize("kind", ["ddp-2", "fsdp-2"])
@pytest.mark.parametrize("method", FAMILIES)
def test_two_processes_train_what_one_does(runs, method, kind):
    torch.testing.assert_close(runs.loss(f"{method}-{kind}"), runs.loss(f"{method}-one-1"), rtol=0, atol=1e-5)
    _compare(runs, f"{method}-one-1", f"{method}-{kind}")


@pytest.mark.parametrize("kind", ["ddp-2", "fsdp-2"])
def test_a_module_of_ones_own_adapts_first_and_shards_then(runs, kind):
    _compare(runs, "own-lora-one-1", f"own-lora-{kind}")


@pytest.mark.parametrize("kind", ["fsdp-2", "fsdp_distributed-2"])
def test_a_model_that_no_process_holds_is_read_shard_by_shard(runs, kind):
    torch.testing.assert_close(runs.loss(f"base-lora-{kind}"), runs.loss("lora-one-1"), rtol=0, atol=1e-5)


def test_a_base_that_was_read_in_shards_has_its_fingerprint(runs):
    _compare(runs, "lora-one-1", "base-lora-fsdp-2")
    one, two = (runs.checkpoint(n)["lightning_peft"]["base"] for n in ("lora-one-1", "base-lora-fsdp-2"))
    assert one == two


def test_shards_are_refused_where_nothing_shards_and_where_weights_are_read(runs):
    assert "needs a strategy that shards (trainer=fsdp)" in runs.error("base-lora-one-1")
    assert "load the model as it is" in runs.error("base-dora-fsdp-2")


@pytest.mark.parametrize("kind", ["ddp-2", "fsdp-2"])
def test_fixed_tensors_are_the_same_where_processes_draw_with_seeds_of_their_own(runs, kind):
    first, second = json.loads((runs.folder / f"seeds-lora_fa-{kind}.ckpt.json").read_text())["fixed"]
    assert first == second
    assert min(first) > 0


def _compare(runs, first, second):
    one, two = (runs.checkpoint(name)["state_dict"] for name in (first, second))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "saved", "kind"), ONWARDS)
def test_a_run_goes_on_under_another_strategy_and_number_of_processes(runs, method, saved, kind):
    found = runs.loss(f"{method}-{kind}-from-{saved}")
    torch.testing.assert_close(found, runs.loss(f"{method}-one-1"), rtol=0, atol=1e-5)


def test_a_checkpoint_of_shards_holds_what_trains_alone(runs):
    """The model has 7.9 MB; a folder says much about each tensor."""
    shards, whole = runs.folder / "lora-fsdp_distributed-2.ckpt", runs.folder / "lora-fsdp-2.ckpt"
    assert sum(f.stat().st_size for f in shards.iterdir()) < 1_000_000
    assert whole.stat().st_size < 200_000


def test_a_method_that_looks_at_data_says_what_to_do_where_no_process_has_the_weights(runs):
    error = runs.error("eva-fsdp-2")
    assert "is sharded; save a checkpoint after a first step under another strategy" in error


def test_what_could_not_be_resumed_from_shards_is_refused_before_it_trains(runs):
    assert "save_distributed_checkpoint=False" in runs.error("gradual_unfreezing-fsdp_distributed-2")
