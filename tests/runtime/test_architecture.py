"""The packages: each has a face that is true, imports go one way, and `import clipret` loads next to nothing."""

import importlib
import importlib.util
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clipret

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["clipret", *(f"clipret.{module.name}" for module in pkgutil.iter_modules(clipret.__path__) if module.ispkg)]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_face_gives_what_it_names(package: str) -> None:
    if package == "clipret.server":
        pytest.importorskip("fastapi", reason="needs the extra serve")
    face = importlib.import_module(package)
    assert face.__doc__
    names = getattr(face, "__all__", [])
    assert [name for name in names if not hasattr(face, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = face.nothing


def test_import_clipret_loads_no_module_of_its_own_before_it_is_needed() -> None:
    code = "import sys, clipret; print(sorted(name for name in sys.modules if name.startswith(('clipret', 'numpy'))))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "['clipret', 'clipret._faces']"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path[:0] = ['runtime', 'export', 'training']; from importlinter import cli"
    return subprocess.run(
        [sys.executable, "-c", f"{code}; cli.lint_imports_command(['--no-cache'])"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not importlib.util.find_spec("importlinter"), reason="needs the extra dev")
@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("runtime/clipret/ranking/ranker.py", "import torch", "The runtime needs neither torch"),
        ("runtime/clipret/tables.py", "from clipret.search import searcher", "The runtime, from the commands down"),
        ("export/clipret_export/towers.py", "from clipret_training import fit", "The export takes only models"),
        ("training/clipret_training/fit.py", "import clipret_export", "The training never imports the export"),
        ("training/clipret_training/models/load.py", "from clipret_training import fit", "The training, from the"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(file: str, line: str, contract: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for room in ("runtime", "export", "training"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / file).write_text((tmp_path / file).read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert any(text.startswith(contract) for text in broken), broken
