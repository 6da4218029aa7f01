"""TensorRT engines of a real export, built by TensorRT for RTX, which needs no GPU."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from clipret.bundle import Bundle, Engine, Manifest
from clipret.errors import ClipretError
from clipret.hardware.cuda import gpu_count
from clipret.inference.tensorrt import TensorRTTower, error_log
from clipret_export.tensorrt import ANY_AMPERE, build_engines, tower_profiles

try:
    import tensorrt_rtx as rtx
except ImportError:
    rtx = None

needs_rtx = pytest.mark.skipif(rtx is None, reason="tensorrt_rtx is not installed (Linux x86-64 and Windows only)")


@pytest.fixture
def half(exported: Callable[..., Bundle]) -> Bundle:
    return exported("fp16")


@pytest.fixture
def folder(bundle_copy: Callable[..., Bundle]) -> Path:
    return bundle_copy("fp16").path


class Proxy:
    """Wraps an object of the library, whose classes cannot be subclassed."""

    def __init__(self, behind: Any) -> None:
        vars(self)["behind"] = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.behind, name, value)


def files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


@needs_rtx
def test_engines_for_two_architectures(folder: Path, half: Bundle) -> None:
    engines = build_engines(
        folder, half.manifest, "tensorrt_rtx", archs=["sm_89", ANY_AMPERE, "sm_89"], batch=[8, 1, 8]
    )
    version = rtx.__version__
    assert engines == {
        f"rtx-{version}-sm_89": Engine("tensorrt_rtx", version, "sm_89", [1, 8]),
        f"rtx-{version}-sm_80+": Engine("tensorrt_rtx", version, "sm_80+", [1, 8]),
    }
    assert files(folder / "engines") == sorted(f"{key}/{kind}.plan" for key in engines for kind in ("image", "text"))
    for key in engines:
        for kind in ("image", "text"):
            size = (folder / "engines" / key / f"{kind}.plan").stat().st_size
            assert size > 0.9 * (folder / f"{kind}.onnx").stat().st_size


@needs_rtx
def test_the_networks_that_are_built(folder: Path, half: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of the builder: typed inputs, dynamic axes, one profile, the architecture, no TensorFloat-32."""
    seen: list[dict[str, Any]] = []

    class Builder(Proxy):
        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            entry, last = network.get_input(0), network.get_output(0)
            seen.append(
                {
                    "input": (entry.dtype, tuple(entry.shape)),
                    "output": (last.dtype, tuple(last.shape)),
                    "typed": network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
                    "profiles": config.num_optimization_profiles,
                    "archs": [config.get_compute_capability(at) for at in range(config.num_compute_capabilities)],
                    "tf32": config.get_flag(rtx.BuilderFlag.TF32),
                }
            )
            return b"plan"

    create = rtx.Builder
    monkeypatch.setattr(rtx, "Builder", lambda log: Builder(create(log)))
    build_engines(folder, half.manifest, "tensorrt_rtx", archs=["sm_120"], batch=[4])
    common = {"typed": True, "profiles": 1, "archs": [rtx.ComputeCapability.SM120], "tf32": False}
    rows = {"output": (rtx.float32, (-1, 48))}
    assert seen == [
        {"input": (rtx.uint8, (-1, 32, 32, 3)), **rows, **common},
        {"input": (rtx.int64, (-1, -1)), **rows, **common},
    ]


def test_profiles(half: Bundle) -> None:
    manifest = half.manifest
    image, text = (tower_profiles(kind, manifest, [1, 4, 16], "tensorrt") for kind in ("image", "text"))
    assert [[shape[0] for shape in profile] for profile in image] == [[1, 1, 1], [2, 4, 4], [5, 16, 16]]
    assert all(shape[1:] == (32, 32, 3) for profile in image for shape in profile)
    assert text == [((1, 1), (1, 16), (1, 24)), ((2, 1), (4, 16), (4, 24)), ((5, 1), (16, 16), (16, 24))]
    assert tower_profiles("text", manifest, [1, 16], "tensorrt_rtx") == [((1, 1), (16, 16), (16, 24))]
    fixed = Manifest.from_json(manifest.to_json().replace('"pad_to": "longest"', '"pad_to": "context"'))
    assert tower_profiles("text", fixed, [16], "tensorrt") == [((1, 24), (16, 24), (16, 24))]


@needs_rtx
def test_an_unknown_architecture_lists_the_known_ones(folder: Path, half: Bundle) -> None:
    with pytest.raises(ClipretError, match=r"does not support 'sm_70': choose from sm_80\+, sm_75, .*sm_89, sm_120"):
        build_engines(folder, half.manifest, "tensorrt_rtx", archs=["sm_89", "sm_70"])
    assert not (folder / "engines").exists()


