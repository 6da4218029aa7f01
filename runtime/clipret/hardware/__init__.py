"""The processors and GPUs of this machine."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.hardware.cpu import cpu_count, peak_memory
    from clipret.hardware.cuda import gpu_count

__all__ = ["cpu_count", "gpu_count", "peak_memory"]

__getattr__ = lazy_face(__name__, {"cpu": ["cpu_count", "peak_memory"], "cuda": ["gpu_count"]})
