"""AdamW, alone or with Muon for the weights inside the towers.

Muon (Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024) makes the momentum of a weight
orthogonal before it is added: all directions of a matrix are learned at one speed. Its steps are scaled to be as long
as AdamW's (Liu et al., Muon is Scalable for LLM Training, 2025), so that learning rates and decay stay what they are.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal

import torch

__all__ = ["Optimizer", "make_optimizer"]

Optimizer = Literal["adamw", "muon"]


def make_optimizer(
    groups: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """The optimiser of `clipret.training.freezing.parameter_groups`: Muon for groups that are so marked."""

    def adamw(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        # The fused kernel is six times faster on a CPU.
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=epsilon, fused=True)

    marked = [group for group in groups if group.get("use_muon")]
    if not marked:
        return adamw(groups)
    from timm.optim.muon import Muon  # slow to import

    rest = [group for group in groups if not group.get("use_muon")]
    return _Joined([(adamw, rest), (lambda groups: Muon(groups, lr=lr, nesterov=True), marked)])


class _Joined(torch.optim.Optimizer):
    """Several optimisers, of groups of their own, as one: one state to save, one scaled gradient to step over."""

    def __init__(
        self,
        parts: Sequence[tuple[Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer], Sequence[dict[str, Any]]]],
    ) -> None:
        self._parts = [make(groups) for make, groups in parts if groups]
        super().__init__(chain.from_iterable(part.param_groups for part in self._parts), {})
        self._share()

    def _share(self) -> None:
        """Let the parts see the groups and moments that are kept here."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """`closure` is None wherever this is called."""
        for part in self._parts:
            part.step(closure)
