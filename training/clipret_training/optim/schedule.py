"""Learning rate schedules."""

import math

from clipret_training.choices import Schedule

__all__ = ["learning_rate"]


def learning_rate(step: int, steps: int, *, lr: float, warmup: float, schedule: Schedule) -> float:
    """The learning rate of a step: a linear warm-up, then a constant rate or a cosine decay to zero.

    The decay begins after the warm-up, as in the trainer of open_clip.

    Args:
        step: Number of the step, from 1 to `steps`.
        steps: Number of all steps.
        lr: The peak rate.
        warmup: Share of the steps that the warm-up takes, from 0 to 1.
        schedule: "constant" or "cosine".

    Returns:
        The learning rate.

    Examples:
        >>> [round(learning_rate(step, 10, lr=1.0, warmup=0.2, schedule="cosine"), 2) for step in (1, 2, 6, 10)]
        [0.5, 1.0, 0.69, 0.04]
    """
    rise = warmup * steps
    if step <= rise:
        return lr * step / rise
    if schedule == "constant":
        return lr
    return lr * (0.5 + 0.5 * math.cos(math.pi * max(0.0, step - 1 - rise) / (steps - rise)))
