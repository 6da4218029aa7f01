"""Indexing: images from a source into a gallery, resumable at every commit, in memory that does not grow."""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from clipret.arrays import StoredEmbeddings
from clipret.errors import ClipretError, printable
from clipret.files import write_file
from clipret.gallery.gallery import Gallery, ImageRecord, Stored
from clipret.images.walk import ImageError
from clipret.inference.encoder import EncodedBatch, Encoder, EncodeStats
from clipret.locations import is_remote
from clipret.ranking.embedding_shards import EmbeddingShards
from clipret.sources.item import Item, Value
from clipret.sources.source import Source
from clipret.tables import as_number

__all__ = ["IndexReport", "Job", "Run", "index_images"]

_log = logging.getLogger(__name__)

_SHARD_ROWS = 8192  # a commit each: what an interrupted run loses at most
_LOOKUP = 64  # images looked up in the database at a time; those of a Parquet file hold their bytes meanwhile


@dataclass
class IndexReport:
    """What an indexing run did, kept up to date while it runs.

    `added` and `changed` images have new rows, of which `copied` are those of files with the same bytes. `unchanged`
    ones were left as they are, but for their record where only time or metadata differ. `removed`: images that the
    source no longer names. `skipped`: path and reason of each that could not be used. `stages`: where the time of
    decoding and of the engine went; `write_seconds`: that of writing.
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
        """Images a second that were encoded or copied."""
        return (self.added + self.changed) / self.seconds if self.seconds else 0.0

    @property
    def limit(self) -> str:
        """Which stage more of would make it faster: "decode", "engine" or "write"."""
        slowest = max(self.stages.compute_seconds, self.stages.wait_seconds)
        return "write" if self.write_seconds > slowest else self.stages.limit


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An image whose row waits for its commit, and nothing more: there are up to 8,192 of them."""

    image: ImageRecord
    metadata: Mapping[str, Value]
    replaces: bool


@dataclass(eq=False, slots=True)
class Job:
    """An image on its way through the encoder; the decode thread that reads the file fills in the rest."""

    number: int
    item: Item
    stored: str
    replaces: tuple[int, ImageRecord] | None  # what the gallery holds under this path
    image: ImageRecord | None = None
    twin: int | None = None  # an image that the gallery holds with the same bytes


def index_images(
    gallery: Gallery,
    encoder: Encoder,
    source: Source,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = lambda items: items,
    *,
    prune: bool = False,
) -> IndexReport:
    """Encode what `source` names and the gallery does not hold yet, or in another state, and commit it shard by shard.

    A file is known by its size and time, and by its bytes: one that was moved, copied or touched is not encoded again.
    `prune` deletes what the gallery holds and the source no longer names, once all of the source was read.
    Unreadable images are skipped and written with their reasons to `skipped.tsv` in the gallery. Raises
    ClipretError when the bundle is not the gallery's, another process is writing, the disk is full, or nothing
    at all could be read; what was committed by then is kept, and the next run goes on from there.
    """
    gallery.check(encoder.bundle)
    _log.info("indexing %s into %s", source.root, gallery.path)
    began = time.perf_counter()
    with gallery.writing(), Run(gallery, source) as run:
        try:
            for batch in encoder.encode_images(run.jobs(progress(source)), run.read, flip=gallery.info.flipped):
                run.take(batch)
        finally:  # Ctrl-C included: what is encoded is kept
            run.report.stages = encoder.stats
            run.commit()
            run.write_skipped()
        run.finish(prune)
    run.report.seconds = time.perf_counter() - began
    counts = (run.report.added, run.report.changed, run.report.unchanged, run.report.removed, len(run.report.skipped))
    _log.info("%d added, %d changed, %d unchanged, %d removed, %d skipped", *counts)
    return run.report


