"""The learning rate of each step."""

import math

from clipret_training.choices import Schedule

__all__ = ["learning_rate"]


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
