"""What this machine's processor can do, as far as results and thread counts depend on it.

The environment variable CLIPRET_CPU=avx2 makes clipret treat the processor as one that has AVX2 and nothing newer: no
VNNI, no bf16. It chooses among clipret's own ways only. The libraries have switches of their own; onnxruntime has none
and keeps the kernels of the real processor.
"""

import os
import platform
import sys
from functools import cache
from pathlib import Path

from clipret.errors import ClipretError

__all__ = ["cpu_count", "int8_saturates", "only_avx2", "peak_memory"]


def cpu_count() -> int:
    """The processors that this process may use; containers and `taskset` allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int | None:
    """The most memory that this process has used, in bytes; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    most: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def only_avx2() -> bool:
    """Whether CLIPRET_CPU asks to do without what is newer than AVX2.

    Raises:
        ClipretError: The variable holds anything but "avx2".
    """
    wanted = os.environ.get("CLIPRET_CPU", "")
    if wanted not in ("", "avx2"):
        raise ClipretError(f"CLIPRET_CPU is {wanted!r}: set it to avx2, or leave it out")
    return wanted == "avx2"


@cache
def int8_saturates() -> bool:
    """Whether the processor adds int8 products up in 16 bits, where they overflow: x86 without VNNI.

    onnxruntime has another kernel for it, exact and several times slower; it does not take it by itself.
    """
    if only_avx2():
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # not Linux: rather slow than wrong
