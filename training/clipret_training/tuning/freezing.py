"""What is trained and how fast: locked towers, layer-wise learning rates, and parameters without weight decay.

Locking a tower except for its last groups is `lock` in open_clip (Zhai et al., LiT, 2021). Learning rates that decrease
from the head to the embeddings come from ELECTRA (Clark et al., 2020) and BEiT (Bao et al., 2021).
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipret.errors import ClipretError
from clipret_training.choices import TOWERS, Tower
from clipret_training.models import tower_of

__all__ = ["depth_groups", "freeze_unused", "layer_weights", "lock_tower", "parameter_groups", "train_mode"]


@dataclass(frozen=True)
class _Layout:
    """Regular expressions for the names of a tower's parameters, matched from the start."""

    block: str  # its capturing groups are the number of the block
    stem: str
    norm: str  # after the last block, and grouped with it
    head: str


_TRANSFORMER = r"transformer\.resblocks\.(\d+)\."
_LAYOUTS: dict[Tower, tuple[_Layout, ...]] = {
    "image": (
        _Layout(
            block=rf"visual\.{_TRANSFORMER}",
            stem=r"visual\.(conv1|class_embedding|positional_embedding|ln_pre|patchnorm_pre_ln)\b",
            norm=r"visual\.(ln_post|attn_pool|attn_pool_contrastive)\b",
            head=r"visual\.proj$",
        ),
        _Layout(
            block=r"visual\.layer(\d)\.(\d+)\.",
            stem=r"visual\.(conv|bn)[123]\.",
            norm=r"$.",
            head=r"visual\.attnpool\.",
        ),
        _Layout(  # clipret-small
            block=r"visual\.blocks\.(\d+)\.", stem=r"visual\.stem\.", norm=r"$.", head=r"visual\.projection\."
        ),
    ),
    "text": (
        _Layout(
            block=rf"(?:text\.)?{_TRANSFORMER}",
            stem=r"(text\.)?(token_embedding|positional_embedding|cls_emb)\b",
            norm=r"(text\.)?ln_final\.",
            head=r"(text\.)?text_projection\b",
        ),
        _Layout(  # Chinese-CLIP
            block=r"bert\.encoder\.layer\.(\d+)\.", stem=r"bert\.embeddings\.", norm=r"$.", head=r"text_projection\b"
        ),
        _Layout(  # open_clip's HFTextEncoder around BERT, RoBERTa, XLM-RoBERTa, T5
            block=r"text\.transformer\.(?:encoder\.)?(?:layers?|block)\.(\d+)\.",
            stem=r"text\.transformer\.(embeddings|shared|(encoder\.)?embed_tokens)\.",
            norm=r"text\.(transformer\.(encoder\.)?(final_layer_norm|layer_norm|pooler)|pooler)\.",
            head=r"text\.proj\.",
        ),
        _Layout(  # clipret-small: a bag of tokens, without blocks
            block=r"$.", stem=r"text\.(embedding|weight)\.", norm=r"text\.norm\.", head=r"text\.projection\."
        ),
    ),
}


def depth_groups(model: nn.Module, tower: Tower) -> list[list[str]]:
    """Group the parameters of a tower by depth: the embeddings, each block, the projection.

    The group of the last block includes the normalization after it, as in open_clip. Towers of timm have the groups of
    timm.

    Args:
        model: The model.
        tower: The tower.

    Returns:
        The names of the parameters in each group, from the input to the output.

    Raises:
        ClipretError: The names do not show the blocks of the tower.
    """
    names = [name for name, _ in model.named_parameters() if tower_of(name) == tower]
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if tower == "image" and trunk is not None:
        return _timm_groups(trunk, names)
    reasons = []
    for layout in _LAYOUTS[tower]:
        groups: dict[tuple[int, ...], list[str]] = {}
        last = (10**6,)  # beyond every block
        unknown = None
        for name in names:
            if match := re.match(layout.block, name):
                depth = tuple(map(int, match.groups()))
            elif re.match(layout.stem, name):
                depth = (-1,)
            elif re.match(layout.norm, name):
                depth = last
            elif re.match(layout.head, name):
                depth = (*last, 1)
            else:
                unknown = name
                break
            groups.setdefault(depth, []).append(name)
        if unknown is None and groups:
            blocks = [depth for depth in groups if (-1,) < depth < last]
            if blocks and last in groups:
                groups[max(blocks)] += groups.pop(last)
            return [groups[depth] for depth in sorted(groups)]
        reasons.append(unknown)
    unknown = max(filter(None, reasons), key=names.index, default="")  # of the layout that matched the most names
    raise ClipretError(
        f"the {tower} tower cannot be grouped by depth ({unknown or 'no parameters'} is in no known layout): lock the "
        "whole tower, and use a layer decay of 1"
    )


