"""All calls of the CUDA driver: memory, copies in their own stream, properties of the GPUs.

The calls go through ctypes and not cuda-bindings: every start counts the GPUs, also in the lean install, which has no
CUDA package, and the few other calls do not justify two more packages. Names and numbers are those of the CUDA driver
API. onnxruntime, TensorRT and every other user of the CUDA runtime work in a device's primary context. This module uses
the same context, so addresses and streams are valid in all of them.
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

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not synchronize with the default stream
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
Bytes = npt.NDArray[np.uint8]


@cache
def _driver() -> Any:
    """Load the driver's library; raises ClipretError if there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise ClipretError(f"no NVIDIA driver is installed ({error}): use --device cpu") from error


def call_driver(name: str, *arguments: Any) -> None:
    """Call a function of the CUDA driver API.

    Args:
        name: Name of the function, such as "cuInit".
        arguments: Its arguments as ctypes values.

    Raises:
        ClipretError: There is no driver, or the function returned an error.
    """
    error = getattr(_driver(), name)(*arguments)
    if error:
        raise ClipretError(f"CUDA's {name} failed with error {error}: check nvidia-smi, or use --device cpu")


def gpu_count() -> int:
    """Number of GPUs that the CUDA driver reports to this process; 0 without a driver."""
    count = ctypes.c_int()
    try:
        call_driver("cuInit", ctypes.c_uint(0))
        call_driver("cuDeviceGetCount", ctypes.byref(count))
    except ClipretError:  # no driver, or one that finds no GPU
        return 0
    return count.value


def _device(number: int) -> ctypes.c_int:
    """The driver's handle of a GPU; raises ClipretError if there is no such GPU."""
    device = ctypes.c_int()
    call_driver("cuInit", ctypes.c_uint(0))
    call_driver("cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
    return device


def device_name(number: int) -> str:
    """Name of GPU `number` as nvidia-smi shows it. Raises ClipretError if there is no such GPU."""
    name = ctypes.create_string_buffer(256)
    call_driver("cuDeviceGetName", name, ctypes.c_int(len(name)), _device(number))
    return name.value.decode(errors="replace")


def gpu_arch(number: int = 0) -> str:
    """Architecture of GPU `number`, such as "sm_89". Raises ClipretError if there is no such GPU."""
    device, value, version = _device(number), ctypes.c_int(), ""
    for attribute in _CAPABILITY:
        call_driver("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        version += str(value.value)
    return f"sm_{version}"


@cache
def _context(number: int) -> ctypes.c_void_p:
    """The primary context of a GPU, retained until the process ends."""
    context = ctypes.c_void_p()
    call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), _device(number))
    return context


def enter_context(number: int) -> None:
    """Make the primary context of GPU `number` current in the calling thread. Cheap if it already is."""
    call_driver("cuCtxSetCurrent", _context(number))


def free_memory(number: int) -> int:
    """Free memory of GPU `number` in bytes. Raises ClipretError if there is no such GPU."""
    enter_context(number)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call_driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


class Buffer:
    """Device memory with host memory of the same size, to copy between them.

    The device memory lives as long as the buffer, the host memory as long as any array that views it.

    Attributes:
        size: Bytes on each side.
        address: Address of the device memory.
        host: The host memory, uint8 [size].
    """

    def __init__(self, address: int, host: Bytes, owner: object = None) -> None:
        self.size, self.address, self.host = len(host), address, host
        self._owner = owner  # of the memory at `address`


class HostCopies:
    """The interface of `Copies` for the CPU as the device."""

    def buffer(self, size: int) -> Buffer:
        """Allocate a buffer of `size` bytes."""
        memory = np.empty(size, np.uint8)
        return Buffer(memory.ctypes.data, np.empty(size, np.uint8), memory)

    def to_device(self, buffer: Buffer, size: int) -> None:
        """Start to copy the first `size` bytes from host to device."""
        ctypes.memmove(buffer.address, buffer.host.ctypes.data, size)

    def to_host(self, buffer: Buffer, size: int) -> None:
        """Start to copy the first `size` bytes from device to host."""
        ctypes.memmove(buffer.host.ctypes.data, buffer.address, size)

    def wait(self) -> None:
        """Wait for all copies."""


class Copies(HostCopies):
    """Copies between pinned memory and a GPU in their own stream, in parallel with what the GPU computes.

    Not thread-safe. Waiting releases Python's global lock, as every call through ctypes does.

    Args:
        number: Number of the GPU.

    Attributes:
        stream: Handle of the stream, in which others may compute.

    Raises:
        ClipretError: There is no such GPU, or it is out of memory.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        enter_context(number)
        stream = ctypes.c_void_p()
        call_driver("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self._stream, self.stream = stream, stream.value or 0
        weakref.finalize(self, _free, "cuStreamDestroy_v2", number, stream)

    def buffer(self, size: int) -> Buffer:
        """Allocate a buffer; its host memory is pinned, which the GPU accesses directly at twice the rate."""
        enter_context(self._number)
        pinned, address = ctypes.c_void_p(), ctypes.c_uint64()
        call_driver("cuMemAllocHost_v2", ctypes.byref(pinned), ctypes.c_size_t(size))
        memory = (ctypes.c_uint8 * size).from_address(pinned.value or 0)
        weakref.finalize(memory, _free, "cuMemFreeHost", self._number, pinned)  # arrays keep `memory` alive
        call_driver("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        buffer = Buffer(address.value, np.ctypeslib.as_array(memory))
        weakref.finalize(buffer, _free, "cuMemFree_v2", self._number, address)
        return buffer

    def to_device(self, buffer: Buffer, size: int) -> None:
        enter_context(self._number)
        device, host = ctypes.c_uint64(buffer.address), ctypes.c_void_p(buffer.host.ctypes.data)
        call_driver("cuMemcpyHtoDAsync_v2", device, host, ctypes.c_size_t(size), self._stream)

    def to_host(self, buffer: Buffer, size: int) -> None:
        enter_context(self._number)
        device, host = ctypes.c_uint64(buffer.address), ctypes.c_void_p(buffer.host.ctypes.data)
        call_driver("cuMemcpyDtoHAsync_v2", host, device, ctypes.c_size_t(size), self._stream)

    def wait(self) -> None:
        call_driver("cuStreamSynchronize", self._stream)


def _free(name: str, number: int, handle: ctypes.c_void_p | ctypes.c_uint64) -> None:
    """Free a resource and ignore errors: at the end of the process the driver may be gone already."""
    driver = _driver()
    driver.cuCtxSetCurrent(_context(number))
    getattr(driver, name)(handle)
