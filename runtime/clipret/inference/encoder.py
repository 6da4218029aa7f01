"""The encoder: images and texts in, unit embeddings out, decode threads running ahead of the engine."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipret.arrays import Embeddings, Pixels
from clipret.bundle import Bundle
from clipret.images.decode import load
from clipret.images.nvimagecodec import GpuDecoder
from clipret.images.walk import ImageFile, read_image
from clipret.inference.config import EncoderConfig
from clipret.inference.decode_pool import Batch, Decoding
from clipret.inference.tokenizer import Tokenizer
from clipret.inference.tower import Tower, open_tower, pick_device
from clipret.sources.item import Item

__all__ = ["EncodeStats", "EncodedBatch", "Encoder", "ImageInput"]

T = TypeVar("T")
ImageInput = Path | bytes | Image.Image | Pixels | ImageFile | Item

_AHEAD = 2  # batches decoded ahead of the engines: at 224 px and batch 32 each costs 4.6 MiB


@dataclass(frozen=True)
class EncodedBatch(Generic[T]):
    """`embeddings` float32 [n,D] belong to `items` [n], in the order of the input; `skipped` could not be decoded."""

    embeddings: Embeddings
    items: list[T]
    skipped: list[tuple[T, str]] = field(default_factory=list)


@dataclass
class EncodeStats:
    """Where the time of one `encode_images` went, kept up to date while it runs.

    `decode_seconds` are summed over the decode threads and `compute_seconds` over the engines, so that both may exceed
    `seconds`, the time from the start to the last batch; in `wait_seconds` of it no pixels were ready.
    """

    images: int = 0
    skipped: int = 0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def limit(self) -> Literal["decode", "engine"]:
        """What more of would make it faster: decode threads, where the engine waits a fifth of the time for them."""
        return "decode" if 4 * self.wait_seconds > self.compute_seconds else "engine"

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds if self.seconds else 0.0


class Encoder:
    """Encodes with the two towers of a bundle; each is opened when it is first needed.

    Args:
        bundle: The model.
        config: How it is run; see `EncoderConfig`.

    Raises:
        ClipretError: As `open_tower` does, when a tower is first needed.
    """

    def __init__(self, bundle: Bundle, config: EncoderConfig | None = None) -> None:
        self.bundle = bundle
        self.config = config or EncoderConfig()
        self.stats = EncodeStats()

    @cached_property
    def devices(self) -> list[str]:
        """Of each image tower; "auto" is what it was found to mean."""
        names = [name.strip() for name in self.config.device.split(",")]
        return [pick_device(self.bundle, self.config.backend) if name == "auto" else name for name in names]

    @cached_property
    def image_towers(self) -> list[Tower]:
        share = max(self.config.thread_count // len(self.devices), 1)
        return [
            open_tower(self.bundle, "image", device, replace(self.config, threads=share)) for device in self.devices
        ]

    @property
    def image_tower(self) -> Tower:
        return self.image_towers[0]

    @cached_property
    def text_tower(self) -> Tower:
        return open_tower(self.bundle, "text", self.devices[0], self.config)

    def engine_name(self, tower: str) -> str:
        """What runs a tower ("image" or "text"), for reports; opens it where that has not happened."""
        return self.image_tower.name if tower == "image" else self.text_tower.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_bundle(self.bundle)

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Unit embeddings float32 [N,D] in the order of `texts`. Raises ClipretError for a blank text."""
        embeddings = np.empty((len(texts), self.bundle.manifest.embedding_dim), dtype=np.float32)
        if not texts:
            return embeddings
        places = {text: at for at, text in enumerate(dict.fromkeys(texts))}  # captions repeat: each is encoded once
        ids = self.tokenizer(list(places))
        unique = (
            embeddings if len(places) == len(texts) else np.empty((len(places), embeddings.shape[1]), dtype=np.float32)
        )
        lengths = _lengths(ids, self.bundle.manifest.text.pad_id)
        trimmed = self.bundle.manifest.text.pad_to == "longest"
        # Texts of like length share a batch, so that short ones do not pay for the longest.
        order = np.argsort(lengths, kind="stable")
        for low in range(0, len(order), self.config.batch_size):
            part = order[low : low + self.config.batch_size]
            width = int(lengths[part].max()) if trimmed else ids.shape[1]
            unique[part] = self.text_tower.run(np.ascontiguousarray(ids[part, :width]))
        return embeddings if unique is embeddings else unique[[places[text] for text in texts]]

    def encode_images(
        self, items: Iterable[T], read: Callable[[T], ImageInput] | None = None, *, flip: bool = False
    ) -> Iterator[EncodedBatch[T]]:
        """Encode a stream of any length in order, a batch at a time, with bounded memory.

        `items` are paths, files' bytes, Pillow images, arrays uint8 [H,W,3], or what `open_source` gives: the
        images of folders, lists and archives. For anything else `read(item)`, in a decode thread, gives the image.
        An item whose image raises a ImageError, or takes longer than `config.image_timeout`, comes back in
        `skipped` of its batch with the reason. `stats` follows.

        `flip`: an embedding is the unit mean of the image's own and of its horizontal flip's, as the tower sees both.
        A caption seldom says left or right, so the flip is a second opinion on the same image; it takes a second pass
        of the image tower and looks at nothing but the image.
        """
        stats = self.stats = EncodeStats()
        began = time.perf_counter()
        turns, _ = self._turns(), self.gpu_decoder  # opened here, not by all threads at once
        decoding = Decoding(
            items,
            lambda item: self._decode(item if read is None else read(item)),
            self.bundle.manifest.image.size,
            self.config.batch_size,
            threads=self.config.thread_count,
            batches=_AHEAD + len(turns),
            timeout=self.config.image_timeout,
        )
        with decoding:
            for batch, embeddings, seconds in _run(decoding, turns, self.bundle.manifest.embedding_dim, flip):
                encoded = EncodedBatch(embeddings, batch.items, batch.skipped)
                decoding.release(batch)
                stats.images += len(encoded.items)
                stats.skipped += len(encoded.skipped)
                stats.compute_seconds += seconds
                stats.decode_seconds, stats.wait_seconds = decoding.decode_seconds, decoding.wait_seconds
                stats.seconds = time.perf_counter() - began
                yield encoded

    def _turns(self) -> list[Tower]:
        """The image towers by turns, each as often as it may run at once."""
        most = max(tower.lanes for tower in self.image_towers)
        return [tower for turn in range(most) for tower in self.image_towers if turn < tower.lanes]

    @cached_property
    def gpu_decoder(self) -> GpuDecoder | None:
        return GpuDecoder(self.devices[0]) if self.config.decode == "gpu" else None

    def _decode(self, source: Any) -> Pixels:
        if isinstance(source, Item):
            source = source.read()
        if isinstance(source, ImageFile):
            source = source.content
        spec = self.bundle.manifest.image
        if self.gpu_decoder is not None and isinstance(source, Path):
            source = read_image(source).content
        if self.gpu_decoder is not None and isinstance(source, bytes):
            return self.gpu_decoder.load(source, spec)
        return load(source, spec, fast=True) if self.config.fast_decode else load(source, spec)


