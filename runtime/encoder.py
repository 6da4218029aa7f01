"""The encoder: pictures and texts in, unit rows out, decode threads running ahead of the engine."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipret.bundle import Bundle
from clipret.images import PictureError, load
from clipret.text import Tokenizer
from clipret.towers import EngineChoice, Tower, cpu_count, open_tower

__all__ = ["EncodedBatch", "Encoder"]

T = TypeVar("T")
Rows = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_AHEAD = 2  # batches decoded ahead of the engine: at 224 px and batch 32 each costs 4.6 MiB


@dataclass(frozen=True)
class EncodedBatch(Generic[T]):
    """`rows` float32 [n,D] belong to `items` [n], in the order of the input; `skipped` could not be decoded."""

    rows: Rows
    items: list[T]
    skipped: list[tuple[T, str]] = field(default_factory=list)


class Encoder:
    """Encodes with the two towers of a bundle; each is opened when it is first needed.

    `threads`: decode threads and engine threads, default the processors there are. `engine`: see `open_tower`.
    Raises ClipretError as `open_tower` does.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        engine: EngineChoice = "auto",
        threads: int | None = None,
        batch_size: int = 32,
    ) -> None:
        self.bundle = bundle
        self.device = device
        self.engine: EngineChoice = engine
        self.threads = threads or cpu_count()
        self.batch_size = batch_size

    @cached_property
    def image_tower(self) -> Tower:
        return open_tower(self.bundle, "image", self.device, self.threads, self.engine)

    @cached_property
    def text_tower(self) -> Tower:
        return open_tower(self.bundle, "text", self.device, self.threads, self.engine)

    def engine_name(self, tower: str) -> str:
        """What runs a tower ("image" or "text"), for reports; opens it where that has not happened."""
        return self.image_tower.name if tower == "image" else self.text_tower.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_bundle(self.bundle)

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """Unit rows float32 [N,D] in the order of `texts`. Raises ClipretError for a blank text."""
        rows = np.empty((len(texts), self.bundle.manifest.embedding_dim), dtype=np.float32)
        if not texts:
            return rows
        ids = self.tokenizer(texts)
        lengths = _lengths(ids, self.bundle.manifest.text.pad_id)
        trimmed = self.bundle.manifest.text.pad_to == "longest"
        # Texts of like length share a batch, so that short ones do not pay for the longest.
        order = np.argsort(lengths, kind="stable")
        for low in range(0, len(order), self.batch_size):
            part = order[low : low + self.batch_size]
            width = int(lengths[part].max()) if trimmed else ids.shape[1]
            rows[part] = self.text_tower.run(np.ascontiguousarray(ids[part, :width]))
        return rows

    def encode_images(
        self, items: Iterable[T], read: Callable[[T], Path | bytes | Image.Image]
    ) -> Iterator[EncodedBatch[T]]:
        """Encode a stream of any length in order, a batch at a time, with bounded memory.

        `read(item)` runs in a decode thread and gives what `images.load` takes. An item whose picture raises a
        PictureError comes back in `skipped` of its batch with the reason.
        """
        spec = self.bundle.manifest.image
        stream = iter(items)
        waiting: deque[tuple[T, Future[Pixels]]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            try:
                while True:
                    for item in islice(stream, self.batch_size * (_AHEAD + 1) - len(waiting)):
                        waiting.append((item, pool.submit(lambda item: load(read(item), spec), item)))
                    if not waiting:
                        return
                    yield self._encode([waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))])
            finally:
                # Ctrl-C, or a caller that stops early, must not wait for pictures nobody will use.
                pool.shutdown(wait=False, cancel_futures=True)

    def _encode(self, batch: list[tuple[T, Future[Pixels]]]) -> EncodedBatch[T]:
        decoded: list[Pixels] = []
        items: list[T] = []
        skipped: list[tuple[T, str]] = []
        for item, future in batch:
            try:
                decoded.append(future.result())
                items.append(item)
            except PictureError as error:
                skipped.append((item, str(error)))
        if not decoded:
            rows = np.empty((0, self.bundle.manifest.embedding_dim), dtype=np.float32)
        else:
            rows = self.image_tower.run(np.stack(decoded))
        return EncodedBatch(rows, items, skipped)


def _lengths(ids: npt.NDArray[np.int64], pad_id: int) -> npt.NDArray[np.int64]:
    """Tokens of each row of ids [N,L] up to the last that is no padding, at least 1; int64 [N]."""
    used = ids != pad_id
    lengths: npt.NDArray[np.int64] = np.where(used.any(axis=1), ids.shape[1] - used[:, ::-1].argmax(axis=1), 1)
    return lengths
