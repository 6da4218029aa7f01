"""Averages of weights: over the steps of a training, of a model with its original, of several trainings.

State dicts are averaged in float32 and come back in the type that they had; what is no float (counters, positions) is
that of the first.

The moving average is torch's own, but not its AveragedModel: this copies frozen weights as well, of which an adapter
leaves 99 in 100, averages all buffers or none, counters included, and has no warm-up. Given ours it gave the same
digits; an update took it 1.45 times as long for clipret-small and as long for a ViT-B-32 (2 cores of an AMD EPYC).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clipret.errors import ClipretError

__all__ = ["MovingAverage", "Soup", "greedy_soup", "interpolate", "uniform_soup"]

State = Mapping[str, Tensor]


class MovingAverage:
    """The exponential moving average of what is trained, and of the statistics of batch normalisation.

    After each step it moves by 1 - `decay` towards the weights; by more in the first steps, min(decay, (1 + n) /
    (10 + n)) after n of them, lest it remember the random start. Frozen weights are not kept twice.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ClipretError(f"the decay of a moving average is {decay}: use a number from 0 to below 1, as 0.999")
        self._decay, self._updates = decay, 0
        self._averages = {
            name: value.detach().float().clone(memory_format=torch.preserve_format)
            for name, value in _moving(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After each step of the optimiser."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        now = _moving(model)
        current = [now[name].detach().float() for name in self._averages]
        move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        move(list(self._averages.values()), current, self._updates)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averages inside the block, to be measured or saved, and its own weights after it."""
        moving = _moving(model)
        own = {name: moving[name].data for name in self._averages}
        for name, average in self._averages.items():
            moving[name].data = average.to(own[name].dtype)
        try:
            yield
        finally:
            for name, value in own.items():
                moving[name].data = value

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly, as tensors and numbers."""
        return {"updates": self._updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ClipretError when it is of another model."""
        averages: State = state["averages"]
        _check_alike("the model", self._averages, "the saved moving average", averages)
        self._updates = state["updates"]
        for name, average in self._averages.items():
            average.copy_(averages[name])


@dataclass(frozen=True)
class Soup:
    """The weights, the names of the ingredients in the order in which they went in, and the quality of each name
    alone and of the soup, where they were measured."""

    weights: dict[str, Tensor]
    ingredients: tuple[str, ...]
    alone: dict[str, Any]
    quality: Any = None


def interpolate(original: State, tuned: State, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * original + alpha * tuned (Wortsman et al., Robust fine-tuning of zero-shot models, 2022).

    Raises ClipretError for an `alpha` outside 0 to 1 and for weights of different models.
    """
    if not 0 <= alpha <= 1:
        raise ClipretError(f"alpha is {alpha}: use a number from 0, the original, to 1, the tuned model")
    _check_alike("the original", original, "the tuned model", tuned)
    return _mixed(original, tuned, alpha)


def uniform_soup(names: Sequence[str], load: Callable[[str], State]) -> Soup:
    """The mean of all (Wortsman et al., Model soups, 2022). `load` gives a name's weights; one is in memory at a time,
    next to the soup. Raises ClipretError for weights of different models."""
    weights = dict(load(names[0]))
    for count, name in enumerate(names[1:], start=1):
        more = load(name)
        _check_alike(names[0], weights, name, more)
        weights = _mixed(weights, more, 1 / (count + 1))
    return Soup(weights, tuple(names), {})


def greedy_soup(
    names: Sequence[str],
    load: Callable[[str], State],
    measure: Callable[[State], Any],
    report: Callable[[str], None] = lambda _: None,
) -> Soup:
    """From the best down, each goes in if the soup is no worse with it (Wortsman et al., 2022, Recipe 1).

    `measure` gives weights a quality, the larger the better; it is asked 2 n - 1 times. `report` is told in a line what
    happened. Raises ClipretError for weights of different models, before anything is measured.
    """
    first = load(names[0])
    for name in names[1:]:
        _check_alike(names[0], first, name, load(name))
    alone = {}
    for name in names:
        alone[name] = measure(load(name))
        report(f"{name}: {alone[name]}")
    order = sorted(dict.fromkeys(names), key=lambda name: alone[name], reverse=True)  # equal ones as they were named
    weights, ingredients, quality = dict(load(order[0])), [order[0]], alone[order[0]]
    for name in order[1:]:
        tried = _mixed(weights, load(name), 1 / (len(ingredients) + 1))
        its_quality = measure(tried)
        taken = its_quality >= quality
        report(f"with {name}: {its_quality}, {'taken' if taken else 'left out'}")
        if taken:
            weights, quality = tried, its_quality
            ingredients.append(name)
    return Soup(weights, tuple(ingredients), alone, quality)


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained and running statistics, by name."""
    moving: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            statistics = (("running_mean", module.running_mean), ("running_var", module.running_var))
            moving |= {f"{name}.{kind}": value for kind, value in statistics if value is not None}
    return moving


@torch.no_grad()
def _mixed(first: State, second: State, share: float) -> dict[str, Tensor]:
    """first + share * (second - first)"""
    return {
        name: torch.lerp(value.float(), second[name].float(), share).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def _check_alike(name: str, state: State, other_name: str, other: State) -> None:
    """Raises ClipretError unless both have the same weights in the same shapes."""
    for missing in sorted(state.keys() ^ other.keys())[:1]:
        has, lacks = (name, other_name) if missing in state else (other_name, name)
        count = len(state.keys() ^ other.keys())
        raise ClipretError(
            f"{name} and {other_name} are different models: {has} has the weight {missing} and {lacks} has not "
            f"({count} differ): average models of one architecture"
        )
    for key, value in state.items():
        if value.shape != other[key].shape:
            raise ClipretError(
                f"{name} and {other_name} are different models: {key} is {list(value.shape)} in one and "
                f"{list(other[key].shape)} in the other: average models of one architecture"
            )
