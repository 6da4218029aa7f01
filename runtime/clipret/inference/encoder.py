"""The encoder: images and texts to unit embeddings, with decode threads that run ahead of the tower."""

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
from clipret.inference.decode_pool import Batch, DecodePool
from clipret.inference.tokenizer import Tokenizer
from clipret.inference.tower import Tower, open_tower, pick_device
from clipret.sources.item import Item

__all__ = ["EncodeStats", "EncodedBatch", "Encoder", "ImageInput"]

T = TypeVar("T")
ImageInput = Path | bytes | Image.Image | Pixels | ImageFile | Item

_AHEAD = 2  # batches decoded ahead of the towers: at 224 px and batch size 32 each takes 4.6 MiB


@dataclass(frozen=True)
class EncodedBatch(Generic[T]):
    """A batch of `Encoder.encode_images`, in the order of the input.

    Attributes:
        embeddings: float32 [n,D], of unit length.
        items: The n items that they belong to.
        skipped: The items that could not be decoded, with the reasons.
    """

    embeddings: Embeddings
    items: list[T]
    skipped: list[tuple[T, str]] = field(default_factory=list)


@dataclass
class EncodeStats:
    """Counts and timings of an `encode_images`, updated while it runs.

    Attributes:
        images: Number of encoded images.
        skipped: Number of images that could not be decoded.
        decode_seconds: Time of decoding, summed over the decode threads; may exceed `seconds`.
        wait_seconds: Time in which a tower waited for pixels.
        compute_seconds: Time of the towers, summed over them; may exceed `seconds`.
        seconds: Time from the start to the last batch.

    Examples:
        >>> EncodeStats(images=100, wait_seconds=1.0, compute_seconds=3.0, seconds=4.0).bottleneck
        'decode'
    """

    images: int = 0
    skipped: int = 0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def bottleneck(self) -> Literal["decode", "compute"]:
        """The slowest stage: "decode" if the towers wait for pixels more than a fifth of the time, else "compute"."""
        return "decode" if 4 * self.wait_seconds > self.compute_seconds else "compute"

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0


