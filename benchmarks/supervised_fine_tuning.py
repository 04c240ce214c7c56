"""Supervised fine-tuning of a Llama with LoRA: examples a second and peak memory, beside the tools that people use.

    python benchmarks/supervised_fine_tuning.py ours trainer
    python benchmarks/supervised_fine_tuning.py ours ours:smallest trl:default trl:grouped trl:packed trl:smallest

All runs of one line are compared with its first; what begins with ``trl`` needs ``pip install trl``.

The bodies of functions of Python's standard library are prompts, their docstrings completions, at most 384 and 128
tokens of them; half of a batch that is padded is padding, and a ninth of its tokens is supervised. Each run is a
process of its own, in turns with the others; every tool gets the same weights, examples, rate and optimizer in 32 bits,
and ``trainer``, ``trl:default`` and ``ours`` the same examples in every step, so their losses are compared too. The
figures go to ``benchmarks/results/supervised_fine_tuning.json``.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

PROMPT, COMPLETION, BATCH, RATE = 384, 128, 8, 1e-3
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
VOCABULARY = 32_000
MIB = 2**20


def pairs() -> list[tuple[str, str]]:
    """Bodies of functions without their docstrings, and these."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if isinstance(node, ast.FunctionDef) and text and len(node.body) > 1:
                node.body = node.body[1:]
                found.append((ast.unparse(node) + "\n", text))
    return found


def prepare(folder: Path, examples: int) -> None:
    """Writes the base, a tokenizer that has read the examples, and their token ids."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = pairs()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    learn = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator((a + b for a, b in texts), learn)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    random.Random(0).shuffle(texts)
    rows = []
    for prompt, completion in texts[:examples]:
        before = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"][: PROMPT - 1]]
        answer = [*tokenizer(completion)["input_ids"][: COMPLETION - 1], tokenizer.eos_token_id]
        rows.append({"input_ids": before + answer, "labels": [-100] * len(before) + answer})
    (folder / "rows.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=VOCABULARY, pad_token_id=0)).save_pretrained(folder)
    module(folder).adapter.save(folder / "start")


def memory() -> tuple[float, float]:
    """What the process holds now and what it held at most since `forget_peak`, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> None:
    """Lets Linux begin anew with the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def module(folder: Path, activation_checkpointing: int = 0) -> Any:
    """The base with LoRA of this package, always with the same numbers."""
    import torch

    from lightning_peft import LoRA, PeftModule, SupervisedFineTuning

    torch.manual_seed(0)
    optimizer = {"name": "AdamW", "lr": RATE, "weight_decay": 0.0}
    base = {"name_or_path": str(folder), "activation_checkpointing": activation_checkpointing}
    made = PeftModule(base, LoRA(r=16, lora_alpha=32), SupervisedFineTuning(), optimizer, {"name": "constant"})
    made.configure_model()
    return made


def ours(folder: Path, kind: str) -> dict[str, Any]:
    """`PeftModule` under Lightning's Trainer; ``smallest`` computes the layers again in the backward pass."""
    import lightning as L
    from torch.utils.data import DataLoader

    class Losses(L.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.seen.append(float(outputs["loss"]))

    rows = json.loads((folder / "rows.json").read_text())
    adapted, losses = module(folder, activation_checkpointing=int(kind == "smallest")), Losses()
    collate = partial(adapted.task.collate, tokenizer=adapted.tokenizer, training=True)
    loader = DataLoader(rows, BATCH, collate_fn=collate)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(max_epochs=1, callbacks=[losses], accelerator="cpu", gradient_clip_val=1.0, **quiet)
    return timed(lambda: trainer.fit(adapted, loader), len(rows), losses.seen)


def peft_model(folder: Path) -> Any:
    """The base with PEFT's LoRA from the same numbers as ours begins with."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(base, str(folder / "start"), is_trainable=True)


def in_order(kind: Any, seen: list[float]) -> Any:
    """A trainer that takes the examples as they come, and notes the loss of every step."""
    import torch

    class InOrder(kind):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            seen.append(float(loss))
            return loss

    return InOrder


def trainer(folder: Path) -> dict[str, Any]:
    """Transformers' Trainer with PEFT, as it is but for the order of the examples."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows, seen = json.loads((folder / "rows.json").read_text()), list[float]()
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder))
    run = in_order(Trainer, seen)(peft_model(folder), arguments(TrainingArguments, folder), collator, rows)
    return timed(run.train, len(rows), seen)


