"""Embeddings of all processes in one tensor, with gradients, over gloo and NCCL."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipret.errors import ClipretError

__all__ = ["exchange_shapes", "gather_embeddings"]

Shapes = list[tuple[int, int]]  # embeddings and width, of each process


def exchange_shapes(
    tensors: Mapping[str, Tensor | None], group: dist.ProcessGroup | None, *, like: Tensor
) -> dict[str, Shapes]:
    """The shapes [embeddings, width] of these tensors on every process, by name, in one message on the device of
    `like`.

    Raises ClipretError on every process when one has a tensor that another lacks.
    """
    mine = [tuple(value.shape) if value is not None else (-1, -1) for value in tensors.values()]
    sent = torch.tensor(mine, dtype=torch.int64, device=like.device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    table = torch.stack(received).tolist()  # [W,tensors,2]
    shapes: dict[str, Shapes] = {}
    for number, name in enumerate(tensors):
        shapes[name] = [(embeddings, width) for embeddings, width in (process[number] for process in table)]
        if len({embeddings < 0 for embeddings, _ in shapes[name]}) > 1:
            has = next(rank for rank, (embeddings, _) in enumerate(shapes[name]) if embeddings >= 0)
            lacks = next(rank for rank, (embeddings, _) in enumerate(shapes[name]) if embeddings < 0)
            raise ClipretError(f"process {has} has {name} and process {lacks} has none: give them to all or to none")
    return shapes


def gather_embeddings(
    embeddings: Tensor, shapes: Shapes, group: dist.ProcessGroup | None, fill: float | None = None
) -> Tensor:
    """[embeddings,width] of this process -> the embeddings of all processes, in their order; gradients flow back to
    each.

    `shapes`: of every process; numbers of embeddings may differ, and with `fill` so may widths. Raises ClipretError on
    every process when widths differ and there is no `fill`.
    """
    widths = [width for _, width in shapes]
    if fill is None and len(set(widths)) > 1:
        raise ClipretError(f"the embeddings of the processes are {widths} wide: every process must use the same model")
    if embeddings.shape[1] < max(widths):
        embeddings = torch.nn.functional.pad(embeddings, (0, max(widths) - embeddings.shape[1]), value=fill or 0)
    gathered: Tensor = _Gather.apply(embeddings, [count for count, _ in shapes], group)
    return gathered


class _Gather(torch.autograd.Function):
    """all_gather whose backward pass sums what all processes want of an embedding. Short parts travel padded."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.counts = group, counts
        padded = embeddings.new_zeros(max(counts), embeddings.shape[1])
        padded[: len(embeddings)] = embeddings
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        first = sum(ctx.counts[:rank])
        return gradient[first : first + ctx.counts[rank]], None, None
