"""Indexing: images of a source into a gallery, resumable at every commit, with bounded memory."""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from clipret.arrays import StoredEmbeddings
from clipret.errors import ClipretError, printable
from clipret.files import write_file
from clipret.gallery.gallery import Gallery, ImageRecord
from clipret.gallery.info import Stored
from clipret.images.walk import ImageError
from clipret.inference.encoder import EncodedBatch, Encoder, EncodeStats
from clipret.locations import is_remote
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.sources.item import Item, Value
from clipret.sources.source import Source
from clipret.tables import as_number

__all__ = ["IndexReport", "Job", "Run", "index_images"]

_log = logging.getLogger(__name__)

_SHARD_SIZE = 8192  # images per commit: an interrupted run loses no more
_LOOKUP_SIZE = 64  # images per database lookup; items of a Parquet file keep their bytes in memory meanwhile


@dataclass
class IndexReport:
    """What an indexing run did, updated while it runs.

    Attributes:
        added: New images.
        changed: Images whose file has changed.
        copied: Added and changed images whose embedding was copied, because the gallery has a file with the same bytes.
        unchanged: Images whose embedding is unchanged; their modification time or metadata may have been updated.
        removed: Images that were deleted because the source no longer names them.
        skipped: Path and reason of each image that could not be used.
        seconds: Time of the run.
        write_seconds: Time of writing.
        stages: Timings of decoding and of the towers.
    """

    added: int = 0
    changed: int = 0
    copied: int = 0
    unchanged: int = 0
    removed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    write_seconds: float = 0.0
    stages: EncodeStats = field(default_factory=EncodeStats)

    @property
    def rate(self) -> float:
        """Encoded or copied images per second."""
        return (self.added + self.changed) / self.seconds if self.seconds else 0.0

    @property
    def bottleneck(self) -> Literal["decode", "compute", "write"]:
        """The slowest stage."""
        encode_seconds = max(self.stages.compute_seconds, self.stages.wait_seconds)
        return "write" if self.write_seconds > encode_seconds else self.stages.bottleneck


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An image that waits for its commit, without its pixels: there are up to 8,192 of them."""

    image: ImageRecord
    metadata: Mapping[str, Value]
    replaces: bool


@dataclass(eq=False, slots=True)
class Job:
    """An image to encode.

    Attributes:
        number: Its number in the source.
        item: The item of the source.
        stored: Its path in the gallery.
        replaces: Id and record of the image that the gallery has under this path.
        image: Its record, set by the decode thread that reads the file.
        twin: Id of an image in the gallery with the same bytes, set by that thread.
    """

    number: int
    item: Item
    stored: str
    replaces: tuple[int, ImageRecord] | None
    image: ImageRecord | None = None
    twin: int | None = None


def index_images(
    gallery: Gallery,
    encoder: Encoder,
    source: Source,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = lambda items: items,
    *,
    prune: bool = False,
) -> IndexReport:
    """Encode the new and changed images of a source and commit them to a gallery, shard by shard.

    Files are compared by size and modification time, then by their bytes: a file that was moved, copied or touched is
    not encoded again. Unreadable images are skipped and written with their reasons to `skipped.tsv` in the gallery.

    Args:
        gallery: The gallery to write.
        encoder: The encoder, with the bundle of the gallery.
        source: The images.
        progress: Wraps the iteration over the images, for a progress bar.
        prune: Delete images that the source does not name, after all of the source was read.

    Raises:
        ClipretError: The encoder has another bundle, another process is writing, the disk is full, or no image could be
            read. What has been committed is kept, and the next run continues from there.

    Examples:
        >>> gallery = Gallery.open("gallery/")  # doctest: +SKIP
        >>> report = index_images(gallery, Encoder(gallery.bundle()), open_source("images/"))  # doctest: +SKIP
        >>> report.added  # doctest: +SKIP
        1000
    """
    gallery.check(encoder.bundle)
    _log.info("indexing %s into %s", source.root, gallery.path)
    began = time.perf_counter()
    with gallery.writing(), Run(gallery, source) as run:
        try:
            for batch in encoder.encode_images(run.jobs(progress(source)), run.read, flip=gallery.info.flipped):
                run.add(batch)
        finally:  # also after Ctrl-C: encoded images are kept
            run.report.stages = encoder.stats
            run.commit()
            run.write_skipped()
        run.finish(prune)
    run.report.seconds = time.perf_counter() - began
    counts = (run.report.added, run.report.changed, run.report.unchanged, run.report.removed, len(run.report.skipped))
    _log.info("%d added, %d changed, %d unchanged, %d removed, %d skipped", *counts)
    return run.report


class Run:
    """An indexing run: the images that wait for their commit, and the paths that the source has named so far.

    Args:
        gallery: The gallery to write.
        source: The images.

    Attributes:
        report: What the run has done so far.
        changes: Number of additions and updates so far.
        committed: How many of them are committed.
    """

    def __init__(self, gallery: Gallery, source: Source) -> None:
        self.gallery, self.source = gallery, source
        self.report = IndexReport()
        self._skipped_file = Path(gallery.path, "skipped.tsv")
        self.changes = self.committed = 0
        self._embeddings = np.empty((_SHARD_SIZE, gallery.info.embedding_dim), np.float16)
        self._stored: Stored | None = None
        root = self.gallery.info.root
        self._same_root = os.path.abspath(source.root) == root  # noqa: PTH100
        with contextlib.suppress(OSError):  # another path of the same folder
            self._same_root = self._same_root or os.path.samefile(source.root, root)  # noqa: PTH121
        self._waiting: list[_Waiting] = []
        self._updates: dict[int, tuple[ImageRecord, Mapping[str, Value]]] = {}
        # Decode threads look for twins through a separate connection, which sees committed images only.
        self._twins, self._lock = Gallery.open(gallery.path), threading.Lock()
        # A database that moves to disk once it is large: a set of all paths would grow without bounds.
        self._seen = sqlite3.connect("", isolation_level=None)
        self._seen.execute("CREATE TABLE seen (path TEXT PRIMARY KEY) WITHOUT ROWID")
        self._seen.execute("BEGIN")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.close()
        with self._lock:
            self._twins.close()

    def jobs(self, items: Iterable[Item]) -> Iterator[Job]:
        """Iterate over the new and changed images, each path once, and record the unchanged ones.

        Args:
            items: Items of the source.
        """
        number = 0
        for chunk in _chunks(items):
            named = [(self.stored(item), item) for item in chunk if self._usable(item)]
            fresh = [(stored, item) for stored, item in named if self._first(stored)]
            indexed = self.gallery.database.by_path([stored for stored, _ in fresh])
            with_metadata = [indexed[stored][0] for stored, item in fresh if stored in indexed and item.metadata]
            metadata = self.gallery.database.metadata(with_metadata) if with_metadata else {}
            for stored, item in fresh:
                entry = indexed.get(stored)
                if entry is not None and (entry[1].size, entry[1].mtime_ns) == (item.size, item.mtime_ns):
                    self.report.unchanged += 1
                    if _differs(item.metadata, metadata.get(entry[0], {})):
                        self._updates[entry[0]] = (entry[1], item.metadata)
                        self.changes += 1
                else:
                    yield Job(number, item, stored, entry)
                    number += 1

    def read(self, job: Job) -> bytes:
        """Read an image in a decode thread. Raises ImageError if it is unreadable, or its bytes are in the gallery."""
        file = job.item.read()
        job.image = ImageRecord(job.stored, file.size, file.mtime_ns, file.digest)
        if job.replaces is not None and job.replaces[1].hash == file.digest:
            job.twin = job.replaces[0]
        else:
            with self._lock:
                job.twin = self._twins.database.by_hash(file.digest)
        if job.twin is not None:
            raise ImageError("the gallery holds its embedding")
        return file.content

    def add(self, batch: EncodedBatch[Job]) -> None:
        """Add a batch of the encoder in the order of the source, to be committed later."""
        encoded = list(zip(batch.items, batch.embeddings, strict=True))
        for job, reason in batch.skipped:
            if job.twin is None:
                self.skip(job.stored, reason)
            elif job.replaces is not None and job.twin == job.replaces[0]:  # touched: the record alone is new
                self._updates[job.twin] = (_record(job), job.item.metadata)
                self.changes += 1
                self.report.unchanged += 1
            else:
                encoded.append((job, self._embedding(job.twin)))
                self.report.copied += 1
        for job, embedding in sorted(encoded, key=lambda entry: entry[0].number):
            self._embeddings[len(self._waiting)] = embedding
            self._waiting.append(_Waiting(_record(job), job.item.metadata, job.replaces is not None))
            self.changes += 1
            if len(self._waiting) == len(self._embeddings):
                self.commit()

    def _embedding(self, number: int) -> StoredEmbeddings:
        """The embedding of an image in the gallery. Only this run writes, so an id that was not read yet is newer."""
        if self._stored is None or not len(self._stored.ids) or number > self._stored.ids[-1]:
            self._stored = self.gallery.read()
        positions = np.searchsorted(self._stored.ids, [number])
        embedding: StoredEmbeddings = EmbeddingShards(self._stored.shards).take(positions)[0]
        return embedding

    def commit(self) -> None:
        """Write what waits. Ctrl-C may come between any two steps: nothing is written twice."""
        began = time.perf_counter()
        waiting, self._waiting = self._waiting, []
        updates, self._updates = self._updates, {}
        images = [entry.image for entry in waiting]
        metadata = [entry.metadata for entry in waiting]
        self.gallery.append(images, self._embeddings[: len(waiting)], metadata if any(metadata) else None)
        self.gallery.update(updates)
        changed = sum(entry.replaces for entry in waiting)
        self.report.changed += changed
        self.report.added += len(waiting) - changed
        self.committed = self.changes
        self.report.write_seconds += time.perf_counter() - began

    def finish(self, prune: bool) -> None:
        """Finish a run after all of the source was read.

        Args:
            prune: Delete images that the source did not name.

        Raises:
            ClipretError: The source named no images, or none could be used.
        """
        report = self.report
        if not report.skipped:
            self._skipped_file.unlink(missing_ok=True)
        if report.skipped and not report.added + report.changed + report.unchanged:
            path, reason = report.skipped[0]
            raise ClipretError(f"none of the {len(report.skipped)} images could be used; the first: {path}: {reason}")
        if not report.skipped and not report.added + report.changed + report.unchanged:
            raise ClipretError(f"{self.source.root} names no images: check the path")
        if prune:
            # A folder that could not be read is one skipped path: the images below it are not gone.
            unread = {path for path, _ in report.skipped}
            gone = [
                number
                for number, path in self.gallery.database.live_paths()
                if not self._named(path) and not unread.intersection(map(str, PurePosixPath(path).parents))
            ]
            report.removed = self.gallery.remove(gone)

    def skip(self, path: str, reason: str) -> None:
        """Count an image that cannot be used; `write_skipped` lists it."""
        _log.info("skipped %s: %s", printable(path), reason, extra={"path": path, "reason": reason})
        self.report.skipped.append((path, reason))

    def write_skipped(self) -> None:
        """Write skipped.tsv, the images that could not be read with the reasons."""
        if self.report.skipped:
            lines = [f"{printable(path)}\t{printable(reason)}" for path, reason in self.report.skipped]
            write_file(self._skipped_file, "\n".join(["path\treason", *lines]) + "\n")

    def stored(self, item: Item) -> str:
        """The path of an image of the source in the gallery."""
        if is_remote(item.path):
            return item.path
        if self._same_root and not any(part in ("", ".", "..") for part in item.path.split("/")):
            return item.path
        return self.gallery.stored_path(self.source.root / item.path)

    def _usable(self, item: Item) -> bool:
        with contextlib.suppress(UnicodeEncodeError):
            item.path.encode()
            return True
        # The database and all reports are UTF-8; Python reads other bytes of names as lone surrogates.
        self.skip(item.path, "its name is not UTF-8: rename it")
        return False

    def keep_unchanged(self, first: str, last: str) -> None:
        """Record that the source names all images of the gallery from `first` to before `last`, unchanged."""
        rows = self.gallery.database.query(
            "SELECT path FROM rows WHERE deleted = 0 AND path >= ? AND path < ?", first, last
        )
        self._seen.executemany("INSERT OR IGNORE INTO seen VALUES (?)", rows)
        self.report.unchanged += len(rows)

    def _named(self, stored: str) -> bool:
        return self._seen.execute("SELECT 1 FROM seen WHERE path = ?", (stored,)).fetchone() is not None

    def _first(self, stored: str) -> bool:
        """Whether the source names this image for the first time."""
        return self._seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (stored,)).rowcount == 1


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Split items into chunks; if the source fails, the items before the failure are yielded first."""
    chunk: list[Item] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == _LOOKUP_SIZE:
                yield chunk
                chunk = []
    except Exception:
        yield chunk
        raise
    yield chunk


def _record(job: Job) -> ImageRecord:
    assert job.image is not None  # the encoder returns only jobs that were read
    return job.image


def _differs(metadata: Mapping[str, Value], stored: Mapping[str, Value]) -> bool:
    """Whether an image's metadata differs from that in the gallery, which stores strings of numbers as numbers."""
    lower = {name.lower(): value for name, value in stored.items()}
    return any(lower.get(name.lower()) != as_number(value) for name, value in metadata.items())
