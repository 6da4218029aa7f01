"""The packages of the training have faces that are true, and `--help` needs no torch."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import clipret_training

PACKAGES = [
    f"clipret_training.{module.name}" for module in pkgutil.iter_modules(clipret_training.__path__) if module.ispkg
]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_face_gives_what_it_names(package: str) -> None:
    face = importlib.import_module(package)
    assert face.__doc__
    assert face.__all__ == sorted(face.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert [name for name in face.__all__ if not hasattr(face, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = face.nothing


@pytest.mark.parametrize(
    "command", [["--help"], ["fit", "--help"], ["models", "--recipe", "small"], ["soup", "--help"], ["run"]]
)
def test_what_is_only_printed_needs_no_torch(command: list[str]) -> None:
    code = f"""
import sys
from clipret_training.cli import main
main({command}, standalone_mode=False)
print([name for name in ("torch", "open_clip", "peft") if name in sys.modules])
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "[]"
