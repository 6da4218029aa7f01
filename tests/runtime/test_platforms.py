"""Every module can be imported on systems without Unix's own modules, such as Windows."""

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_UNIX = """
import builtins, os, signal, sys
MODULES = {"fcntl", "grp", "pwd", "pty", "resource", "termios", "tty"}
if sys.argv[1] == "clipret":
    sys.modules |= dict.fromkeys(MODULES)
    for name in ("geteuid", "getuid", "nice", "sched_getaffinity"):
        os.__dict__.pop(name, None)
    for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGXFSZ"):
        signal.__dict__.pop(name, None)
else:  # torch and transformers detect the system in their own ways: they may still import these modules
    original = builtins.__import__
    def checked(name, globals=None, *rest, **named):
        if name in MODULES and (globals or {}).get("__name__", "").startswith("clipret"):
            raise ModuleNotFoundError(name=name)
        return original(name, globals, *rest, **named)
    builtins.__import__ = checked
"""
IMPORT_ALL = """
import importlib, pkgutil
package, count = importlib.import_module(sys.argv[1]), 0
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
        count += 1
    except ModuleNotFoundError as error:  # a package of an extra may be missing
        if error.name is None or error.name in MODULES or error.name.startswith("clipret"):
            raise
    except Exception as error:
        if type(error).__name__ != "ClipretError":
            raise
print(count)
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", WITHOUT_UNIX + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["clipret", "clipret_export", "clipret_training"])
def test_all_modules_import_without_unix_modules(package: str) -> None:
    if package != "clipret":
        pytest.importorskip("torch", reason="needs the extras of export and training")
    assert int(run(IMPORT_ALL, package)) > 10


def test_folders_and_peak_memory_without_unix_modules(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from clipret.files import new_folder; from clipret.hardware import peak_memory\n"
        "with new_folder(Path(sys.argv[2])) as folder: (folder / 'a').write_text('b')\n"
        "print((Path(sys.argv[2]) / 'a').read_text(), sys.platform == 'win32' or peak_memory())"
    )
    assert run(code, "clipret", tmp_path / "new").split() == ["b", str(sys.platform == "win32" or None)]
