"""Adapters on small random models with every kind of attention; saved adapters are merged by lora.py."""

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clipret.errors import ClipretError
from clipret_training.models.attention import pack_attention, packed_state, split_attention, splittable
from clipret_training.models.chinese_clip_model import FAMILY, ChineseClip
from clipret_training.models.load import load_model
from clipret_training.models.small import SmallClip, SmallConfig
from clipret_training.tuning.adapters import (
    AdapterConfig,
    adapter_state,
    add_adapters,
    base_state,
    load_adapter_state,
    merge_adapters,
    write_adapter,
)

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
TEXT = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 99, "context_length": 12}


def clip() -> nn.Module:
    return open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)


def custom_text() -> nn.Module:
    """An image tower of timm with attention pooling and a separate text tower, as in SigLIP."""
    timm_cfg = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    return open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=timm_cfg, text_cfg=TEXT)


def chinese() -> nn.Module:
    text = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "max_position_embeddings": 16, "type_vocab_size": 2}
    vision = {**VISION, "heads": 2, "mlp_ratio": 4.0}
    return ChineseClip({"family": FAMILY, "embed_dim": 16, "vision": vision, "text": text})


def small() -> nn.Module:
    model = SmallClip(SmallConfig(vocab_size=99, dim=16, widths=(8, 16), depths=(1, 1)))
    for name, parameter in model.named_parameters():
        if "norm2" in name:
            nn.init.ones_(parameter)  # as after training: at zero, the blocks have no effect
    return model


MODELS = {"clip": clip, "custom_text": custom_text, "chinese": chinese, "small": small}
TARGETS: dict[str, tuple[str, ...]] = {
    "clip": ("attention", "mlp"),
    "custom_text": ("attention", "mlp"),
    "chinese": ("q", "k", "v"),
    "small": ("projection", "image:conv?"),
}


