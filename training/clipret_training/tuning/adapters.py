"""LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024) through PEFT, on either tower or both.

Targets are told by what a layer does, so that one word means the same in every architecture, or by its name. PEFT
itself passes over a target that matches nothing as long as another one matches; here it is an error.
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
_NAME = "default"  # PEFT's name for an adapter that has none
_PREFIX = "base_model.model."  # what PEFT puts before every name in a file


@dataclass(frozen=True)
class AdapterConfig:
    """`rank` rows and columns a layer, whose product is added times `alpha` / `rank`; `dropout` of what goes into it.

    A target is a role (q, k, v, out, fc1, fc2), a group of them (attention, mlp) or the end of a layer's dotted name
    as PEFT takes it, * and ? allowed; `image:` or `text:` before it restricts it to a tower. Each must match in every
    tower that it names. Raises ClipretError for a value out of range.
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
    """Put adapters that change nothing yet into `model`, in place, and freeze everything else. The adapted layers.

    Attention with packed projections is taken apart where one of them is a target. Adapters are float32 whatever the
    model is. `base_state` gives the weights under the model's own names. Raises ClipretError when a target matches
    no layer of a tower that it names; then the model is as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    apart = splittable(model)
    chosen = _match(_candidates(model, apart), config)
    split_attention(model, [name for name in apart if any(f"{name}.{part}" in chosen for part in _LAYERS)])
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides it
        lora_dropout=config.dropout,
        # A list would match ends of names: "transformer.x" is one of "visual.transformer.x" too.
        target_modules="|".join(map(re.escape, chosen)),
        use_dora=config.dora,
    )
    inject_adapter_in_model(lora, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return chosen


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the adapters in `model` under the names that they have in PEFT's files."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    return {f"{_PREFIX}{name}": value.detach() for name, value in state.items()}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Undo `adapter_state` into a model with the same adapters. Raises ClipretError when the names differ."""
    from peft import set_peft_model_state_dict

    expected = adapter_state(model)
    if wrong := sorted(expected.keys() ^ state.keys()):
        whose = "lacks" if wrong[0] in expected else "has no place for"
        raise ClipretError(f"the adapter {whose} the weight {wrong[0]} ({len(wrong)} differ): it has other targets")
    set_peft_model_state_dict(model, {name.removeprefix(_PREFIX): value for name, value in state.items()}, _NAME)


def write_adapter(folder: Path, model: nn.Module, base: str) -> None:
    """Write the adapters in `model` to `folder` in PEFT's layout; `load_model` and clipret-export take it.

    base: what `load_model` calls the model that they were added to; a path may be relative to `folder`.
    """
    adapted: Any = model
    config = copy.copy(adapted.peft_config[_NAME])
    config.base_model_name_or_path, config.inference_mode = base, True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    weights = {name: value.cpu().contiguous() for name, value in adapter_state(model).items()}
    with new_folder(folder, overwrite=True) as made:
        write_file(made / ADAPTER_WEIGHTS[0], save(weights, metadata={"format": "pt"}))
        write_file(made / ADAPTER_CONFIG, json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")


@torch.no_grad()
def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` as if its adapters were merged, under the names that it had without any.

    Leaves the model as it is. Without adapters it is the model's own state dict.
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
    """Add the adapters to the weights, in place: the classes and names that the model had before, still frozen."""
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
    """The layers that an adapter can go to, by tower, with those that `split_attention` will make of `apart`."""
    # These multiply by the weights of their layers without calling them: an adapter would do nothing.
    aloof = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, AttentionPool2d | nn.MultiheadAttention)
        or (isinstance(module, EvaAttention) and module.qkv is not None and not module.qkv_bias_separate)
    )
    found: dict[Tower, list[str]] = {tower: [] for tower in TOWERS}
    for name, module in model.named_modules():
        tower = tower_of(name)
        if tower is None:
            continue
        if name in apart:
            out = ["out_proj"] if isinstance(module, nn.MultiheadAttention) else []
            found[tower] += [f"{name}.{part}" for part in (*PARTS, *out)]
        elif type(module) in (nn.Linear, nn.Conv2d) and not name.startswith(aloof):
            found[tower].append(name)
    return found


def _match(candidates: dict[Tower, list[str]], config: AdapterConfig) -> list[str]:
    chosen: set[str] = set()
    for target in config.targets:
        scope, colon, pattern = target.rpartition(":")
        if colon and scope not in config.towers:
            known = scope in TOWERS
            raise ClipretError(
                f"target {target!r} names the {scope} tower and the adapter is for {' and '.join(config.towers)}"
                if known
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
    return f"{which} matches no layer of the {tower} tower: near it are {', '.join(near) or 'none'}"
