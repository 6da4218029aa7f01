"""Exports that fail: one line on stderr, exit status 1, and no partial bundle."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from clipret.bundle import Bundle
from clipret.errors import ClipretError
from clipret_export.cli import main
from clipret_export.pipeline import export_bundle


def refused(source: str, out: Path, *options: str) -> str:
    """The one line that the command prints."""
    result = CliRunner().invoke(main, [source, str(out), *options])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = result.stderr.splitlines()
    assert list(out.parent.iterdir()) == []
    return line


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


def test_a_truncated_checkpoint(model: str, out: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(model).iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content if file.suffix == ".json" else content[: len(content) // 2])
    assert "cannot be loaded" in refused(str(broken), out)
    torch.save({"state_dict": {"visual.proj": torch.zeros(99, 99)}}, tmp_path / "half.pt")
    content = (tmp_path / "half.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    assert "cannot be loaded" in refused(f"ViT-S-32:{tmp_path / 'half.pt'}", out)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of the checkpoint ran",))


def test_a_checkpoint_with_code(out: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.pt")
    assert "could run code" in refused(f"ViT-S-32:{tmp_path / 'evil.pt'}", out)


def test_an_unknown_name(out: Path) -> None:
    assert "did you mean ViT-B-32" in refused("ViT-B-23", out)
    assert "did you mean" in refused("ViT-H-14-quickgleu", out)


def test_a_disk_that_is_too_small(model: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipret_export.pipeline.shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    assert "free and this bundle needs about" in refused(model, out)


def test_a_disk_that_fills_up(model: str, out: Path) -> None:
    """The system refuses to write more than 64 KiB to a file."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    command = [sys.executable, "-m", "clipret_export.cli", model, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=300, check=False)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(out.parent.iterdir()) == []


def test_ctrl_c_in_the_middle(model: str, out: Path) -> None:
    command = [sys.executable, "-m", "clipret_export.cli", model, str(out)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(out.parent.glob(".bundle.*/image.onnx")):  # half of the bundle is written
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert list(out.parent.iterdir()) == []


def test_unreadable_check_data(model: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("path,caption\nnone.jpg,a dog\n")
    assert "none of the 1 images" in refused(model, out, "--verify", str(tmp_path / "captions.csv"))
    assert "cannot be read" in refused(model, out, "--verify", str(tmp_path / "no.csv"))


def test_an_old_bundle_survives_a_failed_one(
    model: str, bundle_copy: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_copy()
    monkeypatch.setattr("clipret_export.pipeline.write_onnx", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_bundle(model, bundle.path, overwrite=True)
    assert bundle.file("image.onnx").is_file()
    with pytest.raises(ClipretError, match=r"is not empty: choose another folder, or pass --overwrite"):
        export_bundle(model, bundle.path)


def test_only_bundles_are_overwritten(model: str, bundle_copy: Callable[..., Bundle], out: Path) -> None:
    out.mkdir()
    (out / "a.txt").write_text("precious")
    with pytest.raises(ClipretError, match=r"is not empty: choose another folder$"):
        export_bundle(model, out)
    with pytest.raises(ClipretError, match=r"has a\.txt in it, and --overwrite replaces only bundles"):
        export_bundle(model, out, overwrite=True)
    bundle = bundle_copy()
    (bundle.path / "notes").mkdir()
    with pytest.raises(ClipretError, match="has notes in it, and"):
        export_bundle(model, bundle.path, overwrite=True)
    assert bundle.file("image.onnx").is_file()


def test_calibration_needs_images(model: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("path,caption\nnone.jpg,a dog\n")
    line = refused(model, out, "--int8", "--calibration", str(tmp_path / "captions.csv"))
    assert "none of the 1 images for calibration can be read" in line
