"""Several processes that train one model: torchrun starts them, and each gets a share of the images."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from clipret.errors import ClipretError, one_line
from clipret_training.tuning import open_device

__all__ = ["World", "average_gradients", "gather_objects", "join", "smallest"]

_BUCKET = 64 * 2**20 // 4  # values in one message: 64 MiB of float32


@dataclass(frozen=True)
class World:
    """The processes of a training.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that torchrun started for the duration of the block, with NCCL on GPUs and gloo elsewhere.

    Without torchrun, the process is alone.

    Args:
        device: cpu, cuda or cuda:N; cuda is the GPU with the number of the process on its machine.

    Yields:
        The processes.

    Raises:
        ClipretError: The device cannot be used, or the other processes cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, open_device(device))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    opened = open_device(f"cuda:{local}" if device == "cuda" else device)
    if opened.type == "cuda":
        torch.cuda.set_device(opened)
    try:
        backend, device_id = ("nccl", opened) if opened.type == "cuda" else ("gloo", None)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size) and "TORCHELASTIC_RESTART_COUNT" in os.environ:
            # torchrun keeps one store for all attempts, with the addresses of processes that have ended. On one machine
            # all processes count the attempts alike; several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            store, _, _ = next(rendezvous("env://"))
            store = PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
        else:
            dist.init_process_group(backend, device_id=device_id)
    except (RuntimeError, ValueError) as error:
        raise ClipretError(
            f"process {rank} of {size} cannot reach the others ({one_line(error)}): check the network and torchrun's "
            "--rdzv-endpoint"
        ) from error
    try:
        yield World(rank, size, opened)
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace each gradient by its mean over the processes.

    Called after the backward pass, because a step may run several backward passes (cached features). It sends a few
    large messages with trained parameters only, which are a hundredth of the model for an adapter. The gradient of a
    parameter that a process did not use counts as zero.

    Args:
        parameters: The trained parameters.
        world: The processes.
    """
    if world.size == 1:
        return
    bucket: list[Tensor] = []
    filled = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        filled += parameter.numel()
        if filled >= _BUCKET:
            _average(bucket, world.size)
            bucket, filled = [], 0
    if bucket:
        _average(bucket, world.size)


def _average(gradients: list[Tensor], size: int) -> None:
    joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(joined)
    joined /= size
    start = 0
    for gradient in gradients:
        gradient.copy_(joined[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def smallest(value: int, world: World) -> int:
    """The minimum over all processes.

    Args:
        value: The value of this process.
        world: The processes.

    Returns:
        The smallest value, in every process.
    """
    if world.size == 1:
        return value
    tensor = torch.tensor(value, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)


def gather_objects(value: Any, world: World) -> list[Any]:
    """Gather a value from every process.

    Args:
        value: The value of this process, which can be pickled.
        world: The processes.

    Returns:
        The values in the order of the ranks, in every process.
    """
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
