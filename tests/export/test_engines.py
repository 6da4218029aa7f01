"""TensorRT engines in a bundle, built by the real builder of TensorRT for RTX, which needs no GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from clipret.bundle import Bundle
from clipret.errors import ClipretError
from clipret.inference.encoder import Encoder
from clipret_export.cli import main
from clipret_export.engines import EngineRequest, add_engines
from clipret_export.pipeline import export_bundle
from clipret_export.samples import TEXTS, Sample, sample_images

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def test_an_export_with_engines(model: str, tmp_path: Path) -> None:
    command = [model, str(tmp_path / "bundle"), "--fp16", "--tensorrt-rtx", "sm_89,sm_120", "--engine", "batch=1,8"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    keys = [f"rtx-{trt.__version__}-{arch}" for arch in ("sm_89", "sm_120")]
    assert list(bundle.manifest.engines) == keys
    assert f"TensorRT engines: {', '.join(keys)}" in result.stdout
    assert "tensorrt_rtx: not run" in result.stdout
    for key in keys:
        assert bundle.manifest.engines[key].batch == [1, 8]
        for name in ("image", "text"):
            assert bundle.file(f"engines/{key}/{name}.plan").stat().st_size > 10_000
    report = json.loads(bundle.file("verify.json").read_text())
    assert report["engine_checks"]["tensorrt_rtx"].startswith("not run: ")


def test_engines_are_added_without_the_model(bundle_copy: Callable[..., Bundle]) -> None:
    """The bundle keeps its fingerprint, so galleries that were indexed with it still accept it."""
    before = bundle_copy("fp16")
    result = CliRunner().invoke(main, ["engines", str(before.path), "--tensorrt-rtx"])
    assert result.exit_code == 0, result.output
    after = Bundle.open(before.path)
    assert after.fingerprint == before.fingerprint
    assert list(after.manifest.engines) == [f"rtx-{trt.__version__}-sm_80+"]
    assert set(after.manifest.files) - set(before.manifest.files) == {
        f"engines/rtx-{trt.__version__}-sm_80+/{name}.plan" for name in ("image", "text")
    }
    assert len(Encoder(after).encode_texts(TEXTS)) == len(TEXTS)


def test_a_changed_tower_gets_no_engine(bundle_copy: Callable[..., Bundle]) -> None:
    bundle = bundle_copy()
    with (bundle.path / "text.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ClipretError, match=r"text\.onnx"):
        add_engines(bundle.path, EngineRequest("tensorrt_rtx"))
    assert not (bundle.path / "engines").exists()


def test_int8_is_for_cpus(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(sample_images(4)):
        image.save(folder / f"{number}.png")
    (folder / "captions.csv").write_text("path,caption\n" + "".join(f"{n}.png,caption {n}\n" for n in range(4)))
    data = Sample(folder / "captions.csv")
    with pytest.raises(ClipretError, match="export with --fp16"):
        export_bundle(
            model,
            tmp_path / "bundle",
            precision="int8",
            calibration_data=data,
            engines=[EngineRequest("tensorrt_rtx")],
        )
    assert not (tmp_path / "bundle").exists()


def test_what_cannot_be_built_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    for options, message in (
        (["--tensorrt-rtx", "sm_99"], "does not support 'sm_99'"),
        (["--tensorrt-rtx", "--engine", "batch=0"], "no engine can be built"),
        (["--tensorrt-rtx", "--engine", "timing_cache=cache"], "leave the timing cache out"),
    ):
        result = CliRunner().invoke(main, ["no-such-model", str(tmp_path / "bundle"), *options])
        assert result.exit_code == 1
        assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "name what to build"),
        (["--tensorrt-rtx", "--engine", "batch=1,many"], 2, "is not a list of numbers"),
        (["--tensorrt-rtx", "sm_99"], 1, "does not support 'sm_99'"),
    ],
)
def test_wrong_requests(options: list[str], status: int, message: str, bundle_copy: Callable[..., Bundle]) -> None:
    folder = bundle_copy().path
    result = CliRunner().invoke(main, ["engines", str(folder), *options])
    assert result.exit_code == status
    assert message in result.stderr
    assert Bundle.open(folder).manifest.engines == {}