def _run(
    decoding: Decoding[T], turns: list[Tower], dim: int, flip: bool
) -> Iterator[tuple[Batch[T], Embeddings, float]]:
    """The batches in their order, with embeddings float32 [n,D] and the seconds that an engine took, each batch on the
    tower whose turn it is."""

    def run(tower: Tower, batch: Batch[T]) -> tuple[Embeddings, float]:
        began = time.perf_counter()
        embeddings = tower.run(batch.pixels) if batch.items else np.empty((0, dim), dtype=np.float32)
        if flip and batch.items:
            embeddings = embeddings + tower.run(np.ascontiguousarray(batch.pixels[:, :, ::-1]))
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        return embeddings, time.perf_counter() - began

    if len(turns) == 1:  # in the caller's own thread, where nothing can go wrong between two
        for batch in decoding:
            yield batch, *run(turns[0], batch)
        return
    # Leaving the pool waits for the batches that are on a device: an engine must not be torn down while it runs.
    with ThreadPoolExecutor(len(turns), thread_name_prefix="engine") as pool:
        flying = deque[tuple[Batch[T], Future[tuple[Embeddings, float]]]]()
        for number, batch in enumerate(decoding):
            flying.append((batch, pool.submit(run, turns[number % len(turns)], batch)))
            if len(flying) == len(turns):
                first, future = flying.popleft()
                yield first, *future.result()
        for first, future in flying:
            yield first, *future.result()


def _lengths(ids: npt.NDArray[np.int64], pad_id: int) -> npt.NDArray[np.int64]:
    """Tokens of each embedding of ids [N,L] up to the last that is no padding, at least 1; int64 [N]."""
    used = ids != pad_id
    lengths: npt.NDArray[np.int64] = np.where(used.any(axis=1), ids.shape[1] - used[:, ::-1].argmax(axis=1), 1)
    return lengths