class Encoder:
    """Encodes images and texts with the towers of a bundle; each tower is opened when it is first used.

    Args:
        bundle: The model.
        config: Device, backend, threads and so on.

    Attributes:
        stats: Timings of the last `encode_images`.

    Raises:
        ClipretError: As for `open_tower`, when a tower is first used.

    Examples:
        >>> encoder = Encoder(Bundle.open("bundle/"))  # doctest: +SKIP
        >>> encoder.encode_texts(["a red car"]).shape  # doctest: +SKIP
        (1, 512)
    """

    def __init__(self, bundle: Bundle, config: EncoderConfig | None = None) -> None:
        self.bundle = bundle
        self.config = config or EncoderConfig()
        self.stats = EncodeStats()

    @cached_property
    def devices(self) -> list[str]:
        """The device of each image tower, with "auto" resolved."""
        names = [name.strip() for name in self.config.device.split(",")]
        return [pick_device(self.bundle, self.config.backend) if name == "auto" else name for name in names]

    @cached_property
    def image_towers(self) -> list[Tower]:
        """The image towers, one per device, which share the threads."""
        share = max(self.config.thread_count // len(self.devices), 1)
        return [
            open_tower(self.bundle, "image", device, replace(self.config, threads=share)) for device in self.devices
        ]

    @property
    def image_tower(self) -> Tower:
        """The first image tower."""
        return self.image_towers[0]

    @cached_property
    def text_tower(self) -> Tower:
        """The text tower, on the first device."""
        return open_tower(self.bundle, "text", self.devices[0], self.config)

    def backend_name(self, tower: str) -> str:
        """Name of the backend that runs a tower ("image" or "text"), for reports; opens the tower."""
        return self.image_tower.name if tower == "image" else self.text_tower.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the bundle."""
        return Tokenizer.from_bundle(self.bundle)

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Encode texts.

        Args:
            texts: N texts; a text that repeats is encoded once.

        Returns:
            Unit embeddings float32 [N,D] in the order of `texts`.

        Raises:
            ClipretError: A text is blank.
        """
        embeddings = np.empty((len(texts), self.bundle.manifest.embedding_dim), dtype=np.float32)
        if not texts:
            return embeddings
        positions = {text: position for position, text in enumerate(dict.fromkeys(texts))}
        ids = self.tokenizer(list(positions))
        repeats = len(positions) < len(texts)
        unique = np.empty((len(positions), embeddings.shape[1]), dtype=np.float32) if repeats else embeddings
        lengths = _lengths(ids, self.bundle.manifest.text.pad_id)
        trimmed = self.bundle.manifest.text.pad_to == "longest"
        # Texts of similar length share a batch, so that short texts are not padded to the longest one.
        order = np.argsort(lengths, kind="stable")
        for low in range(0, len(order), self.config.batch_size):
            part = order[low : low + self.config.batch_size]
            width = int(lengths[part].max()) if trimmed else ids.shape[1]
            unique[part] = self.text_tower.run(np.ascontiguousarray(ids[part, :width]))
        return unique[[positions[text] for text in texts]] if repeats else embeddings

    def encode_images(
        self, items: Iterable[T], read: Callable[[T], ImageInput] | None = None, *, flip: bool = False
    ) -> Iterator[EncodedBatch[T]]:
        """Encode a stream of images of any length in order, in batches, with bounded memory.

        Args:
            items: Paths, files' bytes, Pillow images, arrays uint8 [H,W,3], or the items of a `Source`; any other type
                with `read`.
            read: Returns the image of an item; called in a decode thread.
            flip: Average the embedding of each image with that of its horizontal flip. Captions rarely say left or
                right, so the flip is a second view of the same content. It doubles the work of the image tower.

        Yields:
            Batches. An item whose image raises an ImageError, or takes longer than `config.image_timeout`, is in
            `skipped` of its batch with the reason.

        Raises:
            ClipretError: As for `open_tower`; too many images time out at once.
        """
        stats = self.stats = EncodeStats()
        began = time.perf_counter()
        turns, _ = self._turns(), self.gpu_decoder  # opened here and not by several threads at once
        pool = DecodePool(
            items,
            lambda item: self._decode(item if read is None else read(item)),
            self.bundle.manifest.image.size,
            self.config.batch_size,
            threads=self.config.thread_count,
            batches=_AHEAD + len(turns),
            timeout=self.config.image_timeout,
        )
        with pool:
            for batch, embeddings, seconds in _run(pool, turns, self.bundle.manifest.embedding_dim, flip):
                encoded = EncodedBatch(embeddings, batch.items, batch.skipped)
                pool.release(batch)
                stats.images += len(encoded.items)
                stats.skipped += len(encoded.skipped)
                stats.compute_seconds += seconds
                stats.decode_seconds, stats.wait_seconds = pool.decode_seconds, pool.wait_seconds
                stats.seconds = time.perf_counter() - began
                yield encoded

    def _turns(self) -> list[Tower]:
        """The image towers in the order in which they take batches, each as often as it has lanes."""
        max_lanes = max(tower.lanes for tower in self.image_towers)
        return [tower for lane in range(max_lanes) for tower in self.image_towers if lane < tower.lanes]

    @cached_property
    def gpu_decoder(self) -> GpuDecoder | None:
        """The decoder for `config.decode` = "gpu", else None."""
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
    decoded: DecodePool[T], turns: list[Tower], dim: int, flip: bool
) -> Iterator[tuple[Batch[T], Embeddings, float]]:
    """Run the towers in turn; yield the batches in order with embeddings float32 [n,D] and the tower's seconds."""

    def run(tower: Tower, batch: Batch[T]) -> tuple[Embeddings, float]:
        began = time.perf_counter()
        embeddings = tower.run(batch.pixels) if batch.items else np.empty((0, dim), dtype=np.float32)
        if flip and batch.items:
            embeddings = embeddings + tower.run(np.ascontiguousarray(batch.pixels[:, :, ::-1]))
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        return embeddings, time.perf_counter() - began

    if len(turns) == 1:  # no second thread needed
        for batch in decoded:
            yield batch, *run(turns[0], batch)
        return
    # Leaving the executor waits for the batches on a device: a backend must not be destroyed while it runs.
    with ThreadPoolExecutor(len(turns), thread_name_prefix="tower") as executor:
        running = deque[tuple[Batch[T], Future[tuple[Embeddings, float]]]]()
        for number, batch in enumerate(decoded):
            running.append((batch, executor.submit(run, turns[number % len(turns)], batch)))
            if len(running) == len(turns):
                first, future = running.popleft()
                yield first, *future.result()
        for first, future in running:
            yield first, *future.result()


def _lengths(ids: npt.NDArray[np.int64], pad_id: int) -> npt.NDArray[np.int64]:
    """Number of tokens of each row of ids [N,L] up to the last that is not padding, at least 1; int64 [N]."""
    used = ids != pad_id
    lengths: npt.NDArray[np.int64] = np.where(used.any(axis=1), ids.shape[1] - used[:, ::-1].argmax(axis=1), 1)
    return lengths
