"""What is trained and how fast: locked towers, learning rates by depth, and what is not decayed.

Locking a tower and unlocking its last groups is open_clip's `lock` (Zhai et al., LiT, 2021); learning rates that fall
from the head to the embeddings are those of ELECTRA (Clark et al., 2020) and BEiT (Bao et al., 2021).
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
    """Regular expressions over the names of a tower's parameters, matched from their start."""

    block: str  # its groups are the block's number
    stem: str
    norm: str  # what comes after the last block and is grouped with it
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
        _Layout(  # clipret-small has a bag of tokens and no blocks
            block=r"$.", stem=r"text\.(embedding|weight)\.", norm=r"text\.norm\.", head=r"text\.projection\."
        ),
    ),
}


def depth_groups(model: nn.Module, tower: Tower) -> list[list[str]]:
    """The names of a tower's parameters from its input to its output: the embeddings, each block, the projection.

    The last block's group holds the normalisation after it, too, as in open_clip. Towers of timm are grouped as timm
    groups them. Raises ClipretError for a tower whose blocks cannot be told from its names.
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
            if found := re.match(layout.block, name):
                place = tuple(map(int, found.groups()))
            elif re.match(layout.stem, name):
                place = (-1,)
            elif re.match(layout.norm, name):
                place = last
            elif re.match(layout.head, name):
                place = (*last, 1)
            else:
                unknown = name
                break
            groups.setdefault(place, []).append(name)
        if unknown is None and groups:
            blocks = [place for place in groups if (-1,) < place < last]
            if blocks and last in groups:
                groups[max(blocks)] += groups.pop(last)
            return [groups[place] for place in sorted(groups)]
        reasons.append(unknown)
    unknown = max(filter(None, reasons), key=names.index, default="")  # of the layout that came furthest
    raise ClipretError(
        f"the {tower} tower cannot be taken apart by depth: {unknown or 'it has no parameters'} fits no layout that is "
        "known; lock the whole tower, and use a layer decay of 1"
    )


def lock_tower(model: nn.Module, tower: Tower, unlocked_groups: int = 0) -> None:
    """Freeze a tower but for its last `unlocked_groups` groups: 1 is its projection, 2 its last block as well.

    Raises ClipretError when it has fewer groups, and, where some stay unlocked, for a tower that cannot be grouped.
    """
    if unlocked_groups < 0:
        raise ClipretError(f"{unlocked_groups} groups of the {tower} tower cannot be unlocked: use 0 or more")
    unlocked: set[str] = set()
    if unlocked_groups:
        groups = depth_groups(model, tower)
        if unlocked_groups > len(groups):
            raise ClipretError(
                f"the {tower} tower has {len(groups)} groups and {unlocked_groups} are to stay unlocked: "
                f"use at most {len(groups)}, or do not lock it"
            )
        unlocked = {name for group in groups[-unlocked_groups:] for name in group}
    for name, parameter in model.named_parameters():
        if tower_of(name) == tower:
            parameter.requires_grad_(name in unlocked)


def freeze_unused(model: nn.Module) -> None:
    """Freeze what no embedding goes through and no gradient reaches, such as CoCa's captioner."""
    for name, parameter in model.named_parameters():
        if tower_of(name) is None and not name.startswith("logit_"):
            parameter.requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """`model.train()`, in which batch normalisations that are frozen keep their running statistics, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            weights = list(module.parameters(recurse=False))
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()


def layer_weights(model: nn.Module) -> set[str]:
    """The names of the matrices that something is multiplied by: linear layers, projections, convolutions' kernels.

    Embeddings are looked up or added and are none of them; nor are kernels of one channel.
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
    """What is trained, as an optimizer of torch takes it: groups with `params`, `lr`, `weight_decay` and `lr_scale`.

    A schedule sets `lr` of a group to its rate times `lr_scale`: the tower's, times `layer_decay` for each group of
    `depth_groups` between the parameter and the tower's output. No decay for biases, normalisations, the logit scale:
    all that has fewer than two dimensions. With `muon` the groups of `layer_weights` have `use_muon`. Raises
    ClipretError when nothing is to be trained, for values out of range, and, with a `layer_decay` below 1, for a tower
    that cannot be grouped.
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
        its_tower = tower_of(name)
        scale = (scale_of[its_tower] if its_tower else 1.0) * layer_decay ** depth.get(name, 0)
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((scale, decay, name in matrices), {"params": []})
        group |= {"lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
        group |= {"use_muon": True} if name in matrices else {}
        group["params"].append(parameter)
    if not groups:
        raise ClipretError("nothing is to be trained: both towers are locked and there is no adapter")
    return list(groups.values())


def _timm_groups(trunk: Any, names: list[str]) -> list[list[str]]:
    """timm's own groups of the trunk; what open_clip puts behind it is the projection."""
    from timm.models import group_parameters

    try:
        numbered = group_parameters(trunk, trunk.group_matcher())
    except (AttributeError, TypeError) as error:
        raise ClipretError(
            f"the image tower, {type(trunk).__name__} of timm, does not tell its blocks ({error}): lock the whole "
            "tower, and use a layer decay of 1"
        ) from error
    groups = [[f"visual.trunk.{name}" for name in numbered[number]] for number in sorted(numbered)]
    inside = {name for group in groups for name in group}
    head = [name for name in names if name not in inside]
    return [*groups, head] if head else groups
