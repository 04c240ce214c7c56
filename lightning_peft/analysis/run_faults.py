"""What may be wrong with a run's files: it did not end, its parts are of different bases, it forgot what it knew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_peft.analysis.diagnosis import Diagnosis, number

FORGOT = 0.1
"""Share of the loss of the base, on texts that it knew, by which it may grow: less is within what drawing texts varies.

Of likenesses between layers (1 - CKA) it is the same share of the whole range.
"""


def unended(
    *,
    metrics: bool,
    epoch: int | None,
    epochs: int | None,
    step: int | None,
    steps: int | None,
    failed: str | None = None,
) -> Diagnosis:
    """Whether the run came to no end.

    Args:
        metrics: whether there is a ``metrics.json``, which is written at the end.
        epoch: epochs that are known to be whole; None where nothing tells.
        epochs: how many the run was to have; None where it has no such end.
        step: the last step that is known; None where nothing tells.
        steps: how many the run was to have; None where it has no such end.
        failed: why it failed, in a sentence; None where it said nothing.
    """
    subject = "end"
    reached = "no step is known" if step is None else f"step {step:,}"
    if epoch is not None:
        reached += f", {epoch:,}" + (f" of {epochs:,} epochs" if epochs is not None else " epochs")
    if steps is not None:
        reached += f", {steps:,} steps at most"
    if metrics:
        return Diagnosis(subject, f"metrics.json is there, which is written last; {reached}")
    if epoch is not None and epochs is not None and epoch >= epochs:
        what = "The run trained to its end, but stopped before it wrote its metrics and its adapter."
        remedy = "lightning-peft export adapter=.../checkpoints/best.ckpt to=FOLDER"
    else:
        what = "The run did not end." if failed is None else f"The run failed: {failed}"
        remedy = (
            "the command that began it, with ckpt_path=last and hydra.run.dir= its folder, goes on where it stopped"
            if epoch is not None or step is not None
            else "the command that began it, again: it saved nothing to go on from"
        )
        if failed is not None:
            remedy = f"what the sentence says; then {remedy}"
    return Diagnosis(subject, f"there is no metrics.json; {reached}", what, remedy)


def unreadable(damaged: Sequence[str], *, best: bool) -> Diagnosis:
    """Whether what the run saved can be read.

    Args:
        damaged: a sentence for each checkpoint or adapter that is there and cannot be.
        best: whether the best checkpoint was read.
    """
    subject = "files"
    if not damaged:
        return Diagnosis(subject, "what the run saved can be read")
    return Diagnosis(
        subject,
        "; ".join(damaged),
        "What the run saved cannot be read.",
        "move it away: ckpt_path=last goes on from the newest checkpoint that is whole"
        + (", lightning-peft export adapter=.../checkpoints/best.ckpt to=FOLDER writes an adapter" if best else ""),
    )


def another_base(
    adapter: Mapping[str, str | None], mismatch: str | None, said: str, *, compared: bool = True
) -> Diagnosis:
    """Whether the adapter, the checkpoint and the base on this machine belong together.

    Args:
        adapter: fingerprints of the base by the file that tells them; None where values could not be read.
        mismatch: in which way the base on this machine is another one than the checkpoint's; None where it is not.
        said: what the base on this machine is, or why it was not compared.
        compared: whether it was.
    """
    subject = "base"
    told = {name: print_ for name, print_ in adapter.items() if print_ is not None}
    if not told:
        why = f"neither a checkpoint nor the adapter's folder tells its base's fingerprint; {said}"
        return Diagnosis.unseen(subject, why)
    evidence = ", ".join(f"{name} {print_}" for name, print_ in told.items())
    if len(set(told.values())) > 1:
        return Diagnosis(
            subject,
            evidence,
            "The exported adapter and the checkpoint were trained on different bases: one of them is not of this run.",
            "lightning-peft export adapter=.../checkpoints/best.ckpt to=FOLDER writes the checkpoint's adapter anew",
        )
    if mismatch is not None:
        return Diagnosis(
            subject,
            f"{evidence}; {mismatch}",
            "The base that config.yaml names is not the one that the adapter was trained on.",
            "model.name_or_path and model.revision: name the weights of the training",
        )
    evidence = f"{evidence}; {said}"
    return Diagnosis(subject, evidence) if compared else Diagnosis.unseen(subject, evidence)


def forgetting(kind: str, before: float | None, forgotten: float) -> Diagnosis:
    """Whether the model lost what it knew before the training.

    Args:
        kind: ``"loss"`` on texts that the base knew, or ``"cka"``, the likeness of the layers' outputs.
        before: the base's own value; None where it has none.
        forgotten: 0 where nothing is, larger is worse.
    """
    subject = "forgetting"
    unit = "the loss on texts that the base knew grew" if kind == "loss" else "the layers' outputs drifted (1 - CKA)"
    share = forgotten / before if kind == "loss" and before else forgotten
    evidence = f"{unit} by {number(forgotten)}" + (f" from {number(before)}" if kind == "loss" and before else "")
    if share <= FORGOT:
        return Diagnosis(subject, evidence)
    return Diagnosis(
        subject,
        evidence,
        "The model forgot what it knew before the training.",
        "a lower optimizer.lr, fewer epochs, a smaller method.r, or some of the base's own texts among the data",
    )
