"""Real exports of small models: a ViT in open_clip's format, and what passes the parity check."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import open_clip
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from clipret import Bundle, ClipretError, Encoder, EncoderConfig
from clipret_export.cli import main
from clipret_export.pipeline import export_bundle
from clipret_export.samples import TEXTS, sample_images
from clipret_training.models.load import load_model
from clipret_training.run import RunFolder


@pytest.fixture(params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, exported: Callable[..., Bundle]) -> Bundle:
    return exported(request.param)


def torch_embeddings(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings by open_clip alone: its model, its transform, its tokenizer."""
    net, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model}")
    tokens = open_clip.get_tokenizer(f"local-dir:{model}")(TEXTS)
    with torch.inference_mode():
        images = net.eval().encode_image(torch.stack([transform(image) for image in sample_images()]), normalize=True)
        return images.numpy(), net.encode_text(tokens, normalize=True).numpy()


def test_the_bundle_equals_open_clip_from_image_to_embedding(bundle: Bundle, model: str) -> None:
    """Preprocessing and tokenizer included: nothing of clipret is on the reference's side."""
    images, texts = torch_embeddings(model)
    tolerance = {"fp32": 2e-6, "fp16": 2e-3}[bundle.manifest.precision]
    for size in (1, 3, 8):
        encoder = Encoder(bundle, EncoderConfig(batch_size=size))
        embeddings = np.concatenate(
            [batch.embeddings for batch in encoder.encode_images(sample_images(), lambda image: image)]
        )
        np.testing.assert_allclose(embeddings, images, atol=tolerance)
        np.testing.assert_allclose(encoder.encode_texts(TEXTS), texts, atol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_of_the_small_model(precision: Literal["fp32", "fp16"], tmp_path: Path) -> None:
    """A run folder exports from its best checkpoint, with its normalizations folded into the convolutions."""
    loaded = load_model("clipret-small", captions=[*TEXTS, "一辆红色的轿车"], seed=1)
    for module in loaded.model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: no value is the initial one
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


def test_embeddings_have_unit_length_and_any_text_length_runs(bundle: Bundle) -> None:
    tower = Encoder(bundle).text_tower
    for length in (1, 2, 7, 24):
        embeddings = tower.run(np.full((2, length), 49407, dtype=np.int64))
        assert embeddings.shape == (2, 48)
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_the_manifest_describes_the_folder(bundle: Bundle) -> None:
    manifest = bundle.manifest
    names = {file.name for file in bundle.path.iterdir()}
    assert names == {"bundle.json", "image.onnx", "text.onnx", "tokenizer.json", "verify.json", "reference.npz"}
    assert set(manifest.files) == names - {"bundle.json"}
    for name in manifest.files:
        bundle.file(name)
    assert (manifest.image.size, manifest.image.resize) == (32, "longest")
    assert (manifest.text.context_length, manifest.text.pad_to) == (24, "longest")
    assert manifest.embedding_dim == 48
    assert manifest.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    report = json.loads(bundle.file("verify.json").read_text())
    assert report["image"]["min_cosine"] >= report["limits"]["cosine"]
    assert report["nodes"]["image"] == len(onnx.load(bundle.path / "image.onnx").graph.node)
    # no paths of the exporting machine
    assert b"site-packages" not in (bundle.path / "image.onnx").read_bytes()


def test_fp16_halves_the_weights(exported: Callable[..., Bundle]) -> None:
    def weights(precision: Literal["fp32", "fp16"]) -> int:
        return sum(file.stat().st_size for file in exported(precision).path.glob("*.onnx"))

    assert weights("fp16") < 0.6 * weights("fp32")


def test_overwriting_replaces_a_bundle_by_the_same_one(
    model: str, bundle_copy: Callable[..., Bundle], tmp_path: Path
) -> None:
    old = bundle_copy()
    inode = old.file("image.onnx").stat().st_ino
    new = export_bundle(model, tmp_path / "bundle", overwrite=True)
    assert new.file("image.onnx").stat().st_ino != inode
    assert new.fingerprint == old.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_fp16_survives_activations_that_half_cannot_hold(write_vit: Any, tmp_path: Path) -> None:
    """A residual stream beyond 65,504 makes a model in plain half precision NaN; with a float32 stream it exports."""
    model = write_vit(tmp_path / "loud", stream=4e4)
    net = open_clip.create_model(f"local-dir:{model}").eval()
    plain = net.visual.half()(torch.rand(1, 3, 32, 32, dtype=torch.float16))
    assert not plain.isfinite().all()
    bundle = export_bundle(model, tmp_path / "bundle", precision="fp16")
    assert json.loads((bundle.path / "verify.json").read_text())["image"]["min_cosine"] > 0.9999


def test_a_failed_export_keeps_the_old_bundle(model: str, bundle_copy: Callable[..., Bundle], tmp_path: Path) -> None:
    old = bundle_copy().file("image.onnx").stat().st_ino
    with pytest.raises(ClipretError, match="is not empty"):
        export_bundle(model, tmp_path / "bundle")
    with pytest.raises(ClipretError):
        export_bundle("no-such-model", tmp_path / "bundle", overwrite=True)
    assert (tmp_path / "bundle/image.onnx").stat().st_ino == old
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]


def test_the_command(model: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    sample_images(1)[0].save(tmp_path / "images" / "one.png")
    command = [model, str(tmp_path / "bundle"), "--fp16", "--verify", str(tmp_path / "images")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "bundle" / "verify.json").read_text())
    assert (report["images"], report["recall"]) == (1, None)  # a folder has no captions
    assert result.stdout.startswith(str(tmp_path / "bundle"))
    assert "fp16" in result.stdout
    wrong = CliRunner().invoke(main, ["ViT-B-23", str(tmp_path / "new")])
    assert wrong.exit_code == 1
    assert wrong.stdout == ""
    assert "did you mean ViT-B-32" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()
    both = CliRunner().invoke(main, [model, str(tmp_path / "new"), "--fp16", "--int8"])
    assert both.exit_code == 2
    assert "one precision" in both.stderr
