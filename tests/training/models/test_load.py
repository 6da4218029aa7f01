import doctest
import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from clipret.bundle import ImageSpec, TextSpec
from clipret.errors import ClipretError
from clipret.images.decode import load
from clipret.inference.tokenizer import Tokenizer
from clipret_training.models import load as loading
from clipret_training.models.load import architecture, load_model
from clipret_training.tuning.precision import autocast

CAPTIONS = ["a red car and a blue truck", "a dog runs", "一辆红色的车", "two dogs"]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in open_clip's format with random weights."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    torch.manual_seed(3)
    model = open_clip.CLIP(**TINY)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "interpolation": "bilinear",
        "resize_mode": "longest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess}))
    return folder


def test_small_embeddings_ignore_padding_and_the_batch() -> None:
    loaded = load_model("clipret-small", captions=CAPTIONS)
    ids = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(CAPTIONS))
    together = loaded.model.encode_text(ids)
    for embedding, text in zip(together, CAPTIONS, strict=True):
        alone = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)([text]))
        padded = torch.nn.functional.pad(alone, (0, 30))
        torch.testing.assert_close(loaded.model.encode_text(alone)[0], embedding, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded.model.encode_text(padded)[0], embedding, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_small_takes_any_image_size_and_normalizes() -> None:
    model = load_model("clipret-small", captions=CAPTIONS).model
    for size in (64, 80, 100):
        embeddings = model.encode_image(torch.rand(2, 3, size, size), normalize=True)
        assert embeddings.shape == (2, 256)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_the_seed_determines_new_weights_and_not_the_state_of_torch() -> None:
    state = torch.get_rng_state()
    first, same, other = (load_model("clipret-small", seed=seed, captions=CAPTIONS) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.source_sha256 == same.source_sha256 != other.source_sha256


def test_open_clip_folder_is_open_clips_model(tiny: Path) -> None:
    loaded = load_model(str(tiny))
    reference = open_clip.create_model(f"local-dir:{tiny}").eval()
    assert loaded.name == tiny.name
    assert loaded.image == ImageSpec(32, "longest", "bilinear", fill=0)
    assert loaded.text == TextSpec(77, "clip", "longest")
    assert (loaded.mean, loaded.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    ids = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)
    short = torch.from_numpy(Tokenizer(loaded.tokenizer_json, loaded.text)(CAPTIONS))
    assert short.shape[1] < 77
    torch.testing.assert_close(loaded.model.encode_text(short), reference.encode_text(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_is_open_clips_pixel_for_pixel(
    tiny: Path, tmp_path: Path, mode: str, interpolation: str, colour_folder: Path
) -> None:
    config = json.loads((tiny / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"resize_mode": mode, "interpolation": interpolation}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").write_bytes((tiny / "open_clip_model.safetensors").read_bytes())
    loaded = load_model(str(tmp_path))
    *_, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    for path in sorted(colour_folder.rglob("*.*")):
        ours = torch.from_numpy(load(path, loaded.image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
        with Image.open(path) as image:
            torch.testing.assert_close((ours - mean) / std, transform(image), rtol=0, atol=1e-5)


def test_images_that_are_not_square_are_refused(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = [32, 48]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ClipretError, match="only squares are supported"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoint_file_for_a_named_architecture(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {"tiny-clip": TINY})
    torch.manual_seed(5)
    model = open_clip.CLIP(**TINY).eval()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file)
    else:
        save_file(model.state_dict(), file)
    loaded = load_model(f"tiny-clip:{file}")
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.model.encode_image(pixels), model.encode_image(pixels))
    assert loaded.source == f"tiny-clip:{file}"
    with pytest.raises(ClipretError, match="ViT-B-32:"):  # the file alone does not name its architecture
        load_model(str(file))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of the checkpoint ran",))


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(ClipretError, match="could run code"):
        load_model(f"ViT-S-32:{tmp_path / 'evil.pt'}")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-B-23", "did you mean .*ViT-B-32"),
        ("clipret-smal", "did you mean clipret-small"),
        ("ViT-B-32:laion", "similar: laion"),
        ("ViT-B-32:missing.pt", "missing.pt does not exist"),
        ("ViT-B-32:", "ends in a colon"),
        ("clipret-small", "train it"),
        ("clipret-small:openai", "no pretrained weights"),
        ("local-dir:nowhere", "cannot be read"),
        ("missing.safetensors", "does not exist"),
    ],
)
def test_an_unknown_source_is_reported_in_one_line(source: str, message: str) -> None:
    with pytest.raises(ClipretError, match=message) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_fit_is_reported_in_one_line(tmp_path: Path) -> None:
    save_file({"visual.proj": torch.zeros(3, 3), "logit_scale": torch.zeros(())}, tmp_path / "other.safetensors")
    with pytest.raises(ClipretError, match="cannot be loaded") as caught:
        load_model(f"ViT-S-32:{tmp_path / 'other.safetensors'}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("source", ["ViT-B-32:openai", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"])
def test_a_hub_that_cannot_be_reached(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ClipretError, match=r"cannot be (loaded|read)") as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


def test_architecture_is_known_without_loading(tiny: Path) -> None:
    assert architecture("clipret-small") == ("clipret-small", False)
    assert architecture("ViT-B-32") == ("ViT-B-32", False)
    assert architecture("ViT-B-32:openai") == ("ViT-B-32", True)
    assert architecture(str(tiny))[1]


def test_attention_stays_float32_under_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = F.scaled_dot_product_attention, []

    def spy(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(query.dtype)
        return original(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer, x = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.rand(3, 5, 8)
    with autocast("bf16", torch.device("cpu")):
        y, _ = layer(x, x, x, need_weights=False)
    assert seen == [torch.float32]
    assert y.dtype == torch.bfloat16  # the projections around it are in bf16
    assert F.scaled_dot_product_attention is spy


def test_the_example_of_load_model_runs() -> None:
    result = doctest.testmod(loading)
    assert result.attempted
    assert not result.failed
