"""The plan: every figure follows from the rates, and values that were never measured must be given."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from clipret import ClipretError
from clipret.cli import main
from clipret.diagnostics.planning import Line, Workload, plan, read_rates

ROOT = Path(__file__).resolve().parents[3]


def lines_of(**asked: Any) -> dict[str, Line]:
    return {line.name: line for line in plan(Workload(**asked), read_rates())}


@pytest.mark.slow
def test_the_rates_are_those_of_the_results() -> None:
    pytest.importorskip("open_clip", reason="needs the shapes of its models")
    spec = importlib.util.spec_from_file_location("make_rates", ROOT / "benchmarks" / "make_rates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "runtime" / "clipret" / "diagnostics" / "rates.json").read_text(encoding="utf-8") == module.text()
    # The models' own papers say 4.4 (B-32), 17.6 (B-16), 80.7 (L-14) x 10^9 multiplications; the last block does less.
    for name, told in (("ViT-B-32", 4.4), ("ViT-B-16", 17.6), ("ViT-L-14", 80.7)):
        assert 0.9 < module.shape(name)["image_gflop"] / (2 * told) < 1.0


def test_a_measured_model() -> None:
    rates = read_rates()
    found = lines_of(images=10**6, model="ViT-B-32", precision="int8", cores=16)
    core = rates.encode.images_a_core_second["int8"]
    decode = rates.decode.core_ms_a_image["0.3 MP"].default
    assert (found["a core, tower alone"].value, found["a core, tower alone"].origin) == (core, "measured")
    hours = 1e6 * (1 / core + decode / 1000) / 3600
    assert found["on processors"].value == pytest.approx(hours)
    assert found["on 16 cores"].value == pytest.approx(hours / 16)
    assert found["embeddings, float16"].value == pytest.approx(1.024)
    assert found["a gallery"].value == pytest.approx(1.536 + rates.gallery.database_bytes_a_image / 1000)


def test_nothing_is_invented() -> None:
    found = lines_of(images=10**9, model="ViT-H-14", qps=5000.0)
    for name in ("a GPU", "to be read", "Milvus query nodes"):
        assert found[name].value is None
        assert found[name].origin == "missing"
        assert "give " in found[name].formula
    assert "on GPUs" not in found
    assert found["a core, tower alone"].origin == "computed"
    assert found["memory, Milvus HNSW"].value == pytest.approx(4 * 1024 + 128)


def test_what_the_user_gives() -> None:
    found = lines_of(
        images=10**9, model="ViT-H-14", tflops=300.0, hours=24.0, kilobytes=100.0, qps=10.0, milvus_qps=4.0
    )
    rate = 300e3 / read_rates().models["ViT-H-14"].image_gflop
    assert found["a GPU"].value == pytest.approx(rate)
    assert found["a GPU"].origin == "computed"
    assert "tflops" in found["a GPU"].formula
    hours = 1e9 / rate / 3600
    assert found["on GPUs"].value == pytest.approx(hours)
    assert found["GPUs for 24 h"].value == -(-hours // 24)
    assert found["to be read"].value == pytest.approx(100)
    assert found["from the store"].value == pytest.approx(8e14 / 86400 / 1e9)
    assert found["Milvus query nodes"].value == 3
    given = lines_of(images=1000, model="ViT-H-14", rate=50.0, gpus=2)
    assert (given["a GPU"].value, given["a GPU"].origin) == (50.0, "given")
    assert given["on 2 GPUs"].value == pytest.approx(1000 / 50 / 3600 / 2)


def test_by_command(tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(main, ["plan", "images=1e9", "model=ViT-H-14", "qps=5000"])
    assert done.exit_code == 0, done.output
    assert "no GPU was measured: give rate=…" in done.output
    done = runner.invoke(main, ["plan", "images=1_000", "model=ViT-B-32", "--json"])
    named = {line["name"]: line for line in json.loads(done.output)}
    assert named["embeddings, float16"]["formula"] == "1e+03 x 2 x 512"
    mine = {"dim": 8, "image_gflop": 1.0, "text_gflop": 1.0}
    rates = msgspec.to_builtins(read_rates()) | {"models": {"mine": mine}}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    plan_mine = ["plan", "images=10", "model=mine", "--rates", str(tmp_path / "rates.json")]
    assert runner.invoke(main, plan_mine).exit_code == 0
    for words, reason in (
        (["images=1e9", "model=ViT-X"], "there are no rates of model ViT-X: choose one of ViT-B-32"),
        (["images=1e9", "model=ViT-B-32", "precision=fp4"], "there are no rates of precision fp4"),
        (["images=1e9", "model=ViT-B-32", "--rates", str(tmp_path / "none")], "cannot be read"),
        (["images=1e9", "model=ViT-B-32", "--rates", str(ROOT / "pyproject.toml")], "holds no rates"),
    ):
        done = runner.invoke(main, ["plan", *words])
        assert done.exit_code == 1
        assert reason in done.output
        assert len(done.output.strip().splitlines()) == 1
    assert runner.invoke(main, ["plan", "images=1.5", "model=ViT-B-32"]).exit_code == 2


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="cannot be read"):
        read_rates(tmp_path / "none.json")
