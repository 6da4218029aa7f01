"""Real exports of small models: a ViT in open_clip's own format, and what the gate lets through."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import open_clip
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from clipret import Bundle, ClipretError, Encoder
from clipret.export import pipeline
from clipret.export.cli import main
from clipret.export.pipeline import export_bundle
from clipret.export.precision import to_half
from clipret.export.towers import PlainAttention, replace_modules
from clipret.export.verify import TEXTS, pictures
from clipret.training.models import load_model
from clipret.training.run import RunFolder

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "longest"},
}


def write_model(folder: Path, stream: float = 1.0) -> str:
    """A random ViT as open_clip saves one to disk; `stream` scales its image tower's residual stream."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    model = open_clip.model.CLIP(**CONFIG["model_cfg"])
    model.visual.ln_pre.weight.data *= stream
    for block in model.visual.transformer.resblocks:  # so that what the blocks add is not lost beside it
        block.attn.out_proj.weight.data *= stream
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "vit")


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(model, tmp_path_factory.mktemp("export") / "bundle", precision=request.param)


def torch_rows(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings by open_clip alone: its model, its transform, its tokenizer."""
    net, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model}")
    tokens = open_clip.get_tokenizer(f"local-dir:{model}")(TEXTS)
    with torch.inference_mode():
        images = net.eval().encode_image(torch.stack([transform(picture) for picture in pictures()]), normalize=True)
        return images.numpy(), net.encode_text(tokens, normalize=True).numpy()


def test_the_bundle_equals_open_clip_from_picture_to_row(bundle: Bundle, model: str) -> None:
    """Preprocessing and tokenizer included: nothing of clipret is on the reference's side."""
    images, texts = torch_rows(model)
    tolerance = {"fp32": 2e-6, "fp16": 2e-3}[bundle.manifest.precision]
    for size in (1, 3, 8):
        encoder = Encoder(bundle, batch_size=size)
        rows = np.concatenate([batch.rows for batch in encoder.encode_images(pictures(), lambda picture: picture)])
        np.testing.assert_allclose(rows, images, atol=tolerance)
        np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts, atol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_of_the_small_model(precision: Literal["fp32", "fp16"], tmp_path: Path) -> None:
    """A run folder exports from its best checkpoint, its normalisations folded into the convolutions."""
    loaded = load_model("clipret-small", captions=[*TEXTS, "一辆红色的轿车"], seed=1)
    for module in loaded.model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training: nothing is at its initial value
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    run = RunFolder.create(tmp_path / "run", {"seed": 1}, loaded)
    run.save(loaded, "best")
    bundle = export_bundle(str(tmp_path / "run"), tmp_path / "bundle", precision=precision)
    assert bundle.manifest.model == "clipret-small"
    kinds = {node.op_type for node in onnx.load(bundle.path / "image.onnx").graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds


def test_rows_have_unit_length_and_any_text_length_runs(bundle: Bundle) -> None:
    tower = Encoder(bundle).text_tower
    for length in (1, 2, 7, 24):
        rows = tower.run(np.full((2, length), 49407, dtype=np.int64))
        assert rows.shape == (2, 48)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_the_manifest_describes_the_folder(bundle: Bundle) -> None:
    manifest = bundle.manifest
    names = {file.name for file in bundle.path.iterdir()}
    assert names == {"bundle.json", "image.onnx", "text.onnx", "tokenizer.json", "verify.json"}
    assert set(manifest.files) == names - {"bundle.json"}
    for name in manifest.files:
        bundle.file(name)
    assert (manifest.image.size, manifest.image.resize) == (32, "longest")
    assert (manifest.text.context_length, manifest.text.pad_to) == (24, "longest")
    assert manifest.embedding_dim == 48
    assert manifest.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    report = json.loads(bundle.file("verify.json").read_text())
    assert report["image"]["min_cosine"] >= report["image"]["limit"]
    # the machine that exports leaves no trace
    assert b"site-packages" not in (bundle.path / "image.onnx").read_bytes()


def test_fp16_halves_the_weights(model: str, tmp_path: Path) -> None:
    def weights(precision: Literal["fp32", "fp16"]) -> int:
        folder = export_bundle(model, tmp_path / precision, precision=precision).path
        return sum(file.stat().st_size for file in folder.glob("*.onnx"))

    assert weights("fp16") < 0.6 * weights("fp32")


def test_the_same_model_gives_the_same_fingerprint(model: str, tmp_path: Path) -> None:
    assert export_bundle(model, tmp_path / "a").fingerprint == export_bundle(model, tmp_path / "b").fingerprint


def test_fp16_survives_activations_that_half_cannot_hold(tmp_path: Path) -> None:
    """A residual stream beyond 65,504 makes a plain half model NaN; with the stream in float32 it exports."""
    model = write_model(tmp_path / "loud", stream=4e4)
    net = open_clip.create_model(f"local-dir:{model}").eval()
    plain = net.visual.half()(torch.rand(1, 3, 32, 32, dtype=torch.float16))
    assert not plain.isfinite().all()
    bundle = export_bundle(model, tmp_path / "bundle", precision="fp16")
    assert json.loads((bundle.path / "verify.json").read_text())["image"]["min_cosine"] > 0.9999


def test_plain_attention_equals_the_packed_one() -> None:
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    nn.init.normal_(packed.in_proj_bias)
    x, mask = torch.randn(3, 5, 32), torch.full((5, 5), float("-inf")).triu(1)
    expected = packed(x, x, x, need_weights=False, attn_mask=mask)[0]
    torch.testing.assert_close(PlainAttention(packed)(x, x, x, attn_mask=mask)[0], expected, atol=1e-6, rtol=1e-5)


def test_half_leaves_no_product_in_float32() -> None:
    holder = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 4), nn.Embedding(5, 4), nn.LayerNorm(4))
    holder.append(nn.MultiheadAttention(4, 2))
    replace_modules(holder, nn.MultiheadAttention, PlainAttention)
    to_half(holder)
    kinds = {name: value.dtype for name, value in holder.named_parameters()}
    assert all((dtype == torch.float32) == name.startswith("3.") for name, dtype in kinds.items()), kinds


def broken_image(tower: nn.Module) -> None:
    tower.scale *= 1.05


def broken_text(tower: nn.Module) -> None:
    tower.model.ln_final = nn.Identity()


@pytest.mark.parametrize(("tower", "damage"), [("ImageTower", broken_image), ("TextTower", broken_text)])
def test_a_wrong_tower_is_never_written(
    tower: str, damage: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = getattr(pipeline, tower)

    def make(loaded: Any) -> nn.Module:
        made: nn.Module = good(loaded)
        damage(made)
        return made

    monkeypatch.setattr(pipeline, tower, make)
    with pytest.raises(ClipretError, match="differs from torch"):
        export_bundle(model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_old_bundle(model: str, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/old").touch()
    with pytest.raises(ClipretError, match="is not empty"):
        export_bundle(model, tmp_path / "bundle")
    with pytest.raises(ClipretError):
        export_bundle("no-such-model", tmp_path / "bundle", overwrite=True)
    assert [file.name for file in (tmp_path / "bundle").iterdir()] == ["old"]
    export_bundle(model, tmp_path / "bundle", overwrite=True)
    assert not (tmp_path / "bundle/old").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_the_command(model: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [model, str(tmp_path / "bundle"), "--fp16"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(str(tmp_path / "bundle"))
    assert "fp16" in result.stdout
    wrong = CliRunner().invoke(main, ["ViT-B-23", str(tmp_path / "new")])
    assert wrong.exit_code == 1
    assert wrong.stdout == ""
    assert "did you mean ViT-B-32" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()
