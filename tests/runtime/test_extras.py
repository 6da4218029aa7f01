"""What a user meets who has installed only the runtime: help works, and a missing extra is one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from clipret.errors import ClipretError, require


def run_without(missing: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a Python in which `import missing` fails as if it were not installed."""
    code = f"import sys; sys.modules[{missing!r}] = None; from {module} import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_require() -> None:
    assert require("json", "cpu").__name__ == "json"
    with pytest.raises(ClipretError, match=r"no_such_thing is not installed: run  pip install 'clipret\[cpu\]'"):
        require("no_such_thing.part", "cpu")


@pytest.mark.parametrize("module", ["clipret_export.cli", "clipret_training.cli"])
def test_help_needs_no_extra(module: str) -> None:
    result = run_without("torch", module, "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


@pytest.mark.parametrize(
    ("missing", "module", "arguments", "extra"),
    [
        ("torch", "clipret_export.cli", ["model", "out"], "export"),
        ("torch", "clipret_training.cli", ["fit", "list.csv", "--model", "clipret-small", "--out", "run"], "train"),
    ],
)
def test_a_missing_extra_is_one_sentence(missing: str, module: str, arguments: list[str], extra: str) -> None:
    result = run_without(missing, module, *arguments)
    assert result.returncode == 1
    assert f"{missing} is not installed: run  pip install 'clipret[{extra}]'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_backend(tmp_path: Path, tiny_bundle: Path, colour_folder: Path) -> None:
    result = run_without("onnxruntime", "clipret.cli", "index", str(tiny_bundle), str(colour_folder), f"{tmp_path}/g")
    assert result.returncode == 1
    assert "onnxruntime is not installed: run  pip install 'clipret[cpu]'; installed: " in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
