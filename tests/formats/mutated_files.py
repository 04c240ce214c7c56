"""Adapters' folders and checkpoints with something changed in them, each loaded in this process under limits.

    python tests/formats/mutated_files.py --cases 10000

A line of JSON says how many loaded, how many were refused, and what was neither. Audit hooks see to it that nothing is
unpickled, run, fetched or written outside of the script's own folder meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.methods.hf_peft_config import knows

SECONDS = 10
MEMORY = 3 * 2**30  # beyond what the process has when it begins
REFUSALS = (ValueError, FileNotFoundError)
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lp.LoRA(r=2, rank_pattern={"v_proj": 3}, modules_to_save=["lm_head"]),
    "dora": lambda: lp.LoRA(r=2, use_dora=True, target_modules=r".*\.(q|v)_proj"),
    "ia3": lambda: lp.IA3(),
    "vera": lambda: lp.VeRA(r=4),
    "loha": lambda: lp.LoHa(r=2),
    "shira": lambda: lp.SparseTuning(r=2),
    "tokens": lambda: lp.TrainableTokens([5, 9]),
    "bottleneck": lambda: lp.BottleneckAdapter(reduction_factor=4),
    "compacter": lambda: lp.Compacter(reduction_factor=4),
    "norms": lambda: lp.Selective(parameter_types=["norm"]),
    "prompt": lambda: lp.PromptTuning(4),
    "prefix": lambda: lp.PrefixTuning(4),
    "p_tuning": lambda: lp.PTuning(num_virtual_tokens=4, encoder_hidden_size=5),
    "loreft": lambda: lp.LoReFT(r=2),
    "oft": lambda: lp.OFT(oft_block_size=8),
}
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 255, 10**6, 10**9, 2**63, 10**400, -(2**63), 0.5, -1.0, 1e-30, 1e308, float("nan"),
    float("inf"), "", "x", "all-linear", "../../etc/passwd", "/etc/passwd", "os.system", "q_proj", "(a+)+b", "[",
    "\x00", "é" * 1000, [], [None], [0], ["q_proj"], [[]], [1, "a"], {}, {"a": 1}, {"": None}, [[[[[[[[[[]]]]]]]]]],
)  # fmt: skip


class Net(L.LightningModule):
    """What the checkpoints are of."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, max_position_embeddings=32, pad_token_id=0)).eval()


def originals(scratch: Path) -> dict[str, dict[str, bytes]]:
    """The folders and the checkpoint before anything is changed: a file's name to what is in it."""
    found = {}
    for name, make in METHODS.items():
        folder = lp.adapt(language_model(), make()).save(scratch / name)
        files = {f: (folder / f).read_bytes() for f in ("adapter_model.safetensors", "lightning_peft.json")}
        found[name] = files
        if (folder / "adapter_config.json").exists():
            config = (folder / "adapter_config.json").read_bytes()
            files["adapter_config.json"] = config
            if name != "p_tuning":  # its network is none of peft's, which reads the vectors alone
                found[f"{name} of peft"] = {f: c for f, c in files.items() if f != "lightning_peft.json"}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    callback = lp.PeftCallback(lp.LoRA(r=2), model="layer", print_plan=False)
    trainer = L.Trainer(callbacks=[callback], max_epochs=1, accelerator="cpu", default_root_dir=scratch, **quiet)
    trainer.fit(Net(), DataLoader(torch.randn(4, 4), batch_size=2))
    trainer.save_checkpoint(scratch / "a.ckpt")
    found["checkpoint"] = {"a.ckpt": (scratch / "a.ckpt").read_bytes()}
    return found


