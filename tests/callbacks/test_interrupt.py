"""What a person sees who interrupts a run in a terminal, and a cluster that ends one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys

import lightning as L
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.callbacks.interrupt import SaveOnInterrupt


class Interrupted(L.LightningModule):
    """Ctrl-C in its third step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyboardInterrupt
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def narrow_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    heard = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, heard)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("words", [None, ["method=lora", "data.columns={text: a b}", "ckpt_path=old.ckpt"]])
def test_the_command_to_go_on_is_one_line_below_the_stopped_bar(narrow_terminal, monkeypatch, capsys, tmp_path, words):
    monkeypatch.setattr(sys, "argv", ["env/lightning-peft", "-m", "method=lora,bitfit", "hydra.run.dir=a"])
    # the bar that a command appends comes after the callback that saves
    callbacks = [SaveOnInterrupt(str(tmp_path), words), RichProgressBar()]
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path, **options)
    with pytest.raises(SystemExit):
        trainer.fit(Interrupted(), DataLoader(TensorDataset(torch.ones(8, 2))))
    said = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().out)
    given = "-m method=lora,bitfit" if words is None else "method=lora 'data.columns={text: a b}'"
    command = f"Go on with:  env/lightning-peft {given} ckpt_path={tmp_path}/interrupted.ckpt\n"
    assert command in said
    assert not said[said.index(command) + len(command) :].strip(), "nothing is drawn below it"
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_trial_of_a_search_goes_on_as_a_run_by_itself(capsys, tmp_path):
    words = ["+sweep=optuna", "hydra.sweep.dir=found", "method.r=4", "search.trial=3"]
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, callbacks=SaveOnInterrupt(str(tmp_path), words), **options)
    with pytest.raises(SystemExit):
        trainer.fit(Interrupted(), DataLoader(TensorDataset(torch.ones(8, 2))))
    kept = "+sweep=optuna method.r=4 search.trial=3 hydra.mode=RUN callbacks.pruning=null ckpt_path="
    assert kept in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_run_of_the_command_goes_on_in_its_own_folder(capsys, tmp_path):
    words = ["+sweep=methods", "method=lora", "hydra.sweep.dir=swept"]
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    saves = SaveOnInterrupt(str(tmp_path / "a run" / "checkpoints"), words)
    with pytest.raises(SystemExit):
        L.Trainer(max_epochs=1, callbacks=saves, **options).fit(
            Interrupted(), DataLoader(TensorDataset(torch.ones(8, 2)))
        )
    said = capsys.readouterr().out
    *_, folder, last = shlex.split(said[said.index("Go on with:") :])
    assert (folder, last) == (f'hydra.run.dir="{tmp_path / "a run"}"', "ckpt_path=last")
    assert OverridesParser.create().parse_override(folder).value() == str(tmp_path / "a run"), "as Hydra reads it"
    assert "hydra.mode=RUN" in said


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_folder_that_could_take_no_checkpoint_is_named_before_the_first_step(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    folder, heard = tmp_path / "file" / "checkpoints", signal.getsignal(signal.SIGINT)
    run = trainer(SaveOnInterrupt(str(folder)))
    with pytest.raises(
        NotADirectoryError, match=f"no checkpoint can be written into {folder}: Not a directory; choose"
    ):
        run.fit(Interrupted(), DataLoader(TensorDataset(torch.ones(8, 2))))
    assert run.global_step == 0
    assert signal.getsignal(signal.SIGINT) is heard


SCRIPT = """
import os, signal, sys, time, warnings
warnings.filterwarnings("ignore")
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_peft import AdaLoRA, PeftCallback, SaveOnInterrupt

signal.signal(signal.SIGINT, signal.default_int_handler)
sent = {"sigint": [signal.SIGINT], "twice": [signal.SIGINT] * 2, "sigterm": [signal.SIGTERM],
        "requeue": [signal.SIGUSR1], "none": []}[sys.argv[1]]

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))
        self.sent = not sent

    def training_step(self, batch, batch_idx):
        if self.global_step == int(sys.argv[2]) and batch_idx % 2 == 0 and not self.sent:
            self.sent = True
            for number in sent:  # in the middle of a step, of which one batch of two is done
                os.kill(os.getpid(), number)
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        if sys.argv[3] == "validating" and self.global_step == 4 and batch_idx == 1 and not self.sent:
            self.sent = True
            os.kill(os.getpid(), sent[0])
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

class Same(DataLoader):  # all batches are alike
    state_dict = lambda self: {}
    load_state_dict = lambda self, state: None

if __name__ == "__main__":
    torch.manual_seed(1)
    keep = ModelCheckpoint("c", filename="last", every_n_train_steps=1, enable_version_counter=False)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    net, rows = Net(), torch.ones(8, 4)
    callbacks = [SaveOnInterrupt("."), PeftCallback(AdaLoRA(init_r=2, target_r=1), model="layer"), keep]
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, accumulate_grad_batches=2, callbacks=callbacks, **quiet)
    path = sys.argv[4] if len(sys.argv) > 4 else None
    workers = {"num_workers": 1} if sys.argv[3] == "workers" else {}
    judge = DataLoader(rows, batch_size=2, generator=torch.Generator())  # which draws nothing from what dropout draws
    trainer.fit(net, Same(rows, **workers), judge, ckpt_path=path, weights_only=True)
    torch.save(net.state_dict(), "end.pt")
    print("steps", trainer.global_step, flush=True)
"""


def _run(folder, *words, **environment):
    (folder / "run.py").write_text(SCRIPT)
    command = [sys.executable, "run.py", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = _run(folder, "none", "-1", "-")
    assert "steps 12" in done.stdout, done.stderr
    return torch.load(folder / "end.pt", weights_only=True)


def _equals(folder, expected):
    found = torch.load(folder / "end.pt", weights_only=True)
    return found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "where"),
    [
        ("sigint", 130, "-"),
        ("sigterm", 143, "-"),
        ("sigint", 130, "workers"),
        ("sigint", 130, "validating"),
        ("sigterm", 143, "validating"),
    ],
)
def test_a_run_that_is_asked_to_end_finishes_its_batch_saves_and_goes_on_exactly(
    tmp_path, undisturbed, sent, status, where
):
    step = "-1" if where == "validating" else "5"
    done = _run(tmp_path, sent, step, where)
    assert done.returncode == status, done.stderr
    assert "Go on with:  trainer.fit(..., ckpt_path='" in done.stdout
    assert ("Ctrl-C: this step is finished" in done.stdout) == (sent == "sigint")
    resumed = _run(tmp_path, "none", "-1", where, "interrupted.ckpt")
    assert "steps 12" in resumed.stdout, resumed.stderr
    assert _equals(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once_and_what_was_saved_stays(tmp_path, undisturbed):
    done = _run(tmp_path, "twice", "5", "-")
    assert done.returncode == 1
    assert "Stopped at once" in done.stdout
    assert not (tmp_path / "interrupted.ckpt").exists()
    assert torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert "steps 12" in _run(tmp_path, "none", "-1", "-", "last").stdout
    assert _equals(tmp_path, undisturbed)


@pytest.mark.slow
def test_slurm_requeues_a_run_that_saved_between_two_steps(tmp_path, undisturbed):
    """A command of SLURM's name notes what it is called with; Lightning finds the checkpoint in the requeued job."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/called\n")
    (tools / "scontrol").chmod(0o755)
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tools}:{os.environ['PATH']}"}
    done = _run(tmp_path, "requeue", "5", "-", **job)
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert (tmp_path / "called").read_text() == "requeue 7\n"
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    assert "steps 12" in _run(tmp_path, "none", "-1", "-", **job).stdout
    assert _equals(tmp_path, undisturbed)


RANKS = """
import os, signal, sys, warnings
warnings.filterwarnings("ignore")
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader
from lightning_peft import LoRA, PeftCallback, SaveOnInterrupt

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
    def training_step(self, batch, batch_idx):
        if self.global_rank == int(sys.argv[1]) and batch_idx == 2:
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))  # one rank alone hears it
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, **quiet,
                        callbacks=[PeftCallback(LoRA(r=2), model="layer"), SaveOnInterrupt(".")])
    try:
        trainer.fit(Net(), DataLoader(torch.ones(16, 4), batch_size=1))
    finally:
        open(f"rank {trainer.global_rank}", "w").write(str(trainer.global_step))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "sent", "status"), [(1, "SIGTERM", 143), (0, "SIGINT", 130)])
def test_all_ranks_stop_after_the_same_batch_though_one_alone_was_asked(tmp_path, rank, sent, status):
    (tmp_path / "run.py").write_text(RANKS)
    done = subprocess.run([sys.executable, "run.py", str(rank), sent], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert [(tmp_path / f"rank {rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_one_more_while_the_state_is_written_ends_without_a_traceback(narrow_terminal, capsys, tmp_path):
    class Again(L.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            raise KeyboardInterrupt

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    callbacks = [SaveOnInterrupt(str(tmp_path)), Again()]
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, enable_progress_bar=False, **options)
    with pytest.raises(SystemExit):
        trainer.fit(Interrupted(), DataLoader(TensorDataset(torch.ones(8, 2))))
    assert "Stopped at once; what was saved before is whole" in capsys.readouterr().out
    assert not (tmp_path / "interrupted.ckpt").exists()
