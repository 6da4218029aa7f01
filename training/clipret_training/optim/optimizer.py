"""AdamW, alone or with Muon for the weights of layers.

Muon (Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024) orthogonalizes the momentum of a
weight matrix before the step, so that all directions of the matrix are learned at the same speed. Its steps are scaled
to the length of AdamW's (Liu et al., Muon is Scalable for LLM Training, 2025), so the same learning rates and decay
apply.

torch.optim.Muon is no alternative. It takes only matrices, not convolutions. It uses one polynomial for all iterations,
so a step differs from ours by 18 to 19 percent of its length. And it always multiplies in bf16, which takes 20 times as
long on a processor that emulates bf16. With native bf16, it took 0.95 of our time (2 cores of an AMD EPYC).
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from clipret_training.tuning import native_precision

__all__ = ["make_optimizer"]

_MOMENTUM = 0.95  # from Jordan et al.
_LENGTH = 0.2  # root mean square of an element of AdamW's steps, from Liu et al.
# Polynomials that map singular values from 0.001 to 1 close to 1 (Cesista et al., Squeezing 1-2% Efficiency Gains Out
# of Muon by Optimizing the Newton-Schulz Coefficients, 2025).
_POLYNOMIALS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def make_optimizer(
    groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """Make the optimizer of a training.

    Args:
        groups: The result of `parameter_groups`; groups marked with `use_muon` get Muon, the others AdamW.
        lr: Learning rate of AdamW for groups without one.
        betas: AdamW's decay rates of the two moments.
        epsilon: AdamW's epsilon.

    Returns:
        One optimizer for all groups.
    """

    def adamw(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        # On a CPU, the fused kernel is six times faster.
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=epsilon, fused=True)

    marked = [group for group in groups if group.get("use_muon")]
    if not marked:
        return adamw(groups)
    return _Joined([(adamw, [group for group in groups if not group.get("use_muon")]), (_Muon, marked)])


class _Muon(torch.optim.Optimizer):
    """Muon for weights with two dimensions or more; the kernels of a convolution are the rows of a matrix."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        native = native_precision(self.param_groups[0]["params"][0].device) == "bf16"
        self._dtype = torch.bfloat16 if native else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002 (always None)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group["lr"], group["weight_decay"])

    def _move(self, weight: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        ahead = gradient.lerp(momentum, _MOMENTUM).flatten(1)  # Nesterov's
        step = _orthogonal(ahead.to(self._dtype))
        weight.mul_(1 - lr * weight_decay)
        weight.add_(step.reshape(weight.shape), alpha=-lr * _LENGTH * max(step.shape) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The matrix [M,N] with the same singular vectors and all singular values near 1."""
    if tall := matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.mT
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    for linear, cubic, quintic in _POLYNOMIALS:
        gram = matrix @ matrix.mT
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), matrix, beta=linear)
    return matrix.mT if tall else matrix


class _Joined(torch.optim.Optimizer):
    """Several optimizers, each with its own groups, as one optimizer with one state."""

    def __init__(
        self,
        parts: Sequence[tuple[Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer], Sequence[dict[str, Any]]]],
    ) -> None:
        self._parts = [make(groups) for make, groups in parts if groups]
        super().__init__(chain.from_iterable(part.param_groups for part in self._parts), {})
        self._share()

    def _share(self) -> None:
        """Share the groups and moments with the optimizers."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Run a step of each optimizer. `closure` is always None."""
        for part in self._parts:
            part.step(closure)
