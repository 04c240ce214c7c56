"""`callbacks=forgetting` on the command line, alone and beside other callbacks."""

from __future__ import annotations

import json

import pytest

from tests.processes import run


@pytest.mark.slow
def test_a_run_says_what_it_has_forgotten(tmp_path, bert_folder):
    rows = [{"text": "red " * (1 + i % 5) if i % 2 else "blue " * (1 + i % 4), "label": i % 2} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "texts.txt").write_text("".join(f"small green {i} large blue {i * i}\n" for i in range(12)))
    words = [f"model.name_or_path={bert_folder}", "data=files", "data.train_files=rows.jsonl", "trainer.max_epochs=2"]
    chosen = [
        "callbacks=[early_stopping,forgetting]",
        "callbacks.forgetting.texts=texts.txt",
        "method=full",
        "data.batch_size=4",
    ]
    said = run(*words, *chosen, "hydra.run.dir=run", cwd=tmp_path).stdout
    found = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["forgetting"] == found["forgetting"] > 0
    (line,) = (line for line in said.splitlines() if line.startswith("forgetting"))
    assert f"{found['forgetting']:.4f} 1 - CKA with the base" in line
    assert "forgetting" in (tmp_path / "run" / "logs" / "metrics.csv").read_text()
