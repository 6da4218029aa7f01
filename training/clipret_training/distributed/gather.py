"""Embeddings of all processes in one tensor, with gradients, over gloo and NCCL."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipret.errors import ClipretError

__all__ = ["exchange_shapes", "gather_embeddings"]

Shapes = list[tuple[int, int]]  # number and width of the embeddings, for each process


def exchange_shapes(
    tensors: Mapping[str, Tensor | None], group: dist.ProcessGroup | None, *, like: Tensor
) -> dict[str, Shapes]:
    """Exchange the shapes of tensors between all processes, in one message.

    Args:
        tensors: Tensors [n,width] by name, or None where there is none; the same names in every process.
        group: The processes; None for all.
        like: A tensor on the device that sends the message.

    Returns:
        For each name the shape in every process, (-1, -1) for None.

    Raises:
        ClipretError: One process has a tensor that another lacks; raised in every process.
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
            raise ClipretError(f"process {has} has {name}, process {lacks} does not: give them to all or to none")
    return shapes


def gather_embeddings(
    embeddings: Tensor, shapes: Shapes, group: dist.ProcessGroup | None, fill: float | None = None
) -> Tensor:
    """Gather the embeddings of all processes, with gradients to each of them.

    Args:
        embeddings: The embeddings of this process, [n,width].
        shapes: The shapes in all processes, from `exchange_shapes`. The numbers of embeddings may differ.
        group: The processes; None for all.
        fill: Value that pads narrower embeddings; None if all widths must be the same.

    Returns:
        The embeddings [N,width] of all processes, in the order of their ranks.

    Raises:
        ClipretError: The widths differ and there is no `fill`; raised in every process.
    """
    widths = [width for _, width in shapes]
    if fill is None and len(set(widths)) > 1:
        raise ClipretError(f"the embeddings of the processes have widths {widths}: use the same model in every process")
    if embeddings.shape[1] < max(widths):
        embeddings = torch.nn.functional.pad(embeddings, (0, max(widths) - embeddings.shape[1]), value=fill or 0)
    gathered: Tensor = _Gather.apply(embeddings, [count for count, _ in shapes], group)
    return gathered


class _Gather(torch.autograd.Function):
    """all_gather with a backward pass that sums the gradients of all processes. Shorter parts are padded."""

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
