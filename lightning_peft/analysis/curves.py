"""The curves of a training as a picture for its model card."""

from __future__ import annotations

import io

from lightning_peft.formats.card_sections import spoken
from lightning_peft.formats.training_record import TrainingRecord

_INK, _PALE = "#24292f", "#8c959f"
_TRAINING, _JUDGED = "#3b82c4", "#e08a2e"


def curves_png(training: TrainingRecord) -> bytes | None:
    """The losses, and beside them the metric by which checkpoints were chosen, over the optimizer's steps.

    Args:
        training: what is known of it.

    Returns:
        A PNG, 1280 pixels wide, made to be read at half of that; None where there is no curve.
    """
    training.settle()
    losses = {"train": [(p[0], p[1]) for p in training.losses]}
    for name in training.metrics:
        split, metric = spoken(name)
        if metric == "loss" and split == "validation":
            losses[split] = [(p[0], p[1]) for p in training.metrics[name]]
    losses = {k: v for k, v in losses.items() if v}
    panels = {"loss": losses} if losses else {}
    split, metric = spoken(training.monitor or "")
    chosen = [(p[0], p[1]) for p in training.metrics.get(training.monitor or "", [])]
    if chosen and (metric != "loss" or not losses):
        panels[metric] = {split or "": chosen}
    if not any(len(points) > 1 for lines in panels.values() for points in lines.values()):
        return None
    return _drawn(panels, training)


def _drawn(panels: dict[str, dict[str, list[tuple[float, float]]]], training: TrainingRecord) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
        "axes.edgecolor": _PALE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "text.parse_math": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, 2.7), dpi=200, layout="constrained", facecolor="white")
        for place, (title, lines) in zip(
            figure.subplots(1, len(panels), sharex=True, squeeze=False)[0], panels.items(), strict=True
        ):
            for split, points in lines.items():
                steps, values = zip(*points, strict=True)
                style_of = (
                    {"linewidth": 1.2, "color": _TRAINING} if split == "train" else {"marker": "o", "markersize": 3}
                )
                place.plot(steps, values, **{"linewidth": 1.5, "color": _JUDGED, **style_of}, label=split or None)
            place.set_title(title, fontsize=10, loc="left")
            place.set_xlabel("step")
            place.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            place.grid(axis="y", color="#d0d7de", linewidth=0.6)
            if training.step < training.last_step:
                place.axvline(training.step, color=_PALE, linewidth=1, linestyle="--", label="these weights")
            if any(split for split in lines):
                place.legend(frameon=False, fontsize=8)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return file.getvalue()
