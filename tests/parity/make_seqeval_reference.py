"""Reference values from ``seqeval``, the entity metrics that the field reports.

It runs in an environment of its own and imports nothing of lightning_peft::

    python3 -m venv seqeval_env
    seqeval_env/bin/pip install seqeval==1.2.2 scikit-learn==1.9.1
    seqeval_env/bin/python tests/parity/make_seqeval_reference.py

``seqeval_reference.json`` holds, for tags of several schemes drawn at random (so most sequences are malformed),
the sentences of both sides, seqeval's scores by its default, and the entities that it reads.
"""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

from seqeval.metrics import accuracy_score, classification_report
from seqeval.metrics.sequence_labeling import get_entities

TAGS = {
    "IOB": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "BIOES": ["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("PER", "LOC"))],
    "hyphens": ["O", "B-work-of-art", "I-work-of-art", "B-I-B", "I-I-B"],
    "bare": ["O", "B", "I", "E", "S"],
    "mixed": ["O", "B", "I-PER", "E-PER", "S", "B-LOC"],
}


def sentences(tags: list[str], dice: random.Random) -> tuple[list[list[str]], list[list[str]]]:
    """Sentences that agree in about two of three words."""
    expected = [[dice.choice(tags) for _ in range(dice.randint(1, 9))] for _ in range(40)]
    said = [[tag if dice.random() < 0.67 else dice.choice(tags) for tag in row] for row in expected]
    return expected, said


def scores(expected: list[list[str]], said: list[list[str]]) -> dict[str, Any]:
    """What seqeval reports by default."""
    report = classification_report(expected, said, output_dict=True)
    return {
        "accuracy": accuracy_score(expected, said),
        "types": {
            kind: {"precision": float(v["precision"]), "recall": float(v["recall"]), "f1": float(v["f1-score"])}
            for kind, v in report.items()
            if kind not in ("macro avg", "weighted avg")
        },
        "entities": [[[kind, start, end + 1] for kind, start, end in get_entities(row)] for row in said],
    }


def main() -> None:
    """Writes the file."""
    warnings.simplefilter("ignore")
    cases = {}
    for name, tags in TAGS.items():
        dice = random.Random(name)
        expected, said = sentences(tags, dice)
        cases[name] = {"tags": tags, "expected": expected, "said": said, **scores(expected, said)}
        print(f"{name:8} f1 {cases[name]['types']['micro avg']['f1']:.3f}  accuracy {cases[name]['accuracy']:.3f}")
    content = {"versions": {"seqeval": "1.2.2"}, "cases": cases}
    (Path(__file__).parent / "seqeval_reference.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
