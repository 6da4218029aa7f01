"""LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024) through PEFT, on one tower or both.

A target names the role of a layer, which means the same in every architecture, or the layer itself. PEFT silently
ignores a target without a matching layer if another target has one; here it is an error.
"""

import copy
import difflib
import fnmatch
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from open_clip.modified_resnet import AttentionPool2d
from safetensors.torch import save
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from clipret.errors import ClipretError
from clipret.files import new_folder, write_file
from clipret_training.choices import TOWERS, Tower
from clipret_training.models import tower_of
from clipret_training.models.attention import PARTS, pack_attention, packed_state, split_attention, splittable
from clipret_training.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from clipret_training.schema import Count, PartialShare, Positive, check_fields

__all__ = [
    "ROLES",
    "AdapterConfig",
    "adapter_state",
    "add_adapters",
    "base_state",
    "load_adapter_state",
    "merge_adapters",
    "write_adapter",
]

# Names of layers in open_clip, in timm and in the text towers of transformers
ROLES = {
    "q": r"q_proj|query|q|q_lin",
    "k": r"k_proj|key|k|k_lin",
    "v": r"v_proj|value|v|v_lin",
    "out": r"out_proj|attention\.output\.dense|attn\.proj|o_proj|o|out_lin",
    "fc1": r"c_fc|intermediate\.dense|mlp\.fc1|lin1|wi|wi_0|wi_1",
    "fc2": r"mlp\.c_proj|(?<!attention\.)output\.dense|mlp\.fc2|lin2|wo",
}
_GROUPS = {"attention": ("q", "k", "v", "out"), "mlp": ("fc1", "fc2")}
_NAME = "default"  # PEFT's name for an unnamed adapter
_PREFIX = "base_model.model."  # PEFT's prefix of every name in a file


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of an adapter.

    Attributes:
        rank: Rank of the two matrices of each layer.
        alpha: The product of the matrices is scaled by `alpha` / `rank`.
        dropout: Dropout of the adapter's input.
        targets: The layers to adapt. A target is a role (q, k, v, out, fc1, fc2), a group of roles (attention, mlp), or
            the end of a layer's dotted name as in PEFT, in which * and ? are allowed. The prefix `image:` or `text:`
            restricts it to one tower. A target must match a layer in each of its towers.
        towers: The towers to adapt.
        dora: Use DoRA instead of LoRA.

    Raises:
        ClipretError: A value is out of range.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    dropout: PartialShare = 0.0
    targets: Annotated[tuple[str, ...], Meta(min_length=1)] = ("attention",)
    towers: Annotated[tuple[Tower, ...], Meta(min_length=1)] = TOWERS
    dora: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "adapter_")