def build(name: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def embeddings(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(3, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 98, (3, 12), generator=generator)
    return torch.cat([model.encode_image(pixels), model.encode_text(ids)])


def stir(model: nn.Module) -> None:
    """Change the adapters as training does: none is zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name: str, dora: bool) -> None:
    model = build(name)
    before, names, kinds = embeddings(model), list(model.state_dict()), [*map(type, model.modules())]
    parameters = {name for name, _ in model.named_parameters()}
    add_adapters(model, AdapterConfig(4, 8, targets=TARGETS[name], dora=dora))
    torch.testing.assert_close(embeddings(model), before, rtol=0, atol=1e-5)  # no effect at first
    stir(model)
    unmerged, state = embeddings(model), base_state(model)
    torch.testing.assert_close(embeddings(model), unmerged, rtol=0, atol=0)  # base_state changes nothing
    assert (unmerged - before).abs().max() > 1e-2
    merge_adapters(model)
    torch.testing.assert_close(embeddings(model), unmerged, rtol=0, atol=1e-5)
    assert sorted(model.state_dict()) == sorted(names) == sorted(state)
    assert {name for name, _ in model.named_parameters()} == parameters
    assert [*map(type, model.modules())] == kinds
    fresh = build(name, seed=7)
    fresh.load_state_dict(state)
    torch.testing.assert_close(embeddings(fresh), unmerged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_get_gradients_and_all_of_them_do(name: str) -> None:
    model = build(name)
    add_adapters(model, AdapterConfig(2, 4, targets=TARGETS[name]))
    stir(model)
    embeddings(model).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in parameter_name)
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, f"{parameter_name} has no effect"


@pytest.mark.parametrize(
    ("name", "targets", "towers", "expected"),
    [
        ("clip", ("q", "v"), ("image",), {"visual.transformer.resblocks.N.attn": {"q_proj", "v_proj"}}),
        ("clip", ("k",), ("text",), {"transformer.resblocks.N.attn": {"k_proj"}}),
        ("clip", ("image:out", "text:mlp"), ("image", "text"),
         {"visual.transformer.resblocks.N.attn": {"out_proj"}, "transformer.resblocks.N.mlp": {"c_fc", "c_proj"}}),
        ("chinese", ("out",), ("image", "text"),
         {"visual.transformer.resblocks.N.attn": {"out_proj"}, "bert.encoder.layer.N.attention.output": {"dense"}}),
        ("chinese", ("text:query", "image:resblocks.0.attn.q_proj"), ("image", "text"),
         {"bert.encoder.layer.N.attention.self": {"query"}, "visual.transformer.resblocks.N.attn": {"q_proj"}}),
        ("chinese", ("fc2",), ("text",), {"bert.encoder.layer.N.output": {"dense"}}),
        ("custom_text", ("q",), ("image",), {"visual.trunk.blocks.N.attn.qkv": {"q_proj"}}),
    ],
)  # fmt: skip
def test_a_target_matches_only_the_layers_it_names(
    name: str, targets: tuple[str, ...], towers: tuple[Any, ...], expected: dict[str, set[str]]
) -> None:
    model = build(name)
    chosen = add_adapters(model, AdapterConfig(2, 4, targets=targets, towers=towers))
    adapted = {key.partition(".lora_")[0] for key in model.state_dict() if ".lora_" in key}
    assert adapted == set(chosen)
    layers: dict[str, set[str]] = {}
    for layer in chosen:
        parent, _, leaf = layer.rpartition(".")
        layers.setdefault(".".join("N" if part.isdigit() else part for part in parent.split(".")), set()).add(leaf)
    assert layers == expected


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("clip", {"targets": ("q_prj",)}, "'q_prj' matches no layer of the image tower: similar names are .*q_proj"),
        ("clip", {"targets": ("q_proj", "image:c_fcc")}, "'image:c_fcc' matches no layer of the image .*c_fc"),
        ("chinese", {"targets": ("q_proj",)}, "'q_proj' matches no layer of the text tower: similar names are .*q"),
        ("chinese", {"targets": ("querry",), "towers": ("text",)}, "similar names are .*query"),
        ("small", {"targets": ("attention",)}, "'q' of target 'attention' matches no layer of the image .*projection"),
        ("clip", {"targets": ("text:q",), "towers": ("image",)}, "names the text tower, but the adapter is for image"),
        ("clip", {"targets": ("vision:q",)}, "names the tower 'vision': use image or text"),
        ("clip", {"targets": ()}, r"adapter_targets is \(\): it must be a list of strings, at least 1"),
        ("clip", {"rank": 0}, "adapter_rank is 0: it must be a whole number from 1"),
        ("clip", {"alpha": 0}, "adapter_alpha is 0: it must be a finite number above 0"),
        ("clip", {"dropout": 1.0}, "adapter_dropout is 1.0"),
        ("clip", {"towers": ("both",)}, "adapter_towers is .*: it must be a list of image, text"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(name: str, values: dict[str, Any], message: str) -> None:
    model = build(name)
    names = list(model.state_dict())
    with pytest.raises(ClipretError, match=message):
        add_adapters(model, AdapterConfig(**values))
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "values",
    [{"targets": ("q", "v")}, {"targets": ("attention", "mlp"), "dora": True}, {"targets": ("out",)}],
    ids=["q,v", "all, DoRA", "out"],
)
def test_a_saved_adapter_merges_into_the_base(values: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    text = {"width": 32, "heads": 2, "layers": 2}  # with the vocabulary of open_clip's tokenizer
    model_cfg = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    (base / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    torch.manual_seed(3)
    save_file(dict(open_clip.CLIP(**model_cfg).state_dict()), base / "open_clip_model.safetensors")
    loaded: Any = load_model(str(base))
    add_adapters(loaded.model, AdapterConfig(4, 8, **values))
    stir(loaded.model)
    write_adapter(tmp_path / "adapter", loaded.model, "../base")

    pixels, ids = torch.rand(2, 3, 32, 32), torch.randint(1, 49407, (2, 7))
    merged: Any = load_model(str(tmp_path / "adapter"))
    with torch.inference_mode():
        for ours, theirs in (
            (merged.model.encode_image(pixels), loaded.model.encode_image(pixels)),
            (merged.model.encode_text(ids), loaded.model.encode_text(ids)),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert merged.model.state_dict().keys() == load_model(str(base)).model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.model.parameters())

    # The state of an adapter loads only into a model with the same adapted layers.
    again: Any = load_model(str(base))
    add_adapters(again.model, AdapterConfig(4, 8, **values))
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    load_adapter_state(again.model, state)
    assert all(torch.equal(value, adapter_state(again.model)[key]) for key, value in state.items())
    with torch.inference_mode():
        torch.testing.assert_close(again.model.encode_image(pixels), loaded.model.encode_image(pixels), rtol=0, atol=0)
    with pytest.raises(ClipretError, match=r"the adapter lacks the weight .*lora_"):
        load_adapter_state(again.model, dict(list(state.items())[1:]))


def test_layers_that_are_never_called_are_no_targets() -> None:
    """The attention pooling of a ResNet multiplies by the weights of its layers without calling them."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT)
    with pytest.raises(ClipretError, match="'q' matches no layer of the image tower"):
        add_adapters(model, AdapterConfig(2, 4, targets=("q",)))
    assert add_adapters(model, AdapterConfig(2, 4, targets=("text:q", "image:conv2")))


def test_a_model_in_bfloat16_gets_adapters_in_float32() -> None:
    model = build("clip").bfloat16()
    add_adapters(model, AdapterConfig(2, 4, targets=("q",)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert embeddings(model.float()).isfinite().all()


@pytest.mark.parametrize("same_width", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_split_attention_is_the_same(same_width: bool, bias: bool, batch_first: bool) -> None:
    torch.manual_seed(5)
    kdim, vdim = (None, None) if same_width else (8, 12)
    packed = nn.MultiheadAttention(16, 4, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first)
    model = nn.Sequential(packed)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    query = torch.randn(5, 5, 16)
    key, value = (query, query) if same_width else (torch.randn(5, 5, 8), torch.randn(5, 5, 12))
    causal = torch.full((5, 5), float("-inf")).triu(1)
    masks = [None, causal, causal.isinf(), causal.repeat(20, 1, 1)]
    call = {"need_weights": False}
    before = [packed(query, key, value, attn_mask=mask, **call)[0] for mask in masks]
    split_attention(model, splittable(model))
    split: Any = model[0]
    for mask, expected in zip(masks, before, strict=True):
        ours = split(query, key, value, attn_mask=mask, **call)[0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with pytest.raises(ClipretError, match="choose other targets"):
        split(query, key, value, need_weights=True)
    for again in (packed_state(model, model.state_dict()), (pack_attention(model), model.state_dict())[1]):
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)
    assert type(model[0]) is nn.MultiheadAttention


def test_split_attention_of_timm_is_the_same() -> None:
    torch.manual_seed(6)
    model = timm.create_model("test_vit", img_size=32).eval()
    original, pixels = copy.deepcopy(model), torch.rand(2, 3, 32, 32)
    split_attention(model, splittable(model))
    assert "blocks.0.attn.qkv.k_proj.weight" in model.state_dict()
    torch.testing.assert_close(model(pixels), original(pixels), rtol=0, atol=1e-5)
    pack_attention(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in original.state_dict().items())
