"""TensorRT plans of a bundle: which of them fits this machine, and a tower that runs one.

A plan runs with exactly the version that built it: TensorRT's default, and for TensorRT for RTX without exception (its
manual, "Engine Compatibility"). TensorRT's fit one GPU architecture; those of TensorRT for RTX fit the architectures
they were built for, which may be "Ampere (sm_80) and later".
"""

import importlib
import importlib.util
import queue
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.backends import BACKENDS, TENSORRT_LIBRARIES, TensorRTLibrary
from clipret.bundle import Engine
from clipret.errors import ClipretError, require
from clipret.hardware.cuda import Copies, enter_context

__all__ = [
    "TensorRTTower",
    "choose_engine",
    "error_log",
    "explain",
    "installed",
    "load_library",
]


def load_library(library: TensorRTLibrary) -> Any:
    """The module. Raises ClipretError with the pip command where it is not installed."""
    try:
        return require(library, BACKENDS[library].extra)
    except (ImportError, OSError) as error:  # the Python package without the shared libraries that it loads
        raise ClipretError(f"{BACKENDS[library].label} does not load ({error}): install {library} again") from None


def installed() -> dict[TensorRTLibrary, str]:
    """The versions of the TensorRT libraries of this machine, the preferred one first."""
    return {
        library: load_library(library).__version__
        for library in TENSORRT_LIBRARIES
        if importlib.util.find_spec(library)
    }


def choose_engine(engines: Mapping[str, Engine], library: TensorRTLibrary, version: str, arch: str) -> str | None:
    """The key of the plan to run with this library on this GPU, or None; one for exactly this GPU goes first."""
    fitting = {
        engine.arch: key
        for key, engine in engines.items()
        if (engine.library, engine.version) == (library, version) and _fits(engine.arch, arch)
    }
    return fitting.get(arch) or next(iter(fitting.values()), None)


def _fits(built: str, arch: str) -> bool:
    if built.endswith("+"):  # for that architecture and all later ones
        return int(arch.removeprefix("sm_")) >= int(built.removeprefix("sm_").removesuffix("+"))
    return built == arch


def explain(engines: Mapping[str, Engine], versions: Mapping[TensorRTLibrary, str], arch: str) -> str:
    """Why no plan of a bundle fits a machine with the libraries `versions` and a GPU `arch`, and what to do."""
    held = ", ".join(
        f"{BACKENDS[engine.library].label} {engine.version} on {engine.arch}" for engine in engines.values()
    )
    here = (
        " and ".join(f"{BACKENDS[library].label} {version}" for library, version in versions.items()) or "no TensorRT"
    )
    option = "--tensorrt" if "tensorrt" in versions or not versions else f"--tensorrt-rtx {arch}"
    return (
        f"the bundle's plans are for {held or 'nothing'}, this machine has {arch} with {here}: "
        f"build one here with  clipret-export engines BUNDLE {option}"
    )


def error_log(trt: Any) -> Any:
    """An ILogger that keeps errors, the first one as `reason`, and prints nothing. Its base class exists only once the
    library is loaded."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        @property
        def reason(self) -> str:
            return self.errors[0] if self.errors else "it gives no reason"

    return ErrorLog()


class TensorRTTower:
    """A tower as a TensorRT plan on GPU number `device`.

    Any batch runs: in the profile with the smallest limit that holds it, in parts where it exceeds the largest.
    Up to `lanes` threads run at once, each with a context, a stream and buffers of its own, so that one batch is copied
    while another is computed; further ones take turns. Raises ClipretError where the library, the GPU or its memory
    is missing, or the plan does not fit.
    """

    lanes = 2

    def __init__(self, path: Path, library: TensorRTLibrary, device: int = 0) -> None:
        trt = load_library(library)
        self.name = f"{BACKENDS[library].label} {trt.__version__}"
        self._device = device
        enter_context(device)
        self._log = error_log(trt)
        engine = trt.Runtime(self._log).deserialize_cuda_engine(path.read_bytes())
        context = None if engine is None else engine.create_execution_context()
        if engine is None or context is None:
            raise ClipretError(f"{path} does not run in {self.name}: {self._log.reason}; build it again here")
        self._engine = engine
        self._dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(self._engine.get_tensor_name(0))))
        first = _Lane(self._engine, context, device, self._dtype)
        self._limit, self._dim = first.limits[-1], first.dim
        self._free = queue.SimpleQueue[_Lane]()
        self._free.put(first)
        self._made, self._making = 1, threading.Lock()

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """uint8 [B,S,S,3] or int64 [B,L] -> float32 [B,D], each embedding of unit length; B >= 1."""
        batch = batch.astype(self._dtype, copy=False)
        embeddings = np.empty((len(batch), self._dim), dtype=np.float32)
        enter_context(self._device)  # a thread's own, and any thread may come
        lane = self._take()
        try:
            for low in range(0, len(batch), self._limit):
                part = batch[low : low + self._limit]
                if not lane.run(part, embeddings[low : low + self._limit]):
                    raise ClipretError(f"{self.name} cannot run a batch of shape {part.shape}: {self._log.reason}")
        finally:
            self._free.put(lane)
        return embeddings

    def _take(self) -> "_Lane":
        """A lane that is free, a new one where all are taken and there may be more, else the first that comes free."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            pass
        with self._making:
            if self._made < self.lanes:
                context = self._engine.create_execution_context()
                self._made = self.lanes if context is None else self._made + 1  # no memory for another: take turns
                if context is not None:
                    return _Lane(self._engine, context, self._device, self._dtype)
        return self._free.get()


class _Lane:
    """An execution context of an engine with what one thread at a time needs to run it."""

    def __init__(self, engine: Any, context: Any, device: int, dtype: np.dtype[Any]) -> None:
        self._context, self._copies = context, Copies(device)
        self._input, self._output = (engine.get_tensor_name(at) for at in (0, 1))
        profiles = range(engine.num_optimization_profiles)
        shapes = [engine.get_tensor_profile_shape(self._input, at)[2] for at in profiles]  # smallest, usual, largest
        self.limits = [shape[0] for shape in shapes]  # ascending, as they were built
        self.dim = int(engine.get_tensor_shape(self._output)[-1])
        self._profile = 0
        self._batch = self._copies.buffer(max(map(prod, shapes)) * dtype.itemsize)
        self._embeddings = self._copies.buffer(self.limits[-1] * self.dim * 4)

    def run(self, batch: npt.NDArray[Any], embeddings: npt.NDArray[np.float32]) -> bool:
        """Fill embeddings float32 [B,D] from a batch that a profile holds; False where the engine refuses it."""
        context, copies = self._context, self._copies
        profile = next(at for at, limit in enumerate(self.limits) if len(batch) <= limit)
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, copies.stream):
                return False
            self._profile = profile
        ready = context.set_input_shape(self._input, batch.shape)
        ready = ready and context.set_tensor_address(self._input, self._batch.address)
        ready = ready and context.set_tensor_address(self._output, self._embeddings.address)
        if not ready:
            return False
        self._batch.host[: batch.nbytes].view(batch.dtype).reshape(batch.shape)[...] = batch
        copies.to_device(self._batch, batch.nbytes)
        if not context.execute_async_v3(copies.stream):
            copies.wait()  # the next batch is staged in the same place
            return False
        copies.to_host(self._embeddings, embeddings.nbytes)
        copies.wait()
        embeddings[...] = self._embeddings.host[: embeddings.nbytes].view(np.float32).reshape(embeddings.shape)
        return True