TRL: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped": {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False},
    "packed": {"packing": True, "max_length": 1600, "per_device_train_batch_size": 1, "gradient_checkpointing": False},
    "smallest": {"packing": True, "max_length": 1600, "per_device_train_batch_size": 1},
}
"""TRL's settings by name; its default computes the layers again in the backward pass, which takes time for memory."""


def trl(folder: Path, kind: str) -> dict[str, Any]:
    """TRL's SFTTrainer with PEFT, in 32 bits as the others; at its default with the same examples in every step."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    rows, seen = json.loads((folder / "rows.json").read_text()), list[float]()
    options = arguments(SFTConfig, folder, **{"bf16": False, "max_length": PROMPT + COMPLETION, **TRL[kind]})
    made = in_order(SFTTrainer, seen) if kind == "default" else SFTTrainer
    run = made(
        peft_model(folder),
        options,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    return timed(run.train, len(rows), seen)


def arguments(kind: Any, folder: Path, **more: Any) -> Any:
    """Training arguments: an epoch with a constant rate."""
    options = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": RATE, "use_cpu": True}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "lr_scheduler_type": "constant"}
    return kind(str(folder / "out"), **{**options, **quiet, **more})


def timed(run: Any, examples: int, losses: list[float]) -> dict[str, Any]:
    """Runs it, and says how long it took and what it held above what it held before."""
    forget_peak()
    before = memory()[0]
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    return {"examples_per_second": examples / seconds, "peak_mib": memory()[1] - before, "losses": losses}


def main() -> None:
    """Starts the runs in turns, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", help="ours, ours:smallest, trainer, " + ", ".join(f"trl:{kind}" for kind in TRL)
    )
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "supervised_fine_tuning.json"
    )
    options = parser.parse_args()
    if options.folder is not None:  # one run, in a process of its own
        import torch

        torch.set_num_threads(options.threads)
        name, _, kind = options.runs[0].partition(":")
        run = trainer if name == "trainer" else partial({"ours": ours, "trl": trl}[name], kind=kind)
        found = run(options.folder)
        print("\n" + json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, options.examples)
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in options.runs}
        for _ in range(options.repeats):
            for name in options.runs:
                command = [sys.executable, __file__, name, "--folder", scratch, "--threads", str(options.threads)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                measured[name].append(json.loads(done.stdout.splitlines()[-1]))
    report(measured, options.examples, options.output)


def report(measured: dict[str, list[dict[str, Any]]], examples: int, output: Path) -> None:
    """The medians over the first run's, as a table and as JSON."""
    first = next(iter(measured))
    table: dict[str, Any] = {"examples": examples}
    print(f"{'':<14}{'examples/s':>12}{'spread':>16}{'peak MiB':>10}{first + ' is':>12}{'of its peak':>13}{'loss':>10}")
    for name, rounds in measured.items():
        speeds = sorted(r["examples_per_second"] for r in rounds)
        ratios = [
            a["examples_per_second"] / b["examples_per_second"] for a, b in zip(measured[first], rounds, strict=True)
        ]
        peaks = [a["peak_mib"] / b["peak_mib"] for a, b in zip(measured[first], rounds, strict=True)]
        pairs = zip(measured[first][0]["losses"], rounds[0]["losses"], strict=False)
        row = {
            "examples_per_second": round(statistics.median(speeds), 2),
            "spread": [round(speeds[0], 2), round(speeds[-1], 2)],
            "peak_mib": round(statistics.median(r["peak_mib"] for r in rounds)),
            "times_as_fast": round(statistics.median(ratios), 2),
            "of_its_peak": round(statistics.median(peaks), 2),
            "largest_difference_of_losses": max((abs(a - b) for a, b in pairs), default=None),
        }
        table[name] = row
        spread = f"{row['spread'][0]} to {row['spread'][1]}"
        apart = row["largest_difference_of_losses"]
        print(
            f"{name:<14}{row['examples_per_second']:>12}{spread:>16}{row['peak_mib']:>10}{row['times_as_fast']:>11}x"
            f"{row['of_its_peak']:>13}{'' if apart is None else f'{apart:.1e}':>10}"
        )
    output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
