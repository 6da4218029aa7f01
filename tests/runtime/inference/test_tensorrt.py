"""Which TensorRT engine fits, the explanation if none does, and a tower on a fake TensorRT and driver."""

import ctypes
import gc
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from clipret.bundle import Bundle, Engine
from clipret.errors import BackendWarning, ClipretError
from clipret.inference import tower as towers
from clipret.inference.config import EncoderConfig
from clipret.inference.tensorrt import TensorRTTower, choose_engine, explain_mismatch
from clipret.inference.tower import open_tower

ONE, TENSORRT = EncoderConfig(threads=1), EncoderConfig(backend="tensorrt")
FULL = Engine("tensorrt", "10.13.0.35", "sm_90", [1, 64])
EXACT = Engine("tensorrt_rtx", "1.7.1.116", "sm_89", [64])
AMPERE = Engine("tensorrt_rtx", "1.7.1.116", "sm_80+", [64])
ENGINES = {"ampere": AMPERE, "full": FULL, "exact": EXACT}


@pytest.mark.parametrize(
    ("library", "version", "arch", "key"),
    [
        ("tensorrt", "10.13.0.35", "sm_90", "full"),
        ("tensorrt", "10.13.0.35", "sm_89", None),
        ("tensorrt", "10.13.3.9", "sm_90", None),
        ("tensorrt", "1.7.1.116", "sm_89", None),
        ("tensorrt_rtx", "1.7.1.116", "sm_89", "exact"),
        ("tensorrt_rtx", "1.7.1.116", "sm_86", "ampere"),
        ("tensorrt_rtx", "1.7.1.116", "sm_120", "ampere"),
        ("tensorrt_rtx", "1.7.1.116", "sm_75", None),
        ("tensorrt_rtx", "1.7.2.1", "sm_89", None),
    ],
)
def test_an_engine_fits_its_library_version_and_architecture(library: Any, version: str, arch: str, key: str) -> None:
    assert choose_engine(ENGINES, library, version, arch) == key
    assert choose_engine({}, library, version, arch) is None


