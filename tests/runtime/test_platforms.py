"""Every module can be imported on systems without Unix's own modules, such as Windows."""

import subprocess
import sys
from pathlib import Path

import pytest

# Without the optional packages a module may say that its extra is missing; anything else is an error.
IMPORT_ALL = """
import importlib, os, pkgutil, signal, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
for name in ("geteuid", "getuid", "nice", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGXFSZ", "SIGUSR1"):
    if hasattr(signal, name):
        delattr(signal, name)
count = 0
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
            count += 1
        except ModuleNotFoundError as error:
            if error.name in sys.modules or error.name.startswith(package.__name__):
                raise
        except Exception as error:
            if type(error).__name__ != "ClipretError":
                raise
print(count)
"""


@pytest.mark.parametrize("package", ["clipret", "clipret_export", "clipret_training"])
def test_all_modules_import_without_unix_modules(package: str) -> None:
    if package != "clipret":
        pytest.importorskip("torch", reason="needs the extras of export and training")
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, package], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_files_and_memory_without_unix_modules(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "from pathlib import Path; from clipret.files import new_folder; from clipret.hardware import peak_memory\n"
        "with new_folder(Path(sys.argv[1], 'new')) as folder: (folder / 'a').write_text('b')\n"
        "print(Path(sys.argv[1], 'new', 'a').read_text(), sys.platform == 'win32' or peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["b", str(True if sys.platform == "win32" else None)]
