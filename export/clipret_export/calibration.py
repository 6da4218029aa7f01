"""Value ranges in a tower: hooks in torch record the inputs and outputs of every layer on real data.

The ranges serve two purposes. A layer stays in float32 where its values come close to the limit of half precision. A
backend would not show such an overflow: onnxruntime's CPU provider computes half-precision graphs in float32. And int8
takes its fixed scales from the ranges.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipret_export.layers import attention_as, kind_of

__all__ = ["HALF_LIMIT", "Ranges", "observe", "overflows"]

# Half of 65,504, the largest finite half: other images may exceed the values of the calibration by a factor of two.
HALF_LIMIT = 32_752.0
_SAMPLE = 1 << 15  # values kept of a batch to choose an int8 range from
_SHRINK = [1 - 0.03 * step for step in range(24)]  # candidate ranges, as fractions of the full range


@dataclass
class Ranges:
    """Ranges of the inputs and outputs of one layer or attention, and samples of its values.

    Attributes:
        low: Smallest input. Of an attention, `low` and `high` bound queries, keys, values and the scores before the
            softmax.
        high: Largest input.
        out_low: Smallest output.
        out_high: Largest output.
        finite: False if a value was infinite or NaN.
        sample: Inputs, one 1-D tensor for each batch.
        out_sample: Outputs, likewise.
    """

    low: float = float("inf")
    high: float = float("-inf")
    out_low: float = float("inf")
    out_high: float = float("-inf")
    finite: bool = True
    sample: list[Tensor] = field(default_factory=list)
    out_sample: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor, y: Tensor, keep_sample: bool) -> None:
        """Widen the ranges to one call of the layer.

        Args:
            x: Its input, of any shape; integer inputs, which are token ids, are ignored.
            y: Its output, of any shape.
            keep_sample: Also keep a sample of both.
        """
        if x.is_floating_point():
            self.low, self.high = self._wider(self.low, self.high, x)
        self.out_low, self.out_high = self._wider(self.out_low, self.out_high, y)
        if keep_sample and x.is_floating_point():
            self.sample.append(_thin(x))
            self.out_sample.append(_thin(y))

    def _wider(self, low: float, high: float, x: Tensor) -> tuple[float, float]:
        smallest, largest = (float(value) for value in x.aminmax())
        self.finite &= math.isfinite(smallest) and math.isfinite(largest)  # aminmax propagates NaN, min and max may not
        return min(low, smallest), max(high, largest)

    @property
    def largest(self) -> float:
        """The largest magnitude of an input or output; infinity if a value was infinite or NaN."""
        if not self.finite:
            return float("inf")
        # The input of an embedding table is never recorded: its range is still the initial one.
        return max(-self.out_low, self.out_high, *((-self.low, self.high) if self.low <= self.high else ()))

    def uint8(self) -> tuple[float, int]:
        """Scale and zero point that quantize the input to uint8."""
        return _choose(self.low, self.high, self.sample)

    def output_uint8(self) -> tuple[float, int]:
        """Scale and zero point that quantize the output to uint8."""
        return _choose(self.out_low, self.out_high, self.out_sample)


def _thin(x: Tensor) -> Tensor:
    flat = x.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()


def _choose(low: float, high: float, sample: list[Tensor]) -> tuple[float, int]:
    """The uint8 scale and zero point with the smallest squared error on the sample.

    Zero is always a level, which keeps padding and ReLU exact. Fractions of the full range are candidates, too: a few
    outliers often stretch the range so far that clipping them costs less than the coarser step.
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
    """Run a tower and record the ranges of each layer that it calls.

    Layers are Linear, Conv2d and Embedding, and every module that calls scaled_dot_product_attention itself. A layer
    whose weight another module reads without calling the layer is not recorded, and therefore never converted.

    Args:
        tower: The tower in float32.
        batches: Its inputs, uint8 [B,S,S,3] or int64 [B,L].
        samples: Also keep the samples that `Ranges.uint8` needs.

    Returns:
        The ranges by the name of the submodule.
    """
    ranges_of: dict[str, Ranges] = {}
    running: list[str] = []  # names of the modules that are running, outermost first
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda _module, _args: running.append(name)

    def leave(name: str, layer: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], y: Any) -> None:
            running.pop()
            if layer:
                ranges_of.setdefault(name, Ranges()).see(args[0], y, samples)

        return hook

    def attend(inner: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        y = inner(q, k, v, *args, **options)
        ranges = ranges_of.setdefault(running[-1], Ranges())
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
    return ranges_of


def overflows(tower: nn.Module, ranges: dict[str, Ranges]) -> list[str]:
    """The layers and attentions that would overflow in half precision.

    Args:
        tower: The tower in float32.
        ranges: The ranges that `observe` recorded.

    Returns:
        Names of the submodules with a value or weight beyond `HALF_LIMIT`, or NaN.
    """
    names = []
    for name, layer_ranges in ranges.items():
        weights = [float(value.detach().abs().max()) for value in tower.get_submodule(name).parameters(recurse=False)]
        if not max([layer_ranges.largest, *weights]) <= HALF_LIMIT:  # `not <=` also catches NaN
            names.append(name)
    return names
