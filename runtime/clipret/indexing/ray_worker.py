"""The work of one process of a cluster during indexing: a unit of a source in, blocks of embeddings out.

The encoder is that of a single machine, and items are read, decoded, encoded and skipped in the same way.
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

__all__ = ["FileState", "Result", "ResultBlock", "Settings", "WorkUnit", "encode_unit"]

FileState = tuple[int, int, str]
"""What tells whether an image has changed: size in bytes, modification time in nanoseconds, digest."""

_BLOCK_RESULTS = 1024  # a megabyte of embeddings at 512 dimensions


@dataclass(frozen=True)
class Settings:
    """How each process opens its encoder.

    Attributes:
        bundle: Path of the bundle, the same on all machines.
        fingerprint: Fingerprint of the bundle.
        encoder: Settings of the encoder.
        flip: Average the embedding of each image with that of its horizontal flip.
    """

    bundle: Path
    fingerprint: str
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    flip: bool = False

    def open(self) -> Encoder:
        """Open the encoder with its image tower.

        Raises:
            ClipretError: As for `Encoder`, and if the path has another bundle on this machine.
        """
        bundle = Bundle.open(self.bundle)
        if bundle.fingerprint != self.fingerprint:
            raise ClipretError(
                f"{self.bundle} is another bundle on {platform.node()}: copy the same bundle to all machines"
            )
        encoder = Encoder(bundle, self.encoder)
        encoder.image_tower  # noqa: B018 (an encoder that does not work must fail before it reads images)
        return encoder


@dataclass(frozen=True)
class WorkUnit:
    """A part of a source that one process encodes.

    Attributes:
        number: Number of the unit.
        items: Iterates over its images.
        indexed: The state of the images that the gallery has, by their paths in the source. They are not encoded again
            unless they have changed.
    """

    number: int
    items: Callable[[], Iterator[Item]]
    indexed: Mapping[str, FileState] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The result of an item.

    Attributes:
        path: Path of the item.
        size: Size of the item.
        mtime_ns: Modification time of the item.
        metadata: Metadata of the item.
        file: State of the file when it was read; None if it was not read, because size and time equal those in the
            gallery, or could not be read.
        reason: Why it could not be used.
        position: Position among the embeddings of the block; None if it has no new embedding.
    """

    path: str
    size: int | None
    mtime_ns: int | None
    metadata: Mapping[str, Value]
    file: FileState | None = None
    reason: str | None = None
    position: int | None = None


@dataclass(frozen=True)
class ResultBlock:
    """A block of the results of a unit, in the order of its items.

    Attributes:
        unit: Number of the unit.
        number: Number of the block in the unit.
        results: The results.
        embeddings: float16 [n,D].
        last: Whether this is the last block of the unit.
        error: Why the unit ends early.
        fatal: Why no unit can be encoded.
        decode_seconds: As in `EncodeStats`, since the previous block.
        wait_seconds: As in `EncodeStats`, since the previous block.
        compute_seconds: As in `EncodeStats`, since the previous block.
    """

    unit: int
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
    file: FileState | None = None
    in_gallery: bool = False  # it was read, and its bytes equal those in the gallery


def encode_unit(encoder: Encoder, unit: WorkUnit, flip: bool = False) -> Iterator[ResultBlock]:
    """Encode the images of a unit that are not in the gallery.

    Args:
        encoder: The encoder.
        unit: The unit.
        flip: As for `Encoder.encode_images`.

    Yields:
        Blocks. If the source fails, the last one has the error.
    """
    work = _Work(unit)
    error = None
    try:
        for batch in encoder.encode_images(work.tasks(), work.read, flip=flip):
            work.add(batch.items, batch.embeddings.astype(np.float16), batch.skipped)
            if len(work.results) >= _BLOCK_RESULTS:
                yield work.block(encoder)
    except ClipretError as raised:
        error = str(raised)
    yield work.block(encoder, last=True, error=error)


class _Work:
    """Collects the results of a unit into blocks."""

    def __init__(self, unit: WorkUnit) -> None:
        self.unit = unit
        self.results: list[Result] = []
        self._embeddings: list[npt.NDArray[np.float16]] = []
        self._unchanged: list[tuple[int, Result]] = []
        self._blocks = self._count = 0
        self._reported = (0.0, 0.0, 0.0)  # seconds up to the previous block

    def tasks(self) -> Iterator[_Task]:
        for number, item in enumerate(self.unit.items()):
            indexed = self.unit.indexed.get(item.path)
            if indexed is not None and indexed[:2] == (item.size, item.mtime_ns):
                self._unchanged.append((number, Result(item.path, item.size, item.mtime_ns, item.metadata)))
            else:
                yield _Task(number, item)

    def read(self, task: _Task) -> bytes:
        """Read an image in a decode thread."""
        file = task.item.read()
        task.file = (file.size, file.mtime_ns, file.digest)
        indexed = self.unit.indexed.get(task.item.path)
        if indexed is not None and indexed[2] == file.digest:
            task.in_gallery = True
            raise ImageError("the gallery holds its embedding")
        return file.content

    def add(self, items: list[_Task], embeddings: npt.NDArray[np.float16], skipped: list[tuple[_Task, str]]) -> None:
        """Add a batch of the encoder, and the unchanged images before its end, in the order of the source."""
        numbered = list[tuple[int, Result]]()
        for position, task in enumerate(items, self._count):
            numbered.append((task.number, _result(task, position=position)))
        for task, reason in skipped:
            numbered.append((task.number, _result(task, reason=None if task.in_gallery else reason)))
        self._embeddings.append(embeddings)
        self._count += len(embeddings)
        end = max(number for number, _ in numbered) if numbered else -1
        numbered += [entry for entry in self._unchanged if entry[0] <= end]
        self._unchanged = [entry for entry in self._unchanged if entry[0] > end]
        self.results += [result for _, result in sorted(numbered, key=lambda entry: entry[0])]

    def block(self, encoder: Encoder, *, last: bool = False, error: str | None = None) -> ResultBlock:
        """Make a block of the results since the previous one."""
        if last:
            self.results += [result for _, result in self._unchanged]
        dim = encoder.bundle.manifest.embedding_dim
        embeddings = np.concatenate([np.empty((0, dim), np.float16), *self._embeddings])
        stats = encoder.stats
        total = (stats.decode_seconds, stats.wait_seconds, stats.compute_seconds)
        seconds = tuple(new - old for new, old in zip(total, self._reported, strict=True))
        block = ResultBlock(self.unit.number, self._blocks, self.results, embeddings, last, error, None, *seconds)
        self.results, self._embeddings, self._count, self._reported = [], [], 0, total
        self._blocks += 1
        return block


def _result(task: _Task, *, reason: str | None = None, position: int | None = None) -> Result:
    item = task.item
    return Result(item.path, item.size, item.mtime_ns, item.metadata, task.file, reason, position)
