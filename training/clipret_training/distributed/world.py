"""Several processes that train one model: torchrun starts them, each has a share of the images."""

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

_BUCKET = 64 * 2**20 // 4  # values that travel in one message: 64 MiB of float32


@dataclass(frozen=True)
class World:
    """The processes of a training. `rank` counts from 0; the process with 0 writes what is written."""

    rank: int
    size: int
    device: torch.device

    @property
    def writes(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """Inside the block this process belongs to those that torchrun started, by NCCL on GPUs and by gloo elsewhere.

    Without torchrun it is alone. `device` cuda becomes the GPU of the process's own number on its machine. Raises
    ClipretError as `open_device` does, and when the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, open_device(device))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    place = open_device(f"cuda:{local}" if device == "cuda" else device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    try:
        backend, device_id = ("nccl", place) if place.type == "cuda" else ("gloo", None)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size) and "TORCHELASTIC_RESTART_COUNT" in os.environ:
            # torchrun keeps one store for all of its attempts, where the addresses of processes that are gone stand.
            # On one machine all count the attempts alike; several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            store, _, _ = next(rendezvous("env://"))
            store = PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
        else:
            dist.init_process_group(backend, device_id=device_id)
    except (RuntimeError, ValueError) as error:
        raise ClipretError(f"process {rank} of {size} cannot reach the others: {one_line(error)}") from error
    try:
        yield World(rank, size, place)
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace each gradient by its mean over the processes.

    After the backward pass, in a few large messages: a step may run several backward passes (cached features), and only
    what is trained travels, of an adapter a hundredth. A parameter that a process did not use counts as zero.
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
    """The least of the processes' values."""
    if world.size == 1:
        return value
    tensor = torch.tensor(value, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)


def gather_objects(value: Any, world: World) -> list[Any]:
    """The value of every process, on every process."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
