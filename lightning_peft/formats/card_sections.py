"""The sections of a model card that tell how an adapter came to be, in Markdown; what is not known is left out."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from lightning_peft.core.method import Method
from lightning_peft.formats.markdown import code, prose, table
from lightning_peft.formats.training_record import TrainingRecord
from lightning_peft.methods.hf_peft_config import ready_config

_PLACES = 20  # rows of a table that one still reads
_LABELS = 12
_SHOWN = 8
_SPLITS = {"val": "validation", "test": "test", "train": "train"}


def spoken(name: str) -> tuple[str | None, str]:
    """A metric's split and its own name: ``"val/accuracy"`` is the accuracy on ``"validation"``.

    Args:
        name: as it was logged; a name without a split of ours stays whole.
    """
    stage, _, metric = name.partition("/")
    return (_SPLITS[stage], metric) if metric and stage in _SPLITS else (None, name)


def changes_section(method: Method, places: Sequence[tuple[str, str, int, int]], trainable: int, total: int) -> str:
    """What trains where, and the options that are not the defaults.

    Args:
        method: the method.
        places: module, what trains there, how many modules, how many parameters.
        trainable: trained parameters.
        total: parameters of the model.
    """
    share = 100 * trainable / max(1, total)
    shown = [(code(p), prose(what), f"{n:,}", f"{count:,}") for p, what, n, count in places[:_PLACES]]
    left = [(f"{len(places) - _PLACES} more", "", "", "")] if len(places) > _PLACES else []
    parts = [
        "## Method",
        f"{trainable:,} parameters train, {share:.2f}% of the model's {total:,}.",
        table(("Module", "What trains", "Modules", "Parameters"), [*shown, *left], "llrr"),
        _options(method),
    ]
    return "\n\n".join(parts)


def _options(method: Method) -> str:
    changed = changed_options(method)
    if not changed:
        return "All options of the method have their defaults."
    return "Options that differ from the method's defaults:\n\n" + table(
        ("Option", "Value"), [(code(k), code(_short(v))) for k, v in changed.items()], "ll"
    )


def changed_options(method: Method) -> dict[str, Any]:
    """The method's options that differ from its defaults; a tuner of ``peft``'s against the defaults there.

    Args:
        method: the method. Its learning rate is one of the training's numbers, no option of what it is.
    """
    found: dict[str, Any] = {}
    for option in fields(method):  # type: ignore[arg-type]
        value = getattr(method, option.name)
        if isinstance(value, dict) and "peft_type" in value:
            found |= _changed(ready_config(value), value)
        elif option.name != "learning_rate" and value != _default(option):
            found[option.name] = value
    return found


def _changed(config: Any, plain: dict[str, Any]) -> dict[str, Any]:
    defaults = {f.name: _default(f) for f in fields(config)}
    named = {k: v for k, v in plain.items() if k not in ("peft_type", "task_type")}
    return {k: v for k, v in named.items() if v not in (None, [], {}) and v != defaults.get(k)}


def _default(option: Any) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > _SHOWN:
        return f"{', '.join(map(repr, value[:_SHOWN]))} and {len(value) - _SHOWN} more"
    return str(value)


def metrics_section(training: TrainingRecord) -> str:
    """The metrics of these weights.

    Args:
        training: how they were trained.
    """
    rows = []
    for name, value in training.reached.items():
        split, metric = spoken(name)
        mark = "**" if name == training.monitor else ""
        rows.append((f"{mark}{split + ' ' if split else ''}{prose(metric)}{mark}", f"{mark}{value:.4g}{mark}"))
    if not rows:
        return ""
    parts = ["## Metrics", table(("Metric", "Value"), rows, "lr")]
    if training.step < training.last_step and training.monitor is not None:
        split, metric = spoken(training.monitor)
        by = f"{split} {prose(metric)}" if split else prose(metric)
        parts.append(f"These weights are those of step {training.step:,} of {training.last_step:,}, chosen by {by}.")
    return "\n\n".join(parts)


def curves_section(file: str) -> str:
    """The picture.

    Args:
        file: where it is.
    """
    return f"![Losses and metrics over the steps of the training]({file})"


def data_section(data: dict[str, Any]) -> str:
    """What it was trained and judged on.

    Args:
        data: ``origin``, ``seen_as`` and ``splits``.
    """
    told = data.get("splits", {})
    splits: dict[str, dict[str, Any]] = {n: told[n] for n in ("train", "validation", "test") if n in told}
    parts = ["## Data"]
    if data.get("origin"):
        seen = f", {prose(data['seen_as'])}" if data.get("seen_as") else ""
        parts.append(f"From {code(data['origin'])}{seen}.")
    columns = [
        (
            "Rows",
            {n: _count(s, "rows", "of a stream, at least " if s.get("streamed") else "") for n, s in splits.items()},
        ),
        ("Tokens", {n: _count(s, "tokens") for n, s in splits.items()}),
        ("Supervised tokens", {n: _count(s, "supervised") for n, s in splits.items()}),
    ]
    for part in dict.fromkeys(name for s in splits.values() for name in s.get("spreads", {})):
        spreads = {n: s["spreads"][part] for n, s in splits.items() if part in s.get("spreads", {})}
        unit = next(iter(spreads.values())).get("unit")
        title = prose(f"{part.capitalize()}{f' in {unit}' if unit else ''} (median, largest)")
        columns.append((title, {n: _spread(spreads.get(n)) for n in splits}))
    known = [(title, cells) for title, cells in columns if any(cells.values())]
    rows = [(name, *(cells[name] for _, cells in known)) for name in splits]
    parts.append(table(("Split", *(title for title, _ in known)), rows, "l" + "r" * len(known)))
    parts.append(_labels(splits))
    return "\n\n".join(p for p in parts if p)


def _count(split: dict[str, Any], key: str, before: str = "") -> str:
    return "" if split.get(key) is None else f"{before}{split[key]:,}"


def _spread(spread: dict[str, Any] | None) -> str:
    return "" if not spread else f"{spread['median']:,.4g}, {spread['largest']:,.4g}"


def _labels(splits: dict[str, dict[str, Any]]) -> str:
    counted = {n: s["labels"] for n, s in splits.items() if s.get("labels")}
    names = list(dict.fromkeys(c for counts in counted.values() for c in sorted(counts, key=lambda c: (-counts[c], c))))
    if not names:
        return ""
    totals = {n: max(1, sum(counts.values())) for n, counts in counted.items()}

    def row(title: str, chosen: Sequence[str]) -> tuple[str, ...]:
        some = list(chosen)
        shares = [100 * sum(counts.get(c, 0) for c in some) / totals[n] for n, counts in counted.items()]
        return (prose(title), *(f"{share:.1f}%" for share in shares))

    rows = [row(name, [name]) for name in names[:_LABELS]]
    rest = names[_LABELS:]
    rows += [row(f"{len(rest)} more", rest)] if rest else []
    return table(("Label", *counted), rows, "l" + "r" * len(counted))


def setup_section(training: TrainingRecord) -> str:
    """How it was trained.

    Args:
        training: what is known of that.
    """
    rows = [(prose(name), prose(words)) for name, words in training.setup]
    if training.step:
        epochs = f"{training.step / training.epoch_steps:.3g}" if training.epoch_steps else ""
        said = f" ({epochs} epoch{'s' * (epochs != '1')})" if epochs else ""
        rows.append(("steps", f"{training.step:,}{said}"))
    if not rows:
        return ""
    before = f"The adapter had been trained for {training.earlier:,} steps before." if training.earlier else ""
    return "\n\n".join(p for p in ("## Training", table(("Setting", "Value"), rows, "ll"), before) if p)


def versions_section(training: TrainingRecord | None) -> str:
    """The packages that it was trained with, or written with where that is not known.

    Args:
        training: how it was trained.
    """
    known = training.versions if training and training.versions else installed_versions()
    return "## Versions\n\n" + "\n".join(f"- {prose(name)} {prose(version)}" for name, version in sorted(known.items()))


def installed_versions() -> dict[str, str]:
    """The versions of what is installed here of the packages that matter to an adapter."""
    found = {name: _version(name) for name in ("lightning_peft", "torch", "lightning", "transformers", "peft")}
    return {name: version for name, version in found.items() if version is not None}


@functools.cache  # to find one takes as long as to write a small adapter
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
