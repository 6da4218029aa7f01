"""CUDA's driver, the only file that calls it: memory, copies in a stream of their own, what the GPUs are.

By ctypes and not by cuda-bindings: the lean install asks for the number of GPUs at each start and has no package for
it, and the few calls beyond that are no reason for two packages. Names and numbers are those of the CUDA driver API.
onnxruntime, TensorRT and every other user of the CUDA runtime work in a device's primary context, which is the one
taken here, so that addresses and streams mean the same to all of them.
"""

import ctypes
import sys
import weakref
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError

__all__ = [
    "Buffer",
    "Copies",
    "HostCopies",
    "call_driver",
    "device_name",
    "enter_context",
    "free_memory",
    "gpu_arch",
    "gpu_count",
]

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream, nor it for this
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
Bytes = npt.NDArray[np.uint8]


@cache
def _driver() -> Any:
    """The library. Raises ClipretError where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise ClipretError(f"there is no NVIDIA driver here ({error}): use --device cpu") from None


def call_driver(name: str, *given: Any) -> None:
    """A function of the driver API by its name. Raises ClipretError with the number of the error, if there is one."""
    error = getattr(_driver(), name)(*given)
    if error:
        raise ClipretError(f"CUDA's {name} failed with error {error}: see what nvidia-smi says, or use the CPU")


def gpu_count() -> int:
    """The GPUs that CUDA's driver shows to this process; 0 where there is no driver. Needs no package."""
    count = ctypes.c_int()
    try:
        call_driver("cuInit", ctypes.c_uint(0))
        call_driver("cuDeviceGetCount", ctypes.byref(count))
    except ClipretError:  # no driver, or one that finds no GPU
        return 0
    return count.value


def _device(number: int) -> ctypes.c_int:
    """The driver's handle of GPU `number`. Raises ClipretError where there is no such GPU."""
    device = ctypes.c_int()
    call_driver("cuInit", ctypes.c_uint(0))
    call_driver("cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
    return device


def device_name(number: int) -> str:
    """As nvidia-smi calls it. Raises ClipretError where there is no such GPU."""
    name = ctypes.create_string_buffer(256)
    call_driver("cuDeviceGetName", name, ctypes.c_int(len(name)), _device(number))
    return name.value.decode(errors="replace")


def gpu_arch(number: int = 0) -> str:
    """The architecture of GPU `number`, like "sm_89". Raises ClipretError where there is no such GPU."""
    device, value, version = _device(number), ctypes.c_int(), ""
    for attribute in _CAPABILITY:
        call_driver("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        version += str(value.value)
    return f"sm_{version}"


@cache
def _context(number: int) -> ctypes.c_void_p:
    """The primary context of a GPU, kept until the process ends."""
    context = ctypes.c_void_p()
    call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), _device(number))
    return context


def enter_context(number: int) -> None:
    """Make the context of GPU `number` that of the calling thread; it costs nothing where it is."""
    call_driver("cuCtxSetCurrent", _context(number))


def free_memory(number: int) -> int:
    """Bytes of GPU `number` that nobody has taken. Raises ClipretError where there is no such GPU."""
    enter_context(number)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call_driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


class Buffer:
    """`size` bytes of a device at `address`, and as many in `host` (uint8 [size]), to copy from and to.

    The memory lives as long as the buffer and, that of `host`, as any array of it.
    """

    def __init__(self, address: int, host: Bytes, owner: object = None) -> None:
        self.size, self.address, self.host = len(host), address, host
        self._owner = owner  # of the memory at `address`


class HostCopies:
    """What `Copies` does, where the device is the CPU itself."""

    def buffer(self, size: int) -> Buffer:
        """A new buffer of `size` bytes."""
        memory = np.empty(size, np.uint8)
        return Buffer(memory.ctypes.data, np.empty(size, np.uint8), memory)

    def to_device(self, buffer: Buffer, size: int) -> None:
        """Start to copy the first `size` bytes of the host's side to the device's."""
        ctypes.memmove(buffer.address, buffer.host.ctypes.data, size)

    def to_host(self, buffer: Buffer, size: int) -> None:
        """The other way."""
        ctypes.memmove(buffer.host.ctypes.data, buffer.address, size)

    def wait(self) -> None:
        """Return when everything that was started is done."""


class Copies(HostCopies):
    """Copies between pinned memory and GPU `number` in a stream of their own, beside whatever the GPU computes.

    `stream` is its handle, for others to compute in. One thread at a time; waiting gives Python's lock back, as every
    call by ctypes does. Raises ClipretError where there is no such GPU, or it has no memory left.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        enter_context(number)
        stream = ctypes.c_void_p()
        call_driver("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self._stream, self.stream = stream, stream.value or 0
        weakref.finalize(self, _forget, "cuStreamDestroy_v2", number, stream)

    def buffer(self, size: int) -> Buffer:
        """The host's side is pinned: the GPU reads and writes it by itself, at twice the rate of other memory."""
        enter_context(self._number)
        pinned, address = ctypes.c_void_p(), ctypes.c_uint64()
        call_driver("cuMemAllocHost_v2", ctypes.byref(pinned), ctypes.c_size_t(size))
        memory = (ctypes.c_uint8 * size).from_address(pinned.value or 0)
        weakref.finalize(memory, _forget, "cuMemFreeHost", self._number, pinned)  # an array of it keeps `memory`
        call_driver("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        buffer = Buffer(address.value, np.ctypeslib.as_array(memory))
        weakref.finalize(buffer, _forget, "cuMemFree_v2", self._number, address)
        return buffer

    def to_device(self, buffer: Buffer, size: int) -> None:
        enter_context(self._number)
        given = ctypes.c_uint64(buffer.address), ctypes.c_void_p(buffer.host.ctypes.data), ctypes.c_size_t(size)
        call_driver("cuMemcpyHtoDAsync_v2", *given, self._stream)

    def to_host(self, buffer: Buffer, size: int) -> None:
        enter_context(self._number)
        given = ctypes.c_void_p(buffer.host.ctypes.data), ctypes.c_uint64(buffer.address), ctypes.c_size_t(size)
        call_driver("cuMemcpyDtoHAsync_v2", *given, self._stream)

    def wait(self) -> None:
        call_driver("cuStreamSynchronize", self._stream)


def _forget(name: str, number: int, handle: ctypes.c_void_p | ctypes.c_uint64) -> None:
    """Free something; at the end of the process the driver may have gone before."""
    driver = _driver()
    driver.cuCtxSetCurrent(_context(number))
    getattr(driver, name)(handle)
