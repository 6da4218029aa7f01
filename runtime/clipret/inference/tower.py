"""Towers: the image or text half of a CLIP model in a backend, which maps a batch to unit embeddings."""

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
    explain_mismatch,
    installed,
    load_library,
)
from clipret.ort.cuda_graphs import BoundSession
from clipret.ort.session import CUDA, gpu_number, open_session, providers

__all__ = ["OnnxTower", "OpenVinoTower", "Tower", "open_tower", "pick_device"]

_log = logging.getLogger(__name__)


class Tower(Protocol):
    """The interface of a tower, whatever its backend.

    Attributes:
        name: Name of the backend, for reports.
        lanes: Number of threads that may call `run` at once.
    """

    name: str
    lanes: int

    def run(self, batch: npt.NDArray[Any]) -> Embeddings:
        """Encode a batch.

        Args:
            batch: Pixels uint8 [B,S,S,3] or token ids int64 [B,L], B >= 1.

        Returns:
            Unit embeddings float32 [B,D].
        """
        ...


def pick_device(bundle: Bundle, backend: BackendChoice = "auto") -> str:
    """Resolve the device "auto": "cuda" if there is a GPU and a backend that can use it, else "cpu".

    Warns with a BackendWarning if the bundle's TensorRT engines do not fit the GPU and no other backend can use it.

    Args:
        bundle: The model.
        backend: The backend that will run it.
    """
    if backend in ("tensorrt", "tensorrt_rtx"):
        return "cuda"
    if backend == "openvino" or not gpu_count():
        return "cpu"
    if backend == "auto" and bundle.manifest.engines:
        try:
            _fitting_engine(bundle, 0, installed())
        except ClipretError as error:
            if CUDA not in providers():
                warnings.warn(f"the CPU runs instead of the GPU: {error}", BackendWarning, stacklevel=2)
        else:
            return "cuda"
    return "cuda" if CUDA in providers() else "cpu"


def open_tower(bundle: Bundle, name: str, device: str = "cpu", config: EncoderConfig | None = None) -> Tower:
    """Open a tower of a bundle.

    On a GPU the backend "auto" uses a TensorRT engine of the bundle if one fits the GPU and the installed library, else
    onnxruntime; engines that cannot be used cause a BackendWarning. On a CPU it uses onnxruntime, or OpenVINO for bf16,
    which onnxruntime does not support there, and for int8 if OpenVINO is installed.

    Args:
        bundle: The model.
        name: "image" or "text".
        device: "cpu", "cuda" or "cuda:N"; `config.device` may name several.
        config: Its `backend`, `threads` and `cuda_graphs` are used.

    Raises:
        ClipretError: A file of the bundle has changed, the backend is not installed or does not support the device, or
            a TensorRT library was chosen and no engine fits.
    """
    config = config or EncoderConfig()
    backend, gpu = config.backend, gpu_number(device)
    if backend in ("tensorrt", "tensorrt_rtx"):
        if gpu is None:
            raise ClipretError(f"{backend} engines run on a GPU, not on {device}: use --device cuda")
        version = load_library(backend).__version__
        return _tensorrt_tower(bundle, name, gpu, {backend: version})
    if backend == "auto" and gpu is not None and bundle.manifest.engines:
        try:
            return _tensorrt_tower(bundle, name, gpu, installed())
        except ClipretError as error:
            warnings.warn(f"onnxruntime runs instead of TensorRT: {error}", BackendWarning, stacklevel=2)
    if backend == "openvino" and gpu is not None:
        raise ClipretError(f"clipret runs OpenVINO on the CPU only, not on {device}: use --device cpu")
    precision = bundle.manifest.precision
    if gpu is None and precision == "bf16" and backend == "onnxruntime":
        raise ClipretError(
            f"{bundle.path} is bf16, which onnxruntime does not support on a CPU: use OpenVINO or export fp16"
        )
    path, threads = bundle.file(f"{name}.onnx"), config.thread_count
    if backend == "openvino" or (backend == "auto" and gpu is None and _openvino_is_best(precision)):
        tower: Tower = OpenVinoTower(path, threads, precision == "bf16")
    else:
        tower = OnnxTower(path, device, threads, config.cuda_graphs)
    _log.debug("%s tower of %s on %s: %s, %s threads", name, bundle.path, device, type(tower).__name__, threads)
    return tower


def _openvino_is_best(precision: str) -> bool:
    """Whether OpenVINO is the better backend on a CPU.

    With int8 graphs its embeddings equal those of onnxruntime to within rounding, and it is two to three times faster
    on processors with AMX. It has no exact kernels for processors on which int8 sums overflow.
    """
    if precision == "int8":
        return importlib.util.find_spec("openvino") is not None and not int8_saturates()
    return precision == "bf16"


