"""The doctor reports what works, and what does not: libraries that crash, hang or are wrong, an inexact ranking."""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import clipret.ranking.scan
from clipret.cli import main
from clipret.diagnostics import doctor

pytestmark = pytest.mark.slow

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments], prog_name="clipret-search")


def test_everything_that_is_installed_works() -> None:
    result = run("--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["ok"]
    assert [one["name"] for one in told["backends"]] == list(BACKENDS)
    for one in told["backends"]:
        there = importlib.util.find_spec(one["name"]) is not None
        assert (one["state"] in ("works", "idle")) == there, one
        if not there:
            extra = one["name"].replace("_", "-").replace("onnxruntime", "cpu")
            assert one["detail"] == f"pip install 'clipret[{extra}]'"
    assert {one["state"] for one in told["ranking"]} == {"works"}
    forms = " ".join(one["name"] for one in told["ranking"])
    for form in (
        "float32, streamed",
        "few embeddings",
        "quantized, streamed",
        "quantized, resident",
        "a query at a time",
    ):
        assert form in forms
    assert told["machine"]["usable_cores"] >= 1
    assert told["machine"]["disk_free"] > 0
    assert isinstance(told["machine"]["vnni"], bool)
    (own,) = [one for one in told["extras"] if one["name"] == ""]
    assert own["packages"]["numpy"] == np.__version__
    assert (own["complete"], own["install"]) == (True, None)
    (train,) = [one for one in told["extras"] if one["name"] == "train"]
    assert train["complete"] == (None not in train["packages"].values())
    assert train["install"] == (None if train["complete"] else "pip install 'clipret[train]'")


@pytest.fixture
def broken_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for OpenVINO in every process that is started."""
    (tmp_path / "openvino").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "openvino/__init__.py"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_library_that_crashes(broken_openvino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_openvino.write_text("import os, sys\nprint('no such symbol', file=sys.stderr, flush=True)\nos.abort()\n")
    monkeypatch.setattr(doctor, "check_exactness", lambda: [])
    result = run("--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert not told["ok"]
    (found,) = [one for one in told["backends"] if one["name"] == "openvino"]
    assert found == {"name": "openvino", "state": "fails", "detail": "crashes (signal 6): no such symbol"}
    assert result.stderr == "clipret-search: openvino crashes (signal 6): no such symbol\n"


def test_a_library_that_hangs_or_is_wrong(broken_openvino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_openvino.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(doctor, "_PATIENCE", 0.5)
    (found,) = doctor.check_backends(("openvino",))
    assert (found.state, found.detail) == ("fails", "does not answer within 0.5 s")
    monkeypatch.undo()
    with pytest.raises(doctor.ClipretError, match="embeddings of a tower are wrong by"):
        doctor._checked(Wrong(), 0.03)


class Wrong:
    """A tower of unit embeddings that have nothing to do with its images."""

    name, lanes = "wrong", 1

    def run(self, batch: np.ndarray) -> np.ndarray:
        return np.full((len(batch), 8), 8**-0.5, np.float32)


@pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="the float32 form has no such bound")
def test_a_ranking_that_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = clipret.ranking.scan.QuantizedQueries.scales

    def careless(self: object, *given: object) -> tuple[object, ...]:
        base, unit, error = scales(self, *given)
        return base, unit, error * 0

    monkeypatch.setattr(clipret.ranking.scan.QuantizedQueries, "scales", careless)
    found = {one.name: one for one in doctor.check_exactness(20000)}
    assert found["float32, streamed"].state == "works"
    wrong = found["quantized, streamed, 48 queries"]
    assert wrong.state == "fails"
    assert "wrong from rank" in wrong.detail


def test_what_is_missing_or_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=1.26", 'nosuch[a,b]>=1; extra == "gone"', "numpy>=999; python_version > '3' and extra == 'late'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(doctor, "check_exactness", lambda: [])
    monkeypatch.setattr(doctor, "check_backends", lambda: [doctor.Finding("onnxruntime", "works", "1")])
    result = run()
    assert result.exit_code == 1
    assert "numpy is older than clipret needs: run  pip install --upgrade numpy" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "pip install 'clipret[gone]'   (for nosuch)" in result.stdout
    monkeypatch.setattr(doctor, "check_backends", lambda: [doctor.Finding("onnxruntime", "absent", "1")])
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted[:1])
    assert "no backend is installed: run  pip install 'clipret[cpu]'" in run().stderr
