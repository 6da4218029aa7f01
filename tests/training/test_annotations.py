"""Lists with groups, and webdataset's archives."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret.errors import ClipretError
from clipret.images.decode import load
from clipret_training.annotations import read_annotation_files, read_annotations
from clipret_training.config import FitConfig
from clipret_training.data.batches import ImageReader
from clipret_training.fit import fit


def config(data: Path, **given: object) -> FitConfig:
    values: dict[str, object] = {"epochs": 1, "batch_size": 4, "threads": 1, "precision": "fp32", **given}
    return FitConfig.for_model(str(data), "clipret-small", **values)


def test_groups_are_read_by_image(tmp_path: Path) -> None:
    rows = ["path,caption,shop", "a.jpg,one,x", "b.jpg,two,", "a.jpg,three,y", "c.jpg,two,y"]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    annotations = read_annotations(config(tmp_path / "list.csv", group_column="shop"), str(tmp_path / "list.csv"), None)
    assert annotations.groups == ((0, 1), (), (1,))
    assert annotations.subset([2, 0]).groups == ((1,), (0, 1))
    assert annotations.fingerprint() != annotations.subset([0, 1]).fingerprint()
    with pytest.raises(ClipretError, match="no column 'shap': its columns are path, caption, shop"):
        read_annotations(config(tmp_path / "list.csv", group_column="shap"), str(tmp_path / "list.csv"), None)


def test_held_out_are_the_same_files_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "images" / "b.jpg")
    (tmp_path / "list.csv").write_text("path,caption\nimages/a.jpg,x\nlink.jpg,y\nimages/c.jpg,z\n")
    (tmp_path / "images" / "val.csv").write_text("path,caption\n../images/a.jpg,x\nb.jpg,y\n")
    (tmp_path / "mine.toml").write_text('data = "list.csv"\n')
    whole = str(tmp_path / "images" / "val.csv")
    for val in (whole, "images/val.csv"):
        given = FitConfig.for_model(None, "clipret-small", recipe="mine.toml", val=val)
        train, held_out = read_annotation_files(given)
        assert [path.name for path in train.pairs.paths] == ["c.jpg"]
        assert len(held_out.pairs.paths) == 2
    # Not made by for_model: as `clipret-train resume` reads an old params.toml.
    train, _ = read_annotation_files(dataclasses.replace(given, data="list.csv", val=whole))
    assert [path.name for path in train.pairs.paths] == ["c.jpg"]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two archives of six images: captions in .txt files in the first and in .json files in the second."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for number in range(6):
                content = io.BytesIO()
                pixels = np.full((30, 40, 3), rng.integers(0, 256, 3), np.uint8)
                Image.fromarray(pixels).save(content, "PNG")
                caption = f"an image {number % 4}"
                meta = json.dumps({"caption": caption, "shop": number % 2}) if shard else caption
                members = {"png": content.getvalue(), "json" if shard else "txt": meta.encode()}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{number:04}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def test_archives_are_read_without_unpacking(shards: Path) -> None:
    annotations = read_annotations(config(shards), str(shards / "{000..000}.tar"), None)
    assert len(annotations.pairs.paths) == 6
    assert annotations.pairs.captions == ("an image 0", "an image 1", "an image 2", "an image 3")
    assert annotations.pairs.of_image[4] == (0,)
    images = ImageReader(annotations, config_spec(), threads=1, cache_limit=0)
    (_, pixels), *_ = images.batches([5, 0], 2)
    with tarfile.open(shards / "000.tar") as tar:
        member = tar.extractfile("0005.png")
        assert member is not None
        assert np.array_equal(pixels[0].numpy(), load(member.read(), config_spec()))


def config_spec():  # type: ignore[no-untyped-def]
    from clipret_training.models.small import IMAGE

    return IMAGE


def test_a_training_on_archives(shards: Path, tmp_path: Path) -> None:
    given = {"val": str(shards / "000.tar"), "captions": 1, "caption_column": None}
    result = fit(config(shards / "001.tar", **given), tmp_path / "run")
    assert result.last["text_to_image"]["queries"] == 4
    grouped = config(shards / "001.tar", val=str(shards / "000.tar"), group_column="shop")
    train, _ = read_annotation_files(grouped)
    assert train.groups == ((0,), (1,)) * 3


def test_an_image_without_a_caption_is_named(tmp_path: Path, shards: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as tar, tarfile.open(shards / "000.tar") as old:
        for name in ("0000.png", "0000.txt", "0001.png"):
            tar.addfile(old.getmember(name), old.extractfile(name))
    with pytest.raises(ClipretError, match=r"odd\.tar/0001\.png in .* has no text"):
        read_annotations(config(shards), str(tmp_path / "odd.tar"), None)


def test_a_damaged_archive_is_not_said_to_be_done_in_part(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "short.tar").write_bytes((shards / "000.tar").read_bytes()[:3000])
    with pytest.raises(ClipretError, match=r"short\.tar is damaged or not an archive \(.*\): create it again"):
        read_annotations(config(shards), str(tmp_path / "short.tar"), None)
