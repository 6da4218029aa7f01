"""Towers: one half of a CLIP model as an engine that maps a batch to unit rows."""

import os
import platform
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from clipret.bundle import Bundle
from clipret.engines import (
    EngineWarning,
    Library,
    TensorRTTower,
    choose_engine,
    explain,
    gpu_arch,
    installed,
    load_library,
)
from clipret.errors import ClipretError, require

__all__ = ["EngineChoice", "OnnxTower", "OpenVinoTower", "Tower", "cpu_count", "open_tower"]

Rows = npt.NDArray[np.float32]
EngineChoice = Literal["auto", "onnxruntime", "openvino"] | Library


class Tower(Protocol):
    """What the encoder needs of an engine; `name` says which it is."""

    name: str

    def run(self, batch: npt.NDArray[Any]) -> Rows:
        """uint8 [B,S,S,3] or int64 [B,L] -> float32 [B,D], each row of unit length; B >= 1."""


def cpu_count() -> int:
    """The processors that this process may use; containers and `taskset` allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_tower(
    bundle: Bundle, name: str, device: str = "cpu", threads: int | None = None, engine: EngineChoice = "auto"
) -> Tower:
    """The tower `name` ("image" or "text") of a bundle on `device` ("cpu", "cuda" or "cuda:N").

    `threads`: of the engine on a CPU, default all processors. `engine`: "auto" takes a TensorRT plan of the bundle
    where one fits the GPU and the installed library, else onnxruntime; plans that cannot be used are an EngineWarning.
    On a CPU it takes onnxruntime, and OpenVINO for bf16, which onnxruntime does not have there.
    Raises ClipretError for changed bytes, a missing engine, a device that the engine cannot use, or a plan that was
    asked for by its library and does not fit.
    """
    gpu = _gpu_number(device)
    if engine in ("tensorrt", "tensorrt_rtx"):
        if gpu is None:
            raise ClipretError(f"{engine} plans run on a GPU, not on {device}: use --device cuda")
        version = load_library(engine).__version__
        return _plan_tower(bundle, name, gpu, {engine: version})
    if engine == "auto" and gpu is not None and bundle.manifest.engines:
        try:
            return _plan_tower(bundle, name, gpu, installed())
        except ClipretError as error:
            warnings.warn(f"onnxruntime runs instead of TensorRT: {error}", EngineWarning, stacklevel=2)
    path, threads, bf16 = bundle.file(f"{name}.onnx"), threads or cpu_count(), bundle.manifest.precision == "bf16"
    if gpu is None and bf16 and engine == "onnxruntime":
        raise ClipretError(f"{bundle.path} is bf16, which onnxruntime lacks on a CPU: use OpenVINO or export fp16")
    if engine == "openvino" or (gpu is None and bf16):
        if gpu is not None:
            raise ClipretError(f"OpenVINO runs on the CPU here, not on {device}: use --device cpu")
        return OpenVinoTower(path, threads, bf16)
    return OnnxTower(path, device, threads)


def _plan_tower(bundle: Bundle, name: str, gpu: int, versions: dict[Library, str]) -> TensorRTTower:
    """The tower as a plan for the first of the libraries that one fits."""
    engines, arch = bundle.manifest.engines, gpu_arch(gpu)
    for library, version in versions.items():
        if key := choose_engine(engines, library, version, arch):
            return TensorRTTower(bundle.file(f"engines/{key}/{name}.plan"), library, gpu)
    raise ClipretError(explain(engines, versions, arch))


class OnnxTower:
    """A tower in onnxruntime, on its CPU or CUDA execution provider."""

    name = "onnxruntime"

    def __init__(self, path: Path, device: str, threads: int) -> None:
        ort = require("onnxruntime", "gpu" if device.startswith("cuda") else "cpu")
        provider, provider_options = _provider(device)
        available = ort.get_available_providers()
        if provider not in available:
            raise ClipretError(
                f"device {device} needs onnxruntime's {provider}, this one has {', '.join(available)}: "
                "use --device cpu or  pip install 'clipret[gpu]'"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # its warnings speak of the graph's nodes, not to the user
        # Threads that spin between two batches take the cores away from the decode threads.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.x64quantprecision", "1" if _int8_saturates() else "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[(provider, provider_options)])
        except Exception as error:  # onnxruntime raises a dozen types of its own, all unexported
            reason = str(error).strip().splitlines()[0]
            raise ClipretError(f"{path} cannot be opened on {device}: {reason}; export the model again") from None
        # onnxruntime falls back to the CPU without a word when a provider's libraries do not load.
        if provider not in self._session.get_providers():
            raise ClipretError(f"onnxruntime could not start {provider} for {device}: see clipret[gpu]'s requirements")
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: npt.NDArray[Any]) -> Rows:
        rows: Rows = self._session.run(None, {self._input: batch})[0]
        return rows


class OpenVinoTower:
    """A tower in OpenVINO on the CPU, in float32 or, where the processor has it, in bfloat16."""

    name = "openvino"

    def __init__(self, path: Path, threads: int, bf16: bool) -> None:
        core = require("openvino", "openvino").Core()
        native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        options = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 and native else "f32", "INFERENCE_NUM_THREADS": threads}
        try:
            self._model = core.compile_model(str(path), "CPU", options)
        except Exception as error:  # OpenVINO raises plain RuntimeError, and others for files it cannot parse
            reason = str(error).strip().splitlines()[-1].strip()
            raise ClipretError(f"{path} cannot be opened by OpenVINO: {reason}; export the model again") from None

    def run(self, batch: npt.NDArray[Any]) -> Rows:
        rows: Rows = self._model([batch])[0]
        return rows


@cache
def _int8_saturates() -> bool:
    """Whether the processor adds int8 products up in 16 bits, where they overflow: x86 without VNNI.

    onnxruntime has another kernel for it, exact and several times slower; it does not take it by itself.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # not Linux: rather slow than wrong


def _provider(device: str) -> tuple[str, dict[str, str]]:
    gpu = _gpu_number(device)
    if gpu is None:
        return "CPUExecutionProvider", {}
    return "CUDAExecutionProvider", {"device_id": str(gpu)}


def _gpu_number(device: str) -> int | None:
    """N of "cuda:N", None for the CPU."""
    kind, _, number = device.partition(":")
    if device == "cpu":
        return None
    if kind == "cuda" and (number.isdigit() or device == "cuda"):
        return int(number or "0")
    raise ClipretError(f"device {device!r} is unknown: use cpu, cuda or cuda:N")
