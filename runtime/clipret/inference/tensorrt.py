"""TensorRT engines of a bundle: choose the one that fits this machine, and run a tower with it.

An engine runs with exactly the version that built it: by default in TensorRT, always in TensorRT for RTX (its manual,
"Engine Compatibility"). An engine of TensorRT fits one GPU architecture; one of TensorRT for RTX fits the architectures
that it was built for, which may be "Ampere (sm_80) and later".
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
    "explain_mismatch",
    "installed",
    "load_library",
]


def load_library(library: TensorRTLibrary) -> Any:
    """Import a TensorRT library. Raises ClipretError, with the pip command if it is not installed."""
    try:
        return require(library, BACKENDS[library].extra)
    except (ImportError, OSError) as error:  # the Python package without its shared libraries
        raise ClipretError(f"{BACKENDS[library].label} does not load ({error}): reinstall {library}") from error


def installed() -> dict[TensorRTLibrary, str]:
    """Versions of the installed TensorRT libraries, the preferred one first."""
    return {
        library: load_library(library).__version__
        for library in TENSORRT_LIBRARIES
        if importlib.util.find_spec(library)
    }


def choose_engine(engines: Mapping[str, Engine], library: TensorRTLibrary, version: str, arch: str) -> str | None:
    """Choose the engine of a bundle for a library and a GPU.

    Args:
        engines: The engines of the bundle by key.
        library: The TensorRT library.
        version: Its version.
        arch: Architecture of the GPU, such as "sm_89".

    Returns:
        The key of an engine, preferably one for exactly this architecture, or None if none fits.
    """
    fitting = {
        engine.arch: key
        for key, engine in engines.items()
        if (engine.library, engine.version) == (library, version) and _fits(engine.arch, arch)
    }
    return fitting.get(arch) or next(iter(fitting.values()), None)


def _fits(built: str, arch: str) -> bool:
    if built.endswith("+"):  # this architecture and all later ones
        return int(arch.removeprefix("sm_")) >= int(built.removeprefix("sm_").removesuffix("+"))
    return built == arch


def explain_mismatch(engines: Mapping[str, Engine], versions: Mapping[TensorRTLibrary, str], arch: str) -> str:
    """Explain why no engine of a bundle fits a machine, and what to do.

    Args:
        engines: The engines of the bundle by key.
        versions: The installed libraries with their versions.
        arch: Architecture of the GPU, such as "sm_89".
    """
    built_for = ", ".join(
        f"{BACKENDS[engine.library].label} {engine.version} on {engine.arch}" for engine in engines.values()
    )
    libraries = " and ".join(f"{BACKENDS[library].label} {version}" for library, version in versions.items())
    option = "--tensorrt" if "tensorrt" in versions or not versions else f"--tensorrt-rtx {arch}"
    has = f"has engines for {built_for}" if built_for else "has no TensorRT engines"
    return (
        f"the bundle {has}, this machine has {arch} with {libraries or 'no TensorRT'}: "
        f"build an engine here with  clipret-export engines BUNDLE {option}"
    )


def error_log(trt: Any) -> Any:
    """Make an ILogger that collects errors and prints nothing; `reason` is the first error.

    Args:
        trt: The module of the library, which has the base class.
    """

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        @property
        def reason(self) -> str:
            return self.errors[0] if self.errors else "no reason given"

    return ErrorLog()


class TensorRTTower:
    """A tower as a TensorRT engine.

    A batch of any size runs: in the smallest optimization profile that it fits, or in parts if it exceeds the largest.
    Up to `lanes` threads run at once, each with its own context, stream and buffers, so that one batch is copied while
    another is computed. Further threads wait.

    Args:
        path: The file of the engine.
        library: The library that built it.
        device: Number of the GPU.

    Raises:
        ClipretError: The library is not installed, there is no such GPU, its memory is full, or the file does not fit.
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
            raise ClipretError(
                f"{path} does not run in {self.name}: {self._log.reason}; build it on this machine with "
                "clipret-export engines"
            )
        self._engine = engine
        self._dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(self._engine.get_tensor_name(0))))
        first = _Lane(self._engine, context, device, self._dtype)
        self._limit, self._dim = first.limits[-1], first.dim
        self._free = queue.SimpleQueue[_Lane]()
        self._free.put(first)
        self._lane_count, self._lock = 1, threading.Lock()

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Run a batch; see `Tower.run`."""
        batch = batch.astype(self._dtype, copy=False)
        embeddings = np.empty((len(batch), self._dim), dtype=np.float32)
        enter_context(self._device)  # contexts are per thread, and any thread may call
        lane = self._free_lane()
        try:
            for low in range(0, len(batch), self._limit):
                part = batch[low : low + self._limit]
                if not lane.run(part, embeddings[low : low + self._limit]):
                    raise ClipretError(f"{self.name} cannot run a batch of shape {part.shape}: {self._log.reason}")
        finally:
            self._free.put(lane)
        return embeddings

    def _free_lane(self) -> "_Lane":
        """A free lane, a new one if all are in use and there may be more, or else the next one that becomes free."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            if self._lane_count < self.lanes:
                context = self._engine.create_execution_context()
                # Without memory for another lane, threads wait for the existing ones.
                self._lane_count = self.lanes if context is None else self._lane_count + 1
                if context is not None:
                    return _Lane(self._engine, context, self._device, self._dtype)
        return self._free.get()


class _Lane:
    """An execution context of an engine with its stream and buffers, for one thread at a time."""

    def __init__(self, engine: Any, context: Any, device: int, dtype: np.dtype[Any]) -> None:
        self._context, self._copies = context, Copies(device)
        self._input, self._output = (engine.get_tensor_name(number) for number in (0, 1))
        profiles = range(engine.num_optimization_profiles)
        shapes = [engine.get_tensor_profile_shape(self._input, profile)[2] for profile in profiles]  # min, opt, max
        self.limits = [shape[0] for shape in shapes]  # ascending, as the engine was built
        self.dim = int(engine.get_tensor_shape(self._output)[-1])
        self._profile = 0
        self._batch = self._copies.buffer(max(map(prod, shapes)) * dtype.itemsize)
        self._embeddings = self._copies.buffer(self.limits[-1] * self.dim * 4)

    def run(self, batch: npt.NDArray[Any], embeddings: npt.NDArray[np.float32]) -> bool:
        """Fill embeddings float32 [B,D] from a batch that fits a profile; returns False if the engine rejects it."""
        context, copies = self._context, self._copies
        profile = next(number for number, limit in enumerate(self.limits) if len(batch) <= limit)
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
            copies.wait()  # the next batch is staged in the same memory
            return False
        copies.to_host(self._embeddings, embeddings.nbytes)
        copies.wait()
        embeddings[...] = self._embeddings.host[: embeddings.nbytes].view(np.float32).reshape(embeddings.shape)
        return True
