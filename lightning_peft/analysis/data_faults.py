"""What may be wrong with what a run learnt from, and with what it reached: answers cut off, no more than a guess."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_peft.analysis.data_summary import LOST, Cut, percent
from lightning_peft.analysis.diagnosis import Diagnosis, number


def truncation(cuts: Mapping[str, Cut], max_length: int | None) -> Diagnosis:
    """Whether the cut to ``max_length`` takes what is to be learnt.

    Args:
        cuts: what is cut off, by split.
        max_length: where rows are cut.
    """
    subject = "truncation"
    if not cuts:
        return Diagnosis.unseen(subject, "the summary of the data does not say what is cut off")
    said = []
    for name, cut in cuts.items():
        lost = "labels are of whole rows"
        if cut.supervised:
            lost = f"{percent(cut.supervised_lost, cut.supervised)} of what is learnt is lost"
        said.append(f"{name}: {percent(cut.rows, cut.looked_at)} of the rows are cut, {lost}")
    evidence = f"{'; '.join(said)}; data.max_length={max_length}"
    eaten = {n: c for n, c in cuts.items() if c.supervised and c.supervised_lost > LOST * c.supervised}
    if not eaten:
        return Diagnosis(subject, evidence)
    enough = max(c.enough for c in eaten.values())
    longer = (
        f"data.max_length={enough} loses next to nothing (lightning-peft data data.max_length=... shows another one)"
    )
    if max_length is not None and enough <= max_length:
        longer = f"a larger limit of the task's own, such as task.max_target_length={enough}"
    return Diagnosis(
        subject,
        evidence,
        "The cut to data.max_length takes what is to be learnt: the model never sees the end of its answers.",
        f"{longer}; or shorter prompts",
    )


def no_better_than_guessing(
    metrics: Mapping[str, float], labels: Mapping[str, int] | None, monitor: str | None, scored: int | None = None
) -> Diagnosis:
    """Whether a metric is no better than always saying the most frequent label gives.

    Args:
        metrics: what the run reached, by name, of the validation.
        labels: how often each label occurs there; None where that is not known.
        monitor: the metric by which checkpoints were chosen.
        scored: how many rows each validation looked at; None for all of them.
    """
    subject = "guessing"
    if not labels:
        return Diagnosis.unseen(subject, "the summary of the data counts no labels of the rows that validate")
    rows, most = sum(labels.values()), max(labels.values())
    share = most / rows
    scored = rows if scored is None else min(scored, rows)
    # what saying one label alone gives, and by how much rows that are drawn anew would change it
    error = (share * (1 - share) / scored) ** 0.5
    guesses = {
        "accuracy": (share, error),
        "mcc": (0.0, scored**-0.5),
        "f1_macro": (2 * share / (1 + share) / len(labels), error / len(labels)),
    }
    known = [n for n in metrics if n.rpartition("/")[2] in guesses and n.startswith("val/")]
    chosen = next((n for n in known if n == monitor), known[0] if known else None)
    if chosen is None:
        return Diagnosis.unseen(subject, "no metric is known of which a guess's value is")
    if len(labels) < 2:
        return Diagnosis.unseen(subject, f"the rows that validate have one label, {next(iter(labels))!r}")
    guess, by_chance = guesses[chosen.rpartition("/")[2]]
    label = max(labels, key=lambda name: labels[name])
    on = f" on {scored:,} rows" if scored < rows else ""
    evidence = (
        f"{chosen} {number(metrics[chosen])}{on}, and always saying {label!r} ({percent(most, rows)} of {rows:,} rows) "
        f"gives {number(guess)}"
    )
    if metrics[chosen] > guess + by_chance:
        return Diagnosis(subject, evidence)
    return Diagnosis(
        subject,
        evidence,
        "The model does no better than always saying the most frequent label.",
        "see the findings on the rate and the gradients first; then data.columns and the labels: lightning-peft data",
    )
