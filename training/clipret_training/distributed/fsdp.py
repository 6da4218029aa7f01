"""FSDP2: weights, gradients and moments of a model that is too large for one device, sharded over all devices.

    shards-STEP-EPOCH/    a checkpoint: the shard of each process (torch.distributed.checkpoint) and state.pt

The folder is written under a temporary name and renamed, so an existing one is complete.
"""

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from clipret.errors import ClipretError, one_line
from clipret.files import sync_folder
from clipret_training.checkpoint import read_state
from clipret_training.distributed.world import World

__all__ = [
    "clip_gradients",
    "latest_shards",
    "load_shards",
    "save_shards",
    "shard_model",
    "split_groups",
    "whole_weights",
]

_BLOCKS = ("ResidualAttentionBlock", "CustomResidualAttentionBlock", "_PooledBlock", "BertLayer", "Block", "Bottleneck")


def shard_model(model: Any, world: World) -> None:
    """Shard the parameters of a model over the processes. Each block is gathered while it computes.

    The logit scale and bias have no dimension to shard and stay whole.

    Args:
        model: The model to change in place.
        world: The processes.

    Raises:
        ClipretError: There is only one process.
    """
    if world.size == 1:
        raise ClipretError("fsdp shards a model over several processes: start them with torchrun, or leave fsdp out")
    mesh = init_device_mesh(world.device.type, (world.size,))
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for module in list(model.modules()):
        if type(module).__name__ in _BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def split_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Separate sharded from whole parameters, because no kernel of an optimizer takes both.

    Args:
        groups: Parameter groups of an optimizer.

    Returns:
        Parameter groups with either sharded or whole parameters.
    """
    separated = []
    for group in groups:
        for sharded in (True, False):
            parameters = [p for p in group["params"] if isinstance(p, DTensor) == sharded]
            if parameters:
                separated.append({**group, "params": parameters})
    return separated


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale gradients to a maximum norm over all processes.

    Args:
        parameters: The parameters with gradients, sharded or whole.
        limit: The maximum norm of all gradients together.
    """
    sharded, whole = list[Tensor](), list[Tensor]()
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            sharded.append(gradient.to_local())
        elif gradient is not None:
            whole.append(gradient)
    squares = torch.zeros((), device=(sharded or whole)[0].device)
    for local in sharded:
        squares += local.square().sum()
    dist.all_reduce(squares)
    for gradient in whole:
        squares += gradient.square().sum()
    scale = limit / (math.sqrt(float(squares)) + 1e-6)
    if scale < 1:
        for tensor in (*sharded, *whole):
            tensor.mul_(scale)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather the state dict of a sharded model. Every process must call it.

    Args:
        model: The model.

    Returns:
        The whole state dict on the CPU in the process with rank 0, {} in the others.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def save_shards(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    name: str,
    world: World,
) -> None:
    """Write a checkpoint and remove the earlier ones. Every process must call it.

    Args:
        folder: The folder of the checkpoints.
        model: The sharded model.
        optimizer: Its optimizer.
        state: Further state of the training, for state.pt.
        name: Name of the checkpoint, shards-STEP-EPOCH.
        world: The processes.

    Raises:
        ClipretError: The checkpoint cannot be written.
    """
    temporary = folder / f".{name}.tmp"
    if world.writes:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    try:
        save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
        if world.writes:
            torch.save(dict(state), temporary / "state.pt")
            for file in temporary.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            temporary.rename(folder / name)
            sync_folder(folder)
    except Exception as error:  # the errors of torch.distributed.checkpoint have no narrower base
        reason = one_line(error)
        raise ClipretError(
            f"a checkpoint cannot be written to {folder}: {reason}; the previous one is intact: free some space, then "
            "resume"
        ) from error
    if world.writes:
        for old in folder.glob("shards-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def latest_shards(folder: Path, identity: str) -> tuple[Path, dict[str, Any]] | None:
    """Find the latest checkpoint.

    Args:
        folder: The folder of the checkpoints.
        identity: The identity of the run.

    Returns:
        The checkpoint and the content of its state.pt; None without a checkpoint.

    Raises:
        ClipretError: The checkpoint is broken, or belongs to another run.
    """
    checkpoints = sorted(folder.glob("shards-*"))
    if not checkpoints:
        return None
    latest = checkpoints[-1]
    state = read_state(latest / "state.pt")
    if state["identity"] != identity:
        raise ClipretError(f"checkpoint {latest} belongs to another run or model: train into a new folder")
    return latest, state


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint that `save_shards` wrote. Every process must call it.

    Args:
        folder: The checkpoint.
        model: The sharded model, changed in place.
        optimizer: Its optimizer, changed in place.

    Raises:
        ClipretError: The checkpoint cannot be read, or does not fit the model.
    """
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        load(state, checkpoint_id=folder)
    except Exception as error:
        raise ClipretError(f"checkpoint {folder} cannot be read: {one_line(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
