"""What one process of a cluster does when images are indexed by many: a part of the source in, blocks of embeddings
out.

The encoder is that of a single machine; a part is read, decoded, embedded and skipped as the same items are there.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipret.bundle import Bundle
from clipret.errors import ClipretError
from clipret.images.walk import ImageError
from clipret.inference.config import EncoderConfig
from clipret.inference.encoder import Encoder
from clipret.sources.item import Item, Value

__all__ = ["Block", "Part", "Result", "Settings", "State", "encode_part"]

State = tuple[int, int, str]
"""What tells whether an image has changed: size in bytes, time in nanoseconds, digest."""

_RESULTS = 1024  # a block: a megabyte of embeddings at 512 dimensions


@dataclass(frozen=True)
class Settings:
    """How each process makes its encoder: see `Encoder`. The bundle lies at the same path on every machine."""

    bundle: Path
    fingerprint: str
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    flip: bool = False

    def open(self) -> Encoder:
        """Raises ClipretError as `Encoder` does, and where the path leads to another bundle."""
        bundle = Bundle.open(self.bundle)
        if bundle.fingerprint != self.fingerprint:
            raise ClipretError(
                f"{self.bundle} is another bundle on {platform.node()}: put the same one on all machines"
            )
        encoder = Encoder(bundle, self.encoder)
        encoder.image_tower  # noqa: B018 (what cannot encode must say so before it reads)
        return encoder


@dataclass(frozen=True)
class Part:
    """Some images of a source, read by calling `items`. `held`: what the gallery knows of those of them that it has,
    by their paths in the source; they are not encoded again."""

    number: int
    items: Callable[[], Iterator[Item]]
    held: Mapping[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of one item, whose own fields come first.

    `file`: its state as it was read; None where the size and time were those that the gallery holds, or where it could
    not be read, for the `reason`. `embedding`: its place among the block's embeddings, None where the gallery has them.
    """

    path: str
    size: int | None
    mtime_ns: int | None
    metadata: Mapping[str, Value]
    file: State | None = None
    reason: str | None = None
    position: int | None = None


@dataclass(frozen=True)
class Block:
    """Results of a part, in its order; `number` counts its blocks, `last` is set in the last. `embeddings` float16
    [n,D].

    `error`: why the part ends before its end; `fatal`: why no part can be done. Seconds as in `EncodeStats`.
    """

    part: int
    number: int
    results: Sequence[Result]
    embeddings: npt.NDArray[np.float16]
    last: bool = False
    error: str | None = None
    fatal: str | None = None
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(eq=False)
class _Task:
    number: int
    item: Item
    file: State | None = None
    touched: bool = False  # read, and found to be what the gallery holds


def encode_part(encoder: Encoder, part: Part, flip: bool = False) -> Iterator[Block]:
    """Encode what the gallery does not hold. The last block says so; a source that breaks off is told in it."""
    work = _Work(part)
    error = None
    try:
        for batch in encoder.encode_images(work.tasks(), work.read, flip=flip):
            work.take(batch.items, batch.embeddings.astype(np.float16), batch.skipped)
            if len(work.done) >= _RESULTS:
                yield work.block(encoder)
    except ClipretError as raised:
        error = str(raised)
    yield work.block(encoder, last=True, error=error)


class _Work:
    def __init__(self, part: Part) -> None:
        self.part = part
        self.done: list[Result] = []
        self._embeddings: list[npt.NDArray[np.float16]] = []
        self._unchanged: list[tuple[int, Result]] = []
        self._blocks = self._count = 0
        self._told = (0.0, 0.0, 0.0)

    def tasks(self) -> Iterator[_Task]:
        for number, item in enumerate(self.part.items()):
            held = self.part.held.get(item.path)
            if held is not None and held[:2] == (item.size, item.mtime_ns):
                self._unchanged.append((number, Result(item.path, item.size, item.mtime_ns, item.metadata)))
            else:
                yield _Task(number, item)

    def read(self, task: _Task) -> bytes:
        """In a decode thread."""
        file = task.item.read()
        task.file = (file.size, file.mtime_ns, file.digest)
        held = self.part.held.get(task.item.path)
        if held is not None and held[2] == file.digest:
            task.touched = True
            raise ImageError("the gallery holds its embedding")
        return file.content

    def take(self, items: list[_Task], embeddings: npt.NDArray[np.float16], skipped: list[tuple[_Task, str]]) -> None:
        """A batch of the encoder, and what was unchanged between its images, in the order of the source."""
        found = list[tuple[int, Result]]()
        for position, task in enumerate(items, self._count):
            found.append((task.number, _result(task, position=position)))
        for task, reason in skipped:
            found.append((task.number, _result(task, reason=None if task.touched else reason)))
        self._embeddings.append(embeddings)
        self._count += len(embeddings)
        end = max(number for number, _ in found) if found else -1
        found += [one for one in self._unchanged if one[0] <= end]
        self._unchanged = [one for one in self._unchanged if one[0] > end]
        self.done += [result for _, result in sorted(found, key=lambda one: one[0])]

    def block(self, encoder: Encoder, *, last: bool = False, error: str | None = None) -> Block:
        if last:
            self.done += [result for _, result in self._unchanged]
        dim = encoder.bundle.manifest.embedding_dim
        embeddings = np.concatenate([np.empty((0, dim), np.float16), *self._embeddings])
        stats = encoder.stats
        now = (stats.decode_seconds, stats.wait_seconds, stats.compute_seconds)
        seconds = tuple(new - old for new, old in zip(now, self._told, strict=True))
        made = Block(self.part.number, self._blocks, self.done, embeddings, last, error, None, *seconds)
        self.done, self._embeddings, self._count, self._told = [], [], 0, now
        self._blocks += 1
        return made


def _result(task: _Task, *, reason: str | None = None, position: int | None = None) -> Result:
    item = task.item
    return Result(item.path, item.size, item.mtime_ns, item.metadata, task.file, reason, position)
