"""A graph with fused operators of onnxruntime, against the original graph."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from clipret.bundle import Bundle
from clipret.errors import ClipretError
from clipret_export.fusion import fuse
from clipret_export.pipeline import export_bundle


def run(path: Path, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    embeddings: np.ndarray = session.run(None, {session.get_inputs()[0].name: batch})[0]
    return embeddings


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_fused_tower_gives_the_same_embeddings(
    exported: Callable[..., Bundle], precision: str, tower: str, tmp_path: Path
) -> None:
    plain = exported(precision).file(f"{tower}.onnx")
    fused = tmp_path / plain.name
    shutil.copy(plain, fused)
    counts = fuse(fused)
    # One per layer, except the last of the text tower: it attends from one token, whose position and mask vary.
    assert counts["MultiHeadAttention"] == (2 if tower == "image" else 1)
    assert counts["BiasGelu"] == 2
    assert counts["SkipLayerNormalization"] >= 2
    assert counts == Counter(node.op_type for node in onnx.load(fused).graph.node)
    assert counts["Softmax"] == 2 - counts["MultiHeadAttention"]
    assert counts["Gelu"] == 0
    rng = np.random.default_rng(0)
    for size in (1, 3):
        if tower == "image":
            batch = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        else:
            batch = rng.integers(1, 49000, (size, 9)).astype(np.int64)
            batch[:, -1] = 49407  # the end-of-text token, where the tower pools
        expected, embeddings = run(plain, batch), run(fused, batch)
        # onnxruntime's CPU provider computes halves in float32, but rounds between operators, and there are fewer now.
        np.testing.assert_allclose(embeddings, expected, atol=2e-5 if precision == "fp32" else 2e-3)


def test_a_graph_without_the_patterns_stays_as_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    shutil.copy(tiny_bundle / "image.onnx", path)
    batch = np.zeros((1, *onnx_size(path), 3), dtype=np.uint8)
    before = run(path, batch)
    assert not {"MultiHeadAttention", "BiasGelu", "SkipLayerNormalization"} & set(fuse(path))
    np.testing.assert_array_equal(run(path, batch), before)


def test_a_fused_bundle_passes_the_check_and_says_what_it_needs(model: str, tmp_path: Path) -> None:
    bundle = export_bundle(model, tmp_path / "bundle", fused=True)
    assert "MultiHeadAttention" in [node.op_type for node in onnx.load(bundle.file("image.onnx")).graph.node]
    with pytest.raises(ClipretError, match="fused operators run only in onnxruntime"):
        export_bundle(model, tmp_path / "other", precision="bf16", fused=True)


def onnx_size(path: Path) -> tuple[int, int]:
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    return shape[1].dim_value, shape[2].dim_value