class Run:
    """The state of one run: rows that wait for their commit, and what the source has named so far.

    `changes` counts what was taken up, `kept` how much of that is committed.
    """

    def __init__(self, gallery: Gallery, source: Source) -> None:
        self.gallery, self.source = gallery, source
        self.report = IndexReport()
        self._skipped_file = Path(gallery.path, "skipped.tsv")
        self.changes = self.kept = 0
        self._rows = np.empty((_SHARD_ROWS, gallery.info.embedding_dim), np.float16)
        self._held: Stored | None = None
        root = self.gallery.info.root
        self._same_root = os.path.abspath(source.root) == root  # noqa: PTH100
        with contextlib.suppress(OSError):  # another name of the same folder
            self._same_root = self._same_root or os.path.samefile(source.root, root)  # noqa: PTH121
        self._waiting: list[_Waiting] = []
        self._updates: dict[int, tuple[ImageRecord, Mapping[str, Value]]] = {}
        # Decode threads look for twins through a connection of their own, which sees committed rows only.
        self._twins, self._lock = Gallery.open(gallery.path), threading.Lock()
        # On disk once it is large: a set of all paths would be the one thing here that grows.
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
        """What is new or changed, each path once; all else is noted."""
        number = 0
        for chunk in _chunks(items):
            named = [(self.stored(item), item) for item in chunk if self._usable(item)]
            fresh = [(stored, item) for stored, item in named if self._first(stored)]
            known = self.gallery.database.by_path([stored for stored, _ in fresh])
            with_metadata = [known[stored][0] for stored, item in fresh if stored in known and item.metadata]
            metadata = self.gallery.database.metadata(with_metadata) if with_metadata else {}
            for stored, item in fresh:
                held = known.get(stored)
                if held is not None and (held[1].size, held[1].mtime_ns) == (item.size, item.mtime_ns):
                    self.report.unchanged += 1
                    if _differs(item.metadata, metadata.get(held[0], {})):
                        self._updates[held[0]] = (held[1], item.metadata)
                        self.changes += 1
                else:
                    yield Job(number, item, stored, held)
                    number += 1

    def read(self, job: Job) -> bytes:
        """The image's bytes, in a decode thread. A ImageError where the gallery holds a row of the same bytes."""
        file = job.item.read()
        job.image = ImageRecord(job.stored, file.size, file.mtime_ns, file.digest)
        if job.replaces is not None and job.replaces[1].hash == file.digest:
            job.twin = job.replaces[0]
        else:
            with self._lock:
                job.twin = self._twins.database.by_hash(file.digest)
        if job.twin is not None:
            raise ImageError("the gallery holds its row")
        return file.content

    def take(self, batch: EncodedBatch[Job]) -> None:
        """A batch of the encoder: its rows wait for their commit, in the order of the source."""
        rows = iter(batch.embeddings)
        made = [(job, next(rows)) for job in batch.items]
        for job, reason in batch.skipped:
            if job.twin is None:
                self.skip(job.stored, reason)
            elif job.replaces is not None and job.twin == job.replaces[0]:  # touched: the record alone is new
                self._updates[job.twin] = (_record(job), job.item.metadata)
                self.changes += 1
                self.report.unchanged += 1
            else:
                made.append((job, self._row(job.twin)))
                self.report.copied += 1
        for job, row in sorted(made, key=lambda one: one[0].number):
            self._rows[len(self._waiting)] = row
            self._waiting.append(_Waiting(_record(job), job.item.metadata, job.replaces is not None))
            self.changes += 1
            if len(self._waiting) == len(self._rows):
                self.commit()

    def _row(self, number: int) -> StoredEmbeddings:
        """The stored row of an image. Only this run writes: a row that is not in what was read came after it."""
        if self._held is None or not len(self._held.ids) or number > self._held.ids[-1]:
            self._held = self.gallery.read()
        row: StoredEmbeddings = EmbeddingShards(self._held.shards).take(np.searchsorted(self._held.ids, [number]))[0]
        return row

    def commit(self) -> None:
        """Write what waits. Ctrl-C can come between any two steps: nothing is written twice."""
        began = time.perf_counter()
        waiting, self._waiting = self._waiting, []
        updates, self._updates = self._updates, {}
        metadata = [one.metadata for one in waiting]
        rows = self._rows[: len(waiting)]
        self.gallery.append([one.image for one in waiting], rows, metadata if any(metadata) else None)
        self.gallery.update(updates)
        changed = sum(one.replaces for one in waiting)
        self.report.changed += changed
        self.report.added += len(waiting) - changed
        self.kept = self.changes
        self.report.write_seconds += time.perf_counter() - began

    def finish(self, prune: bool) -> None:
        """After all of the source: what it no longer names. Raises ClipretError if nothing was named or usable."""
        report = self.report
        if not report.skipped:
            self._skipped_file.unlink(missing_ok=True)
        if report.skipped and not report.added + report.changed + report.unchanged:
            path, reason = report.skipped[0]
            raise ClipretError(f"none of the {len(report.skipped)} images could be used; the first: {path}: {reason}")
        if not report.skipped and not report.added + report.changed + report.unchanged:
            raise ClipretError(f"{self.source.root} names no images: is it the right one?")
        if prune:
            # A folder that could not be read is one skipped path: what lies below it has not vanished.
            unread = {path for path, _ in report.skipped}
            vanished = [
                number
                for number, path in self.gallery.database.live_paths()
                if not self._named(path) and not unread.intersection(map(str, PurePosixPath(path).parents))
            ]
            report.removed = self.gallery.remove(vanished)

    def skip(self, path: str, reason: str) -> None:
        """Count an image that cannot be used; `write_skipped` lists it."""
        _log.info("skipped %s: %s", printable(path), reason, extra={"path": path, "reason": reason})
        self.report.skipped.append((path, reason))

    def write_skipped(self) -> None:
        """The report of what could not be read, also where the source breaks off."""
        if self.report.skipped:
            lines = [f"{printable(path)}\t{printable(reason)}" for path, reason in self.report.skipped]
            write_file(self._skipped_file, "\n".join(["path\treason", *lines]) + "\n")

    def stored(self, item: Item) -> str:
        """The path under which the gallery keeps an image of the source."""
        if is_remote(item.path):
            return item.path
        if self._same_root and not any(part in ("", ".", "..") for part in item.path.split("/")):
            return item.path
        return self.gallery.stored_path(self.source.root / item.path)

    def _usable(self, item: Item) -> bool:
        with contextlib.suppress(UnicodeEncodeError):
            item.path.encode()
            return True
        # The database and every report are UTF-8; Python reads the bytes of such names as lone surrogates.
        self.skip(item.path, "its name is not UTF-8: rename it")
        return False

    def leave(self, first: str, last: str) -> None:
        """Note that the source names all images from `first` to before `last` as the gallery holds them."""
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
    """A few at a time; where the source fails, what it gave before comes first."""
    chunk: list[Item] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == _LOOKUP:
                yield chunk
                chunk = []
    except Exception:
        yield chunk
        raise
    yield chunk


def _record(job: Job) -> ImageRecord:
    assert job.image is not None  # the encoder gives back what was read
    return job.image


def _differs(given: Mapping[str, Value], held: Mapping[str, Value]) -> bool:
    """Whether an image's metadata says something else than the gallery does, which holds numbers as numbers."""
    lower = {name.lower(): value for name, value in held.items()}
    return any(lower.get(name.lower()) != as_number(value) for name, value in given.items())
