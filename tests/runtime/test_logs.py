"""Logging: silent unless it is asked for, one JSON object per line, tracebacks on demand."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from clipret.cli import main


def test_the_library_is_silent_by_default(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from clipret import *; b = Bundle.open(sys.argv[1]); "
        "g = Gallery.create(sys.argv[3], b, open_source(sys.argv[2]).root); g.writing()\n"
        "with g: index_images(g, Encoder(b), open_source(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle), str(colour_folder), str(tmp_path / "g")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.parametrize("before", [True, False])
def test_an_error_as_json(before: bool, tmp_path: Path) -> None:
    options, command = ["--log-level", "debug", "--log-format", "json"], ["info", str(tmp_path)]
    result = CliRunner().invoke(main, [*options, *command] if before else [*command, *options])
    assert result.exit_code == 1
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    assert entries[-1]["level"] == "error"
    assert entries[-1]["message"].startswith(f"{tmp_path} is no gallery")
    assert "ClipretError" in entries[-1]["traceback"]
    assert entries[-1]["time"].endswith("Z")


def test_the_traceback_is_shown_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CliRunner().invoke(main, ["info", str(tmp_path)])
    assert len(plain.stderr.splitlines()) == 1
    monkeypatch.setenv("CLIPRET_DEBUG", "1")
    lines = CliRunner().invoke(main, ["info", str(tmp_path)]).stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == plain.stderr.strip()


def test_levels(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    command = ["index", str(tiny_bundle), str(colour_folder), str(tmp_path / "g")]
    assert " INFO " not in CliRunner().invoke(main, command).stderr
    detailed = CliRunner().invoke(main, ["query", str(tmp_path / "g"), "red", "-vv"]).stderr
    assert " DEBUG " in detailed
    assert " clipret.inference.tower: " in detailed
    (colour_folder / "new.png").write_bytes(b"no image")
    logged = CliRunner().invoke(main, [*command, "-v", "--log-format", "json"]).stderr
    entries = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
    [skipped] = [entry for entry in entries if entry["message"].startswith("skipped ")]
    assert skipped["path"] == "new.png"
    assert not logging.getLogger("clipret").isEnabledFor(logging.INFO)  # the command's end undoes it
    assert os.environ.get("CLIPRET_DEBUG") is None


def test_a_fault_of_the_service_as_json(tiny_bundle: Path, colour_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    run = CliRunner().invoke(main, ["index", str(tiny_bundle), str(colour_folder), str(tmp_path / "g")])
    assert run.exit_code == 0
    code = (
        "import sys, threading, urllib.request, urllib.error, os, signal\n"
        "from clipret.cli import main\nfrom clipret.server.snapshot import ServedSnapshot\n"
        "def broken(*_): raise RuntimeError('broken on purpose')\nServedSnapshot.records = broken\n"
        "import clipret.cli.serve as serve_module, clipret.server.run as run\n"
        "def ask(address):\n"
        "    try: urllib.request.urlopen(address + 'search?q=red')\n"
        "    except urllib.error.HTTPError as error: print(error.code, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "serve = run.serve\n"
        "def served(service, host, port, started):\n"
        "    serve(service, host, port, lambda address: threading.Timer(1, ask, [address]).start())\n"
        "run.serve = served\n"
        "main(['serve', sys.argv[1], '--port', '0', '-v', '--log-format', 'json'])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "g")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    assert "500" in result.stdout, result.stderr
    assert any("broken on purpose" in entry.get("traceback", "") for entry in entries)
    assert [entry["status"] for entry in entries if entry["logger"] == "clipret.access"] == [500]
