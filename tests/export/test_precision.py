"""What is computed in lower precision, what stays in float32, and how the export decides it."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from torch import nn

from clipret.bundle import Bundle, Precision
from clipret.errors import ClipretError
from clipret.inference.config import EncoderConfig
from clipret.inference.encoder import Encoder
from clipret_export import pipeline
from clipret_export.calibration import observe, overflows
from clipret_export.layers import replace_modules
from clipret_export.parity import LIMITS, Limits
from clipret_export.pipeline import export_bundle
from clipret_export.precision import FLOATS, convert
from clipret_export.reference import inputs, reference, texts
from clipret_export.samples import TEXTS, Sample, sample_images
from clipret_export.sensitivity import costs, worst
from clipret_export.towers import ImageTower, PlainAttention, TextTower, rewrite
from clipret_training.models.load import load_model


def drawn(folder: Path) -> Sample:
    """Twenty-four images with a caption each."""
    folder.mkdir()
    lines = ["path,caption"]
    for number, image in enumerate(sample_images(24)):
        image.save(folder / f"{number}.png")
        lines.append(f"{number}.png,an image with number {number}")
    (folder / "captions.csv").write_text("\n".join(lines))
    return Sample(folder / "captions.csv")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return drawn(tmp_path_factory.mktemp("sample") / "images")


@pytest.fixture(scope="module")
def int8(model: str, sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return export_bundle(model, folder, precision="int8", calibration_data=sample)


def tower_of(model: str, kind: str) -> tuple[nn.Module, list[torch.Tensor]]:
    loaded = load_model(model)
    rewrite(loaded.model)
    if kind == "image":
        return ImageTower(loaded).eval(), inputs(loaded, sample_images())
    return TextTower(loaded).eval(), texts(loaded, TEXTS)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_rewriting_leaves_the_embedding_as_it_is(model: str, kind: str) -> None:
    """Plain attention, early pooling and trimmed texts: together within 1e-5 of the original model."""
    expected, _ = reference(load_model(model))
    tower, (batch,) = tower_of(model, kind)
    with torch.inference_mode():
        np.testing.assert_allclose(tower(batch).numpy(), getattr(expected, kind), rtol=0, atol=1e-5)


def test_the_last_block_computes_one_token(model: str) -> None:
    tower, (batch,) = tower_of(model, "image")
    shapes = {}
    for name, module in tower.named_modules():
        if name.endswith("mlp.c_fc"):
            module.register_forward_hook(lambda _m, args, _y, name=name: shapes.update({name: args[0].shape[1]}))
    tower(batch)
    assert list(shapes.values()) == [17, 1]  # 16 patches and the class token


def test_plain_attention_equals_the_packed_one() -> None:
    torch.manual_seed(0)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    for packed in (nn.MultiheadAttention(32, 4, batch_first=True), nn.MultiheadAttention(32, 4)):
        nn.init.normal_(packed.eval().in_proj_bias)
        x = torch.randn(5, 5, 32)
        expected = packed(x, x, x, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(PlainAttention(packed)(x, x, x, attn_mask=mask)[0], expected, atol=1e-5, rtol=1e-5)
    cross = nn.MultiheadAttention(32, 4, batch_first=True, kdim=24, vdim=24).eval()
    q, kv = torch.randn(3, 2, 32), torch.randn(3, 7, 24)
    expected = cross(q, kv, kv, need_weights=False)[0]
    torch.testing.assert_close(PlainAttention(cross)(q, kv, kv)[0], expected, atol=1e-5, rtol=1e-5)


def test_half_leaves_no_product_in_float32() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv, self.linear = nn.Embedding(5, 4), nn.Conv2d(1, 4, (1, 4)), nn.Linear(4, 4)
            self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.conv(self.table(ids)[:, None]).squeeze(-1).transpose(1, 2)
            x = self.norm(self.linear(x))
            return self.attention(x, x, x)[0].mean(dim=1)

    holder = Holder().eval()
    replace_modules(holder, nn.MultiheadAttention, PlainAttention)
    ids = torch.randint(5, (2, 3))
    before = holder(ids)
    ranges = observe(holder, [ids])
    assert "attention" in ranges  # the product of queries and keys is not a layer, but is converted as well
    convert(holder, "fp16", ranges, ())
    kinds = {name: value.dtype for name, value in holder.named_parameters()}
    assert all((dtype == torch.float32) == name.startswith("norm") for name, dtype in kinds.items()), kinds
    torch.testing.assert_close(holder(ids), before, atol=5e-3, rtol=5e-3)


def scale_layer(folder: str, factor: float) -> None:
    """Scale a hidden layer of the image tower until its output overflows in half precision.

    The next layer is scaled down by the same factor, so the model hardly changes.
    """
    from safetensors.torch import load_file, save_file

    file = Path(folder) / "open_clip_model.safetensors"
    state = load_file(file)
    name = "visual.transformer.resblocks.0.mlp"
    for part in ("c_fc.weight", "c_fc.bias"):
        state[f"{name}.{part}"] *= factor
    state[f"{name}.c_proj.weight"] /= factor
    save_file(state, file)


def test_a_layer_that_overflows_stays_in_float32(write_vit: Callable[..., str], tmp_path: Path) -> None:
    model = write_vit(tmp_path / "loud")
    scale_layer(model, 1e6)
    plain = open_clip.create_model(f"local-dir:{model}").eval().visual.half()
    assert not plain(torch.rand(2, 3, 32, 32, dtype=torch.float16)).isfinite().all()
    bundle = export_bundle(model, tmp_path / "bundle", precision="fp16")
    assert bundle.manifest.float32_layers == [
        "visual.transformer.resblocks.0.mlp.c_fc",
        "visual.transformer.resblocks.0.mlp.c_proj",
    ]
    report = json.loads((bundle.path / "verify.json").read_text())
    assert report["image"]["min_cosine"] > 0.99999
    assert report["float32_layers"] == bundle.manifest.float32_layers


def test_attention_scores_can_overflow_too() -> None:
    class Attend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x).sum(dim=(1, 2))

    x = torch.full((1, 1, 3, 16), 120.0)  # every value fits into a half, the scores of 120 * 120 * 16 / 4 do not
    tower = nn.Sequential(Attend())
    assert overflows(tower, observe(tower, [x])) == ["0"]
    assert overflows(tower, observe(tower, [x / 2])) == []


def test_what_the_hook_misses_torchs_half_finds(
    write_vit: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the ranges, the first attempt is NaN in torch's half precision; the second keeps the worst layers."""
    model = write_vit(tmp_path / "loud")
    scale_layer(model, 1e6)
    monkeypatch.setattr(pipeline, "overflows", lambda *_: [])
    bundle = export_bundle(model, tmp_path / "bundle", precision="fp16")
    assert "visual.transformer.resblocks.0.mlp.c_fc" in bundle.manifest.float32_layers
    monkeypatch.setattr(pipeline, "_ATTEMPTS", 1)
    with pytest.raises(ClipretError, match="in torch's fp16"):
        export_bundle(model, tmp_path / "one-attempt", precision="fp16")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_expected_cost_is_the_real_one(model: str, kind: str, precision: Precision) -> None:
    """One pass predicts the cost of converting all layers together within a factor of 2."""
    tower, batches = tower_of(model, kind)
    with torch.inference_mode():
        exact = torch.cat([tower(batch) for batch in batches]).double()
    ranges = observe(tower, batches)
    expected = sum(costs(tower, batches, ranges, precision).values())
    convert(tower, precision, ranges, ())
    with torch.inference_mode():
        rough = torch.cat([tower(batch) for batch in batches]).double()
    real = float(1 - nn.functional.cosine_similarity(exact, rough).mean())
    assert FLOATS[precision] in {value.dtype for value in tower.parameters()}
    assert real / 2 < expected < real * 2


