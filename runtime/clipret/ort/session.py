"""Open onnxruntime sessions; all sessions of the runtime are created here.

Threads do not spin between runs, because that would take cores away from the decode threads. onnxruntime's warnings,
which are about nodes and not for users, are silenced. A provider that falls back to the CPU is an error.
"""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipret.errors import ClipretError, one_line, require
from clipret.hardware.cpu import int8_saturates

__all__ = ["CUDA", "gpu_number", "has_device", "open_session", "providers"]

_log = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


def gpu_number(device: str) -> int | None:
    """Parse a device: N of "cuda:N", 0 for "cuda", None for "cpu". Raises ClipretError for any other device."""
    kind, _, number = device.partition(":")
    if device == "cpu":
        return None
    if kind == "cuda" and (number.isdigit() or device == "cuda"):
        return int(number or "0")
    raise ClipretError(f"device {device!r} is unknown: use cpu, cuda or cuda:N")


def providers() -> list[str]:
    """The execution providers of the installed onnxruntime; empty if it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    available: list[str] = require("onnxruntime", "cpu").get_available_providers()
    return available


def has_device(device: str) -> bool:
    """Whether onnxruntime is installed and supports the GPU `device` ("cuda", "cuda:N"); False for the CPU."""
    return device.startswith("cuda") and CUDA in providers()


def open_session(
    model: bytes | Path,
    device: str = "cpu",
    threads: int | None = None,
    *,
    provider_options: Mapping[str, str] | None = None,
    exact_int8: bool = True,
) -> Any:
    """Open an onnxruntime.InferenceSession on exactly the requested device.

    Args:
        model: A serialized ModelProto, or the path of one.
        device: "cpu", "cuda" or "cuda:N".
        threads: Threads per operator on a CPU; default: onnxruntime's.
        provider_options: Further options of the execution provider.
        exact_int8: On processors that sum int8 products in 16 bits, use the kernel that does not overflow, which is
            several times slower. Callers whose products cannot overflow turn it off.

    Raises:
        ClipretError: onnxruntime is not installed, does not support the device, or cannot open the model.
    """
    gpu = gpu_number(device)
    ort = require("onnxruntime", "cpu" if gpu is None else "gpu")
    provider, settings = (_CPU, {}) if gpu is None else (CUDA, {"device_id": str(gpu)})
    if provider not in (available := ort.get_available_providers()):
        raise ClipretError(
            f"device {device} needs onnxruntime's {provider}, but the installed one has {', '.join(available)}: "
            "use --device cpu or  pip install 'clipret[gpu]'"
        )
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", "1" if exact_int8 and int8_saturates() else "0")
    content = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(
            content, options, providers=[(provider, settings | dict(provider_options or {}))]
        )
    except Exception as error:  # onnxruntime raises a dozen types of its own and exports none
        what = "a graph of clipret" if isinstance(model, bytes) else model
        raise ClipretError(f"{what} cannot be opened on {device}: {one_line(error)}; export the model again") from error
    if provider not in session.get_providers():
        raise ClipretError(f"onnxruntime could not start {provider} for {device}: see clipret[gpu]'s requirements")
    _log.debug("onnxruntime session of %s on %s", "a graph" if isinstance(model, bytes) else model, provider)
    return session
