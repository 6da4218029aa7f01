"""What the parity check accepts and refuses: every fault here is one that real exporters have shipped."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from clipret.bundle import Bundle
from clipret.errors import ClipretError
from clipret_export import pipeline, towers
from clipret_export.cli import main
from clipret_export.parity import LIMITS, check_bundle, load_reference, parity_check
from clipret_export.pipeline import export_bundle
from clipret_export.samples import Sample, sample_images


def swapped_normalization(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and std in BGR order."""

    def make(loaded: Any) -> torch.nn.Module:
        tower = towers.ImageTower(loaded)
        tower.scale, tower.shift = tower.scale.flip(0), tower.shift.flip(0)
        return tower

    monkeypatch.setattr(pipeline, "ImageTower", make)


def baked_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text graph that runs at the full context length only."""
    write = pipeline.write_onnx

    def fixed(*args: Any, dynamic: dict[int, str], **options: Any) -> int:
        return write(*args, dynamic={0: dynamic[0]}, **options)

    monkeypatch.setattr(pipeline, "write_onnx", fixed)


def baked_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    write = pipeline.write_onnx

    def fixed(*args: Any, dynamic: dict[int, str], **options: Any) -> int:
        return write(*args, dynamic={axis: name for axis, name in dynamic.items() if axis}, **options)

    monkeypatch.setattr(pipeline, "write_onnx", fixed)


def wrong_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that squashes where the model was trained on padded squares."""
    describe = pipeline._manifest

    def wrong(*args: Any) -> Any:
        manifest = describe(*args)
        return msgspec.structs.replace(manifest, image=msgspec.structs.replace(manifest.image, resize="squash"))

    monkeypatch.setattr(pipeline, "_manifest", wrong)


def lost_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(loaded: Any) -> torch.nn.Module:
        tower = towers.TextTower(loaded)
        loaded.model.pooled_text.ln_final = torch.nn.Identity()
        return tower

    monkeypatch.setattr(pipeline, "TextTower", make)


def off_by_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings with the right direction and another length: no cosine shows it."""

    class Scaled(towers.TextTower):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return 1.5 * super().forward(tokens)

    monkeypatch.setattr(pipeline, "TextTower", Scaled)


def write_only(kind: str, whole: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the graph of the other, undamaged tower from a good bundle: writing it takes seconds."""
    write = pipeline.write_onnx

    def write_or_copy(tower: Any, example: Any, path: Path, **options: Any) -> int:
        if path.stem == kind:
            return write(tower, example, path, **options)
        shutil.copy(whole.file(path.name), path)
        return 0

    monkeypatch.setattr(pipeline, "write_onnx", write_or_copy)


@pytest.mark.parametrize(
    ("damage", "tower", "precision"),
    [
        (baked_length, "text", "fp32"),  # it does not run in any precision
        (baked_batch, "image", "fp32"),
        *(
            (damage, tower, precision)
            for damage, tower in (
                (swapped_normalization, "image"),
                (wrong_resize, "image"),
                (lost_layer_norm, "text"),
                (off_by_a_factor, "text"),
            )
            for precision in ("fp32", "fp16")
        ),
    ],
)
def test_a_wrong_bundle_is_never_written(
    damage: Callable[[pytest.MonkeyPatch], None],
    tower: str,
    precision: Any,
    model: str,
    exported: Callable[..., Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "_ATTEMPTS", 1)
    write_only("none" if damage is wrong_resize else tower, exported(precision), monkeypatch)
    damage(monkeypatch)
    with pytest.raises(ClipretError, match=f"{tower} tower"):
        export_bundle(model, tmp_path / "bundle", precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_the_check_runs_again_without_the_model(exported: Callable[..., Bundle]) -> None:
    bundle = exported()
    report = parity_check(bundle, load_reference(bundle), LIMITS["fp32"])
    assert report.problems == {}
    written = json.loads((bundle.path / "verify.json").read_text())
    assert report.image.min_cosine == pytest.approx(written["image"]["min_cosine"], abs=1e-9)
    stricter = parity_check(bundle, load_reference(bundle), replace(LIMITS["fp32"], cosine=1 + 1e-9))
    assert set(stricter.problems) == {"image", "text"}


def test_nan_is_a_problem(exported: Callable[..., Bundle]) -> None:
    bundle = exported()
    expected = load_reference(bundle)
    broken = replace(expected, image=np.full_like(expected.image, np.nan))
    assert "cosine nan" in parity_check(bundle, broken, LIMITS["int8"]).problems["image"][0]


def write_images(folder: Path) -> Path:
    """Twelve images, one of them broken, and an annotations file with a caption for each."""
    folder.mkdir()
    lines = ["path,caption"]
    for number, image in enumerate(sample_images()):
        image.save(folder / f"{number}.png")
        lines.append(f"{number}.png,image number {number}")
    (folder / "5.png").write_bytes(b"no image")
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder / "captions.csv"


def test_the_users_own_images_count(model: str, tmp_path: Path) -> None:
    """Recall of torch and of the bundle on the user's images; unreadable images are reported and left out of both."""
    source = write_images(tmp_path / "images")
    bundle = export_bundle(model, tmp_path / "bundle", precision="fp16", verify_data=Sample(source))
    report = json.loads((bundle.path / "verify.json").read_text())
    assert (report["images"], report["texts"]) == (11, 11)
    assert report["recall"] == report["recall_torch"]
    assert [Path(path).name for path, _ in report["skipped"]] == ["5.png"]
    again = check_bundle(bundle, LIMITS["fp16"], data=Sample(source))
    assert again.recall == report["recall"]
    with pytest.raises(ClipretError, match="was not exported with these"):
        check_bundle(bundle, LIMITS["fp16"], data=Sample(source, limit=4))


def test_a_lost_recall_is_a_problem(model: str, exported: Callable[..., Bundle], tmp_path: Path) -> None:
    from clipret_export.reference import reference
    from clipret_training.models.load import load_model

    source = write_images(tmp_path / "images")
    bundle = exported()
    expected, _ = reference(load_model(model), Sample(source).read())
    assert expected.pairs is not None
    assert parity_check(bundle, expected, LIMITS["fp32"]).problems == {}
    # torch as if it ranked the right image first for every caption
    assert expected.data_text is not None
    perfect = replace(expected, data_text=expected.data_image)
    report = parity_check(bundle, perfect, replace(LIMITS["fp32"], cosine=-1))
    assert "recall@1 differs" in " ".join(report.problems["text"])


def test_the_command_checks_a_bundle(exported: Callable[..., Bundle]) -> None:
    bundle = exported().path
    good = CliRunner().invoke(main, ["check", str(bundle)])
    assert good.exit_code == 0, good.output
    assert "smallest cosine" in good.stdout
    as_json = CliRunner().invoke(main, ["check", str(bundle), "--json"])
    assert json.loads(as_json.stdout)["problems"] == {}
    bad = CliRunner().invoke(main, ["check", str(bundle), "--verify", "min_cosine=1.1"])
    assert bad.exit_code == 1
    assert "smallest cosine" in bad.stderr
    assert len(bad.stderr.strip().splitlines()) == 1


def test_a_bundle_without_a_reference(bundle_copy: Callable[..., Bundle]) -> None:
    bundle = bundle_copy()
    kept = {name: entry for name, entry in bundle.manifest.files.items() if name != "reference.npz"}
    manifest = msgspec.structs.replace(bundle.manifest, files=kept)
    (bundle.path / "bundle.json").write_text(manifest.to_json())
    with pytest.raises(ClipretError, match=r"has no reference\.npz"):
        load_reference(Bundle.open(bundle.path))
