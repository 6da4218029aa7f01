"""Towers: one half of a CLIP model as an engine that maps a batch to unit embeddings."""

import importlib.util
import logging
import queue
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from clipret.arrays import Embeddings
from clipret.backends import BACKENDS, BackendChoice, TensorRTLibrary
from clipret.bundle import Bundle
from clipret.errors import BackendWarning, ClipretError, one_line, require
from clipret.hardware.cpu import int8_saturates, only_avx2
from clipret.hardware.cuda import gpu_arch, gpu_count
from clipret.inference.config import EncoderConfig
from clipret.inference.tensorrt import (
    TensorRTTower,
    choose_engine,
    explain,
    installed,
    load_library,
)
from clipret.ort.cuda_graphs import BoundSession
from clipret.ort.session import CUDA, gpu_number, open_session, providers

__all__ = ["OnnxTower", "OpenVinoTower", "Tower", "open_tower", "pick_device"]

_log = logging.getLogger(__name__)


class Tower(Protocol):
    """What the encoder needs of an engine; `name` says which it is, `lanes` how many threads may run it at once."""

    name: str
    lanes: int

    def run(self, batch: npt.NDArray[Any]) -> Embeddings:
        """uint8 [B,S,S,3] or int64 [B,L] -> float32 [B,D], each embedding of unit length; B >= 1."""
        ...


def pick_device(bundle: Bundle, backend: BackendChoice = "auto") -> str:
    """What device "auto" means here: "cuda" where there is a GPU and an engine that can use it, else "cpu".

    A bundle whose plans do not fit the GPU that there is, where nothing else can use it either, is an BackendWarning.
    """
    if backend in ("tensorrt", "tensorrt_rtx"):
        return "cuda"
    if backend == "openvino" or not gpu_count():
        return "cpu"
    if backend == "auto" and bundle.manifest.engines:
        try:
            _fitting_plan(bundle, 0, installed())
        except ClipretError as error:
            if CUDA not in providers():
                warnings.warn(f"the CPU runs instead of the GPU: {error}", BackendWarning, stacklevel=2)
        else:
            return "cuda"
    return "cuda" if CUDA in providers() else "cpu"


def open_tower(bundle: Bundle, name: str, device: str = "cpu", config: EncoderConfig | None = None) -> Tower:
    """One tower of a bundle, ready to run.

    On a GPU the backend "auto" takes a TensorRT engine of the bundle where one fits the GPU and the installed library,
    else onnxruntime; engines that cannot be used are an BackendWarning. On a CPU it takes onnxruntime, or OpenVINO for
    bf16, which onnxruntime does not have there, and for int8 where it is installed.

    Args:
        bundle: The model.
        name: "image" or "text".
        device: "cpu", "cuda" or "cuda:N": where this tower runs; that of `config` may name several.
        config: `backend`, `threads` and `cuda_graphs` of it count here.

    Raises:
        ClipretError: Changed bytes, a missing backend, a device that the backend cannot use, or an engine that was
            asked for by its library and does not fit.
    """
    config = config or EncoderConfig()
    backend, gpu = config.backend, gpu_number(device)
    if backend in ("tensorrt", "tensorrt_rtx"):
        if gpu is None:
            raise ClipretError(f"{backend} plans run on a GPU, not on {device}: use --device cuda")
        version = load_library(backend).__version__
        return _plan_tower(bundle, name, gpu, {backend: version})
    if backend == "auto" and gpu is not None and bundle.manifest.engines:
        try:
            return _plan_tower(bundle, name, gpu, installed())
        except ClipretError as error:
            warnings.warn(f"onnxruntime runs instead of TensorRT: {error}", BackendWarning, stacklevel=2)
    if backend == "openvino" and gpu is not None:
        raise ClipretError(f"OpenVINO runs on the CPU here, not on {device}: use --device cpu")
    precision = bundle.manifest.precision
    if gpu is None and precision == "bf16" and backend == "onnxruntime":
        raise ClipretError(f"{bundle.path} is bf16, which onnxruntime lacks on a CPU: use OpenVINO or export fp16")
    path, threads = bundle.file(f"{name}.onnx"), config.thread_count
    if backend == "openvino" or (backend == "auto" and gpu is None and _openvino_is_best(precision)):
        tower: Tower = OpenVinoTower(path, threads, precision == "bf16")
    else:
        tower = OnnxTower(path, device, threads, config.cuda_graphs)
    _log.debug("%s tower of %s on %s: %s, %s threads", name, bundle.path, device, type(tower).__name__, threads)
    return tower


def _openvino_is_best(precision: str) -> bool:
    """On a CPU. Of int8 graphs it makes the same embeddings as onnxruntime to within a rounding, two to three times
    faster where the processor multiplies tiles (AMX); it has no exact kernels for processors that overflow."""
    if precision == "int8":
        return importlib.util.find_spec("openvino") is not None and not int8_saturates()
    return precision == "bf16"


