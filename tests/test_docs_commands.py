"""The commands in the documentation run, one after another, on small models and few rows, for a step or two."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import datasets
import pandas as pd
import pytest
import transformers

from tests.processes import run
from tests.test_docs_code import PAGES, commands

NOT_RUN = {
    "submitit_slurm": "needs a cluster",
    "trainer=slurm": "needs a cluster",
    "owner/name": "needs the hub",
    "trainer.devices=4": "needs four GPUs; tests/end_to_end/test_several_devices.py has two processes",
    "[experts.": "needs a mixture of experts; tests/methods/test_stacked_weights.py has some",
    "launcher=joblib": "tests/end_to_end/test_command.py has such a sweep",
    "torchvision": "needs a package that the tests do without",
    "--help": "tests/end_to_end/test_command.py has it",
}
"""What stands in commands that do not run here, with the reason."""

MEANT = {
    "path/to/model": "llama",
    "name_or_path=...": "name_or_path=llama",
    "name_or_path=folder": "name_or_path=llama",
    "Qwen/Qwen3-0.6B": "llama",
    "google/flan-t5-small": "t5",
    "google/vit-base-patch16-224-in21k": "vit",
    "outputs/.../adapter": "run/adapter",
    "outputs/2026-01-31/12-00-00": "run",
    "outputs/mine": "run",
    "trainer=gpu": "trainer=cpu",
    "data.max_length=2048": "data.max_length=48",
    "data.max_length=1024": "data.max_length=48",
    "seed=0,1,2": "seed=0",
    "seed=1,2": "seed=1",
    " ...": " model=hf model.name_or_path=llama data=files data.train_files=chat.jsonl",
    "adapter_layers=30": "adapter_layers=2",
}
"""What stands here for a name, or for a number that takes long."""

SHORT = {
    "train": {"trainer.max_steps": 2, "trainer.limit_val_batches": 1, "data.limit": 8, "data.batch_size": 4},
    "eval": {"trainer.limit_val_batches": 1},
}
"""What makes a command short, where it does not say it itself."""

FEW = {"+sweep=methods": ["method=bitfit,ia3", "seed=0"], "+sweep=optuna": ["search.trials=2"]}
"""What makes a sweep small."""

EMBEDDED = "index.md"  # whose commands run on the model that is there for them

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path, llama_folder, bert_folder, vit_folder, draw, monkeypatch):
    """A folder with what the pages name: models, and files that have the columns of all tasks."""
    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ eos_token }}{% endfor %}"
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=len(tokenizer))
    config.decoder_start_token_id = 0
    for name, model in {
        "llama": transformers.AutoModelForCausalLM.from_pretrained(llama_folder),
        "t5": transformers.T5ForConditionalGeneration(config),
    }.items():
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    for name, folder in {"bert": bert_folder, "vit": vit_folder}.items():
        shutil.copytree(folder, name)
    for split in ("train", "test"):
        draw(f"photos/{split}", each=6)
    shutil.copytree("photos/train/red", "new")
    for path in (tmp_path / "new").glob("*.png"):
        path.rename(path.with_suffix(".jpg"))
    _write_rows(tmp_path)
    return tmp_path


def _write_rows(folder):
    rows = [
        {
            **{"text": f"number {i}", "label": "even" if i % 2 else "odd", "sentence": f"no {i}", "class": f"c{i % 2}"},
            **{"prompt": f"what is {i}", "completion": f"a {i}", "chosen": "a number", "rejected": f"no {i}"},
            **{"anchor": f"find {i}", "positive": f"number {i}", "source": f"say {i}", "target": f"{i}"},
            **{"score": i / 7, "tokens": ["Ada", str(i)], "tags": ["B-PER", "O"], "ner_tags": [1, 0]},
        }
        for i in range(12)
    ]
    table = pd.DataFrame(rows)
    flat = table.drop(columns=["tokens", "tags", "ner_tags"])
    (folder / "parts").mkdir()
    names = (
        "texts",
        "held_out",
        "pairs",
        "prompts",
        "questions",
        "new",
        "parts/a",
        "reviews",
        "sources",
        "train",
        "dev",
    )
    for name in names:
        table.to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    flat.assign(label=[["even"], ["odd", "prime"]] * 6).to_json(folder / "topics.jsonl", orient="records", lines=True)
    flat.to_json(folder / "parts" / "b.jsonl.zst", orient="records", lines=True)
    flat.to_csv(folder / "a.csv", index=False)
    flat.to_parquet(folder / "b.parquet")
    flat[["sentence", "class"]].to_csv(folder / "texts.csv", index=False)
    flat[["text", "score"]].to_csv(folder / "pairs.tsv", index=False, sep="\t")
    table[["tokens", "ner_tags"]].to_parquet(folder / "train.parquet")
    datasets.Dataset.from_pandas(flat).save_to_disk(folder / "saved")
    (folder / "books").mkdir()
    for name in ("texts.txt", "books/one.txt", "books/two.txt"):
        (folder / name).write_text("".join(f"{name}: a text about the number {i}\n" for i in range(70)))
    turns = [[("user", row["prompt"]), ("assistant", "a number")] for row in rows]
    chat = [{"messages": [{"role": role, "content": said} for role, said in turn]} for turn in turns]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))


def _runnable(page):
    """The lines behind each ``lightning-peft`` of a page that run here."""
    found = [line.strip() for line in commands(page) if not any(word in line for word in NOT_RUN)]
    # tests/end_to_end/test_every_preset_learns.py trains what stands in a preset alone
    return [line for line in found if not re.fullmatch(r"method=\w+", line)]


def _words(line, *, embedded):
    """A command's name, and its words with what makes it short."""
    for said, meant in MEANT.items():
        line = line.replace(said, meant)
    words = shlex.split(line)
    command = words[0] if words and words[0].isalpha() else "train"
    there = {word.partition("=")[0] for word in words}
    short = dict(SHORT.get(command, {}))
    if command == "train" and not embedded and "task=sft" not in words and "experiment=docstrings_lm" not in words:
        short["model.name_or_path"] = "bert"
    few = [word for name, more in FEW.items() if any(w.startswith(name) for w in words) for word in more]
    added = [word for word in [f"{k}={v}" for k, v in short.items()] + few if word.partition("=")[0] not in there]
    return command, [*words, *added]


