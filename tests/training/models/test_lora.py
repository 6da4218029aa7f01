import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipret.errors import ClipretError
from clipret.inference.tokenizer import Tokenizer
from clipret_training.models.load import architecture, load_model
from clipret_training.models.loaded import LoadedModel

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"width": 32, "heads": 2, "layers": 2},
}
TARGETS = ["attn", "c_fc"]  # every nn.MultiheadAttention and the first layer of every MLP, in both towers


def embeddings(model: Any, loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(["a red car", "two dogs"]))
    with torch.inference_mode():
        return model.encode_image(pixels), model.encode_text(ids)


@pytest.fixture
def base(tmp_path: Path) -> LoadedModel:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    torch.manual_seed(3)
    save_file(dict(open_clip.CLIP(**CONFIG).state_dict()), folder / "open_clip_model.safetensors")
    return load_model(str(folder))


@pytest.fixture
def adapter(tmp_path: Path, base: LoadedModel) -> tuple[Path, Any]:
    """A saved LoRA with random weights, and the model of PEFT with it."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS)
    adapted = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    torch.manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter", adapted


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_merged_model_is_pefts_and_looks_like_its_base(adapter: tuple[Path, Any], base: LoadedModel) -> None:
    folder, adapted = adapter
    loaded = load_model(str(folder))
    for ours, theirs, before in zip(
        embeddings(loaded.model, loaded),
        embeddings(adapted.get_base_model(), loaded),
        embeddings(base.model, base),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert (ours - before).abs().max() > 1e-2
    before, after = base.model.state_dict(), loaded.model.state_dict()
    changed = {name.partition("resblocks.0.")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"", "attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight"}
    assert after.keys() == before.keys()  # PEFT puts in_proj_weight back as the last of its module
    assert [*map(type, loaded.model.modules())] == [*map(type, base.model.modules())]
    assert {name for name, _ in loaded.model.named_parameters()} == {name for name, _ in base.model.named_parameters()}
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.name, loaded.image, loaded.text) == (base.name, base.image, base.text)
    assert loaded.source == str(folder)


def test_the_hash_covers_base_weights_and_scale(adapter: tuple[Path, Any], base: LoadedModel) -> None:
    folder, _ = adapter
    first = load_model(str(folder)).source_sha256
    assert first == load_model(str(folder)).source_sha256 != base.source_sha256
    change(folder / "adapter_config.json", lora_alpha=8)
    second = load_model(str(folder)).source_sha256
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, folder / "adapter_model.safetensors")
    third = load_model(str(folder)).source_sha256
    base_file = folder.parent / "base" / "open_clip_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(base_file).items()}, base_file)
    assert len({first, second, third, load_model(str(folder)).source_sha256}) == 4


def test_weights_in_a_pickle(adapter: tuple[Path, Any]) -> None:
    folder, _ = adapter
    expected = load_model(str(folder))
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()
    loaded = load_model(str(folder))
    assert torch.equal(embeddings(loaded.model, loaded)[0], embeddings(expected.model, expected)[0])
    torch.save({"x": Path}, folder / "adapter_model.bin")
    with pytest.raises(ClipretError, match="could run code"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": [*TARGETS, "q_proj"]}, "target 'q_proj' matches no module"),
        ({"target_modules": ["q_proj"]}, "q_proj"),
        ({"target_modules": ["attn"]}, "matches no module of the model"),
        ({"target_modules": [*TARGETS, "c_proj"]}, r"lacks the weight .*c_proj"),
        ({"r": 8}, "size mismatch"),
        ({"base_model_name_or_path": None}, "does not name its model"),
        ({"base_model_name_or_path": "../elsewhere"}, "unknown"),
        ({"base_model_name_or_path": "."}, "names itself"),
        ({"peft_type": "NONSENSE"}, "cannot be merged"),
    ],
)
def test_an_adapter_that_does_not_fit(adapter: tuple[Path, Any], values: dict[str, Any], message: str) -> None:
    folder, _ = adapter
    change(folder / "adapter_config.json", **values)
    with pytest.raises(ClipretError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_its_architecture_is_that_of_its_base(adapter: tuple[Path, Any]) -> None:
    change(adapter[0] / "adapter_config.json", base_model_name_or_path="ViT-B-32")
    assert architecture(str(adapter[0])) == ("ViT-B-32", True)


def test_an_adapter_without_weights(adapter: tuple[Path, Any]) -> None:
    folder, _ = adapter
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ClipretError, match="no weights"):
        load_model(str(folder))
