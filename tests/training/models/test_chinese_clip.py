"""Chinese-CLIP in both of its layouts, with small random weights in the real formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from clipret.bundle import ImageSpec, TextSpec
from clipret.errors import ClipretError
from clipret.inference.tokenizer import Tokenizer
from clipret_export.pipeline import export_bundle
from clipret_export.towers import rewrite
from clipret_training.models import chinese_clip as chinese
from clipret_training.models.chinese_clip_model import SIZES, ChineseClip, describe_weights, published, size_name
from clipret_training.models.load import architecture, load_model
from clipret_training.models.loaded import weights_sha256
from clipret_training.run import RunFolder

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"一辆红色的轿车狗在草地上abcde0123",
    "##a",
    "##b",
    "##3",
    "red",
    "##s",
    "。",
    "!",
]
TEXTS = ["一辆红色的轿车", "狗在草地上。", "reds, abc 车"]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it, with the other files of the published folders."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    torch.manual_seed(2)
    text = {"vocab_size": len(WORDS), "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    config = ChineseCLIPConfig(
        text_config={**text, "intermediate_size": 256, "max_position_embeddings": 64},
        vision_config={**vision, "intermediate_size": 512},
        projection_dim=32,
    )
    model = ChineseCLIPModel(config).eval()
    for parameter in model.parameters():  # as after training: no value is zero or one
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    preprocess = {"do_center_crop": False, "size": {"height": 64, "width": 64}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return folder


@pytest.fixture(scope="module")
def ofa_sys(hugging_face: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as OFA-Sys's trainer saves them."""
    folder = tmp_path_factory.mktemp("ofa")
    write_checkpoint(load_model(str(hugging_face)).model, folder / "clip_cn_tiny.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder / "clip_cn_tiny.pt"


def write_checkpoint(model: torch.nn.Module, path: Path) -> None:
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.bert.pooler.dense.weight"] = torch.zeros(128, 128)
    torch.save({"epoch": 3, "step": 7, "name": "x", "state_dict": state, "optimizer": {"lr": 1e-5}}, path)


def test_the_embeddings_are_those_of_transformers(hugging_face: Path) -> None:
    reference = ChineseCLIPModel.from_pretrained(hugging_face).eval()
    loaded = load_model(str(hugging_face))
    pixels = torch.rand(3, 3, 64, 64)
    ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(TEXTS))
    with torch.inference_mode():
        vision = reference.vision_model(pixels).pooler_output
        image = reference.visual_projection(vision)
        hidden = reference.text_model(ids, attention_mask=(ids != 0).long()).last_hidden_state
        text = reference.text_projection(hidden[:, 0])
        torch.testing.assert_close(loaded.model.encode_image(pixels), image, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded.model.encode_text(ids), text, rtol=1e-5, atol=1e-5)


def test_both_layouts_are_one_model(hugging_face: Path, ofa_sys: Path) -> None:
    first, second = load_model(str(hugging_face)), load_model(str(ofa_sys))
    assert first.source_sha256 == second.source_sha256
    assert first.config == second.config
    assert (first.image, first.text) == (second.image, second.text)
    assert first.image == ImageSpec(64, "squash", "bicubic")
    assert first.text == TextSpec(52, "none", "longest")
    assert (first.mean, first.std) == (second.mean, second.std)
    assert first.name == second.name
    assert architecture(str(hugging_face)) == architecture(str(ofa_sys)) == ("Chinese-CLIP", True)


def test_both_layouts_give_one_bundle(hugging_face: Path, ofa_sys: Path, tmp_path: Path) -> None:
    first = export_bundle(str(hugging_face), tmp_path / "first")
    second = export_bundle(str(ofa_sys), tmp_path / "second")
    assert first.fingerprint == second.fingerprint
    for name in ("image.onnx", "text.onnx", "tokenizer.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_the_last_layer_of_the_text_tower_is_computed_for_one_token(hugging_face: Path) -> None:
    loaded = load_model(str(hugging_face))
    ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(TEXTS))
    with torch.inference_mode():
        before = loaded.model.encode_text(ids, normalize=True)
        rewrite(loaded.model)
        seen: list[int] = []
        for layer in loaded.model.bert.encoder.layer:
            layer.intermediate.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
        after = loaded.model.encode_text(ids, normalize=True)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert seen == [ids.shape[1], ids.shape[1], 1]


def test_texts_may_be_cut_to_the_longest(hugging_face: Path) -> None:
    loaded = load_model(str(hugging_face))
    short = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(TEXTS))
    padded = torch.nn.functional.pad(short, (0, 52 - short.shape[1]))
    with torch.inference_mode():
        embeddings = [loaded.model.encode_text(ids, normalize=True) for ids in (short, padded)]
    torch.testing.assert_close(*embeddings, rtol=0, atol=1e-5)


