"""What this machine's processor can do, as far as results and thread counts depend on it."""

import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["cpu_count", "int8_saturates"]


def cpu_count() -> int:
    """The processors that this process may use; containers and `taskset` allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def int8_saturates() -> bool:
    """Whether the processor adds int8 products up in 16 bits, where they overflow: x86 without VNNI.

    onnxruntime has another kernel for it, exact and several times slower; it does not take it by itself.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # not Linux: rather slow than wrong