class Mutation:
    """Draws changes; the same seed draws the same."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def of(self, files: dict[str, bytes], others: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
        files = dict(files)
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            name = self.draw.choice(sorted(files)) if files else None
            if name is None:
                break
            kinds: list[Callable[[bytes], bytes]] = [self._bytes]
            if name.endswith(".json"):
                kinds += [self._json] * 6
            if name.endswith(".safetensors"):
                kinds += [self._header] * 2 + [self._tensors] * 3
            if name.endswith(".ckpt"):
                kinds += [self._checkpoint] * 4
            content = files.pop(name)
            same = [o[name] for o in others.values() if name in o]
            chance = self.draw.random()
            if chance > 0.01:  # else the file is lost, or another adapter's
                files[name] = self.draw.choice(kinds)(content) if chance > 0.03 else self.draw.choice(same)
        return files

    def _bytes(self, content: bytes) -> bytes:
        draw, raw = self.draw, bytearray(content)
        place = draw.randrange(len(raw) + 1)
        end = min(len(raw), place + draw.choice((1, 2, 8, 100)))
        kind = draw.randrange(5)
        if kind == 0:
            for _ in range(draw.choice((1, 2, 8))):
                if raw:
                    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del raw[place:]
        elif kind == 2:
            raw[place:end] = bytes(end - place)
        elif kind == 3:
            raw[place:place] = draw.randbytes(draw.choice((1, 8, 100)))
        else:
            del raw[place:end]
        return bytes(raw)

    def _json(self, content: bytes) -> bytes:
        try:
            return json.dumps(self._value(json.loads(content))).encode()
        except (ValueError, RecursionError):
            return self._bytes(content)

    def _value(self, tree: Any) -> Any:
        """A change somewhere in nested values: another value, a key less, more or of another name, two swapped."""
        draw, tree = self.draw, copy.deepcopy(tree)
        places = list(_places(tree))
        if not places:
            return draw.choice(ODD)
        owner, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[draw.choice((str(key) + "x", str(key)[:-1], "", "_target_"))] = owner.pop(key)
        elif kind == 2:
            other, there = draw.choice(places)
            owner[key], other[there] = other[there], owner[key]
        elif kind == 3 and isinstance(owner[key], (int, float)):
            owner[key] = draw.choice((owner[key] + 1, owner[key] - 1, owner[key] * 1000, -owner[key], str(owner[key])))
        else:
            owner[key] = draw.choice(ODD)
        return tree

    def _header(self, content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = self._json(content[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    def _tensors(self, content: bytes) -> bytes:
        draw = self.draw
        try:
            tensors = load(content)
        except Exception:  # damaged by a change before
            return self._bytes(content)
        if not tensors:
            return content
        key = draw.choice(sorted(tensors))
        tensor = tensors[key]
        kind = draw.randrange(8)
        if kind == 0:
            del tensors[key]
        elif kind == 1:
            tensors[draw.choice((f"{key}x", key[1:], f"base_model.{key}", key.upper()))] = tensors.pop(key)
        elif kind == 2:
            dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.uint8)
            tensors[key] = tensor.to(draw.choice((*dtypes, torch.float8_e4m3fn)))
        elif kind == 3:
            tensors[key] = tensor.reshape(-1)
        elif kind == 4:
            tensors[key] = torch.zeros(draw.choice(((), (0,), (1,), (3, 5), (2, 0, 7), (1, *tensor.shape))))
        elif kind == 5:
            tensors[key] = torch.full(tensor.shape, draw.choice((0, -1, 100))).to(tensor.dtype)
        elif kind == 6 and tensor.is_floating_point():
            tensors[key] = torch.full(tensor.shape, draw.choice((float("nan"), float("inf"), 1e30))).to(tensor.dtype)
        else:
            tensors[key] = tensor[..., : tensor.shape[-1] // 2] if tensor.dim() else tensor.reshape(1)
        return save({k: t.contiguous() for k, t in tensors.items()})

    def _checkpoint(self, content: bytes) -> bytes:
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.seek(0)
            try:
                tree = torch.load(file, weights_only=True)
            except Exception:  # damaged by a change before
                return self._bytes(content)
            # most often what is ours
            if self.draw.random() < 0.7 and isinstance(tree, dict) and isinstance(tree.get("lightning_peft"), dict):
                tree["lightning_peft"] = self._value(tree["lightning_peft"])
            else:
                tree = self._value(tree)
            file.seek(0)
            file.truncate()
            torch.save(tree, file)
            file.seek(0)
            return file.read()


def _places(tree: Any) -> Any:
    if isinstance(tree, (dict, list)):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


class Watch:
    """Notes what a loading does beside loading."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = str(allowed)
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        run = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
        if event in run or (event in ("os.remove", "os.rename", "shutil.rmtree") and self.allowed not in str(args[0])):
            self.seen.append(f"{event} {args!r:.100}")
        if event == "open" and any(m in str(args[1]) for m in "wax+") and not str(args[0]).startswith(self.allowed):
            self.seen.append(f"open {args!r:.100}")


class TooSlow(BaseException):
    """Raised in a case that takes longer than it may."""


def _stop(*_: Any) -> None:
    raise TooSlow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), options.cases, options.seed)))


def run(scratch: Path, cases: int, seed: int) -> dict[str, Any]:
    """Loads so many changed adapters, and tells what became of them."""
    kept = originals(scratch / "originals")
    model = language_model()
    ids = torch.arange(3, 9).unsqueeze(0)
    base = model(input_ids=ids).logits
    knows("HRA")
    for i, name in enumerate(kept):  # imports what it needs before anything is watched
        _load(kept[name], scratch / f"whole{i}", name, model, ids)
    watch = Watch(scratch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _stop)
    counted: Counter[str] = Counter()
    faults: list[str] = []
    for case in range(cases):
        mutation = Mutation(seed * 1_000_003 + case)
        name = mutation.draw.choice(sorted(kept))
        files = mutation.of(kept[name], kept)
        print(f"{case} {name}", file=sys.stderr)  # the last line tells which one ended the process
        watch.on = True
        became, why = _tried(files, scratch / f"case{case}", name, model, ids)
        watch.on = False
        counted[became] += 1
        if hasattr(model, "adapters"):
            why = "left an adapter behind"
        elif case % 50 == 0 and not torch.equal(model(input_ids=ids).logits, base):
            why = "or one before it changed the base"
        if why:
            faults.append(f"case {case} ({name}) {why}")
            model = language_model()
    return {**counted, "faults": faults, "beside": watch.seen}


def _tried(files: dict[str, bytes], place: Path, name: str, model: nn.Module, ids: torch.Tensor) -> tuple[str, str]:
    """Whether a case was loaded or refused, and what was wrong with how that went."""
    signal.alarm(SECONDS)
    try:
        _load(files, place, name, model, ids)
        return "loaded", ""
    except REFUSALS as error:
        said = "".join([str(error), *getattr(error, "__notes__", ())])
        return "refused", "" if str(place) in said else f"names no file: {error}"
    except TooSlow:
        return "failed", f"took more than {SECONDS} s"
    except BaseException as error:
        if name == "checkpoint" and "Error(s) in loading state_dict" in str(error):  # torch's word for it
            return "refused", ""
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error!s:.200} at {where.filename}:{where.lineno}"
    finally:
        signal.alarm(0)


def _load(files: dict[str, bytes], place: Path, name: str, model: nn.Module, ids: torch.Tensor) -> None:
    place.mkdir()
    for file, content in files.items():
        (place / file).write_bytes(content)
    if name == "checkpoint":
        lp.load_from_checkpoint(Net, place / "a.ckpt").layer(torch.ones(1, 4))
        return
    adapter = lp.load_adapter(model, place)
    try:
        model(input_ids=ids)
    finally:
        adapter.remove()


if __name__ == "__main__":
    main()