def test_a_resnet_in_half(tmp_path: Path) -> None:
    """One of the five sizes has a ResNet; some published weights are in half precision."""
    config: dict[str, Any] = {
        "family": chinese.FAMILY,
        "embed_dim": 32,
        "vision": {"image_size": 64, "width": 8, "layers": [1, 2, 1, 1], "heads": 4},
        "text": {
            "vocab_size": len(WORDS),
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": 64,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
    }
    torch.manual_seed(0)
    model = ChineseClip(config).eval().half()
    write_checkpoint(model, tmp_path / "clip_cn_rn.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    loaded = load_model(str(tmp_path / "clip_cn_rn.pt"))
    assert loaded.config == config
    assert loaded.name == "Chinese-CLIP RN17"
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model.encode_image(pixels), model.float().encode_image(pixels))
    RunFolder.create(tmp_path / "run", {"seed": 1}, loaded).save(loaded, "best")
    again = load_model(str(tmp_path / "run"))
    with torch.inference_mode():
        assert torch.equal(again.model.encode_image(pixels), loaded.model.encode_image(pixels))
    bundle = export_bundle(str(tmp_path / "clip_cn_rn.pt"), tmp_path / "bundle")
    assert json.loads((bundle.path / "verify.json").read_text())["image"]["min_cosine"] > 0.999999


def test_a_run_that_began_with_it_loads_again(hugging_face: Path, tmp_path: Path) -> None:
    loaded = load_model(str(hugging_face))
    RunFolder.create(tmp_path / "run", {"seed": 1}, loaded).save(loaded, "best")
    again = load_model(str(tmp_path / "run"))
    assert again.config == loaded.config
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.model.encode_image(pixels), loaded.model.encode_image(pixels))
    assert all(parameter.requires_grad for parameter in again.model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "heads", "millions"),
    [
        ("chinese-clip-rn50", "RN50", 32, 77),
        ("chinese-clip-vit-b-16", "ViT-B-16", 12, 188),
        ("chinese-clip-vit-l-14", "ViT-L-14", 16, 406),
        ("chinese-clip-vit-l-14-336", "ViT-L-14-336", 16, 407),
        ("chinese-clip-vit-h-14", "ViT-H-14", 16, 958),
    ],
)
def test_the_published_sizes(name: str, size: str, heads: int, millions: int) -> None:
    """Heads from cn_clip's model_configs, parameters from its README; shapes alone distinguish the sizes."""
    config = published(name)
    assert size_name(config) == f"Chinese-CLIP {size}"
    assert config["vision"]["heads"] == heads
    with torch.device("meta"):
        model = ChineseClip(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    assert describe_weights(model.state_dict(), {}) == config


def test_a_size_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "chinese-clip-tiny", (32, 32, 16, 64, 1, 64, 1))
    monkeypatch.setattr(chinese, "hf_hub_download", lambda *_: 1 / 0)
    with pytest.raises(ClipretError, match=r"no vocab\.txt and .* cannot be downloaded: install cn_clip"):
        load_model("chinese-clip-tiny")
    (tmp_path / "cn_clip" / "clip").mkdir(parents=True)
    (tmp_path / "cn_clip" / "__init__.py").write_text("1 / 0  # must not be imported")
    words = [*WORDS, *(f"[unused{number}]" for number in range(21128 - len(WORDS)))]
    (tmp_path / "cn_clip" / "clip" / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert architecture("chinese-clip-tiny") == ("chinese-clip-tiny", False)
    first, same, other = (load_model("chinese-clip-tiny", seed=seed) for seed in (1, 1, 2))
    assert first.source_sha256 == same.source_sha256 != other.source_sha256
    torch.save({"state_dict": first.model.state_dict()}, tmp_path / "weights.pt")
    named = load_model(f"chinese-clip-tiny:{tmp_path / 'weights.pt'}")
    assert (named.source_sha256, named.config) == (first.source_sha256, first.config)
    for source, match in {
        f"chinese-clip-rn50:{tmp_path / 'weights.pt'}": "is a Chinese-CLIP ViT-64-16-32, not chinese-clip-rn50",
        "chinese-clip-rn50:missing.pt": r"missing\.pt does not exist",
        "chinese-clip-vit-b16": "did you mean chinese-clip-vit-b-16",
    }.items():
        with pytest.raises(ClipretError, match=match):
            load_model(source)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("layout", ["ofa", "hugging face"])
def test_a_lone_file_is_known_by_its_names(hugging_face: Path, tmp_path: Path, suffix: str, layout: str) -> None:
    loaded = load_model(str(hugging_face))
    state = load_file(hugging_face / "model.safetensors") if layout != "ofa" else loaded.model.state_dict()
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    assert architecture(str(file)) == ("Chinese-CLIP", True)  # a run that starts from it fine-tunes
    again = load_model(str(file))
    assert (again.source_sha256, again.config) == (loaded.source_sha256, loaded.config)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_folders(hugging_face: Path, tmp_path: Path, name: str) -> None:
    state = load_file(hugging_face / "model.safetensors")
    save = save_file if name.endswith(".safetensors") else torch.save
    shards = {key: f"{number % 2}-{name}" for number, key in enumerate(state)}
    for file in set(shards.values()):
        save({key: value for key, value in state.items() if shards[key] == file}, tmp_path / file)
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": shards}))
    for file in ("config.json", "vocab.txt"):
        (tmp_path / file).write_bytes((hugging_face / file).read_bytes())
    assert load_model(str(tmp_path)).source_sha256 == load_model(str(hugging_face)).source_sha256
    (tmp_path / f"1-{name}").unlink()
    with pytest.raises(ClipretError, match=f"1-{name}"):
        load_model(str(tmp_path))


def test_a_file_that_changes_later_leaves_the_model_alone(ofa_sys: Path, tmp_path: Path) -> None:
    file = tmp_path / ofa_sys.name
    file.write_bytes(ofa_sys.read_bytes())
    (tmp_path / "vocab.txt").write_bytes((ofa_sys.parent / "vocab.txt").read_bytes())
    loaded = load_model(str(file))
    with file.open("r+b") as opened:
        opened.write(b"\1" * file.stat().st_size)
    assert weights_sha256(loaded.model) == loaded.source_sha256


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_the_hub_sends_one_format(hugging_face: Path, tmp_path: Path, monkeypatch: Any, weights: str) -> None:
    patterns: list[str] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        assert repo == "org/model"
        patterns.extend(allow_patterns)
        for file in (hugging_face / "config.json", hugging_face / "vocab.txt"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        if "*" + Path(weights).suffix in allow_patterns:
            state = load_file(hugging_face / "model.safetensors")
            (save_file if weights.endswith(".safetensors") else torch.save)(state, tmp_path / weights)
        return str(tmp_path)

    monkeypatch.setattr(chinese, "snapshot_download", download)
    loaded = load_model("hf-hub:org/model")
    assert loaded.source == "hf-hub:org/model"
    assert loaded.source_sha256 == load_model(str(hugging_face)).source_sha256
    assert ("*.bin" in patterns) == (weights == "pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert chinese.hub_folder("org/model") is None  # open_clip loads it


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": {"shortest_edge": 64}}, "shortest_edge"),
        ({"size": 64, "do_center_crop": True}, "crop: True"),
        ({"do_normalize": False}, "do_normalize switched off"),
        ({"rescale_factor": 1.0}, r"rescale_factor 1\.0"),
        ({"image_mean": [0.5]}, "three numbers"),
        ({"resample": 0}, "resample 0"),
    ],
)
def test_preprocessing_that_is_not_supported(
    hugging_face: Path, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    for file in hugging_face.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ClipretError, match=match):
        load_model(str(tmp_path))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of the checkpoint ran",))


def test_bad_files_are_reported_in_one_line(
    hugging_face: Path, ofa_sys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    content = ofa_sys.read_bytes()

    def refuse(name: str, match: str) -> None:
        with pytest.raises(ClipretError, match=match) as caught:
            load_model(str(tmp_path / name))
        assert "\n" not in str(caught.value)

    (tmp_path / "truncated.pt").write_bytes(content[: len(content) // 2])
    refuse("truncated.pt", "cannot be loaded")
    torch.save({"state_dict": {"module.bert.embeddings.word_embeddings.weight": Evil()}}, tmp_path / "evil.pt")
    refuse("evil.pt", "could run code")
    assert capsys.readouterr().out == ""
    (tmp_path / "alone.pt").write_bytes(content)
    monkeypatch.setattr(chinese, "hf_hub_download", lambda *_: 1 / 0)
    refuse("alone.pt", r"no vocab\.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    refuse("alone.pt", "4 entries, but its embedding table")
    stored = torch.load(ofa_sys, weights_only=True)
    del stored["state_dict"]["module.visual.ln_post.weight"]
    torch.save(stored, tmp_path / "lacks.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    refuse("lacks.pt", r"1 weights are missing: visual\.ln_post\.weight;")
    stored["state_dict"] |= {"visual.ln_post.weight": torch.ones(128), "a": torch.ones(1), "b": torch.ones(1)}
    torch.save(stored, tmp_path / "more.pt")
    refuse("more.pt", "2 weights are unknown: a, b")
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in hugging_face.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "preprocessor_config.json").unlink()
    assert load_model(str(folder)).image.resize == "squash"
    (folder / "model.safetensors").unlink()
    refuse("folder", "no weights")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    refuse("folder", "that of a 'clip'")
