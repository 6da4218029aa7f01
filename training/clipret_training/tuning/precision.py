"""bf16 or fp16 where the hardware supports it; on a CPU, attention stays in float32."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from clipret.errors import ClipretError, one_line
from clipret.hardware.cpu import only_avx2
from clipret_training.choices import Precision

__all__ = ["autocast", "float32_attention", "native_precision", "open_device"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def open_device(name: str) -> torch.device:
    """Open a device of torch.

    Args:
        name: cpu, cuda or cuda:N.

    Returns:
        The device.

    Raises:
        ClipretError: This version of torch, or this machine, has no such device.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, with or without its CUDA build
        reason = one_line(error)
        raise ClipretError(f"device {name!r} cannot be used ({reason}): use cpu, cuda or cuda:N") from error
    return device


def native_precision(device: torch.device) -> Precision:
    """The fastest training precision of a device.

    Args:
        device: The device.

    Returns:
        bf16 if the hardware multiplies in it. Elsewhere bf16 is emulated and slower than fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if only_avx2():
        return "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


@contextlib.contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run matrix products and convolutions in a precision inside the block. Weights stay float32.

    Args:
        precision: The precision.
        device: The device of the model.
    """
    if precision == "fp32":
        yield
        return
    with torch.autocast(device.type, _DTYPES[precision]), float32_attention(precision, device):
        yield


@contextlib.contextmanager
def float32_attention(precision: Precision, device: torch.device) -> Iterator[None]:
    """Keep scaled_dot_product_attention in float32 inside the block, if the device is a CPU.

    In half precision on a CPU its backward pass takes two to four times as long. A backward pass that recomputes
    activations must run inside the block, like the forward pass.

    The function is replaced in torch's module, where nn.MultiheadAttention, open_clip and timm look it up. A
    TorchFunctionMode would see nn.MultiheadAttention as a single call.

    Args:
        precision: The precision of the training.
        device: The device of the model.
    """
    if precision == "fp32" or device.type != "cpu":
        yield
        return
    original = F.scaled_dot_product_attention

    def attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            named = {key: _widen(value) for key, value in kwargs.items()}
            attended: torch.Tensor = original(_widen(query), *map(_widen, args), **named)
        return attended.to(query.dtype)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _DTYPES.values() else value
