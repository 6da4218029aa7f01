"""The suite in its smallest form, the report, the comparison of two results, and the GPU's questions on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import pytest
import report
import suite
from figures import direction, figures, is_peer
from plots import bars, lines
from questions import QUESTIONS, Question, Run

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def python(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def content(**results: Any) -> dict[str, Any]:
    asked = {
        name: {"title": name.title(), "about": "", "command": f"python bench_{name}.py", "results": {name: result}}
        for name, result in results.items()
    }
    facts = {"machine": "a machine", "cores": 2, "python": "3.11", "date": "2026-01-01", "commit": "abc"}
    return {**facts, "questions": asked, "missing": {"GPU": "there is none"}}


RANK = {"cone": {"1 queries": {"ms_a_query": {"clipret": 20.0, "faiss flat": 70.0}, "faiss_over_clipret": 3.5}}}


def test_two_questions_end_in_a_report_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    command = (BENCHMARKS / "suite.py", tmp_path, "--quick", "--only", "query", "encode")
    done = python(*command)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    written = json.loads(path.read_text())
    assert set(written["questions"]) == {"query"}
    assert written["questions"]["query"]["results"]["query"]["rows"] == 10_000
    assert written["missing"]["encode"] == "takes too long for --quick"
    assert written["missing"]["serve"] == "left out of this run"
    page = path.with_suffix(".html").read_text()
    assert "python benchmarks/bench_query.py --rows 10000 --pairs 3" in page
    assert "<svg" in page
    assert "left out of this run" in page
    assert "http" not in page.replace("http://www.w3.org/", "")  # nothing from elsewhere
    again = python(*command)
    assert "query: measured already" in again.stderr
    assert json.loads(path.read_text())["questions"] == written["questions"]


def test_a_question_that_fails_is_told_and_asked_again(tmp_path: Path) -> None:
    run = Run(tmp_path, True, tmp_path, None)
    for name in ("done", "logs"):
        (tmp_path / name).mkdir()
    broken = Question("query", "Broken", "", 1, lambda _: ["bench_query.py", "--rows", "many"])
    record = suite.ask(broken, run)
    assert "exit status 2" in record["failed"]
    assert "invalid int value: 'many'" in record["failed"]
    path = suite.collect(tmp_path, tmp_path, {}, quick=True)
    assert "Failed: exit status 2" in path.with_suffix(".html").read_text()
    (tmp_path / "logs" / "query.log").unlink()
    suite.ask(broken, run)
    assert (tmp_path / "logs" / "query.log").exists()


def test_every_script_is_a_question() -> None:
    run = Run(Path("work"), False, Path("data"), Path("data"))
    asked = {str(question.command(run)[0]) for question in QUESTIONS}
    assert asked == {path.name for path in BENCHMARKS.glob("bench_*.py")} - {"bench_gpu.py"}  # has a target of its own
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)


def test_which_figures_are_better_large() -> None:
    assert direction(("batches", "batch 8", "fp32", "images_a_second")) == "higher"
    assert direction(("cone", "1 queries", "ms_a_query", "clipret")) == "lower"
    assert direction(("query", "cold", "cpu_seconds_median")) == "lower"
    assert direction(("rows",)) is None
    assert is_peer(("1 queries", "ms_a_query", "faiss flat"))
    assert is_peer(("batches", "batch 8", "open_clip compiled", "images_a_second"))
    assert not is_peer(("1 queries", "ms_a_query", "clipret"))
    named = {
        figure.name for figure in figures("export", {"exports": [{"model": "B", "precision": "fp16", "seconds": 3}]})
    }
    assert named == {"export: exports, B fp16, seconds"}


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"

    def status(result: dict[str, Any], *options: str) -> int:
        old.write_text(json.dumps(content(rank=RANK)))
        new.write_text(json.dumps(result))
        monkeypatch.setattr(sys, "argv", ["compare.py", str(old), str(new), *options])
        with pytest.raises(SystemExit) as ended:
            compare.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    assert status(content(rank=RANK)) == 0
    slower = json.loads(json.dumps(RANK))
    slower["cone"]["1 queries"]["ms_a_query"]["clipret"] = 30.0
    assert status(content(rank=slower)) == 1
    assert "WORSE   1.50x  20 -> 30  rank: cone, 1 queries, ms_a_query, clipret" in capsys.readouterr().out
    assert status(content(rank=slower), "--threshold", "1.6") == 0
    peer = json.loads(json.dumps(RANK))
    peer["cone"]["1 queries"]["ms_a_query"]["faiss flat"] = 700.0  # the machine, not us
    assert status(content(rank=peer)) == 0
    fewer = json.loads(json.dumps(RANK))
    fewer["cone"]["1 queries"]["faiss_over_clipret"] = 1.0
    assert status(content(rank=fewer)) == 1
    assert status(content(other={"count": 3})) == 2
    new.write_text("{}")
    with pytest.raises(SystemExit, match="is no result file"):
        compare.read(new)


def test_report_has_tables_plots_and_what_is_missing(tmp_path: Path) -> None:
    plot = {"title": "Growth", "x": "rows", "y": "ms", "series": {"one <b>": [[10, 1], [1000, 50.5]]}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content(rank=RANK, scale={"plots": [plot], "points": [{"rows": "10", "ms": 1.5}]})))
    page = report.write(path).read_text()
    assert page.count("<svg") == 2
    assert ">1,000</text>" in page  # marks of a logarithmic axis are figures
    assert "one &lt;b&gt;" in page
    assert "GPU: there is none" in page
    told = path.with_suffix(".md").read_text()
    assert "| clipret | 20 |" in told
    assert "| faiss flat | 70 |" in told
    assert "    python bench_rank.py" in told


def test_plots_with_nothing_to_show() -> None:
    assert "<svg" in bars("none", {"a": 0.0}, set())
    assert lines("none", "x", "y", {"a": [[0, 1]]}) == ""


def test_the_gpu_questions_in_their_reduced_form(tmp_path: Path) -> None:
    """All of bench_gpu but the device, on the tests' tiny bundle and on a tower that travelled without its weights."""
    pytest.importorskip("onnx_ir")
    bundle = tmp_path / "tiny"
    shutil.copytree(BENCHMARKS.parent / "tests" / "data" / "tiny-bundle", bundle)
    skeleton = BENCHMARKS / "skeletons" / "ViT-B-32"
    done = python(
        BENCHMARKS / "bench_gpu.py", tmp_path / "work", "--device", "cpu", "--bundle", bundle, "--skeleton", skeleton
    )
    assert done.returncode == 0, done.stderr
    asked = json.loads(Path(done.stdout.strip().splitlines()[-1]).read_text())["questions"]
    assert not [question["failed"] for question in asked.values() if "failed" in question]
    for form in ("halves", "quantized"):
        assert asked["ranking"]["results"]["ranking"][form]["same as the CPU's"] is True
    towers = asked["towers ViT-B-32"]["results"]["towers ViT-B-32"]
    assert not towers["failed"]
    assert towers["gflop_a_image"] == pytest.approx(8.23, abs=0.01)
    for way in ("onnxruntime", "onnxruntime, fused"):
        assert towers["parity"][way]["cosine_to_cpu"] > 0.999
        assert towers["batch 3"][way]["images_a_second"] > 0
        assert towers["batch 3"][way]["images_a_device_second"] > 0
    aimed = {row["what"]: row for row in asked["goals"]["results"]["goals"]["goals"]}
    assert aimed["ViT-B-32, of the matrix peak"]["goal"] == 0.45
    assert aimed["results as the CPU's"]["reached"] is True
    assert aimed.keys() >= {"one query, of the bandwidth", "scan 16 queries, of the matrix peak"}
    kernels = asked["attention"]["results"]["attention"]
    assert kernels["image"]["nodes by provider"].keys() == {"CPUExecutionProvider"}
    assert kernels["image"]["flash"] is False
    assert asked["decode"]["results"]["decode"]["pillow"]["end_to_end_images_a_second"] > 0


def test_one_gpu_question_that_fails_leaves_the_others(tmp_path: Path) -> None:
    done = python(BENCHMARKS / "bench_gpu.py", tmp_path, "--device", "cpu", "--bundle", tmp_path / "none")
    assert done.returncode == 0, done.stderr
    asked = json.loads(Path(done.stdout.strip().splitlines()[-1]).read_text())["questions"]
    assert "failed" in asked["towers none"]
    assert "results" in asked["limits"]
    assert "results" in asked["ranking"]