def _trained(folder, to):
    """The adapter that most commands are about."""
    words = ["task=sft", "model=hf", "model.name_or_path=llama", "data=files", "data.train_files=texts.jsonl"]
    run(*words, "data.batch_size=4", "trainer.max_epochs=1", f"hydra.run.dir={to}", cwd=folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if _runnable(page)])
def test_the_commands_of_a_page_run_one_after_another(page, here):
    lines = [_words(line, embedded=page == EMBEDDED) for line in _runnable(page)]
    named = " ".join(word for _, words in lines for word in words)
    own = [words for command, words in lines if command == "train" and "-m" not in words]
    if own and "run/adapter" in named:
        own[0].append("hydra.run.dir=run")
    elif re.search(r"\brun\b", named.replace("hydra.run.dir", "")) and "ckpt_path=last" not in named:
        _trained(here, "run")
    if "another" in named:
        _trained(here, "run_again")
        shutil.copytree(here / "run_again" / "adapter", here / "another")
    for command, words in lines:
        if "ckpt_path=last" in words:  # of a run that was cut off after its first step
            run(*(word for word in words if word != "ckpt_path=last"), "trainer.max_steps=1", cwd=here)
            shutil.rmtree(here / "run" / "adapter")
            (here / "run" / "metrics.json").unlink()
        for word in words:  # some pages show one command after another that writes into the same folder
            if word.startswith("to="):
                shutil.rmtree(here / word.removeprefix("to="), ignore_errors=True)
        done = run(*words, cwd=here, check=False)
        assert done.returncode in ((0, 1) if command == "doctor" else (0,)), f"{words}\n{done.stdout}\n{done.stderr}"
