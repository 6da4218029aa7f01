"""The learning rate of each step, and where a step's random numbers come from."""

import hashlib
import math
from typing import Literal, get_args

import torch

__all__ = ["SCHEDULES", "Schedule", "generator", "learning_rate", "seed_of"]

Schedule = Literal["cosine", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def learning_rate(step: int, steps: int, *, lr: float, warmup: float, schedule: Schedule) -> float:
    """A linear rise to `lr` over the share `warmup` of all steps; then `lr`, or half a cosine from it towards zero.

    `step` counts from 1 to `steps`. The cosine begins behind the rise, as in open_clip's trainer.
    """
    rise = warmup * steps
    if step <= rise:
        return lr * step / rise
    if schedule == "constant":
        return lr
    return lr * (0.5 + 0.5 * math.cos(math.pi * max(0.0, step - 1 - rise) / (steps - rise)))


def seed_of(*parts: int | str) -> int:
    """A seed, 0 to 2^63 - 1, that these parts decide: the training's own seed and the place it is for.

    Every step draws from generators of its own. So the place in the training is all the random state there is: nothing
    of it has to be saved, a step that is computed twice meets the same dropout, and a resumed run the same crops.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that is seeded with `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))
