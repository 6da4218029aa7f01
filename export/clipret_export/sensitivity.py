"""How much accuracy each layer's lower precision costs, measured for all layers in one pass.

A layer in lower precision adds an error d to its output, and its share of the embedding's error is J d with J the
Jacobian from there to the unit-length embedding. Every output is written as y + g d with one check g = 0 a sample; the
derivative of r . row by g is then r J d for all layers at once, and over random directions r its mean square is |J d|^2
(Hutchinson's estimator). Quantising one layer at a time would need a pass for each of them.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clipret.bundle import Precision
from clipret_export.calibration import Ranges
from clipret_export.layers import attention_as, kind_of
from clipret_export.precision import FLOATS, round_attention, round_layer

__all__ = ["costs", "worst"]

_DIRECTIONS = 6


def costs(
    tower: nn.Module, batches: Iterable[Tensor], ranges: dict[str, Ranges], precision: Precision
) -> dict[str, float]:
    """What each layer and attention of `ranges` in `precision` is expected to take from the cosine: 1 - cosine.

    `tower` is in float32 and maps a batch to unit embeddings float32 [B,D]. The costs of independent layers add up; one
    that overflows in `precision` costs infinity.
    """
    names = [name for name in ranges if kind_of(tower.get_submodule(name)) is not None or precision in FLOATS]
    total = dict.fromkeys(names, 0.0)
    generator = torch.Generator().manual_seed(0)
    broken: set[str] = set()
    count = 0
    for batch in batches:
        checks: dict[str, Tensor] = {}
        undo = [_open(tower.get_submodule(name), name, precision, ranges[name], checks, broken) for name in names]
        try:
            rows = tower(batch)
        finally:
            for close in undo:
                close()
        seen = list(checks)
        for at in range(_DIRECTIONS):
            direction = torch.randn(rows.shape, generator=generator)
            slopes = torch.autograd.grad(
                (rows * direction).sum(), [checks[name] for name in seen], retain_graph=at + 1 < _DIRECTIONS
            )
            for name, slope in zip(seen, slopes, strict=True):
                # 1 - cosine of two unit embeddings is half the squared distance between them
                total[name] += float(slope.square().sum()) / 2 / _DIRECTIONS
        count += len(rows)
    return {name: math.inf if name in broken else value / count for name, value in total.items()}


def _open(
    module: nn.Module, name: str, precision: Precision, ranges: Ranges, checks: dict[str, Tensor], broken: set[str]
) -> Callable[[], None]:
    """Put a check behind a layer or around an attention; returns what takes it away again."""
    inner = module.forward

    def checked(y: Tensor, rounded: Tensor) -> Tensor:
        error = (rounded - y).detach()
        if not error.isfinite().all():
            broken.add(name)
            return y
        check = checks.setdefault(name, torch.zeros(len(y), requires_grad=True))
        return y + check.view(-1, *[1] * (y.dim() - 1)) * error

    def layer(x: Tensor) -> Tensor:
        y = inner(x)
        with torch.no_grad():
            rounded = round_layer(module, precision, ranges, x)
        return checked(y, rounded)

    def compute(attend: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            rounded = round_attention(FLOATS[precision], attend, *args, **options)
        return checked(attend(*args, **options), rounded)

    def attention(*args: Any, **options: Any) -> Any:
        with attention_as(compute):
            return inner(*args, **options)

    module.forward = layer if kind_of(module) is not None else attention

    def close() -> None:
        del module.forward  # the class's own again

    return close


def worst(costs: dict[str, float], budget: float) -> list[str]:
    """The fewest layers without which the costs of the rest add up to no more than `budget`, worst first."""
    found = sorted(costs, key=lambda name: -costs[name])
    spent = 0.0
    while found and spent + costs[found[-1]] <= budget:
        spent += costs[found.pop()]
    return found
