"""FSDP2: weights, gradients and moments of a model that is too large for one device, spread over all of them.

    shards-STEP-EPOCH/    a checkpoint: every process's own part (torch.distributed.checkpoint) and state.pt

The folder is written under another name and renamed, so one that is there is whole.
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
    """Spread the parameters of `model` over the processes, in place; a block is collected while it computes.

    The logit scale and bias have no dimension to spread and stay whole. Raises ClipretError in a single process.
    """
    if world.size == 1:
        raise ClipretError("fsdp spreads a model over several processes: start them with torchrun, or leave fsdp out")
    mesh = init_device_mesh(world.device.type, (world.size,))
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for module in list(model.modules()):
        if type(module).__name__ in _BLOCKS:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def split_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser in which spread and whole parameters are apart: no kernel takes both at once."""
    apart = []
    for group in groups:
        for spread in (True, False):
            parameters = [p for p in group["params"] if isinstance(p, DTensor) == spread]
            if parameters:
                apart.append({**group, "params": parameters})
    return apart


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale the gradients down to a norm of `limit` over all processes."""
    spread, whole = list[Tensor](), list[Tensor]()
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            spread.append(gradient.to_local())
        elif gradient is not None:
            whole.append(gradient)
    squares = torch.zeros((), device=(spread or whole)[0].device)
    for local in spread:
        squares += local.square().sum()
    dist.all_reduce(squares)
    for gradient in whole:
        squares += gradient.square().sum()
    scale = limit / (math.sqrt(float(squares)) + 1e-6)
    if scale < 1:
        for tensor in (*spread, *whole):
            tensor.mul_(scale)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the whole model on the CPU of the process with rank 0; {} on the others, which must call it."""
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
    """Write the checkpoint `name` into `folder` and remove those before. Raises ClipretError when the disk refuses."""
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
    except Exception as error:  # torch.distributed.checkpoint's has no base but this
        reason = one_line(error)
        raise ClipretError(
            f"a checkpoint cannot be written to {folder}: {reason}; the one before is intact: free space, then resume"
        ) from error
    if world.writes:
        for old in folder.glob("shards-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def latest_shards(folder: Path, identity: str) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint and its state. Raises ClipretError when it is broken or of another run."""
    found = sorted(folder.glob("shards-*"))
    if not found:
        return None
    state = read_state(found[-1] / "state.pt")
    if state["identity"] != identity:
        raise ClipretError(f"checkpoint {found[-1]} is of another run or model: train into a new folder")
    return found[-1], state


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Undo `save_shards`. Raises ClipretError when the checkpoint does not fit."""
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        load(state, checkpoint_id=folder)
    except Exception as error:
        raise ClipretError(f"checkpoint {folder} cannot be read: {one_line(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
