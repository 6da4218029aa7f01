"""The encoder: all kinds of images, several towers on one stream, skipped images, timings."""

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clipret.bundle import Bundle
from clipret.images.walk import ImageError, find_images, read_image
from clipret.inference import encoder as encoders
from clipret.inference.config import EncoderConfig
from clipret.inference.encoder import Encoder, EncodeStats
from clipret.sources.source import open_source

Embeddings = npt.NDArray[np.float32]


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def images(colour_folder: Path) -> list[Path]:
    return find_images(colour_folder)


def embeddings_of(encoder: Encoder, items: Any, read: Any = None) -> Embeddings:
    return np.concatenate([batch.embeddings for batch in encoder.encode_images(items, read)])


def test_an_image_may_have_any_form(bundle: Bundle, images: list[Path]) -> None:
    encoder = Encoder(bundle, EncoderConfig(batch_size=5))
    expected = embeddings_of(encoder, images)
    assert expected.shape == (12, 8)
    forms: dict[str, Any] = {
        "bytes": [path.read_bytes() for path in images],
        "pillow": [Image.open(io.BytesIO(path.read_bytes())) for path in images],
        "file": [read_image(path) for path in images],
        "item": list(open_source(images[0].parent.parent)),
        "array": [np.asarray(Image.open(path).convert("RGB")) for path in images],
    }
    for name, items in forms.items():
        np.testing.assert_array_equal(embeddings_of(encoder, items), expected, err_msg=name)
        np.testing.assert_array_equal(embeddings_of(encoder, range(12), items.__getitem__), expected, err_msg=name)


def test_unreadable_images_are_skipped_with_the_reason(bundle: Bundle, images: list[Path]) -> None:
    def read(path: Path) -> bytes:
        if path == images[1]:
            raise ImageError("withdrawn")
        return b"" if path == images[2] else path.read_bytes()

    encoder = Encoder(bundle, EncoderConfig(batch_size=4))
    batches = list(encoder.encode_images(images, read))
    assert [item for batch in batches for item in batch.items] == [images[0], *images[3:]]
    skipped = [(path, reason) for batch in batches for path, reason in batch.skipped]
    assert skipped[0] == (images[1], "withdrawn")
    assert [path for path, _ in skipped] == images[1:3]
    embeddings = np.concatenate([batch.embeddings for batch in batches])
    np.testing.assert_array_equal(embeddings, embeddings_of(encoder, images)[[0, *range(3, 12)]])


def test_a_batch_of_broken_images_only(bundle: Bundle) -> None:
    (batch,) = Encoder(bundle).encode_images([b"", b"no"])
    assert (batch.embeddings.shape, batch.items, len(batch.skipped)) == ((0, 8), [], 2)


def test_an_image_that_hangs_is_skipped(bundle: Bundle, images: list[Path]) -> None:
    released = threading.Event()

    def read(path: Path) -> Path:
        if path == images[5]:
            released.wait()
        return path

    encoder = Encoder(bundle, EncoderConfig(batch_size=4, threads=1, image_timeout=0.2))
    batches = list(encoder.encode_images(images, read))
    released.set()
    assert [told for batch in batches for told in batch.skipped] == [(images[5], "took longer than 0.2 s")]
    embeddings = np.concatenate([batch.embeddings for batch in batches])
    np.testing.assert_array_equal(embeddings, np.delete(embeddings_of(encoder, images), 5, axis=0))


@pytest.mark.parametrize("count", [1, 5, 12])
def test_several_towers_share_a_stream(bundle: Bundle, images: list[Path], count: int) -> None:
    one, two = (
        Encoder(bundle, EncoderConfig(device="cpu", batch_size=2)),
        Encoder(bundle, EncoderConfig(device="cpu, cpu", batch_size=2)),
    )
    assert len(two.image_towers) == 2
    assert two.image_towers[0] is not two.image_towers[1]
    batches = list(two.encode_images(images[:count]))
    assert [item for batch in batches for item in batch.items] == images[:count]
    embeddings = np.concatenate([batch.embeddings for batch in batches])
    np.testing.assert_array_equal(embeddings, embeddings_of(one, images[:count]))
    np.testing.assert_array_equal(two.encode_texts(["red"]), one.encode_texts(["red"]))


