"""The command line in a process of its own, on tiny local models and files."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from lightning.fabric.utilities.logger import _flatten_dict

from tests.processes import COMMAND, run


@pytest.fixture
def words(tmp_path, bert_folder):
    """Overrides for a run of seconds: a tiny model, a file of texts."""
    rows = [{"sentence": "red " * (1 + i % 5) if i % 2 else "blue " * (1 + i % 4), "label": i % 2} for i in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = ["data=files", "data.train_files=texts.jsonl", "data.columns.text=sentence", "data.batch_size=4"]
    return [f"model.name_or_path={bert_folder}", *data, "trainer.max_epochs=2"]


@pytest.mark.slow
def test_train_eval_predict_and_export_go_together(tmp_path, words):
    said = run(*words, "method.r=2", "hydra.run.dir=run", cwd=tmp_path).stdout
    for expected in ("validation accuracy", "run/checkpoints/best.ckpt", "run/adapter", "run/config.yaml"):
        assert expected in said
    printed = [shlex.split(line) for line in said.partition("Next:")[2].splitlines() if line]
    evaluate, predict, _, sweep = printed
    done = subprocess.run(evaluate, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "val/accuracy" in done.stdout, done.stderr
    assert "data.columns.text=sentence" in predict
    assert set(words) <= set(sweep), "the same model and data"
    assert "method.r=2" not in sweep
    folder = tmp_path / "run"
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert (kept["method"]["r"], kept["data"]["seed"], kept["trainer"]["default_root_dir"]) == (2, 0, str(folder))
    assert "val/accuracy" in json.loads((folder / "metrics.json").read_text())
    assert "val/loss" in (folder / "logs" / "metrics.csv").read_text()
    assert said.index("also in train") < said.index("LoRA"), "the data is shown before the plan"
    assert said.startswith("A step of 4 x 6 tokens takes "), "the forecast is before the data"
    assert (folder / "forecast.json").is_file()
    assert (folder / "data.html").is_file()
    assert (folder / "adapter" / "adapter_config.json").exists()
    card = ModelCard.load(folder / "adapter" / "README.md")
    accuracy = json.loads((folder / "metrics.json").read_text())["best/val/accuracy"]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["accuracy"] == pytest.approx(accuracy)
    for expected in ("From `texts.jsonl`", "| train | ", "| optimizer | AdamW |", "| seed | 0 |", "](curves.png)"):
        assert expected in card.text
    assert str(tmp_path) not in str(card)
    assert (folder / "adapter" / "curves.png").is_file()
    assert not list(tmp_path.rglob(".runs")), "that is a sweep's"

    best = "adapter=run/checkpoints/best.ckpt"
    data = ["data=files", "data.train_files=texts.jsonl", "data.columns.text=sentence"]
    assert "val/accuracy" in run("eval", best, *data, cwd=tmp_path).stdout
    predict = ["predict", *data, "data.predict_files=texts.jsonl"]
    run(*predict, best, "output=from_checkpoint.jsonl", cwd=tmp_path)
    run(*predict, "adapter=run/adapter", "output=from_folder.jsonl", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "from_checkpoint.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in (tmp_path / "from_folder.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert set(rows[0]) == {"id", "text", "label", "score", "probabilities"}
    refused = run(*predict, best, "output=from_folder.jsonl", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "from_folder.jsonl exists" in refused.stderr

    run("export", best, "to=exported", cwd=tmp_path)
    again = run("export", best, "to=exported", cwd=tmp_path, check=False)
    assert "already holds an adapter" in again.stderr
    served = run("export", best, "to=served", "for=vllm", cwd=tmp_path, check=False)
    assert "here is 'classifier', trained in full; export a merged model instead (format=merged)" in served.stderr
    assert not (tmp_path / "served").exists()
    run("export", best, "to=merged", "format=merged", cwd=tmp_path)
    for made in ("exported", "merged"):
        again = ModelCard.load(tmp_path / made / "README.md")
        assert again.data.eval_results == card.data.eval_results
        assert "| optimizer | AdamW |" in again.text
        assert (tmp_path / made / "curves.png").is_file()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        scores = model(**tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")).logits.softmax(-1)
    torch.testing.assert_close(scores.max(-1).values, torch.tensor([r["score"] for r in rows]), rtol=1e-4, atol=1e-5)
    assert [model.config.id2label[i] for i in scores.argmax(-1).tolist()] == [r["label"] for r in rows]


@pytest.mark.slow
def test_the_data_can_be_looked_at_without_training(tmp_path, words):
    data = [w for w in words if not w.startswith("trainer")]
    said = run("data", *data, "examples=3", "hydra.run.dir=looked", cwd=tmp_path).stdout
    assert "examples" in said
    assert said.count("\ntrain ") == 3
    assert "looked/data.html" in said
    numbers = json.loads((tmp_path / "looked" / "data.json").read_text())
    assert sum(split["rows"] for split in numbers["splits"].values()) == 24
    assert (tmp_path / "looked" / "data.html").is_file()
    (tmp_path / "texts.jsonl").write_text('{"sentence": "red", "label": 1}\n{"sentence": "", "label": 0}\n')
    failed = run("data", *data, cwd=tmp_path, check=False)
    assert failed.returncode == 2
    assert "texts.jsonl, line 2 is empty" in failed.stderr


@pytest.mark.slow
def test_a_tuner_of_peft_trains_evaluates_and_merges_like_any_method(tmp_path, words):
    pytest.importorskip("peft")
    bridge = ["method=hf_peft", "method.config.peft_type=HRA", "method.config.r=4"]
    run(*words, *bridge, "trainer.max_epochs=1", "hydra.run.dir=run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "HRA"
    data = ["data=files", "data.train_files=texts.jsonl", "data.columns.text=sentence"]
    from_checkpoint = run("eval", "adapter=run/checkpoints/best.ckpt", *data, cwd=tmp_path).stdout
    assert "val/accuracy" in from_checkpoint
    assert run("eval", "adapter=run/adapter", *data, cwd=tmp_path).stdout == from_checkpoint
    run("export", "adapter=run/adapter", "to=merged", "format=merged", cwd=tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "tensorboard", "wandb", "mlflow"])
def test_a_run_is_logged_where_it_was_asked_for(tmp_path, words, kind):
    offline = ["logger.wandb.offline=true"] if kind == "wandb" else []
    run(*words, f"logger={kind}", *offline, "trainer.log_every_n_steps=1", "hydra.run.dir=run", cwd=tmp_path)
    metrics, options = LOGGED[kind](tmp_path / "run")
    assert metrics >= METRICS
    assert options >= OPTIONS


@pytest.mark.slow
def test_each_run_of_a_sweep_is_a_run_of_its_own_in_wandb(tmp_path, words):
    chosen = ["-m", "seed=1,2", "logger=wandb", "logger.wandb.offline=true", "hydra.sweep.dir=sweep"]
    run(*words, *chosen, "trainer.max_epochs=1", "trainer.log_every_n_steps=1", cwd=tmp_path)
    for number in ("0", "1"):
        assert _in_wandb(tmp_path / "sweep" / number)[0] >= METRICS


OPTIONS = {"method/r", "data/batch_size", "data/train_files", "optimizer/lr", "trainer/max_epochs", "seed"}
METRICS = {"train/loss", "val/loss", "val/accuracy", "lr", "train/tokens_per_second"}


def _in_csv(folder):
    options = yaml.safe_load((folder / "logs" / "hparams.yaml").read_text())
    metrics = (folder / "logs" / "metrics.csv").read_text().splitlines()[0]
    return set(metrics.split(",")), set(_flatten_dict(options))


def _in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    given = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    options = HParamsPluginData.FromString(given).session_start_info.hparams
    return set(events.Tags()["scalars"]), set(options)


def _in_wandb(folder):
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    kept = path.read_bytes()
    found = {name for name in METRICS if name.encode() in kept}
    return found, {name for name in OPTIONS if all(word.encode() in kept for word in name.split("/"))}


def _in_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "lightning-peft")
    (logged,) = client.search_runs([experiment.experiment_id])
    return set(logged.data.metrics), set(logged.data.params)


LOGGED = {"csv": _in_csv, "tensorboard": _in_tensorboard, "wandb": _in_wandb, "mlflow": _in_mlflow}


@pytest.mark.slow
def test_several_best_checkpoints_are_kept_and_the_best_of_them_is_exported(tmp_path, words):
    chosen = ["callbacks.checkpoint.save_top_k=2", "trainer.max_epochs=3", "monitor=val/loss", "mode=min"]
    done = run(*words, *chosen, "optimizer.lr=0.5", "scheduler=constant_with_warmup", "hydra.run.dir=run", cwd=tmp_path)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("best-step=*.ckpt"))
    assert len(kept) == 2
    losses = [float(line.split("val/loss ")[1].split()[0]) for line in done.stdout.splitlines() if "epoch " in line]
    best = json.loads((tmp_path / "run" / "metrics.json").read_text())["best/val/loss"]
    assert len(losses) == 3
    assert best == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "said", "kept"),
    [
        (["data.validation_fraction=0", "trainer.max_epochs=1"], "last checkpoint ", False),
        (["trainer.max_steps=2"], "validation accuracy", True),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=1e-9"],
            "stopped early: Monitored metric val/accuracy did not improve in the last 1 records",
            True,
        ),
    ],
    ids=["no rows validate", "fewer steps than an epoch has", "stopped early"],
)
def test_a_run_ends_with_a_checkpoint_and_its_adapter(tmp_path, words, chosen, said, kept):
    done = run(*words, "method=bitfit", *chosen, "hydra.run.dir=run", cwd=tmp_path)
    assert said in done.stdout
    assert (tmp_path / "run" / "adapter" / "README.md").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert ("best/val/accuracy" in metrics) == kept


@pytest.mark.slow
def test_a_run_on_all_rows_names_the_evaluation_that_it_can_have(tmp_path, words):
    files = tmp_path / "rows.jsonl"
    files.write_text("".join(json.dumps({"text": f"a {i}", "label": "xy"[i % 2]}) + "\n" for i in range(8)))
    data = [f"data.train_files={files}", "data.columns.text=text", "data.validation_fraction=0"]
    chosen = ["method=bitfit", "trainer.max_epochs=1"]
    done = run(*words, *data, *chosen, "hydra.run.dir=without", cwd=tmp_path)
    assert " eval " not in done.stdout
    done = run(*words, *data, *chosen, f"data.test_files={files}", "hydra.run.dir=with", cwd=tmp_path)
    (suggested,) = [line for line in done.stdout.splitlines() if " eval " in line]
    assert "split=test" in suggested
    done = subprocess.run(shlex.split(suggested), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "test/accuracy" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_sweep_leaves_config_metrics_and_adapter_in_each_runs_folder(tmp_path, words):
    chosen = ["-m", "method=bitfit,prompt_tuning", "trainer.max_epochs=1", "hydra.sweep.dir=sweep"]
    done = run(*words, *chosen, cwd=tmp_path)
    table = done.stdout[done.stdout.rindex("chosen") :]
    assert "in sweep" in table, "what their folders share is said once"
    for number, method in (("0", "Selective"), ("1", "PromptTuning")):
        folder = tmp_path / "sweep" / number
        assert method in yaml.safe_load((folder / "config.yaml").read_text())["method"]["_target_"]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert f"{metrics['best/val/accuracy']:.4f}" in table
        assert f"{metrics['trainable_parameters']:,}" in table
        assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert "method=bitfit" in table


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_run_that_failed_and_names_it_at_the_end(tmp_path, words):
    files = "data.train_files=nowhere.jsonl,texts.jsonl"
    words = [w for w in words if not w.startswith(("data.train_files", "trainer.max_epochs"))]
    done = run("-m", *words, files, "trainer.max_epochs=1", "hydra.sweep.dir=sweep", cwd=tmp_path, check=False)
    assert (tmp_path / "sweep" / "1" / "metrics.json").exists(), done.stderr
    assert done.returncode == 2
    end = done.stderr[done.stderr.index("1 of 2 runs failed") :]
    assert "run 0 (data.train_files=nowhere.jsonl): there is no file 'nowhere.jsonl'" in end
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_runs_a_sweep_in_other_processes_and_what_is_said_at_the_end_is_the_same(tmp_path, words, launcher):
    words = [w for w in words if not w.startswith("trainer.max_epochs")]
    sweep = ["-m", *words, "trainer.max_epochs=2,0,1", "method=bitfit"]
    # a folder that names what is swept is another one in each run than in the command
    here = run(*sweep, "hydra.sweep.dir=here/${trainer.max_epochs}", cwd=tmp_path, check=False)
    program = str(Path(sys.executable).with_name("lightning-peft"))
    command = [program, *sweep, "hydra.sweep.dir=away/${trainer.max_epochs}", f"hydra/launcher={launcher}"]
    away = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (here.returncode, away.returncode) == (2, 2), away.stderr
    table, failures = here.stdout.rindex("chosen"), here.stderr.rindex("1 of 3 runs failed")
    told = here.stdout[table:].replace("in here", "in away").partition("\nNext:\n")[0]
    assert away.stdout[away.stdout.rindex("chosen") :].partition("\nNext:\n")[0] == told
    assert away.stdout.endswith("lightning-peft compare away\n")
    assert away.stderr[away.stderr.rindex("1 of 3 runs failed") :] == here.stderr[failures:]
    logs = [path.read_text() for path in tmp_path.glob("away/*/.submitit/*/*_log.*")]
    assert "lightning-peft eval adapter=away/2/0/adapter " in "".join([away.stdout, *logs]), "what can be pasted"
    assert "treespec" not in "".join([away.stderr, *logs]), "no warning that one run alone does not give"


def test_each_failed_run_of_a_sweep_is_told_with_what_the_sweep_chose_for_it(tmp_path):
    done = run("export", "-m", "adapter=a,b", "to=c", cwd=tmp_path, check=False)
    assert done.returncode == 2
    for number, name in enumerate("ab"):
        assert f"run {number} (adapter={name}): adapter={name}: there is no such checkpoint" in done.stderr


def test_a_sweep_into_the_folder_of_another_tells_of_its_own_runs(tmp_path):
    for names, failures in (("a,b,c", "3 of 3 runs failed"), ("d", "1 of 1 run failed")):
        done = run("export", "-m", f"adapter={names}", "to=c", "hydra.sweep.dir=sweep", cwd=tmp_path, check=False)
        assert failures in done.stderr


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Makes the configuration of a sweep's seventh run, as Hydra does in the process of the run."""
    from hydra import compose, initialize_config_module
    from hydra.core.hydra_config import HydraConfig

    from lightning_peft.cli.sweep import Sweep

    def make(*settings):
        settings = ["method=bitfit", "seed=3", f"hydra.sweep.dir={tmp_path}", "hydra.job.num=7", *settings]
        with initialize_config_module("lightning_peft.conf", version_base="1.3"):
            config = compose("train", [*settings, "run_dir=run"], return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        HydraConfig.instance().set_config(config)
        monkeypatch.setattr(Sweep(), "folder", None)
        Sweep().on_multirun_start(config)
        return config

    return make


@pytest.mark.parametrize("counts_itself", [False, True])
def test_what_goes_wrong_in_a_sweep_is_kept_and_told_to_a_sweeper_that_counts_it(swept, capsys, counts_itself):
    from lightning_peft.cli.jobs import Jobs, report

    def broken(config):
        raise KeyError("shape")

    sweeper = "hydra.sweeper._target_=hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    config = swept(sweeper) if counts_itself else swept()
    jobs = Jobs(broken, given=["method=bitfit", "run_dir=run", "seed=3,4"])
    with pytest.raises(KeyError) if counts_itself else nullcontext():
        assert jobs(config) is None
    assert report() == 1
    said = capsys.readouterr().err
    assert "1 of 1 run failed" in said
    assert "run 7 (seed=3): KeyError: 'shape'" in said
    assert "in broken" in said, "nobody foresaw it, so the place is shown"


def test_a_run_on_several_devices_has_the_score_of_its_first_process(swept, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    from lightning_peft.cli.jobs import Jobs
    from lightning_peft.cli.sweep import Sweep

    config = swept()
    for rank, score in ((0, 0.5), (1, None)):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        Jobs(lambda _, score=score: score, given=[])(config)
    (outcome,) = Sweep().outcomes()
    assert (outcome.run, outcome.score, outcome.failed) == (7, 0.5, None)


@pytest.mark.slow
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, words):
    command = [*COMMAND, *words, "trainer.max_epochs=10000", "hydra.run.dir=run"]
    # a test run that is itself in the background would pass on that Ctrl-C is ignored
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    going = subprocess.Popen(command, cwd=tmp_path, **pipes, **heard)
    for line in going.stdout:
        if line.startswith("epoch 3/"):
            going.send_signal(signal.SIGINT)
            break
    said, complained = going.communicate(timeout=60)
    assert f"Go on with:  {shlex.join(COMMAND)} {shlex.join(words[:2])}" in said, complained
    saved = tmp_path / "run" / "checkpoints" / "interrupted.ckpt"
    steps = torch.load(saved, weights_only=True)["global_step"]
    assert steps > 0
    resumed = run(
        *words, "trainer.max_epochs=2000", f"trainer.max_steps={steps + 12}", f"ckpt_path={saved}", cwd=tmp_path
    )
    assert "validation accuracy" in resumed.stdout
    assert "dirpath has changed" not in resumed.stderr, "it does in a new run's folder, as it should"


@pytest.mark.slow
def test_a_killed_run_goes_on_by_the_same_command(tmp_path, words):
    """As a cluster starts a job again that it ended: nobody looks for the checkpoint."""
    again = [*words, "trainer.max_epochs=6", "hydra.run.dir=run", "ckpt_path=last"]
    going = subprocess.Popen([*COMMAND, *again], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    said = []
    for line in going.stdout:
        said.append(line)
        if line.startswith("epoch 2/"):
            going.kill()
            break
    going.communicate(timeout=60)
    assert "begins anew: no whole checkpoint is in run/checkpoints\n" in said
    done = run(*again, cwd=tmp_path)
    assert "goes on from run/checkpoints/last.ckpt\n" in done.stdout
    first = next(line for line in done.stdout.splitlines() if line.startswith("epoch "))
    assert first.split()[1] in ("2/6", "3/6"), "the last checkpoint may be that of the epoch in which it was killed"
    assert "exists and is not empty" not in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    undisturbed = run(*words, "trainer.max_epochs=6", "hydra.run.dir=whole", cwd=tmp_path)
    assert undisturbed.returncode == 0
    last = [torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("run", "whole")]
    assert last[0]["state_dict"].keys() == last[1]["state_dict"].keys()
    assert all(torch.equal(t, last[1]["state_dict"][n]) for n, t in last[0]["state_dict"].items())


def test_a_run_without_a_folder_of_its_own_has_no_last_checkpoint(tmp_path, words):
    unnamed = run(*words, "ckpt_path=last", cwd=tmp_path, check=False)
    assert unnamed.returncode == 2
    assert "which is a new one each time; name it, as in hydra.run.dir=outputs/mine" in unnamed.stderr


@pytest.mark.slow
def test_language_modelling_from_the_command_line(tmp_path, llama_folder):
    words = [
        "experiment=docstrings_lm",
        f"model.name_or_path={llama_folder}",
        "data.limit=32",
        "trainer.limit_val_batches=2",
    ]
    said = run(*words, "hydra.run.dir=run", cwd=tmp_path).stdout
    assert "validation loss" in said
    asked = tmp_path / "prompts.jsonl"
    asked.write_text('{"prompt": "def join(self):"}\n{"prompt": "def close():"}\n')
    run("predict", "adapter=run/adapter", f"data.predict_files={asked}", "output=written.jsonl", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "written.jsonl").read_text().splitlines()]
    assert [set(r) for r in rows] == [{"id", "prompt", "completion"}] * 2

    said = run("export", "adapter=run/adapter", "to=served", "for=vllm", cwd=tmp_path).stdout
    assert f"vllm serve {llama_folder} --enable-lora --lora-modules served=served" in said
    assert sorted(p.name for p in (tmp_path / "served").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    said = run("export", "adapter=run/adapter", "to=converted", "for=gguf", cwd=tmp_path).stdout
    assert "python convert_lora_to_gguf.py converted" in said
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["base_model_name_or_path"]
    low = ["export", "adapter=run/adapter", "to=low", "for=vllm", "max_lora_rank=4"]
    assert "above max_lora_rank=4; start the server with" in run(*low, cwd=tmp_path, check=False).stderr
    assert not (tmp_path / "low").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=lroa"], "method=lroa is unknown; did you mean 'lora'"),
        (["metod=lora"], "there is no 'metod'; did you mean 'method'"),
        (["method.lora_alhpa=3"], "there is no 'method.lora_alhpa'; did you mean 'lora_alpha'?"),
        (["method=norm", "method.r=4"], "method=norm has no option 'r'; known: keep_originals, "),
        (["-m", "method=lora,prompt_tuning", "method.r=4"], "method=prompt_tuning has no option 'r'; known: learning"),
        (["trainr.max_epochs=2"], "there is no 'trainr'; did you mean 'trainer'?"),
        (["data.colums.text=x"], "there is no 'data.colums'; did you mean 'columns'?"),
        (["precision=bf16-mixed"], "there is no 'precision'; did you mean 'trainer.precision'?"),
        (["experimnt=docstrings_lm"], "there is no 'experimnt'; did you mean 'experiment'?"),
        (["method=norm", "method.rank_pattern={a: 2}"], "method=norm has no option 'rank_pattern'"),
        (["logger=none", "logger.csv.name=x"], "logger=none has no option 'csv'"),
        (["-m", "seed=1,2", "trainer.max_epochs=1,two"], "trainer.max_epochs must be a number like 4, but got 'two'"),
        (["trian"], "command 'trian' is unknown; did you mean 'train'?"),
        (["eval"], "eval needs adapter=..."),
        (["-m", "method=lora,bitfitt"], "method=bitfitt is unknown; did you mean 'bitfit'?"),
        (["data=files"], "give a source or train_files"),
        (["data=zzz"], "data=zzz is unknown; known: docstrings, files, hub, images\n"),
        (["trainer.max_epochs=abc"], "trainer.max_epochs must be a number like 4, but got 'abc'"),
        (["trainer=cpu", "trainer.use_distributed_sampler=si"], "must be true or false, but got 'si'"),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest_right_one(monkeypatch, capsys, words, said):
    from lightning_peft.cli.main import main

    monkeypatch.setattr(sys, "argv", ["lightning-peft", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "place", "value"),
    [
        (["generation.max_new_tokens=4"], "generation", {"max_new_tokens": 4}),
        (["generation={num_beams: 2}", "+generation.max_length=9"], "generation", {"num_beams": 2, "max_length": 9}),
        (["model.config={hidden_dropout_prob: 0.2}"], "model.config", {"hidden_dropout_prob": 0.2}),
        (["model.config.rope.factor=2"], "model.config", {"rope": {"factor": 2}}),
        (["method=hf_peft", "method.config.r=8"], "method.config", {"peft_type": "LORA", "r": 8}),
        (["method=hf_peft", "method.config={peft_type: HRA, r: 8}"], "method.config", {"peft_type": "HRA", "r": 8}),
        (["-m", "method.rank_pattern.query=4,8"], "method.rank_pattern", {"query": 4}),
        (["-m", "method=p_tuning,prompt_tuning", "method.num_virtual_tokens=5"], "method.num_virtual_tokens", 5),
        (["-m", "method=glob(lora*)", "method.r=3"], "method.r", 3),
        (["method.init_lora_weights=pissa"], "method.init_lora_weights", "pissa"),
        (["model.quantization={load_in_4bit: true}"], "model.quantization", {"load_in_4bit": True}),
        (["model.quantization=nf4", "optimizer=adamw_8bit"], "optimizer.name", "AdamW8bit"),
    ],
)
def test_entries_of_dictionaries_and_options_of_swept_methods_are_given_like_any_option(
    monkeypatch, tmp_path, words, place, value
):
    from omegaconf import OmegaConf

    from lightning_peft.cli import commands
    from lightning_peft.cli.main import main

    seen = []
    monkeypatch.setattr(commands, "train", lambda config: seen.append(OmegaConf.to_container(config)))
    monkeypatch.setattr(sys, "argv", ["lightning-peft", *words])
    monkeypatch.chdir(tmp_path)
    main()
    assert OmegaConf.select(OmegaConf.create(seen[0]), place) == value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=hf_peft", "method.config.rr=8"], "LORA has no option 'rr'; did you mean 'r'"),
        (["method=hf_peft", "method.config.peft_type=HRR"], "is none of the installed peft's; did you mean 'HRA'"),
        (["method.r=0"], "r must be 1 or more, but got 0"),
        (["method.lora_dropout=-0.5"], "lora_dropout must be at least 0"),
        (["model=hf", "model.name_or_path=no/model"], "is no local folder and could not be fetched from the hub"),
        (["data=hub", "data.source=no/data"], "could not be fetched"),
        (["data=files", "data.train_files=text.jsonl"], "there is no file 'text.jsonl'; did you mean 'texts.jsonl'?"),
        (["data=files", "data.train_files=texts.jsonl"], "has no column 'text'; did you mean"),
        (["method.target_modules=[qurey]"], "'qurey' matches no module; did you mean 'query'"),
        (["trainer.max_epochs=0"], "trainer.max_epochs must be 1 or more, or -1 for no end, but got 0"),
        (["trainer.precision=bf16"], "trainer.precision=bf16 could be bf16-mixed (weights in 32 bits) or bf16-true"),
        (["trainer.limit_train_batches=0"], "trainer.limit_train_batches=0 trains nothing"),
        (["trainer.precision=16"], "trainer.precision=16 could be 16-mixed"),
        (["optimizer.lr=-1"], "optimizer.lr must be above 0, but got -1"),
        (["optimizer.lr=fast"], "optimizer.lr must be a number, auto (which searches for one) or null"),
        (
            ["optimizer=sgd", "optimizer.lr=fast"],
            "optimizer.lr must be a number, auto (which searches for one) or null",
        ),
        (["data=files", "data.train_files=empty.jsonl"], "empty.jsonl, line 2 has nothing in the column 'label'"),
        (["ckpt_path=texts.jsonl"], "texts.jsonl (27 bytes) is no checkpoint, or one that is cut short"),
        (["method.target_modules=all_linear"], "did you mean 'all-linear'"),
        (["model=hf", "model.name_or_path=held"], "the folder 'held' has no config.json and no tokenizer"),
        (["monitor=val/acuracy", "mode=max"], "is logged by no validation; did you mean 'val/accuracy'"),
        (["+method=lora"], "method"),
        (["force=no"], "force must be true or false, but got 'no'"),
        (["seed=one"], "seed must be a number like 0, but got 'one'"),
        (["hydra.run.dir=held"], "held/adapter already holds an adapter"),
    ],
)
def test_a_mistake_is_one_sentence_before_training(tmp_path, words, said):
    (tmp_path / "texts.jsonl").write_text('{"txt": "a", "label": "b"}\n')
    (tmp_path / "empty.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "c", "label": null}\n')
    (tmp_path / "held" / "adapter").mkdir(parents=True)
    (tmp_path / "held" / "adapter" / "adapter_config.json").write_text("{}")
    done = run(*words, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["for=vlm"], "for=vlm is unknown; did you mean 'vllm'?"),
        (["for=vllm", "format=merged"], "for=vllm is a form of the adapter; leave it out for format=merged"),
        (["for=vllm", "max_lora_rank=many"], "max_lora_rank must be a number like 16, but got 'many'"),
    ],
)
def test_a_mistake_about_whom_an_export_is_for_is_said_before_anything_loads(tmp_path, words, said):
    done = run("export", "adapter=nothing", "to=there", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_help_shows_commands_with_examples_and_all_groups(tmp_path):
    said = run("--help", cwd=tmp_path).stdout
    for expected in (
        "lightning-peft eval adapter=",
        "lightning-peft export",
        "method: adalora, bitfit, ",
        "trainer: cpu",
        "-m method=",
    ):
        assert expected in said


@pytest.mark.parametrize(
    "words", [["--cfg", "job", "seed=7"], ["seed=7", "-c", "job"], ["eval", "--cfg", "job", "seed=7"]]
)
def test_the_configuration_is_shown_as_the_help_says(monkeypatch, capsys, words):
    from lightning_peft.cli.main import main

    monkeypatch.setattr(sys, "argv", ["lightning-peft", *words])
    main()
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7


def test_every_method_yaml_holds_what_its_dataclass_holds(tmp_path):
    """The same options, in the same order, with the defaults of one preset."""
    from dataclasses import fields

    from hydra import compose, initialize_config_module
    from hydra.utils import get_class, instantiate

    folder = Path(__file__).parents[2] / "conf" / "method"
    with initialize_config_module("lightning_peft.conf", version_base="1.3"):
        for path in sorted(folder.glob("*.yaml")):
            config = compose("train", [f"method={path.stem}"]).method
            cls = get_class(config._target_)
            assert {k for k in config if k != "_target_"} == {f.name for f in fields(cls)}, path.name
            instantiate(config, _convert_="all")
    for stem, cls_name in (("lora", "LoRA"), ("houlsby", "BottleneckAdapter"), ("prompt_tuning", "PromptTuning")):
        import lightning_peft

        values = {k: v for k, v in yaml.safe_load((folder / f"{stem}.yaml").read_text()).items() if k != "_target_"}
        values["learning_rate"] = float(values["learning_rate"])
        assert values == vars(getattr(lightning_peft, cls_name)())


def test_every_other_group_composes(tmp_path):
    from hydra import compose, initialize_config_module

    folder = Path(__file__).parents[2] / "conf"
    groups = ("model", "data", "task", "trainer", "optimizer", "scheduler", "callbacks", "logger", "experiment")
    with initialize_config_module("lightning_peft.conf", version_base="1.3"):
        for group in groups:
            for path in (folder / group).glob("*.yaml"):
                assert compose("train", [f"{group}={path.stem}"])


@pytest.mark.slow
def test_another_hydra_application_gets_the_groups(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text("defaults:\n  - method: lora\n  - _self_\n")
    (tmp_path / "app.py").write_text(
        "import hydra\n"
        "@hydra.main(version_base='1.3', config_path='conf', config_name='app')\n"
        "def app(config):\n    print(config.method._target_)\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "app.py", "method=houlsby"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "lightning_peft.BottleneckAdapter", done.stderr
