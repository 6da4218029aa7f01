"""`clipret-export check` without torch: the embeddings it compares with are in the bundle."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from clipret.bundle import Bundle, file_entry
from clipret.inference.encoder import Encoder
from clipret_export.cli import main
from clipret_export.parity import Reference
from clipret_export.samples import TEXTS, sample_images


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle with its own embeddings as the reference."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    encoder = Encoder(Bundle.open(folder))
    image = np.concatenate([batch.embeddings for batch in encoder.encode_images(sample_images(), lambda item: item)])
    (folder / "reference.npz").write_bytes(Reference(image, encoder.encode_texts(TEXTS)).to_bytes())
    manifest = Bundle.open(folder).manifest
    files = manifest.files | {"reference.npz": file_entry(folder / "reference.npz")}
    (folder / "bundle.json").write_text(replace(manifest, files=files).to_json())
    return folder


def test_it_needs_neither_torch_nor_onnx() -> None:
    code = "import sys, clipret_export.cli, clipret_export.parity; print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_good_bundle(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["check", str(bundle), "--verify", "min_cosine=0.99"])
    # Texts without a colour word have the same embedding in this model: the check confuses these, and only these.
    assert "smallest cosine" in result.stdout
    assert "image tower" not in result.stderr


def test_another_preprocessing_is_found(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    other = "squash" if manifest.image.resize != "squash" else "longest"
    changed = replace(manifest, image=replace(manifest.image, resize=other))
    (bundle / "bundle.json").write_text(changed.to_json())
    result = CliRunner().invoke(main, ["check", str(bundle)])
    assert result.exit_code == 1
    assert "image tower" in result.stderr.splitlines()[-1]