def lock_tower(model: nn.Module, tower: Tower, unlocked_groups: int = 0) -> None:
    """Freeze a tower except for its last groups.

    Args:
        model: The model to change in place.
        tower: The tower.
        unlocked_groups: Number of groups that are trained: 1 for the projection, 2 for the last block as well.

    Raises:
        ClipretError: The tower has fewer groups, or cannot be grouped although some groups stay unlocked.
    """
    if unlocked_groups < 0:
        raise ClipretError(f"{unlocked_groups} groups of the {tower} tower cannot be unlocked: use 0 or more")
    unlocked: set[str] = set()
    if unlocked_groups:
        groups = depth_groups(model, tower)
        if unlocked_groups > len(groups):
            raise ClipretError(
                f"the {tower} tower has {len(groups)} groups, so {unlocked_groups} of them cannot stay unlocked: "
                f"use at most {len(groups)}, or do not lock the tower"
            )
        unlocked = {name for group in groups[-unlocked_groups:] for name in group}
    for name, parameter in model.named_parameters():
        if tower_of(name) == tower:
            parameter.requires_grad_(name in unlocked)


def freeze_unused(model: nn.Module) -> None:
    """Freeze the parts that the embeddings do not use and no gradient reaches, such as CoCa's captioner.

    Args:
        model: The model to change in place.
    """
    for name, parameter in model.named_parameters():
        if tower_of(name) is None and not name.startswith("logit_"):
            parameter.requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """Call `model.train()`, but keep frozen batch normalizations in eval mode, with their running statistics.

    Args:
        model: The model to change in place.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            weights = list(module.parameters(recurse=False))
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()


def layer_weights(model: nn.Module) -> set[str]:
    """The weight matrices of a model: linear layers, projections, kernels of convolutions.

    Embeddings, which are looked up or added, and kernels with one channel are not among them.

    Args:
        model: The model.

    Returns:
        The names of the parameters.
    """
    looked_up = {
        id(weight) for module in model.modules() if isinstance(module, nn.Embedding) for weight in module.parameters()
    }
    return {
        name
        for name, parameter in model.named_parameters()
        if name.endswith(("weight", "proj", "projection"))
        and id(parameter) not in looked_up
        and parameter.ndim > 1
        and min(parameter.shape[:2]) > 1
    }


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    image_lr_scale: float = 1.0,
    text_lr_scale: float = 1.0,
    muon: bool = False,
) -> list[dict[str, Any]]:
    """Group the trained parameters for an optimizer.

    A schedule sets the `lr` of a group to its own rate times `lr_scale`, which is the factor of the tower, times
    `layer_decay` for each group of `depth_groups` between the parameter and the output of the tower. Parameters with
    fewer than two dimensions (biases, normalizations, the logit scale) have no weight decay.

    Args:
        model: The model.
        lr: Learning rate.
        weight_decay: Weight decay.
        layer_decay: Factor of the learning rate from one group to the one before it, above 0 and at most 1.
        image_lr_scale: Factor of the learning rate of the image tower.
        text_lr_scale: Factor of the learning rate of the text tower.
        muon: Mark the groups of `layer_weights` with `use_muon`.

    Returns:
        Groups with `params`, `lr`, `lr_scale` and `weight_decay`, as optimizers of torch take them.

    Raises:
        ClipretError: Nothing would be trained, a value is out of range, or `layer_decay` is below 1 and a tower cannot
            be grouped.
    """
    if not 0 < layer_decay <= 1:
        raise ClipretError(f"layer_decay is {layer_decay}: use a number above 0 and at most 1")
    scale_of = {"image": image_lr_scale, "text": text_lr_scale}
    for tower, scale in scale_of.items():
        if scale <= 0:
            raise ClipretError(f"{tower}_lr_scale is {scale}: use a number above 0, or lock the tower")
    depth: dict[str, int] = {}
    if layer_decay < 1:
        for tower in TOWERS:
            for above, names in enumerate(reversed(depth_groups(model, tower))):
                depth |= dict.fromkeys(names, above)
    matrices = layer_weights(model) if muon else set[str]()
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter_tower = tower_of(name)
        scale = (scale_of[parameter_tower] if parameter_tower else 1.0) * layer_decay ** depth.get(name, 0)
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((scale, decay, name in matrices), {"params": []})
        group |= {"lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
        group |= {"use_muon": True} if name in matrices else {}
        group["params"].append(parameter)
    if not groups:
        raise ClipretError("there is nothing to train: unlock a tower, or add an adapter")
    return list(groups.values())


def _timm_groups(trunk: Any, names: list[str]) -> list[list[str]]:
    """The groups of a trunk by timm, and the projection that open_clip adds."""
    from timm.models import group_parameters

    try:
        numbered = group_parameters(trunk, trunk.group_matcher())
    except (AttributeError, TypeError) as error:
        raise ClipretError(
            f"timm cannot group the image tower, {type(trunk).__name__}, by depth ({error}): lock the whole tower, and "
            "use a layer decay of 1"
        ) from error
    groups = [[f"visual.trunk.{name}" for name in numbered[number]] for number in sorted(numbered)]
    inside = {name for group in groups for name in group}
    head = [name for name in names if name not in inside]
    return [*groups, head] if head else groups