def add_adapters(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Add adapters to a model and freeze everything else. At first the adapters do not change the embeddings.

    Packed attention is split if one of its projections is a target. Adapters are float32, whatever the precision of the
    model. `base_state` returns the weights under the original names.

    Args:
        model: The model to change in place.
        config: The settings.

    Returns:
        The names of the adapted layers.

    Raises:
        ClipretError: A target matches no layer of one of its towers. The model is unchanged then.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    apart = splittable(model)
    chosen = _match(_candidates(model, apart), config)
    split_attention(model, [name for name in apart if any(f"{name}.{part}" in chosen for part in _LAYERS)])
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides it
        lora_dropout=config.dropout,
        # A list would match the ends of names: "transformer.x" would also match "visual.transformer.x".
        target_modules="|".join(map(re.escape, chosen)),
        use_dora=config.dora,
    )
    inject_adapter_in_model(lora, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return chosen


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the adapters in a model.

    Args:
        model: A model with adapters.

    Returns:
        The weights by their names in PEFT's files.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    return {f"{_PREFIX}{name}": value.detach() for name, value in state.items()}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the result of `adapter_state`.

    Args:
        model: A model with the same adapters, changed in place.
        state: The weights.

    Raises:
        ClipretError: The names of the weights differ.
    """
    from peft import set_peft_model_state_dict

    expected = adapter_state(model)
    if wrong := sorted(expected.keys() ^ state.keys()):
        what = "lacks the weight" if wrong[0] in expected else "has the unknown weight"
        raise ClipretError(f"the adapter {what} {wrong[0]} ({len(wrong)} differ): use one with the same targets")
    set_peft_model_state_dict(model, {name.removeprefix(_PREFIX): value for name, value in state.items()}, _NAME)


def write_adapter(folder: Path, model: nn.Module, base: str) -> None:
    """Save adapters in the layout of PEFT, which `load_model` and clipret-export read.

    Args:
        folder: The new folder, which replaces an existing one.
        model: A model with adapters.
        base: The model without adapters, as `load_model` takes it. A path may be relative to `folder`.
    """
    adapted: Any = model
    config = copy.copy(adapted.peft_config[_NAME])
    config.base_model_name_or_path, config.inference_mode = base, True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    weights = {name: value.cpu().contiguous() for name, value in adapter_state(model).items()}
    with new_folder(folder, overwrite=True) as new:
        write_file(new / ADAPTER_WEIGHTS[0], save(weights, metadata={"format": "pt"}))
        write_file(new / ADAPTER_CONFIG, json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")


@torch.no_grad()
def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with its adapters merged. The model stays as it is.

    Args:
        model: A model, with or without adapters.

    Returns:
        The weights by the names in the original model.
    """
    state = model.state_dict()
    for name, layer in _adapted(model):
        merged = copy.deepcopy(layer)
        merged.merge()
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        state |= {f"{name}.{key}": value for key, value in merged.get_base_layer().state_dict().items()}
    return packed_state(model, state)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Merge the adapters into the weights and restore the original classes and names. Frozen weights stay frozen.

    Args:
        model: A model with adapters, changed in place.
    """
    for name, layer in _adapted(model):
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    pack_attention(model)
    if hasattr(model, "peft_config"):
        del model.peft_config


_LAYERS = (*PARTS, "out_proj")


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _candidates(model: nn.Module, apart: list[str]) -> dict[Tower, list[str]]:
    """The layers that can have an adapter, by tower, including those that `split_attention` will create."""
    # These modules multiply by the weights of their layers without calling them: an adapter would have no effect.
    bypassing = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, AttentionPool2d | nn.MultiheadAttention)
        or (isinstance(module, EvaAttention) and module.qkv is not None and not module.qkv_bias_separate)
    )
    candidates: dict[Tower, list[str]] = {tower: [] for tower in TOWERS}
    for name, module in model.named_modules():
        tower = tower_of(name)
        if tower is None:
            continue
        if name in apart:
            out = ["out_proj"] if isinstance(module, nn.MultiheadAttention) else []
            candidates[tower] += [f"{name}.{part}" for part in (*PARTS, *out)]
        elif type(module) in (nn.Linear, nn.Conv2d) and not name.startswith(bypassing):
            candidates[tower].append(name)
    return candidates


def _match(candidates: dict[Tower, list[str]], config: AdapterConfig) -> list[str]:
    chosen: set[str] = set()
    for target in config.targets:
        scope, colon, pattern = target.rpartition(":")
        if colon and scope not in config.towers:
            raise ClipretError(
                f"target {target!r} names the {scope} tower, but the adapter is for {' and '.join(config.towers)}"
                if scope in TOWERS
                else f"target {target!r} names the tower {scope!r}: use {' or '.join(TOWERS)}"
            )
        for tower in config.towers:
            if colon and tower != scope:
                continue
            for role in _GROUPS.get(pattern, (pattern,)):
                names = [name for name in candidates[tower] if _fits(name, role)]
                if not names:
                    raise ClipretError(_no_match(target, role, tower, candidates[tower]))
                chosen.update(names)
    return [name for tower in TOWERS for name in candidates[tower] if name in chosen]


def _fits(name: str, pattern: str) -> bool:
    if pattern in ROLES:
        return re.search(rf"(?:^|\.)(?:{ROLES[pattern]})$", name) is not None
    return fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")


def _no_match(target: str, role: str, tower: Tower, names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    ends = list(dict.fromkeys(end for part in parts for end in (part[-1], ".".join(part[-2:])) if not end.isdigit()))
    words = [*ROLES, *_GROUPS, *(re.sub(r"\b\d+\b", "*", end) for end in ends)]
    near = difflib.get_close_matches(role, [word for word in words if word != role], n=4, cutoff=0.5)
    near = near or list(dict.fromkeys(part[-1] for part in parts))[:8]
    which = f"target {target!r}" if role == target else f"{role!r} of target {target!r}"
    return f"{which} matches no layer of the {tower} tower: similar names are {', '.join(near) or 'none'}"
