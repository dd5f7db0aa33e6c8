"""The wheel holds the three packages with their data files, and works away from the checkout."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("autopar", "passes", "cost_model")
DEPENDENCIES = ("torch", "numpy", "pulp", "highspy", "networkx", "tyro", "rich", "platformdirs", "safetensors")

MODEL = '''
"""A model of the user's own."""

import torch
from torch import nn
from torch.nn import functional as F


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, idx, targets):
        x = self.embed(idx)
        x = x + self.down(F.gelu(self.up(x)))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def factory():
    idx = torch.zeros(8, 16, dtype=torch.int64)
    return Tagger(), {"idx": idx, "targets": idx}
'''


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed; it sees no PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has the wheel, and from elsewhere only its dependencies.

    The dependencies come through a .pth file: directories it adds are searched last and their own .pth files are not
    read, so an editable install of the checkout stays out of sight.
    """
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=venv)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in dependency_folders()))
    return python


def dependency_folders() -> list[Path]:
    files = [importlib.import_module(name).__file__ for name in DEPENDENCIES]
    folders = sorted({Path(file).resolve().parents[1] for file in files if file})
    assert ROOT not in folders
    return folders


def test_content_is_the_three_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    (info,) = {top for top in tops if top.endswith(".dist-info")}
    assert tops == {*PACKAGES, info}
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name]
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


@pytest.mark.parametrize("folder", ["devices", "clusters"])
def test_data_files_are_shipped(wheel: Path, folder: str) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cost_model" / folder).glob("*.toml")}
    assert files and files <= set(zipfile.ZipFile(wheel).namelist())


def test_metadata_names_every_dependency(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(path).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    base = {"".join(c if c.isalnum() else " " for c in line).split()[0] for line in required if "extra ==" not in line}
    assert base == set(DEPENDENCIES)


def test_packages_come_from_the_wheel(python: Path, tmp_path: Path) -> None:
    program = (
        "import autopar, passes, cost_model; print(autopar.__file__, passes.__file__, cost_model.__file__, sep='\\n')"
    )
    files = run(python, "-c", program, cwd=tmp_path).splitlines()
    assert len(files) == 3 and all(Path(file).is_relative_to(python.parents[1]) for file in files), files


def test_plan_from_another_directory(python: Path, tmp_path: Path) -> None:
    (tmp_path / "tagger.py").write_text(MODEL)
    options = ("--cluster", "dgx2-v100-32gb", "--num-devices", "2", "--json")
    report = json.loads(run(python, "-m", "autopar.cli", "plan", "tagger.py:factory", *options, cwd=tmp_path))
    plan = report.get("plan", report)
    assert plan["dp"] * plan["tp"] * plan["pp"] == 2
    assert plan["batch"] == 8


def test_script_is_installed(python: Path, tmp_path: Path) -> None:
    listed = run(python.with_name("autopar"), "--help", cwd=tmp_path)
    assert all(command in listed for command in ("plan", "estimate", "compare"))
