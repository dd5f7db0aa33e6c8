"""The house rules: imports point one way, every module says what it is for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("autopar", "passes", "cost_model")
CODE_FOLDERS = (*PACKAGES, "tests", "examples", "benchmarks")


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the packages in ``folder`` against the contracts of this project."""
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", program, "--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def imported_roots(source: str) -> set[str]:
    """First names of every absolute import, wherever it stands: module level, function, TYPE_CHECKING block."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    origins = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in plain | origins}


def test_import_contracts_are_kept() -> None:
    checked = lint_imports(ROOT)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture
def small_house(tmp_path: Path) -> Path:
    """Three tiny packages that keep every contract."""
    for package in (*PACKAGES, "autopar/planner"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "autopar/planner/solve.py").write_text("import pulp\nimport cost_model\n")
    (tmp_path / "autopar/api.py").write_text("import autopar.planner.solve\nimport passes.trace\n")
    (tmp_path / "passes/trace.py").write_text("import torch\nimport cost_model\n")
    return tmp_path


def test_contracts_allow_what_the_design_allows(small_house: Path) -> None:
    checked = lint_imports(small_house)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("module", "source", "contract"),
    [
        ("cost_model/op.py", "import torch", "cost_model knows neither torch nor a solver"),
        ("cost_model/op.py", "def price():\n    from pulp import lpSum", "cost_model knows neither torch nor a solver"),
        ("cost_model/op.py", "import passes.trace", "Imports point one way"),
        ("passes/cut.py", "import autopar.api", "Imports point one way"),
        ("passes/cut.py", "import pulp", "passes knows no solver"),
        ("autopar/report.py", "import pulp", "Only autopar.planner imports the solver"),
    ],
)
def test_contracts_see_a_breach(small_house: Path, module: str, source: str, contract: str) -> None:
    (small_house / module).write_text(source + "\n")
    checked = lint_imports(small_house)
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert any(contract in line and "BROKEN" in line for line in checked.stdout.splitlines()), checked.stdout


def test_cost_model_never_names_torch_or_a_solver() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy", "cost_model"}
    strangers = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules("cost_model")
        for name in imported_roots(path.read_text(encoding="utf-8")) - allowed
    }
    assert modules("cost_model") and not strangers


def test_imported_roots_sees_every_form() -> None:
    source = "import a.b as c\nfrom d.e import f\nfrom . import g\nif True:\n    def h():\n        import i, j.k\n"
    assert imported_roots(source) == {"a", "d", "i", "j"}


def test_cost_model_loads_without_torch() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("cost_model")]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "print(sorted({'torch', 'pulp', 'highspy', 'autopar', 'passes'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (loaded.returncode, loaded.stdout.strip()) == (0, "[]"), loaded.stderr


def test_every_module_has_a_docstring() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in modules(*CODE_FOLDERS)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert bare == []


def test_tests_are_no_package() -> None:
    """tests/passes/__init__.py would shadow the real ``passes``."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
