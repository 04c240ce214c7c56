"""Reference values of metrics on texts, from sacrebleu and rouge_score.

It runs in an environment of its own and imports nothing of lightning_peft::

    python3 -m venv metrics_env
    metrics_env/bin/pip install sacrebleu==2.6.0 rouge-score==0.1.2
    metrics_env/bin/python tests/parity/make_written_texts_reference.py

``written_texts_reference.json`` has the versions and, for each corpus, its texts and scores, all from 0 to 1.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

PATH = Path(__file__).parent / "written_texts_reference.json"
ROUGE = ["rouge1", "rouge2", "rougeL"]

# what was written, what was expected
CORPORA: dict[str, list[tuple[str, str]]] = {
    "sentences": [
        ("The dog bit the man.", "The dog had bitten the man."),
        ("It wasn't surprising, was it?", "It was not unexpected."),
        ("The man had just bitten him; 3.5 times (at least).", "The man had bitten him 3,5 times, at least!"),
        ("a a a a the the", "the a quick brown fox jumps over the lazy dog"),
    ],
    "no common run of four": [("the cat sat here", "a cat sat there"), ("blue green red", "red blue green")],
    "nothing in common": [("xyz", "abc"), ("uvw uvw", "def def")],
    "one word": [("yes", "yes"), ("no", "yes")],
    "empty answers": [("", "the whole answer is missing"), ("only this one is here", "only this one is here")],
    "all answers empty": [("", "one"), ("", "two words")],
    "accents, other scripts and entities": [
        ("Ein schöner Tag für Müller &amp; Söhne", "Ein schöner Tag bei Müller &quot;Söhne&quot;"),
        ("これは本です", "これは古い本です"),
        ("Мы видели дом, но не лодку", "Мы видим дом — не лодку"),
        ("naïve café", "naive café"),
    ],
    "equal": [("the same text on both sides of it", "the same text on both sides of it"), ("short one", "short one")],
    "longer than expected": [("one two three four five six seven eight nine ten", "one two three four five")],
}


def main() -> None:
    scorer = RougeScorer(ROUGE, use_stemmer=False)
    found = {}
    for name, pairs in CORPORA.items():
        written, expected = [a for a, _ in pairs], [b for _, b in pairs]
        each = [scorer.score(target=b, prediction=a) for a, b in pairs]
        found[name] = {
            "written": written,
            "expected": expected,
            "scores": {
                "bleu": sacrebleu.corpus_bleu(written, [expected]).score / 100,
                "chrf": sacrebleu.corpus_chrf(written, [expected]).score / 100,
                **{key: sum(e[key].fmeasure for e in each) / len(each) for key in ROUGE},
            },
        }
    versions = {p: version(p) for p in ("sacrebleu", "rouge-score")}
    PATH.write_text(json.dumps({"versions": versions, "corpora": found}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