def _tensorrt_tower(bundle: Bundle, name: str, gpu: int, versions: dict[TensorRTLibrary, str]) -> TensorRTTower:
    """Open the engine of a tower for the first library that one fits."""
    key, library = _fitting_engine(bundle, gpu, versions)
    _log.debug("%s tower of %s on cuda:%d: %s engine %s", name, bundle.path, gpu, library, key)
    return TensorRTTower(bundle.file(f"engines/{key}/{name}.plan"), library, gpu)


def _fitting_engine(bundle: Bundle, gpu: int, versions: dict[TensorRTLibrary, str]) -> tuple[str, TensorRTLibrary]:
    engines, arch = bundle.manifest.engines, gpu_arch(gpu)
    for library, version in versions.items():
        if key := choose_engine(engines, library, version, arch):
            return key, library
    raise ClipretError(explain_mismatch(engines, versions, arch))


def _require_backend(module: str, extra: str) -> Any:
    """Import a backend; raises ClipretError with a list of the installed ones."""
    try:
        return require(module, extra)
    except ClipretError as error:
        names = [name for name in BACKENDS if importlib.util.find_spec(name)]
        backends = [f"{name} ({', '.join(providers())})" if name == "onnxruntime" else name for name in names]
        raise ClipretError(f"{error}; installed: {', '.join(backends) or 'no backend'}") from error


class OnnxTower:
    """A tower in onnxruntime, on its CPU or CUDA execution provider.

    On CUDA two batches may run at once, so that one is copied while the other is computed.

    Args:
        path: The ONNX file.
        device: "cpu", "cuda" or "cuda:N".
        threads: Threads on a CPU.
        graphs: Record CUDA graphs of frequent shapes. If onnxruntime cannot, the tower warns with a BackendWarning and
            runs without them.
        provider_options: Further options of the execution provider.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        device: str,
        threads: int,
        graphs: bool = False,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        gpu = gpu_number(device)
        _require_backend("onnxruntime", "cpu" if gpu is None else "gpu")
        # Without TensorFloat-32, whose mantissa of 10 bits would silently lower the precision.
        settings = ({} if gpu is None else {"use_tf32": "0"}) | dict(provider_options or {})
        self.session: Any = None
        if graphs and gpu is not None:
            try:
                recording = settings | {"enable_cuda_graph": "1"}
                self.session = open_session(path, device, threads, provider_options=recording)
            except ClipretError as error:  # an operator that only the CPU supports
                warnings.warn(f"no CUDA graphs: {error}", BackendWarning, stacklevel=2)
        graphs = self.session is not None
        self.session = self.session or open_session(path, device, threads, provider_options=settings)
        self._input = self.session.get_inputs()[0].name
        self.graphs = graphs
        self.lanes = 1 if gpu is None else 2
        self._bound = queue.SimpleQueue[BoundSession]()
        if gpu is not None:
            # Graphs belong to the thread that recorded them, and a run during a recording would become part of it.
            recorder = ThreadPoolExecutor(1, "graphs") if graphs else None
            submit = None if recorder is None else lambda run: recorder.submit(run).result()
            for _ in range(self.lanes):
                self._bound.put(BoundSession(self.session, "cuda", gpu, graphs=graphs, submit=submit))

    def run(self, batch: npt.NDArray[Any]) -> Embeddings:
        """Run a batch; see `Tower.run`."""
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
    """A tower in OpenVINO on the CPU. Int8 graphs run unchanged, with float32 between the integer operators.

    Args:
        path: The ONNX file.
        threads: Number of threads.
        bf16: Compute in bfloat16 if the processor supports it, else in float32.
    """

    name = "openvino"
    lanes = 1

    def __init__(self, path: Path, threads: int, bf16: bool) -> None:
        core = _require_backend("openvino", "openvino").Core()
        native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") and not only_avx2()
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 and native else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        try:
            self._request = core.compile_model(str(path), "CPU", options).create_infer_request()
        except Exception as error:  # OpenVINO raises RuntimeError, and other types for files that it cannot parse
            reason = one_line(error)
            raise ClipretError(f"{path} cannot be opened by OpenVINO: {reason}; export the model again") from error
        self._lock = threading.Lock()  # requests are not thread-safe

    def run(self, batch: npt.NDArray[Any]) -> Embeddings:
        """Run a batch; see `Tower.run`."""
        with self._lock:
            # The input is read in place. The output is copied: the request overwrites it in the next run.
            embeddings: Embeddings = self._request.infer([batch], share_inputs=True, share_outputs=False)[0]
        return embeddings
