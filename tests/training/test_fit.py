import functools
import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipret.errors import ClipretError
from clipret.inference.tokenizer import Tokenizer
from clipret_training.annotations import read_annotations
from clipret_training.config import FitConfig
from clipret_training.data.batches import ImageReader, Texts
from clipret_training.data.training_data import TrainingData
from clipret_training.fit import fit
from clipret_training.models.load import load_model
from clipret_training.validation import recall

SHADES = {"red": (230, 40, 40), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 plain images in four colours with three captions each, and one file that is no image."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    lines = ["path,caption,part"]
    for number in range(48):
        colour = list(SHADES)[number % 4]
        pixels = np.array(SHADES[colour]) + rng.integers(-25, 26, (24, 30, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        part = "val" if number >= 36 else "train"
        lines += [f"{number}.png,{caption},{part}" for caption in (f"a {colour} image", f"{colour} paint", colour)]
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    lines.append("broken.jpg,a red image,train")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def config(toy: Path, **given: Any) -> FitConfig:
    values: dict[str, Any] = {"model": "clipret-small", "epochs": 2, "batch_size": 12, "threads": 1}
    values |= {"precision": "fp32", "val_where": "part = 'val'"}
    return FitConfig.for_model(str(toy / "list.csv"), **(values | given))


@pytest.fixture(scope="module")
def run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(config(toy, epochs=8), tmp_path_factory.mktemp("runs") / "run").run


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_colours_are_found(run: Path) -> None:
    metrics = lines_of(run)
    assert [line["epoch"] for line in metrics] == list(range(1, 9))
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert [("text_to_image" in line) for line in metrics] == [False] * 4 + [True] + [False, False] + [True]
    assert metrics[-1]["text_to_image"]["queries"] == 12  # 4 colours x 3 captions, whatever number of images each has
    assert metrics[-1]["text_to_image"]["recall_at_1"] > 0.7
    assert metrics[-1]["lr"] < metrics[3]["lr"]


def test_the_run_folder_is_complete(run: Path, toy: Path) -> None:
    params = tomllib.loads((run / "params.toml").read_text())
    assert params["model"] == "clipret-small"
    assert FitConfig(**params) == config(toy, epochs=8)
    assert (run / "skipped.tsv").read_text().splitlines()[1].startswith(f"{toy / 'broken.jpg'}\tnot an image")
    names = sorted(file.name for file in run.rglob("*") if file.is_file())
    assert [name for name in names if not name.startswith("events.")] == [
        "best.safetensors",
        "last.safetensors",
        "log.txt",
        "metrics.jsonl",
        "model.json",
        "params.toml",
        "skipped.tsv",
        "state-24.pt",
        "tokenizer.json",
    ]


def test_a_loaded_run_measures_what_the_training_reported(run: Path, toy: Path) -> None:
    loaded = load_model(str(run))
    val = read_annotations(config(toy), str(toy / "list.csv"), "part = 'val'")
    images = ImageReader(val, loaded.image, threads=1, cache_limit=1 << 30)
    measured = recall(loaded, val.pairs, images, Texts(loaded, val), torch.device("cpu"))
    best = max(
        (line for line in lines_of(run) if "text_to_image" in line), key=lambda m: m["text_to_image"]["recall_at_10"]
    )
    assert {key: best[key] for key in measured} == measured


def test_a_run_loads_to_the_same_bits_from_folder_and_checkpoint(run: Path) -> None:
    first, second = load_model(str(run)), load_model(str(run / "checkpoints" / "best.safetensors"))
    pixels = torch.rand(2, 3, 80, 80)
    ids = torch.from_numpy(Tokenizer(first.tokenizer_json, first.text)(["a red image", "blue"]))
    assert torch.equal(first.model.encode_image(pixels), second.model.encode_image(pixels))
    assert torch.equal(first.model.encode_text(ids), second.model.encode_text(ids))
    assert first.source_sha256 == second.source_sha256
    assert first.model.logit_scale.exp() <= 100


def test_the_seed_decides_everything(toy: Path, tmp_path: Path) -> None:
    results = [
        fit(config(toy, seed=seed, cache_limit=limit), tmp_path / name).last["loss"]
        for seed, limit, name in ((1, 4.0, "a"), (1, 0.0, "b"), (2, 4.0, "c"))
    ]
    assert results[0] != results[2]
    # Streaming meets the broken image in the middle of an epoch and so cuts its batches elsewhere.
    assert results[0] == pytest.approx(results[1], rel=0.2)
    assert fit(config(toy, seed=1), tmp_path / "d").last["loss"] == results[0]


def test_going_on_from_a_run(run: Path, toy: Path, tmp_path: Path) -> None:
    result = fit(config(toy, model=str(run), epochs=1, lr=1e-5), tmp_path / "next")
    assert result.last["loss"] < lines_of(run)[0]["loss"]
    assert (result.run / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Path:
    """A folder with a model of open_clip, of one layer a tower."""
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    folder = tmp_path / "tiny-clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**model_cfg).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_an_adapter_is_trained_saved_and_merged(toy: Path, tiny_clip: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(tiny_clip), "adapter": "lora", "adapter_rank": 4, "epochs": 2, "lr": 1e-2}
    run = fit(config(toy, **given, adapter_targets=["q", "v"]), tmp_path / "run").run
    start, merged, again = (load_model(str(place)) for place in (tiny_clip, run, run / "adapter"))
    assert list(merged.model.state_dict()) == list(start.model.state_dict())
    pixels = torch.rand(2, 3, 32, 32)
    rows = [loaded.model.encode_image(pixels, normalize=True) for loaded in (start, merged, again)]
    assert (rows[1] - rows[0]).abs().max() > 1e-3
    torch.testing.assert_close(rows[1], rows[2], rtol=0, atol=1e-5)
    with pytest.raises(ClipretError, match="target 'qq' matches no layer of the image tower"):
        fit(config(toy, **given, adapter_targets=["qq"]), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_open_clip_models_go_through_the_same_loop(toy: Path, tiny_clip: Path, tmp_path: Path) -> None:
    folder = tiny_clip
    start = load_model(str(folder))
    result = fit(config(toy, model=str(folder), epochs=3, lr=1e-3, precision="bf16"), tmp_path / "run")
    losses = [line["loss"] for line in lines_of(result.run)]
    assert losses[-1] < losses[0]
    trained = load_model(str(result.run))
    assert (trained.image, trained.text, trained.name) == (start.image, start.text, start.name)
    assert not torch.equal(trained.model.visual.proj, start.model.visual.proj)
    # The checkpoint keeps open_clip's own names: its loader takes it.
    reference = open_clip.create_model(f"local-dir:{result.run}", load_weights=False)
    open_clip.load_checkpoint(reference, str(result.run / "checkpoints" / "best.safetensors"))
    assert torch.equal(reference.visual.proj, trained.model.visual.proj)
    # The sigmoid loss gives the model a bias, which stays with it.
    biased = fit(config(toy, model=str(folder), epochs=1, lr=1e-3, loss="siglip"), tmp_path / "siglip").run
    assert -10.1 < load_model(str(biased)).model.logit_bias.item() < -9.9


def test_held_out_images_are_not_trained_on(toy: Path, tmp_path: Path) -> None:
    log = (fit(config(toy, epochs=1), tmp_path / "run").run / "log.txt").read_text()
    assert "37 images with 12 captions to train on, 12 held out" in log  # broken.jpg is found out later


@pytest.mark.parametrize("cache_limit", [4.0, 0.0])
def test_what_cannot_be_read_at_all_is_said_before_anything_is_written(
    toy: Path, tmp_path: Path, cache_limit: float
) -> None:
    more = {"cache_limit": cache_limit, "val_where": "path = 'broken.jpg'"}
    with pytest.raises(
        ClipretError, match=r"none of the 1 images held out .*broken\.jpg.*: hold out others with --val"
    ):
        fit(config(toy, **more), tmp_path / "run")
    with pytest.raises(ClipretError, match=r"none of the 1 images can be read, .*broken\.jpg.*; check image_root"):
        fit(config(toy, cache_limit=cache_limit, where="path = 'broken.jpg'"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_too_few_for_a_batch_begin_the_next_epoch(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = TrainingData.batch

    def batch(self: TrainingData, chosen: list[int], *others: Any) -> Any:
        seen.extend(chosen)
        return original(self, chosen, *others)

    monkeypatch.setattr(TrainingData, "batch", batch)
    for name, more in (("cached", {}), ("streamed", {"cache_limit": 0.0})):
        seen.clear()
        result = fit(config(toy, batch_size=16, epochs=4, **more), tmp_path / name)
        assert result.last["step"] == 4 * 36 // 16
        times = Counter(seen)
        assert len(times) == 36  # all but the broken one
        assert set(times.values()) == {4}
    assert result.last["lr"] < 0.1 * config(toy).lr  # the cosine ends with the last step


def test_a_taken_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    missing = FitConfig.for_model(str(tmp_path / "missing.csv"), "clipret-small")
    with pytest.raises(ClipretError, match="not empty"):
        fit(missing, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"caption_column": "words"}, "its columns are path, caption, part"),
        ({"image_root": "/nowhere"}, "can be read, for example /nowhere"),
        ({"where": "part = 'val'"}, "held out"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"lr": 1e20}, "loss is (nan|inf) at step"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(
    toy: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ClipretError, match=message) as caught:
        fit(config(toy, **given), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_the_course_of_the_steps_is_there_for_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 25))
    assert board.Scalars("loss")[-1].value < board.Scalars("loss")[0].value
    assert [event.step for event in board.Scalars("recall_at_10/text_to_image")] == [15, 24]


def test_losses_and_negatives_by_name(toy: Path, tmp_path: Path) -> None:
    plain = fit(config(toy, epochs=1, augment="none"), tmp_path / "plain").last["loss"]
    for name, given in (
        ("soft", {"loss": "soft"}),
        ("negatives", {"negatives": True}),
        ("smooth", {"label_smoothing": 0.3, "drop_worst": 0.2}),
    ):
        result = fit(config(toy, epochs=1, augment="none", **given), tmp_path / name)
        assert abs(result.last["loss"] - plain) > 0.01, name  # rounding makes 1e-6
    with pytest.raises(ClipretError, match="siglip loss needs a logit bias and this model has none"):
        fit(config(toy, epochs=1, loss="siglip"), tmp_path / "siglip")


def test_an_overflow_of_half_precision_is_skipped_and_counted(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is scaled by 2^26 at first: its gradients are infinite until that has been halved often enough."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**26))
    result = fit(config(toy, precision="fp16", epochs=4, validate_every=4, crop_size=32, captions=1), tmp_path / "run")
    lines = lines_of(result.run)
    counts = [line["overflows"] for line in lines]
    assert counts == sorted(counts)
    assert counts[0] == 3  # every step of the first epoch
    assert 3 < counts[-1] < 12
    assert lines[-1]["loss"] != lines[0]["loss"]
    assert all(torch.isfinite(tensor).all() for tensor in load_model(str(result.run)).model.state_dict().values())


def test_the_length_of_texts_is_the_run_s(toy: Path, tiny_clip: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(tiny_clip), "epochs": 1, "resize": "longest", "fill": 0}
    run = fit(config(toy, **given, context_length=20), tmp_path / "run").run
    loaded = load_model(str(run))
    assert (loaded.text.context_length, loaded.image.resize, loaded.image.fill) == (20, "longest", 0)
    kept = json.loads((run / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert (kept["resize_mode"], kept["fill_color"]) == ("longest", 0)
    with pytest.raises(ClipretError, match="context_length is 90: the text tower of tiny-clip was made for 77 tokens"):
        fit(config(toy, **given, context_length=90), tmp_path / "long")


def test_a_size_that_the_image_tower_does_not_take_is_refused(toy: Path, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="crop_size is 16: the image tower of tiny-clip was made for 32 pixels"):
        fit(config(toy, model=str(tiny_clip), crop_size=16), tmp_path / "run")
    assert not (tmp_path / "run").exists()
