"""The accuracy that each layer loses in lower precision, measured for all layers in one pass.

A layer in lower precision adds an error d to its output y, which changes the embedding by J d, where J is the Jacobian
of the embedding with respect to y. Every output is replaced by y + s d with a switch s = 0 for each sample. For a
random direction r, the derivative of r . embedding with respect to s is r J d, for all layers at once; its mean square
over the directions is |J d|^2 (Hutchinson's estimator). Quantizing one layer at a time would need one pass per layer.
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
    """Predict how much cosine similarity each layer and attention loses in a lower precision.

    Args:
        tower: The tower in float32, from a batch to embeddings float32 [B,D] of unit length.
        batches: Inputs, uint8 [B,S,S,3] or int64 [B,L].
        ranges: The ranges of the layers and attentions to measure, by the name of the submodule.
        precision: The lower precision.

    Returns:
        1 - cosine by the name of the submodule, infinity for a layer that overflows. The costs of independent layers
        add up.
    """
    names = [name for name in ranges if kind_of(tower.get_submodule(name)) is not None or precision in FLOATS]
    total = dict.fromkeys(names, 0.0)
    generator = torch.Generator().manual_seed(0)
    broken: set[str] = set()
    count = 0
    for batch in batches:
        switches: dict[str, Tensor] = {}
        undo = [_insert(tower.get_submodule(name), name, precision, ranges[name], switches, broken) for name in names]
        try:
            embeddings = tower(batch)
        finally:
            for remove in undo:
                remove()
        called = list(switches)
        for at in range(_DIRECTIONS):
            direction = torch.randn(embeddings.shape, generator=generator)
            slopes = torch.autograd.grad(
                (embeddings * direction).sum(), [switches[name] for name in called], retain_graph=at + 1 < _DIRECTIONS
            )
            for name, slope in zip(called, slopes, strict=True):
                # For vectors of unit length, 1 - cosine is half the squared distance.
                total[name] += float(slope.square().sum()) / 2 / _DIRECTIONS
        count += len(embeddings)
    return {name: math.inf if name in broken else value / count for name, value in total.items()}


def _insert(
    module: nn.Module, name: str, precision: Precision, ranges: Ranges, switches: dict[str, Tensor], broken: set[str]
) -> Callable[[], None]:
    """Insert a switch after a layer or an attention; returns a function that removes it."""
    inner = module.forward

    def switched(y: Tensor, rounded: Tensor) -> Tensor:
        error = (rounded - y).detach()
        if not error.isfinite().all():
            broken.add(name)
            return y
        switch = switches.setdefault(name, torch.zeros(len(y), requires_grad=True))
        return y + switch.view(-1, *[1] * (y.dim() - 1)) * error

    def layer(x: Tensor) -> Tensor:
        y = inner(x)
        with torch.no_grad():
            rounded = round_layer(module, precision, ranges, x)
        return switched(y, rounded)

    def compute(attend: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            rounded = round_attention(FLOATS[precision], attend, *args, **options)
        return switched(attend(*args, **options), rounded)

    def attention(*args: Any, **options: Any) -> Any:
        with attention_as(compute):
            return inner(*args, **options)

    module.forward = layer if kind_of(module) is not None else attention

    def remove() -> None:
        del module.forward  # the attribute, so that the method of the class is used again

    return remove


def worst(costs: dict[str, float], budget: float) -> list[str]:
    """Choose the layers to keep in float32.

    Args:
        costs: The costs by the name of the layer; see the function `costs`.
        budget: The largest sum of the costs of all other layers.

    Returns:
        The fewest layers that must stay in float32, the most expensive first.
    """
    names = sorted(costs, key=lambda name: -costs[name])
    spent = 0.0
    while names and spent + costs[names[-1]] <= budget:
        spent += costs[names.pop()]
    return names
