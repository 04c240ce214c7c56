"""The wheel holds what a user needs, and works away from the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # setuptools builds where the sources are: in the checkout two processes would disturb each other
    left = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "outputs", "multirun", "tests")
    sources = shutil.copytree(ROOT, folder / "sources", ignore=left)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(sources)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_config_groups_the_types_and_the_plugin(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"lightning_peft/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    assert "lightning_peft/py.typed" in names
    for plugin in ("search", "searchpath"):
        assert f"hydra_plugins/lightning_peft_{plugin}/__init__.py" in names
    for path in (p for ending in ("*.py", "*.jinja") for p in (ROOT / "lightning_peft").rglob(ending)):
        assert path.relative_to(ROOT).as_posix() in names


@pytest.mark.slow
def test_the_wheel_runs_the_command_from_another_folder(wheel, tmp_path):
    """In an environment of its own that sees the dependencies, but neither the checkout nor its editable install."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # sys.path alone: a .pth file's own imports, the editable install's among them, do not run for such an entry
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (tmp_path / "elsewhere").mkdir()
    command = [tmp_path / "env" / "bin" / "lightning-peft"]
    said = subprocess.run([*command, "--help"], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "method: adalora, bitfit, " in said.stdout
    where = "import lightning_peft, lightning_peft.conf; print(lightning_peft.__file__, lightning_peft.conf.__file__)"
    files = subprocess.run([python, "-c", where], cwd=tmp_path / "elsewhere", capture_output=True, text=True).stdout
    assert all(str(site) in f for f in files.split())
    few = ["trainer.max_epochs=1", "data.limit=32", "trainer.limit_val_batches=1"]
    run = subprocess.run([*command, *few], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "validation accuracy" in run.stdout
