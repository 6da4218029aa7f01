import copy
import re
from typing import Any

import open_clip
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from clipret.errors import ClipretError
from clipret_training.models.chinese_clip_model import FAMILY, ChineseClip
from clipret_training.models.small import SmallClip, SmallConfig
from clipret_training.models.structure import tower_of
from clipret_training.tuning.adapters import AdapterConfig, add_adapters
from clipret_training.tuning.freezing import (
    depth_groups,
    freeze_unused,
    layer_weights,
    lock_tower,
    parameter_groups,
    train_mode,
)

VISION = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 16}
RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8}
TEXT = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 99, "context_length": 12}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def chinese(vision: dict[str, Any]) -> nn.Module:
    text = {**BERT, "max_position_embeddings": 16, "type_vocab_size": 2}
    return ChineseClip({"family": FAMILY, "embed_dim": 16, "vision": vision, "text": text})


class BertText(nn.Module):
    """The parameter names of open_clip's HFTextEncoder, which cannot be created without the hub."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = BertModel(BertConfig(**BERT))
        self.proj = nn.Linear(32, 16, bias=False)


def with_bert() -> nn.Module:
    model = open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)
    model.text = BertText()
    return model


MODELS: dict[str, Any] = {
    "clip": lambda: open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT),
    "resnet": lambda: open_clip.CLIP(embed_dim=16, vision_cfg=RESNET, text_cfg=TEXT),
    "timm": lambda: open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=TIMM, text_cfg=TEXT),
    "bert": with_bert,
    "chinese": lambda: chinese({**VISION, "heads": 2, "mlp_ratio": 4.0}),
    "chinese resnet": lambda: chinese({**RESNET, "heads": 4}),
    "small": lambda: SmallClip(SmallConfig(vocab_size=99, dim=16, widths=(8, 16), depths=(1, 2))),
}


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("clip", 5, 4),
        ("resnet", 7, 4),
        ("timm", 8, 4),  # six blocks; timm's last group is the normalization, then comes open_clip's projection
        ("bert", 5, 4),
        ("chinese", 5, 4),
        ("chinese resnet", 7, 4),
        ("small", 5, 3),
    ],
)
def test_groups_hold_every_parameter_once_in_the_order_of_depth(name: str, image: int, text: int) -> None:
    model = MODELS[name]()
    groups = {"image": depth_groups(model, "image"), "text": depth_groups(model, "text")}
    grouped = [name for side in groups.values() for group in side for name in group]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters() if tower_of(name))
    assert (len(groups["image"]), len(groups["text"])) == (image, text)
    first, last = groups["image"][0], groups["image"][-1]
    assert any(word in first[0] for word in ("embedding", "conv1", "stem", "patch_embed", "cls_token"))
    assert any(word in last[0] for word in ("proj", "attnpool"))
    assert all("embedding" in name or "text.weight" in name for name in groups["text"][0])
    assert all("proj" in name for name in groups["text"][-1])


def test_unlocked_groups_are_those_of_open_clip() -> None:
    ours, theirs = MODELS["clip"](), MODELS["clip"]()
    for unlocked in range(5):
        for model in (ours, theirs):
            model.requires_grad_(True)
        lock_tower(ours, "image", unlocked)
        theirs.lock_image_tower(unlocked_groups=unlocked)
        lock_tower(ours, "text", min(unlocked, 4))
        theirs.lock_text_tower(unlocked_layers=min(unlocked, 4))
        assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
            n for n, p in theirs.named_parameters() if p.requires_grad
        }


def test_a_locked_tower_is_not_changed_by_training() -> None:
    """Neither its weights nor the statistics of its batch normalizations change."""
    torch.manual_seed(0)
    model = MODELS["resnet"]()
    lock_tower(model, "image")
    before = copy.deepcopy(model.state_dict())
    train_mode(model)
    assert model.training
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, weight_decay=0.1))
    ids = torch.randint(1, 98, (4, 12))
    (model.encode_image(torch.rand(4, 3, 32, 32)) * model.encode_text(ids)).sum().backward()
    optimizer.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {tower_of(name) for name in changed} == {"text"}
    lock_tower(model, "text", 1)
    train_mode(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"text_projection", "logit_scale"}
    model.requires_grad_(True)
    train_mode(model)
    assert all(module.training for module in model.modules())


def rates(model: nn.Module, **options: float) -> dict[str, tuple[float, float]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name_of[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, lr=1.0, weight_decay=0.2, **options)
        for parameter in group["params"]
    }


def test_rates_fall_with_depth_and_only_matrices_decay() -> None:
    model = MODELS["clip"]()
    rate_of = rates(model, layer_decay=0.5, image_lr_scale=0.1, text_lr_scale=3)
    assert rate_of["logit_scale"] == (1.0, 0.0)
    assert rate_of["visual.proj"] == pytest.approx((0.1, 0.2))
    assert rate_of["visual.ln_post.weight"] == pytest.approx((0.1 * 0.5, 0.0))
    assert rate_of["visual.transformer.resblocks.2.mlp.c_fc.weight"] == pytest.approx((0.1 * 0.5, 0.2))
    assert rate_of["visual.transformer.resblocks.0.attn.in_proj_bias"] == pytest.approx((0.1 * 0.5**3, 0.0))
    assert rate_of["visual.conv1.weight"] == pytest.approx((0.1 * 0.5**4, 0.2))
    assert rate_of["text_projection"] == (3.0, 0.2)
    assert rate_of["token_embedding.weight"] == pytest.approx((3 * 0.5**3, 0.2))
    assert set(rate_of) == {name for name, _ in model.named_parameters()}
    for group in parameter_groups(model, lr=2.0, weight_decay=0.2, layer_decay=0.5):
        assert group["lr"] == 2.0 * group["lr_scale"]
    assert len(parameter_groups(model, lr=1.0, weight_decay=0.2)) == 2


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("clip", 3 * 4 + 2, 2 * 4 + 1),
        ("resnet", 3 + 5 * 3 + 4 + 4, 2 * 4 + 1),
        ("timm", 6 * 4 + 2, 2 * 4 + 1),
        ("bert", 3 * 4 + 2, 2 * 6 + 2),  # with its pooler
        ("chinese", 3 * 4 + 2, 2 * 6 + 1),
        ("chinese resnet", 3 + 5 * 3 + 4 + 4, 2 * 6 + 1),
        ("small", 1 + 3 * 2 + 1 + 1, 1),
    ],
)
def test_weights_of_layers_are_all_matrices_but_embeddings(name: str, image: int, text: int) -> None:
    model = MODELS[name]()
    parameters, weights = dict(model.named_parameters()), layer_weights(model)
    assert [sum(tower_of(weight) == tower for weight in weights) for tower in ("image", "text")] == [image, text]
    others = [name for name in parameters.keys() - weights if parameters[name].ndim > 1]
    assert all(re.search(r"embed|cls_token|^text\.weight\.", name) for name in others)
    marked = [group for group in parameter_groups(model, lr=1.0, weight_decay=0.2, muon=True) if "use_muon" in group]
    assert sum(len(group["params"]) for group in marked) == image + text


def test_only_what_is_trained_is_in_a_group() -> None:
    model = MODELS["clip"]()
    add_adapters(model, AdapterConfig(2, 4, targets=("q",)))
    rate_of = rates(model, layer_decay=0.9)
    assert rate_of
    assert all("lora_" in name for name in rate_of)
    assert rate_of["visual.transformer.resblocks.2.attn.q_proj.lora_A.default.weight"][0] == pytest.approx(0.9)
    model.requires_grad_(False)
    with pytest.raises(ClipretError, match="there is nothing to train"):
        parameter_groups(model, lr=1.0, weight_decay=0.0)


def test_cocas_captioner_is_frozen() -> None:
    more = {"multimodal_cfg": TEXT | {"attn_pooler_heads": 2}}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = open_clip.CoCa(embed_dim=16, vision_cfg=vision, text_cfg=text, **more)
    freeze_unused(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith("text_decoder.") for name in frozen)
    assert len(depth_groups(model, "image")) == 5


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.logit_scale = nn.Parameter(torch.zeros(()))


def test_wrong_requests_are_refused() -> None:
    model = MODELS["clip"]()
    with pytest.raises(ClipretError, match="image tower has 5 groups, so 6 of them cannot stay unlocked"):
        lock_tower(model, "image", 6)
    with pytest.raises(ClipretError, match="-1 groups"):
        lock_tower(model, "image", -1)
    with pytest.raises(ClipretError, match="layer_decay is 0"):
        parameter_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0)
    with pytest.raises(ClipretError, match="text_lr_scale is 0"):
        parameter_groups(model, lr=1.0, weight_decay=0.0, text_lr_scale=0)
    strange = Strange()
    lock_tower(strange, "image")  # needs no groups
    assert not strange.visual[0].weight.requires_grad
    with pytest.raises(ClipretError, match=r"image tower cannot be grouped by depth \(visual\.0\.weight"):
        lock_tower(strange, "image", 1)
    timm = MODELS["timm"]()
    timm.visual.trunk = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ClipretError, match="timm cannot group the image tower, Sequential, by depth"):
        depth_groups(timm, "image")
