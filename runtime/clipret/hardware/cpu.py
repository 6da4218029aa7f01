"""The features of the processor that results and thread counts depend on.

The environment variable CLIPRET_CPU=avx2 makes clipret treat the processor as one with AVX2 and nothing newer: no VNNI,
no bf16. It affects clipret's own choices only. Other libraries have their own switches; onnxruntime has none and keeps
using the kernels of the real processor.
"""

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

from clipret.errors import ClipretError

__all__ = ["cpu_count", "int8_saturates", "only_avx2", "peak_memory"]


def cpu_count() -> int:
    """Number of processors that this process may use.

    On Linux containers and `taskset` may allow fewer than the machine has; elsewhere this is the machine's number.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int | None:
    """Peak memory of this process in bytes, or None if the system does not report it."""
    if sys.platform == "win32":
        return _windows_peak_memory()
    try:
        import resource
    except ImportError:
        return None
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if sys.platform == "win32":

    def _windows_peak_memory() -> int | None:
        """PeakWorkingSetSize, from GetProcessMemoryInfo of psapi.h."""

        class Counters(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
            _fields_ = (
                ("cb", ctypes.c_uint32),
                ("PageFaultCount", ctypes.c_uint32),
                ("PeakWorkingSetSize", ctypes.c_size_t),
                ("others", ctypes.c_size_t * 7),
            )

        kernel = ctypes.WinDLL("kernel32")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        kernel.K32GetProcessMemoryInfo.argtypes = [ctypes.c_void_p, ctypes.POINTER(Counters), ctypes.c_uint32]
        counters = Counters(cb=ctypes.sizeof(Counters))
        if not kernel.K32GetProcessMemoryInfo(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb):
            return None
        return int(counters.PeakWorkingSetSize)


def only_avx2() -> bool:
    """Whether CLIPRET_CPU turns off what is newer than AVX2.

    Raises:
        ClipretError: The variable has another value than "avx2".
    """
    value = os.environ.get("CLIPRET_CPU", "")
    if value not in ("", "avx2"):
        raise ClipretError(f"CLIPRET_CPU is {value!r}: set it to avx2, or unset it")
    return value == "avx2"


@cache
def int8_saturates() -> bool:
    """Whether the processor sums int8 products in 16 bits, where they overflow (x86 without VNNI).

    onnxruntime has an exact kernel for such processors, several times slower, which it does not select by itself.
    """
    if only_avx2():
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # not Linux: assume the worst, which is slow but exact
