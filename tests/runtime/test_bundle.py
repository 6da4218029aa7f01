import json
import shutil
from pathlib import Path

import pytest

from clipret.bundle import Bundle, Manifest
from clipret.errors import ClipretError


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def change(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(manifest | values))


def test_manifest_survives_a_round_trip(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_files_are_checked_when_asked_for(copy: Path) -> None:
    data = bytearray((copy / "text.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "text.onnx").write_bytes(data)
    bundle = Bundle.open(copy)
    assert bundle.file("image.onnx").is_file()
    with pytest.raises(ClipretError, match=r"text\.onnx has changed since the export"):
        bundle.file("text.onnx")


def test_a_short_file_is_named_with_both_sizes(copy: Path) -> None:
    (copy / "image.onnx").write_bytes(b"abc")
    with pytest.raises(ClipretError, match="has 3 bytes, the manifest says"):
        Bundle.open(copy).file("image.onnx")


def test_a_missing_file(copy: Path) -> None:
    (copy / "image.onnx").unlink()
    with pytest.raises(ClipretError, match=r"image\.onnx cannot be read \(No such file"):
        Bundle.open(copy).file("image.onnx")


def test_external_weights_are_checked_with_their_graph(copy: Path) -> None:
    (copy / "text.onnx.data").write_bytes(b"weights")
    manifest = json.loads((copy / "bundle.json").read_text())
    change(copy, files=manifest["files"] | {"text.onnx.data": {"bytes": 7, "sha256": "0" * 64}})
    with pytest.raises(ClipretError, match=r"text\.onnx\.data has changed"):
        Bundle.open(copy).file("text.onnx")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 99}, "its format is 99"),
        ({"colour": "red"}, "unknown field colour"),
        ({"embedding_dim": "8"}, "embedding_dim is '8': expected int, got str"),
        ({"embedding_dim": True}, "embedding_dim is True: expected int, got bool"),
        (
            {"image": {"size": 16, "resize": "stretch"}},
            "'stretch': expected one of shortest, longest, squash",
        ),
        ({"text": {}}, "text: missing required field context_length"),
        ({"embedding_dim": 0}, "embedding_dim is 0: expected int >= 1"),
        ({"logit_scale": -1}, r"logit_scale is -1: expected float > 0\.0"),
        ({"logit_scale": float("nan")}, "logit_scale is nan: expected float"),
        ({"image": {"size": 16, "fill": 256}}, r"image\.fill is 256: expected int <= 255"),
        (
            {"files": {"text.onnx": {"bytes": 1, "sha256": "f" * 63}}},
            r"files\.text\.onnx\.sha256 is 'f+\.\.\.f+'",
        ),
        (
            {"engines": {"a": {"library": "trt"}}},
            r"engines\.a\.library is 'trt': expected one of tensorrt",
        ),
        ({"float32_layers": ["a", 1]}, r"float32_layers\[1\] is 1: expected str"),
    ],
)
def test_a_bad_manifest_names_the_field(copy: Path, values: dict[str, object], message: str) -> None:
    change(copy, **values)
    with pytest.raises(ClipretError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\ufeff{}"])
def test_a_manifest_that_is_not_a_json_object(copy: Path, content: str) -> None:
    (copy / "bundle.json").write_text(content)
    with pytest.raises(ClipretError, match=r"bundle\.json cannot be used"):
        Bundle.open(copy)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match=r"is not a bundle.*clipret-export"):
        Bundle.open(tmp_path)


def test_the_fingerprint_depends_only_on_what_decides_embeddings(copy: Path) -> None:
    before = Bundle.open(copy).fingerprint
    change(copy, source="elsewhere", logit_scale=3)
    assert Bundle.open(copy).fingerprint == before
    change(copy, image={"size": 16, "resize": "squash"})
    assert Bundle.open(copy).fingerprint != before