def test_the_explanation_names_engines_machine_and_command() -> None:
    message = explain_mismatch({"a": FULL, "b": AMPERE}, {"tensorrt_rtx": "1.8.0.1"}, "sm_89")
    assert "for TensorRT 10.13.0.35 on sm_90, TensorRT for RTX 1.7.1.116 on sm_80+" in message
    assert "this machine has sm_89 with TensorRT for RTX 1.8.0.1" in message
    assert message.endswith("clipret-export engines BUNDLE --tensorrt-rtx sm_89")
    message = explain_mismatch({"a": FULL}, {}, "sm_90")
    assert "this machine has sm_90 with no TensorRT" in message
    assert message.endswith("--tensorrt")


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    """The tiny bundle with one engine in its manifest."""
    opened = Bundle.open(tiny_bundle)
    return Bundle(opened.path, msgspec.structs.replace(opened.manifest, engines={"trt-10.13.0.35-sm_90": FULL}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fake machine; its towers are the arguments that they were opened with."""
    has: dict[str, Any] = {"arch": "sm_90", "versions": {"tensorrt": "10.13.0.35"}}
    monkeypatch.setattr(towers, "gpu_arch", lambda _gpu: has["arch"])
    monkeypatch.setattr(towers, "installed", lambda: has["versions"])
    monkeypatch.setattr(towers, "load_library", lambda name: SimpleNamespace(__version__=has["versions"][name]))
    monkeypatch.setattr(towers, "TensorRTTower", lambda *given: given)
    monkeypatch.setattr(towers, "OnnxTower", lambda *given: given)
    monkeypatch.setattr(Bundle, "file", lambda self, name: self.path / name)
    return has


def test_the_engine_that_fits_is_used(bundle: Bundle, machine: dict[str, Any]) -> None:  # noqa: ARG001
    file = bundle.path / "engines/trt-10.13.0.35-sm_90/image.plan"
    two, onnxruntime = EncoderConfig(threads=2), EncoderConfig(threads=2, backend="onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_tower(bundle, "image", "cuda:1") == (file, "tensorrt", 1)
        assert open_tower(bundle, "image", "cuda", TENSORRT) == (file, "tensorrt", 0)
        assert open_tower(bundle, "image", "cuda", onnxruntime) == (bundle.path / "image.onnx", "cuda", 2, False)
        assert open_tower(bundle, "image", "cpu", two) == (bundle.path / "image.onnx", "cpu", 2, False)


def test_an_engine_that_does_not_fit_falls_back_with_a_warning(bundle: Bundle, machine: dict[str, Any]) -> None:
    machine["arch"] = "sm_89"
    with pytest.warns(BackendWarning, match=r"onnxruntime runs instead of TensorRT.*on sm_90, this machine has sm_89"):
        assert open_tower(bundle, "text", "cuda", ONE) == (bundle.path / "text.onnx", "cuda", 1, False)
    with pytest.raises(ClipretError, match="clipret-export engines BUNDLE --tensorrt"):
        open_tower(bundle, "text", "cuda", TENSORRT)
    machine["versions"] = {"tensorrt_rtx": "1.7.1.116"}
    with pytest.raises(ClipretError, match=r"has sm_89 with TensorRT for RTX 1\.7\.1\.116"):
        open_tower(bundle, "text", "cuda", EncoderConfig(backend="tensorrt_rtx"))


def test_a_bundle_without_engines_needs_no_library(tiny_bundle: Path, machine: dict[str, Any]) -> None:
    machine["versions"] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_tower(Bundle.open(tiny_bundle), "image", "cuda", ONE)[1:] == ("cuda", 1, False)  # type: ignore[index]


def test_an_engine_that_fails_to_load_falls_back_with_a_warning(
    bundle: Bundle, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ClipretError("the driver is too old")

    monkeypatch.setattr(towers, "TensorRTTower", refuse)
    assert machine["arch"] == "sm_90"
    with pytest.warns(BackendWarning, match="instead of TensorRT: the driver is too old"):
        open_tower(bundle, "image", "cuda")


def test_engines_do_not_run_on_a_cpu(bundle: Bundle) -> None:
    with pytest.raises(ClipretError, match="tensorrt engines run on a GPU, not on cpu"):
        open_tower(bundle, "image", "cpu", TENSORRT)
    with pytest.raises(ClipretError, match="device 'cuda:x' is unknown"):
        open_tower(bundle, "image", "cuda:x")


class FakeEngine:
    """Engine and context: profiles for batches of 1 to 2 and 3 to 5; an embedding is (sum, length) of its tokens."""

    num_optimization_profiles = 2

    def __init__(self) -> None:
        self.profile = 0
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def create_execution_context(self) -> "FakeEngine":
        self.address: dict[str, int] = {}
        return self

    def get_tensor_name(self, at: int) -> str:
        return ("tokens", "rows")[at]

    def get_tensor_profile_shape(self, _name: str, profile: int) -> list[tuple[int, int]]:
        return [[(1, 1), (2, 4), (2, 6)], [(3, 1), (5, 4), (5, 6)]][profile]

    def get_tensor_dtype(self, _name: str) -> str:
        return "int64"

    def get_tensor_shape(self, _name: str) -> tuple[int, int]:
        return (-1, 2)

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> bool:
        low, _, high = self.get_tensor_profile_shape(name, self.profile)
        self.shape = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.address[name] = address
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        self.calls.append((self.profile, self.shape))
        count, length = self.shape
        tokens = np.ctypeslib.as_array((ctypes.c_int64 * (count * length)).from_address(self.address["tokens"]))
        rows = np.ctypeslib.as_array((ctypes.c_float * (count * 2)).from_address(self.address["rows"]))
        rows.reshape(count, 2)[:] = np.stack([tokens.reshape(count, length).sum(axis=1), [length] * count], axis=1)
        return True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)
    module = SimpleNamespace(
        __version__="10.13.0.35",
        ILogger=type("ILogger", (), {"Severity": severity}),
        Runtime=lambda _log: SimpleNamespace(deserialize_cuda_engine=lambda data: fake if data == b"plan" else None),
        nptype=np.dtype,
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return fake


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "text.plan").write_bytes(b"plan")
    return tmp_path / "text.plan"


def test_a_batch_of_any_size_runs_in_the_profiles_that_hold_it(driver: Any, engine: FakeEngine, file: Path) -> None:
    tower = TensorRTTower(file, "tensorrt")
    assert tower.name == "TensorRT 10.13.0.35"
    rng = np.random.default_rng(0)
    for count, length in ((1, 6), (4, 3), (2, 1), (5, 2), (12, 4)):
        tokens = rng.integers(0, 100, (count, length * 2))[:, ::2]  # not contiguous
        embeddings = tower.run(tokens)
        assert (embeddings.dtype, embeddings.shape) == (np.float32, (count, 2))
        np.testing.assert_array_equal(embeddings[:, 0], tokens.sum(axis=1))
    assert [(profile, shape[0]) for profile, shape in engine.calls] == [
        (0, 1),
        (1, 4),
        (0, 2),
        (1, 5),
        (1, 5),
        (1, 5),
        (0, 2),
    ]
    assert (len(driver.pinned), len(driver.device), driver.streams) == (2, 2, 1)
    del tower
    gc.collect()
    assert (driver.pinned, driver.device, driver.streams) == ({}, {}, 0)


def test_a_shape_beyond_the_profiles_and_a_broken_engine(driver: Any, engine: FakeEngine, file: Path) -> None:
    tower = TensorRTTower(file, "tensorrt")
    with pytest.raises(ClipretError, match=r"cannot run a batch of shape \(1, 7\)"):
        tower.run(np.zeros((1, 7), dtype=np.int64))
    assert not engine.calls
    driver.fails = 2
    with pytest.raises(ClipretError, match="cuCtxSetCurrent failed with error 2"):
        tower.run(np.zeros((1, 1), dtype=np.int64))
    driver.fails = 0
    file.write_bytes(b"broken")
    with pytest.raises(ClipretError, match=r"text\.plan does not run in TensorRT 10\.13\.0\.35"):
        TensorRTTower(file, "tensorrt")
