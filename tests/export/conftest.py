"""A small random model in open_clip's format, which most of these tests export, and its bundles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from clipret.bundle import Bundle
from clipret_export.pipeline import export_bundle

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "longest"},
}


def write_model(folder: Path, stream: float = 1.0) -> str:
    """Save a random ViT in open_clip's format; `stream` scales the residual stream of its image tower."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    model = open_clip.model.CLIP(**CONFIG["model_cfg"])
    model.visual.ln_pre.weight.data *= stream
    for block in model.visual.transformer.resblocks:  # otherwise the output of the blocks is lost next to it
        block.attn.out_proj.weight.data *= stream
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="session")
def write_vit() -> Callable[..., str]:
    return write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "vit")


@pytest.fixture(scope="session")
def exported(model: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """exported(precision): the bundle of `model`, shared by the tests of all workers. Do not change it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "exported"

    def get(precision: Any = "fp32") -> Bundle:
        with FileLock(f"{folder}-{precision}.lock"):
            if not (folder / precision).exists():
                export_bundle(model, folder / precision, precision=precision)
        return Bundle.open(folder / precision)

    return get


@pytest.fixture
def bundle_copy(exported: Callable[..., Bundle], tmp_path: Path) -> Callable[..., Bundle]:
    """bundle_copy(precision): a copy of that bundle in tmp_path/bundle, which a test may change."""

    def get(precision: Any = "fp32") -> Bundle:
        return Bundle.open(shutil.copytree(exported(precision).path, tmp_path / "bundle"))

    return get