def _plan_tower(bundle: Bundle, name: str, gpu: int, versions: dict[TensorRTLibrary, str]) -> TensorRTTower:
    """The tower as a plan for the first of the libraries that one fits."""
    key, library = _fitting_plan(bundle, gpu, versions)
    _log.debug("%s tower of %s on cuda:%d: %s engine %s", name, bundle.path, gpu, library, key)
    return TensorRTTower(bundle.file(f"engines/{key}/{name}.plan"), library, gpu)


def _fitting_plan(bundle: Bundle, gpu: int, versions: dict[TensorRTLibrary, str]) -> tuple[str, TensorRTLibrary]:
    engines, arch = bundle.manifest.engines, gpu_arch(gpu)
    for library, version in versions.items():
        if key := choose_engine(engines, library, version, arch):
            return key, library
    raise ClipretError(explain(engines, versions, arch))


def _required(module: str, extra: str) -> Any:
    """An engine's module. Raises ClipretError that lists the engines there are."""
    try:
        return require(module, extra)
    except ClipretError as error:
        there = [name for name in BACKENDS if importlib.util.find_spec(name)]
        here = [f"{name} ({', '.join(providers())})" if name == "onnxruntime" else name for name in there]
        raise ClipretError(f"{error}; installed: {', '.join(here) or 'no engine'}") from None


class OnnxTower:
    """A tower in onnxruntime, on its CPU or CUDA execution provider. On CUDA two batches may be under way at once, so
    that one is copied while the other is computed. `graphs`: record CUDA graphs of the shapes that come often; where
    onnxruntime cannot, that is an BackendWarning and the tower runs without. `more`: options of the provider."""

    name = "onnxruntime"

    def __init__(
        self, path: Path, device: str, threads: int, graphs: bool = False, more: Mapping[str, str] | None = None
    ) -> None:
        gpu = gpu_number(device)
        _required("onnxruntime", "cpu" if gpu is None else "gpu")
        # Not TensorFloat-32: its 10 bits of mantissa would be a precision that nobody asked for.
        settings = ({} if gpu is None else {"use_tf32": "0"}) | dict(more or {})
        self.session: Any = None
        if graphs and gpu is not None:
            try:
                recording = settings | {"enable_cuda_graph": "1"}
                self.session = open_session(path, device, threads, provider_options=recording)
            except ClipretError as error:  # a node that only the CPU has
                warnings.warn(f"no CUDA graphs: {error}", BackendWarning, stacklevel=2)
        graphs = self.session is not None
        self.session = self.session or open_session(path, device, threads, provider_options=settings)
        self._input = self.session.get_inputs()[0].name
        self.graphs = graphs
        self.lanes = 1 if gpu is None else 2
        self._bound = queue.SimpleQueue[BoundSession]()
        if gpu is not None:
            # Graphs belong to the thread that recorded them, and a run beside a recording would end up in it.
            runner = ThreadPoolExecutor(1, "graphs") if graphs else None
            submit = None if runner is None else lambda run: runner.submit(run).result()
            for _ in range(self.lanes):
                self._bound.put(BoundSession(self.session, "cuda", gpu, graphs=graphs, submit=submit))

    def run(self, batch: npt.NDArray[Any]) -> Embeddings:
        embeddings: Embeddings
        if self.lanes == 1:
            embeddings = self.session.run(None, {self._input: batch})[0]
            return embeddings
        bound = self._bound.get()
        try:
            return bound.run(batch)
        finally:
            self._bound.put(bound)


class OpenVinoTower:
    """A tower in OpenVINO on the CPU, in float32 or, where the processor has it, in bfloat16; int8 graphs run as they
    are, in float32 between their integers."""

    name = "openvino"
    lanes = 1

    def __init__(self, path: Path, threads: int, bf16: bool) -> None:
        core = _required("openvino", "openvino").Core()
        native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") and not only_avx2()
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 and native else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        try:
            self._request = core.compile_model(str(path), "CPU", options).create_infer_request()
        except Exception as error:  # OpenVINO raises plain RuntimeError, and others for files it cannot parse
            reason = one_line(error)
            raise ClipretError(f"{path} cannot be opened by OpenVINO: {reason}; export the model again") from None
        self._lock = threading.Lock()  # a request is one thread's at a time

    def run(self, batch: npt.NDArray[Any]) -> Embeddings:
        with self._lock:
            # The input is read where it lies. The output is copied: the request writes its next embeddings to the same
            # place.
            embeddings: Embeddings = self._request.infer([batch], share_inputs=True, share_outputs=False)[0]
        return embeddings
