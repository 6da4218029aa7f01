"""What flows through a tower: the range of every layer's input and output, seen on real inputs by hooks in torch.

Two things follow from it. Where a value nears what half precision can hold, the layer must stay in float32; an engine
does not tell (onnxruntime's CPU provider computes half graphs in float32 and hides every overflow). And the fixed
scales of int8 are chosen from it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipret_export.layers import attention_as, kind_of

__all__ = ["HALF_LIMIT", "Ranges", "observe", "overflows"]

# Half of the largest finite half, 65,504: other images may exceed the calibration's by as much.
HALF_LIMIT = 32_752.0
_SAMPLE = 1 << 15  # input values a batch kept for choosing an int8 range
_SHRINK = [1 - 0.03 * step for step in range(24)]  # candidate ranges, as shares of the whole


@dataclass
class Ranges:
    """Of one layer or attention: the smallest and largest value in and out, and a sample of its inputs.

    For an attention `low` and `high` bound queries, keys, values and the scores before the softmax.
    """

    low: float = float("inf")
    high: float = float("-inf")
    out_low: float = float("inf")
    out_high: float = float("-inf")
    finite: bool = True
    sample: list[Tensor] = field(default_factory=list)
    out_sample: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor, y: Tensor, keep_sample: bool) -> None:
        if x.is_floating_point():
            self.low, self.high = self._wider(self.low, self.high, x)
        self.out_low, self.out_high = self._wider(self.out_low, self.out_high, y)
        if keep_sample and x.is_floating_point():
            self.sample.append(_thin(x))
            self.out_sample.append(_thin(y))

    def _wider(self, low: float, high: float, x: Tensor) -> tuple[float, float]:
        smallest, largest = (float(value) for value in x.aminmax())
        self.finite &= math.isfinite(smallest) and math.isfinite(largest)  # aminmax passes NaN on, min and max may not
        return min(low, smallest), max(high, largest)

    @property
    def largest(self) -> float:
        """The largest magnitude in or out; infinity where a value was infinite or NaN."""
        if not self.finite:
            return float("inf")
        # The input of a table is never seen: its ends are where they began.
        return max(-self.out_low, self.out_high, *((-self.low, self.high) if self.low <= self.high else ()))

    def uint8(self) -> tuple[float, int]:
        """Scale and zero point of the input as uint8."""
        return _choose(self.low, self.high, self.sample)

    def output_uint8(self) -> tuple[float, int]:
        """Scale and zero point of the output as uint8."""
        return _choose(self.out_low, self.out_high, self.out_sample)


def _thin(x: Tensor) -> Tensor:
    flat = x.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()


def _choose(low: float, high: float, sample: list[Tensor]) -> tuple[float, int]:
    """The uint8 scale and zero point with the least squared error on the sample, the whole range among them.

    Zero itself must be a level: pads and ReLU are exact then. A few outliers often stretch the range so far that
    cutting them costs less than the coarser step, which is why shares of the range are tried.
    """
    values = torch.cat(sample)
    best = (float("inf"), 1.0, 0)
    for share in _SHRINK:
        bottom, top = min(low * share, 0.0), max(high * share, 0.0)
        step = max((top - bottom) / 255, 1e-12)
        zero = min(255, max(0, round(-bottom / step)))
        rounded = ((values / step).round() + zero).clamp(0, 255).sub(zero).mul(step)
        best = min(best, (float((rounded - values).square().mean()), step, zero))
    return best[1], best[2]


def observe(tower: nn.Module, batches: Iterable[Tensor], *, samples: bool = False) -> dict[str, Ranges]:
    """Run `tower` over batches of its inputs; the ranges of every layer that it really calls, by submodule name.

    Layers are Linear, Conv2d and Embedding, and every module that calls scaled_dot_product_attention itself. A layer
    whose weight another module reads without calling it is not among them and so is never converted.
    `samples` keeps what `Ranges.uint8` needs.
    """
    found: dict[str, Ranges] = {}
    running: list[str] = []  # names of the modules that are being run, outermost first
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda _module, _args: running.append(name)

    def leave(name: str, layer: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], y: Any) -> None:
            running.pop()
            if layer:
                found.setdefault(name, Ranges()).see(args[0], y, samples)

        return hook

    def attend(inner: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        y = inner(q, k, v, *args, **options)
        ranges = found.setdefault(running[-1], Ranges())
        for x in (q, k, v):
            ranges.see(x, y, False)
        # No score exceeds the product of the longest query and the longest key (Cauchy-Schwarz).
        scale = options.get("scale") or q.shape[-1] ** -0.5
        ranges.high = max(ranges.high, float(q.norm(dim=-1).max() * k.norm(dim=-1).max() * scale))
        return y

    for name, module in tower.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave(name, kind_of(module) is not None)))
    try:
        with attention_as(attend), torch.inference_mode():
            for batch in batches:
                tower(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def overflows(tower: nn.Module, ranges: dict[str, Ranges]) -> list[str]:
    """The layers and attentions that half precision cannot hold: values or weights beyond HALF_LIMIT, or NaN."""
    found = []
    for name, seen in ranges.items():
        weights = [float(value.detach().abs().max()) for value in tower.get_submodule(name).parameters(recurse=False)]
        if not max([seen.largest, *weights]) <= HALF_LIMIT:  # `not <=` also catches NaN
            found.append(name)
    return found