class Slow:
    """A tower with two lanes that records its threads and lets a later batch overtake an earlier one."""

    name = "slow"

    def __init__(self, number: int, lanes: int, ran: list[int]) -> None:
        self.number, self.lanes, self.ran = number, lanes, ran
        self.overtaken = threading.Event()

    def run(self, batch: npt.NDArray[np.uint8]) -> Embeddings:
        self.ran.append(self.number)
        if len(self.ran) == 1:
            assert self.overtaken.wait(10)
        self.overtaken.set()
        return batch.reshape(len(batch), -1)[:, :8].astype(np.float32)


def test_the_order_is_kept_if_a_batch_overtakes_another(bundle: Bundle) -> None:
    ran: list[int] = []
    encoder = Encoder(bundle, EncoderConfig(batch_size=2))
    towers = [Slow(0, 2, ran), Slow(1, 1, ran)]
    towers[1].overtaken = towers[0].overtaken
    encoder.image_towers = towers  # type: ignore[assignment]
    images = [np.full((16, 16, 3), value, dtype=np.uint8) for value in range(19)]
    assert embeddings_of(encoder, images)[:, 0].tolist() == list(range(19))
    assert (ran.count(0), ran.count(1)) == (7, 3)


def test_an_error_of_a_backend_is_raised(bundle: Bundle, images: list[Path]) -> None:
    class Broken(Slow):
        def run(self, batch: npt.NDArray[np.uint8]) -> Embeddings:
            raise RuntimeError(f"out of memory at {len(batch)}")

    for lanes in (1, 2):
        encoder = Encoder(bundle, EncoderConfig(batch_size=2))
        encoder.image_towers = [Broken(0, lanes, [])]
        with pytest.raises(RuntimeError, match="out of memory at 2"):
            list(encoder.encode_images(images))


def test_stopping_early_returns_at_once(bundle: Bundle, images: list[Path]) -> None:
    released = threading.Event()

    def endless() -> Iterator[Path]:
        while True:
            yield from images

    def read(path: Path) -> Path:
        if encoder.stats.images:
            released.wait()
        return path

    for device in ("cpu", "cpu,cpu"):
        encoder = Encoder(bundle, EncoderConfig(device=device, batch_size=3))
        stream = encoder.encode_images(endless(), read)
        assert next(stream).items == images[:3]
        stream.close()  # type: ignore[attr-defined]
    released.set()


def test_the_statistics_add_up(bundle: Bundle, images: list[Path]) -> None:
    encoder = Encoder(bundle, EncoderConfig(batch_size=4))
    assert encoder.stats == EncodeStats()
    seen = 0
    for batch in encoder.encode_images([*images, b"broken"]):
        seen += len(batch.items)
        assert encoder.stats.images == seen
    stats = encoder.stats
    assert (stats.images, stats.skipped) == (12, 1)
    assert 0 < stats.wait_seconds + stats.compute_seconds <= stats.seconds
    assert stats.decode_seconds > 0
    assert stats.rate == 12 / stats.seconds
    list(encoder.encode_images(images[:1]))
    assert (encoder.stats.images, encoder.stats.skipped, stats.images) == (1, 0, 12)


def test_the_bottleneck_is_the_slowest_stage() -> None:
    assert EncodeStats(wait_seconds=1.0, compute_seconds=3.0).bottleneck == "decode"
    assert EncodeStats(wait_seconds=0.5, compute_seconds=3.0).bottleneck == "compute"
    assert EncodeStats().rate == 0


def test_fast_decoding_is_used_only_if_configured(
    bundle: Bundle, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, bool]] = []

    def load(*_: Any, **options: bool) -> npt.NDArray[np.uint8]:
        asked.append(options)
        return np.zeros((16, 16, 3), dtype=np.uint8)

    monkeypatch.setattr(encoders, "load", load)
    embeddings_of(Encoder(bundle), images[:1])
    embeddings_of(Encoder(bundle, EncoderConfig(fast_decode=True)), images[:1])
    assert asked == [{}, {"fast": True}]


def test_a_text_is_encoded_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(bundle, EncoderConfig(batch_size=2))
    texts = ["red", "a green one", "red", "blue", "a green one", "red"]
    expected = np.concatenate([Encoder(bundle).encode_texts([text]) for text in texts])
    run, shapes = encoder.text_tower.run, list[tuple[int, ...]]()
    monkeypatch.setattr(encoder.text_tower, "run", lambda ids: (shapes.append(ids.shape), run(ids))[1])
    np.testing.assert_array_equal(encoder.encode_texts(texts), expected)
    assert [shape[0] for shape in shapes] == [2, 1]
    assert shapes[0][1] < shapes[1][1]  # short texts are not padded to the long one
    assert encoder.encode_texts([]).shape == (0, 8)
