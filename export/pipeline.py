"""From a model to a bundle, which is written only after its towers agreed with torch."""

import contextlib
import json
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from clipret.bundle import FORMAT, Bundle, FileEntry, Manifest, file_entry
from clipret.export.graph import write_onnx
from clipret.export.precision import to_half
from clipret.export.towers import ImageTower, PlainAttention, TextTower, replace_modules
from clipret.export.verify import reference, verify
from clipret.files import new_folder
from clipret.training.loaded import LoadedModel
from clipret.training.models import load_model

__all__ = ["export_bundle"]


def export_bundle(
    source: str, out: Path, *, precision: Literal["fp32", "fp16"] = "fp32", overwrite: bool = False
) -> Bundle:
    """Export a run folder, a checkpoint or MODEL[:PRETRAINED] (see `load_model`) to the bundle folder `out`.

    Raises ClipretError when the source cannot be loaded, `out` is not empty (unless `overwrite`), or a tower
    disagrees with torch; then nothing is written.
    """
    with new_folder(out, overwrite=overwrite) as folder:  # first: a wrong place should not cost a model's loading
        loaded = load_model(source)
        expected = reference(loaded)
        _prepare(loaded.model, precision)
        image, text = ImageTower(loaded), TextTower(loaded)
        size = loaded.image.size
        pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        write_onnx(image, pixels, folder / "image.onnx", input_name="pixels", dynamic={0: "batch"})
        tokens = torch.ones(2, loaded.text.context_length, dtype=torch.int64)
        axes = {0: "batch", 1: "length"} if loaded.text.pad_to == "longest" else {0: "batch"}
        write_onnx(text, tokens, folder / "text.onnx", input_name="tokens", dynamic=axes)
        (folder / "tokenizer.json").write_text(loaded.tokenizer_json, encoding="utf-8")
        bundle = _write_manifest(folder, loaded, precision, expected.image.shape[1])
        report = verify(bundle, expected)
        (folder / "verify.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _write_manifest(folder, loaded, precision, expected.image.shape[1])
    return Bundle.open(out)


def _prepare(model: nn.Module, precision: str) -> None:
    """Rewrite the model in place into what exports well and, for fp16, multiplies in half."""
    model.eval().requires_grad_(False)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        # Into the convolutions before them; engines would do the same, but not across the casts of fp16. A tower that
        # cannot be traced keeps its normalisations and is merely slower.
        with contextlib.suppress(TraceError):
            model.visual = fuse(model.visual)  # type: ignore[arg-type]
    replace_modules(model, nn.MultiheadAttention, PlainAttention)
    if precision == "fp16":
        to_half(model)


def _write_manifest(folder: Path, loaded: LoadedModel, precision: Literal["fp32", "fp16"], dim: int) -> Bundle:
    files: dict[str, FileEntry] = {
        file.name: file_entry(file) for file in sorted(folder.iterdir()) if file.name != "bundle.json"
    }
    manifest = Manifest(
        format=FORMAT,
        model=loaded.name,
        source=loaded.source,
        source_sha256=loaded.source_sha256,
        precision=precision,
        embedding_dim=dim,
        logit_scale=float(loaded.model.logit_scale.exp()),  # type: ignore[operator]
        image=loaded.image,
        text=loaded.text,
        files=files,
    )
    (folder / "bundle.json").write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(folder)