@needs_rtx
def test_a_graph_that_the_parser_refuses(folder: Path, half: Bundle) -> None:
    """The second tower fails: the engine of the first is removed, too."""
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 48])
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])
    node = helper.make_node("Telepathy", ["tokens"], ["rows"], name="guess", domain="mind")
    graph = helper.make_graph([node], "text", [tokens], [rows])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("mind", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), folder / "text.onnx")
    with pytest.raises(ClipretError, match=r"refuses operator Telepathy \(node 'guess'\) of text\.onnx") as raised:
        build_engines(folder, half.manifest, "tensorrt_rtx", archs=["sm_89"], batch=[2])
    assert "\n" not in str(raised.value)
    assert not files(folder / "engines")


@needs_rtx
def test_a_graph_that_is_cut_short(folder: Path, half: Bundle) -> None:
    (folder / "image.onnx").write_bytes((folder / "image.onnx").read_bytes()[:5000])
    with pytest.raises(ClipretError, match=r"image\.onnx"):
        build_engines(folder, half.manifest, "tensorrt_rtx")
    assert not files(folder / "engines")


@needs_rtx
def test_a_graph_that_the_builder_refuses(folder: Path, half: Bundle) -> None:
    """Turing multiplies no float32 matrices, and the projections of these towers are float32."""
    with pytest.raises(ClipretError, match=r"cannot build image\.onnx for sm_75: .*FP32 GEMM is not supported"):
        build_engines(folder, half.manifest, "tensorrt_rtx", archs=["sm_75"])
    assert not files(folder / "engines")


INTERRUPTED = """
import signal, sys
from contextlib import contextmanager
from pathlib import Path
from clipret.bundle import Bundle
from clipret_export import tensorrt

shown = []

@contextmanager
def stages():
    def stage(what):
        shown.append(what)
        if what.startswith("text.plan") and len(shown) % 10 == 0:
            signal.raise_signal(signal.SIGINT)
    yield stage

tensorrt.stages = stages
try:
    manifest = Bundle.open(sys.argv[2]).manifest
    tensorrt.build_engines(Path(sys.argv[1]), manifest, "tensorrt_rtx", archs=["sm_89"], batch=[2])
except KeyboardInterrupt:
    began = any(what.startswith("image.plan for sm_89: ") for what in shown)
    print("interrupted", began, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@needs_rtx
def test_interrupted_in_the_middle_of_a_build(folder: Path, half: Bundle) -> None:
    # In a process of its own: after the tests of other files, TensorRT for RTX 1.7 crashed on one of two machines when
    # it aborted a build.
    command = [sys.executable, "-c", INTERRUPTED, str(folder), str(half.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "interrupted True True\n"
    assert not files(folder / "engines")


@needs_rtx
def test_a_full_disk_leaves_nothing(folder: Path, half: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, _data: Any) -> int:
        with self.open("wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ClipretError, match="No space left on device"):
        build_engines(folder, half.manifest, "tensorrt_rtx", archs=["sm_89"])
    assert not files(folder / "engines")


@needs_rtx
def test_useless_requests(folder: Path, half: Bundle) -> None:
    for sizes in ([], [0, 8]):
        with pytest.raises(ClipretError, match="no engine can be built"):
            build_engines(folder, half.manifest, "tensorrt_rtx", batch=sizes)
    with pytest.raises(ClipretError, match="leave the timing cache out"):
        build_engines(folder, half.manifest, "tensorrt_rtx", timing_cache=folder / "cache")


def test_a_missing_library(folder: Path, half: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in (("tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ClipretError, match=rf"{name} is not installed: run  pip install 'clipret\[{extra}\]'"):
            build_engines(folder, half.manifest, name)  # type: ignore[arg-type]


@needs_rtx
def test_the_log_keeps_errors_only(capfd: pytest.CaptureFixture[str]) -> None:
    log = error_log(rtx)
    for severity in (rtx.ILogger.Severity.WARNING, rtx.ILogger.Severity.ERROR, rtx.ILogger.Severity.INFO):
        log.log(severity, f"{severity}\n told")
    assert log.errors == ["Severity.ERROR told"]
    assert capfd.readouterr() == ("", "")


@needs_rtx
def test_an_engine_without_a_gpu_is_one_line(folder: Path, half: Bundle) -> None:
    if gpu_count():
        pytest.skip("this machine has a GPU")
    (key,) = build_engines(folder, half.manifest, "tensorrt_rtx", batch=[1])
    with pytest.raises(ClipretError, match=r"no NVIDIA driver is installed|CUDA's cuInit failed") as raised:
        TensorRTTower(folder / "engines" / key / "text.plan", "tensorrt_rtx")
    assert "\n" not in str(raised.value)
