"""CUDA's driver, called directly: pinned memory, copies in a stream of their own, free memory. Needs no package.

Names and numbers are those of the CUDA driver API. onnxruntime and every other user of the CUDA runtime work in a
device's primary context, which is the one taken here, so that addresses mean the same to all of them.
"""

import ctypes
import importlib
import sys
import weakref
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError

__all__ = [
    "Copies",
    "HostCopies",
    "call_driver",
    "checked",
    "cuda_runtime",
    "device_name",
    "enter_context",
    "free_memory",
    "gpu_arch",
    "gpu_count",
]

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream, nor it for this
Bytes = npt.NDArray[np.uint8]


@cache
def _driver() -> Any:
    """The library. Raises ClipretError where there is none."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise ClipretError(f"there is no NVIDIA driver here ({error}): use --device cpu") from None
    return library


def call_driver(name: str, *given: Any) -> None:
    """A function of the driver API by its name. Raises ClipretError with the number of the error, if there is one."""
    error = getattr(_driver(), name)(*given)
    if error:
        raise ClipretError(f"CUDA's {name} failed with error {error}: see what nvidia-smi says, or use the CPU")


@cache
def _context(number: int) -> tuple[ctypes.c_int, ctypes.c_void_p]:
    """The device and its primary context, kept until the process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call_driver("cuInit", ctypes.c_uint(0))
    call_driver("cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
    call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return device, context


def enter_context(number: int) -> None:
    """Make the device's context that of the calling thread; it costs nothing where it is."""
    call_driver("cuCtxSetCurrent", _context(number)[1])


def free_memory(number: int) -> int:
    """Bytes of GPU `number` that nobody has taken. Raises ClipretError where there is no such GPU."""
    enter_context(number)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call_driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def device_name(number: int) -> str:
    """As nvidia-smi calls it."""
    name = ctypes.create_string_buffer(256)
    call_driver("cuDeviceGetName", name, ctypes.c_int(len(name)), _context(number)[0])
    return name.value.decode()


class HostCopies:
    """What `Copies` does, where the device is the CPU itself."""

    def host(self, size: int) -> Bytes:
        """Memory to copy from and to, uint8 [size]."""
        return np.empty(size, np.uint8)

    def to_device(self, address: int, source: Bytes) -> None:
        """Copy a contiguous array to an address of the device, and return when that is done."""
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def to_host(self, target: Bytes, address: int) -> None:
        """The other way."""
        ctypes.memmove(target.ctypes.data, address, target.nbytes)


class Copies(HostCopies):
    """Copies between pinned memory and GPU `number` in a stream of their own, beside whatever the GPU computes.

    One thread at a time; others wait on the GPU, not in Python: ctypes gives Python's lock back.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        enter_context(number)
        self._stream = ctypes.c_void_p()
        call_driver("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))
        weakref.finalize(self, _forget, "cuStreamDestroy_v2", number, self._stream)

    def host(self, size: int) -> Bytes:
        """Pinned memory: the GPU reads and writes it directly, at twice the rate of other memory and asynchronously."""
        enter_context(self._number)
        address = ctypes.c_void_p()
        call_driver("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(size))
        buffer = (ctypes.c_uint8 * size).from_address(address.value or 0)
        weakref.finalize(buffer, _forget, "cuMemFreeHost", self._number, address)  # an array of it keeps `buffer`
        pinned: Bytes = np.ctypeslib.as_array(buffer)
        return pinned

    def to_device(self, address: int, source: Bytes) -> None:
        enter_context(self._number)
        given = ctypes.c_uint64(address), ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(source.nbytes)
        call_driver("cuMemcpyHtoDAsync_v2", *given, self._stream)
        call_driver("cuStreamSynchronize", self._stream)

    def to_host(self, target: Bytes, address: int) -> None:
        enter_context(self._number)
        given = ctypes.c_void_p(target.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(target.nbytes)
        call_driver("cuMemcpyDtoHAsync_v2", *given, self._stream)
        call_driver("cuStreamSynchronize", self._stream)


def _forget(name: str, number: int, handle: ctypes.c_void_p) -> None:
    """Free something; at the end of the process the driver may have gone before."""
    driver = _driver()
    driver.cuCtxSetCurrent(_context(number)[1])
    getattr(driver, name)(handle)


def gpu_count() -> int:
    """The GPUs that CUDA's driver shows to this process; 0 where there is no driver. Needs no package."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    ready = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if ready else 0


def gpu_arch(device: int = 0) -> str:
    """The architecture of GPU `device`, like "sm_89". Raises ClipretError where there is none."""
    cuda = cuda_runtime()
    names = cuda.cudaDeviceAttr
    wanted = (names.cudaDevAttrComputeCapabilityMajor, names.cudaDevAttrComputeCapabilityMinor)
    major, minor = (checked(cuda.cudaDeviceGetAttribute(name, device)) for name in wanted)
    return f"sm_{major}{minor}"


def cuda_runtime() -> Any:
    """The module of CUDA's runtime. Raises ClipretError with the pip command where it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError:  # both extras bring it, but which of them is meant is not known here
        raise ClipretError("TensorRT plans need CUDA's Python package: run  pip install cuda-bindings") from None


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of the CUDA runtime, which returns (error, *values)."""
    error, *values = result
    if int(error) != 0:
        told = cuda_runtime().cudaGetErrorString(error)[1].decode()
        raise ClipretError(f"CUDA cannot be used ({told}): see what nvidia-smi says, or use the CPU")
    return values[0] if values else None