def test_one_bad_layer_costs_the_most(write_vit: Callable[..., str], tmp_path: Path) -> None:
    """Outliers in the input of a layer ruin its int8 range; the measurement ranks that layer first."""
    model = write_vit(tmp_path / "vit")
    tower, batches = tower_of(model, "image")
    mlp = tower.get_submodule("model.visual.transformer.resblocks.1.mlp")
    mlp.c_fc.weight.data[3] *= 500
    mlp.c_proj.weight.data[:, 3] /= 500
    loss = costs(tower, batches, observe(tower, batches, samples=True), "int8")
    assert worst(loss, sum(loss.values()) / 2)[0] == "model.visual.transformer.resblocks.1.mlp.c_proj"


def test_worst_layers_by_budget() -> None:
    loss = {"a": 1.0, "b": 4.0, "c": 2.0, "d": float("inf")}
    assert worst(loss, 100) == ["d"]
    assert worst(loss, 3) == ["d", "b"]
    assert worst(loss, 0.5) == ["d", "b", "c", "a"]


def test_int8_is_one_integer_product_a_layer_and_the_same_in_every_batch(int8: Bundle) -> None:
    report = json.loads((int8.path / "verify.json").read_text())
    assert report["image"]["min_cosine"] > 0.995
    assert report["text"]["min_cosine"] > 0.995
    assert report["image"]["batch_difference"] < 1e-6
    graph = onnx.load(int8.path / "image.onnx").graph
    kinds = Counter(node.op_type for node in graph.node)
    assert not {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"} & set(kinds)
    assert kinds["QuantizeLinear"] >= 10
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = [value.shape for name, value in weights.items() if name.endswith("c_fc.weight_scale")]
    assert scales == [(256,)] * 2  # one per channel
    encoder = Encoder(int8)
    alone = [next(iter(encoder.encode_images([image], lambda item: item))).embeddings[0] for image in sample_images()]
    together = next(iter(encoder.encode_images(sample_images(), lambda item: item))).embeddings
    np.testing.assert_allclose(np.stack(alone), together, rtol=0, atol=1e-5)


def test_int8_keeps_what_costs_most(model: str, int8: Bundle, sample: Sample, tmp_path: Path) -> None:
    """If plain int8 exceeds a limit, layers return to float32 until the bundle meets it."""
    plain = json.loads((int8.path / "verify.json").read_text())
    assert int8.manifest.float32_layers == []
    loss = 1 - min(plain["image"]["min_cosine"], plain["text"]["min_cosine"])
    limits = Limits(cosine=1 - loss / 4, relative=None, batch=1e-3, recall_points=0.5)
    bundle = export_bundle(model, tmp_path / "strict", precision="int8", calibration_data=sample, limits=limits)
    strict = json.loads((bundle.path / "verify.json").read_text())
    assert 0 < len(bundle.manifest.float32_layers) < 20
    assert min(strict["image"]["min_cosine"], strict["text"]["min_cosine"]) >= limits.cosine


def test_int8_of_convolutions(tmp_path: Path) -> None:
    from clipret_training.run import RunFolder

    sample = drawn(tmp_path / "images")
    loaded = load_model("clipret-small", captions=TEXTS, seed=1)
    RunFolder.create(tmp_path / "run", {"seed": 1}, loaded).save(loaded, "best")
    bundle = export_bundle(str(tmp_path / "run"), tmp_path / "bundle", precision="int8", verify_data=sample)
    kinds = Counter(node.op_type for node in onnx.load(bundle.path / "image.onnx").graph.node)
    assert kinds["Conv"] > 3
    assert kinds["QuantizeLinear"] >= kinds["Conv"]
    report = json.loads((bundle.path / "verify.json").read_text())
    assert report["images"] == 12  # one half; the other half calibrated
    sample.source.with_name("2.png").write_bytes(b"no image")
    bundle = export_bundle(str(tmp_path / "run"), tmp_path / "again", precision="int8", calibration_data=sample)
    report = json.loads((bundle.path / "verify.json").read_text())
    assert [Path(path).name for path, _ in report["skipped"]] == ["2.png"]


def test_int8_needs_something_to_calibrate_with(model: str, tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="--calibration FILE"):
        export_bundle(model, tmp_path / "bundle", precision="int8")
    assert list(tmp_path.iterdir()) == []
    sample_images(1)[0].save(tmp_path / "only.png")
    with pytest.raises(ClipretError, match="one image"):
        export_bundle(model, tmp_path / "bundle", precision="int8", verify_data=Sample(tmp_path))


def test_every_precision_has_limits() -> None:
    assert set(LIMITS) == {"fp32", "fp16", "bf16", "int8"}


def test_casts_between_two_halves_are_gone(exported: Callable[..., Bundle]) -> None:
    """No query, key or value goes to float32 and back between its projection and the attention."""
    graph = onnx.load(exported("fp16").path / "image.onnx").graph
    producer = {name: node for node in graph.node for name in node.output}

    def source(node: Any) -> Any:
        """The node whose values this one gets, skipping nodes that only move values."""
        before = producer.get(node.input[0])
        while before is not None and before.op_type in ("Reshape", "Transpose"):
            before = producer.get(before.input[0])
        return before

    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert casts
    assert not [node for node in casts if (before := source(node)) is not None and before.op_type == "Cast"]


def test_bf16_runs_in_openvino(model: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="bf16 on a CPU needs OpenVINO")
    bundle = export_bundle(model, tmp_path / "bundle", precision="bf16")
    report = json.loads((bundle.path / "verify.json").read_text())
    assert report["backend"] == "openvino"
    assert 0.999 < report["image"]["min_cosine"] < 0.9999999
    kinds = {tensor.data_type for tensor in onnx.load(bundle.path / "image.onnx").graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    with pytest.raises(ClipretError, match="onnxruntime does not support on a CPU"):
        Encoder(bundle, EncoderConfig(backend="onnxruntime")).encode_texts(["a"])


def test_openvino_and_onnxruntime_agree(exported: Callable[..., Bundle]) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    embeddings = [
        Encoder(exported(), EncoderConfig(backend=backend)).encode_texts(TEXTS)  # type: ignore[arg-type]
        for backend in ("onnxruntime", "openvino")
    ]
    np.testing.assert_allclose(*embeddings, rtol=0, atol=1e-5)
