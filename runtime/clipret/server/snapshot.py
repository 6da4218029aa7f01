"""A gallery as it was at one moment, for a service that must go on while other processes change it.

Shards are immutable files, and what is mapped stays readable after compaction has removed its name. What can change
under a reader is the database, so each state has a copy of it: rows, paths, metadata and filters of an answer all come
from the same commit, whatever happens to the gallery meanwhile. (A read transaction held open would do the same and
lock every writer out: the gallery's journal is sqlite's oldest, which needs no files beside the database.)
"""

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError
from clipret.gallery.database import Database, Picture
from clipret.gallery.gallery import Gallery, GalleryInfo
from clipret.inference.encoder import Encoder
from clipret.ranking.rows import StoredRows
from clipret.search.rerank import Rerank, Reranker
from clipret.search.searcher import Forms, Searcher
from clipret.server.limits import NotFoundError, RequestError
from clipret.sources.item import RESERVED, Value, scalar
from clipret.tables import quoted

__all__ = ["Manner", "State", "Watch"]

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

_RETRIES = 5  # when compaction removes shards between the copy of the database and the opening of its files
_MASKS = 64  # filters remembered: a byte a row each
_LONGEST = 1 << 16  # bytes of a value inside a filter: what a single function does to it cannot be interrupted
_PATTERN = 200  # bytes of a pattern for LIKE and GLOB, for the same reason
_VALUES = 40  # distinct values of a column that are offered as a choice; columns with more are not


@dataclass(frozen=True)
class Manner:
    """How every search of a service is made: `templates` as `Searcher` takes them, and the steps of re-ranking.

    A request must not depend on those that come at the same time, so hubness needs texts of its own, `reference`.
    Raises ClipretError where there are none.
    """

    templates: Forms = ("{}",)
    rerank: Rerank = field(default_factory=Rerank)
    reference: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rerank.hubness != "none" and not self.reference:
            raise ClipretError(
                "hubness is measured on the other queries, and those of a service come one at a time: "
                "name fixed texts with --reference"
            )


class _Copy(Gallery):
    """A gallery whose database is a copy in a folder of its own, removed with it."""

    def __init__(self, path: Path, info: GalleryInfo) -> None:
        super().__init__(path, info)
        self.folder = Path(tempfile.mkdtemp(prefix="clipret-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)  # no later than with the interpreter
        held = path / "gallery.db"
        # As Database opens it: only who may write can roll back what an interrupted writer left.
        uri = held.as_uri() + ("?mode=rw" if os.access(held, os.W_OK) else "?mode=ro")
        try:
            with (
                contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as source,
                contextlib.closing(sqlite3.connect(self.folder / "gallery.db")) as target,
            ):
                source.backup(target)
        except sqlite3.Error as error:
            raise ClipretError(f"{held} cannot be read ({error}): restore it or index again") from None

    @cached_property
    def database(self) -> Database:
        return Database(self.folder)


class _Filters(Database):
    """A connection for one expression that a stranger wrote: read-only by `select`, and bounded in time and memory."""

    def mask(self, where: str, ids: Ids, seconds: float) -> Mask:
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _PATTERN)
        end = time.monotonic() + seconds
        # Looked at before each jump; a progress handler would be asked every n instructions, of which each may be slow.
        clock = threading.Timer(seconds, self._connection.interrupt)
        clock.start()
        try:
            return np.isin(ids, self.select(where))
        except ClipretError as error:
            if time.monotonic() >= end:
                raise RequestError(f"where takes longer than {seconds:g} s: ask for something simpler") from None
            # The message names the folder of the copy, which is nobody's business.
            reason = str(error).replace(f" on {self._file.parent}", "").removeprefix("--")
            raise RequestError(reason) from None
        finally:
            clock.cancel()
            clock.join()


class State:
    """One state of a gallery: its rows, a ranker over them, and what is known of its pictures.

    `number` counts the states of a service from 1; `reference` [R,D] are the rows of `Manner.reference`. Methods may be
    called from any thread, but `rank` belongs to the engine's. Raises ClipretError as `Gallery.read` does.
    """

    def __init__(
        self, path: Path, number: int, encoder: Encoder, rerank: Rerank | None = None, reference: Floats | None = None
    ) -> None:
        self.number = number
        for attempt in range(_RETRIES):
            self.gallery = _Copy(path, Gallery.open(path).info)
            searcher = Searcher(self.gallery, encoder, resident=True)
            try:
                self.stored = searcher.stored
                break
            except ClipretError:
                self.gallery.close()
                if attempt == _RETRIES - 1:
                    raise
        # Made now, with whatever is measured once, and not at the first query.
        self._ranker = searcher.ranker
        steps = rerank is not None and rerank.steps
        self._reranker = Reranker(self.stored, self._ranker, rerank, reference) if rerank and steps else None
        self.rows = StoredRows(self.stored.shards)
        self.ids = self.stored.ids
        self.count = len(self.gallery)
        self.columns = self.gallery.columns()
        self._lock = threading.Lock()  # of the copy's one connection
        self._masks = OrderedDict[str, Mask]()

    def rank(self, rows: Floats, k: int, mask: Mask | None, min_score: float | None) -> tuple[Floats, Ids]:
        """As `Ranker.rank`, or as `Reranker.rank`, which knows no least score."""
        if self._reranker is not None:
            return self._reranker.rank(rows, k, among=mask)
        return self._ranker.rank(rows, k, among=mask, min_score=min_score)

    def without(self, mask: Mask | None, exclude: Collection[int]) -> Mask:
        """The mask without these pictures."""
        wanted = ~np.isin(self.ids, np.fromiter(exclude, np.int64, len(exclude)))
        return wanted if mask is None else mask & wanted

    def known(self, ids: Sequence[int]) -> dict[int, tuple[Picture, dict[str, Value]]]:
        """Record and metadata of each of these pictures, by its id."""
        with self._lock:
            records = self.gallery.database.pictures(ids)
            metadata = self.gallery.database.metadata(ids) if self.columns else {}
        empty: dict[str, Value] = dict.fromkeys(self.columns)
        return {
            number: (record, {name: scalar(value) for name, value in metadata.get(number, empty).items()})
            for number, record in records.items()
        }

    def position(self, number: int) -> int:
        """Where the row of a live picture is. Raises NotFoundError."""
        at = int(np.searchsorted(self.ids, number))
        live = self.stored.live
        if at >= len(self.ids) or self.ids[at] != number or (live is not None and not live[at]):
            raise NotFoundError(f"there is no picture {number}")
        return at

    def picture(self, number: int) -> Picture:
        """The record of a live picture. Raises NotFoundError."""
        self.position(number)
        with self._lock:
            return self.gallery.database.pictures([number])[number]

    def row(self, number: int) -> Floats:
        """The stored row of a live picture, float64 [D], at unit length. Raises NotFoundError."""
        row: Floats = self.rows.take(np.array([self.position(number)]))[0].astype(np.float64)
        length = float(np.linalg.norm(row))
        if length:
            row /= length
        return row

    def mask(self, where: str, seconds: float) -> Mask:
        """Which rows a filter lets through, bool [N]. Raises RequestError."""
        with self._lock:
            if where in self._masks:
                self._masks.move_to_end(where)
                return self._masks[where]
        filters = _Filters(self.gallery.folder)
        try:
            mask = filters.mask(where, self.ids, seconds)
        finally:
            filters.close()
        with self._lock:
            self._masks[where] = mask
            while len(self._masks) > _MASKS:
                self._masks.popitem(last=False)
        return mask

    @cached_property
    def choices(self) -> dict[str, list[tuple[Value, int]]]:
        """For each metadata column with few distinct values those values and how many pictures have each."""
        found = dict[str, list[tuple[Value, int]]]()
        database = Database(self.gallery.folder)  # of its own: searches do not wait for it
        live = "FROM rows r JOIN metadata m ON m.id = r.id WHERE r.deleted = 0 AND"
        for name in self.columns:
            column = f"m.{quoted(name)}"
            # Most columns with many values are left after few rows.
            some = database.query(f"SELECT DISTINCT {column} {live} {column} IS NOT NULL LIMIT {_VALUES + 1}")
            if 1 < len(some) <= _VALUES:
                rows = database.query(f"SELECT {column}, count(*) {live} {column} IS NOT NULL GROUP BY 1 ORDER BY 1")
                found[name] = [(scalar(value), int(count)) for value, count in rows]
        database.close()
        return found

    @property
    def filterable(self) -> list[str]:
        """The columns that a filter can use."""
        return [*RESERVED, *self.columns]


class Watch:
    """Knows whether a gallery was changed, by this process or another. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gallery: Gallery | None = None
        self._seen: tuple[int, ...] = ()

    def changed(self) -> bool:
        """Whether it was since the last call; True at the first. Raises ClipretError where the gallery is gone."""
        try:
            status = (self.path / "gallery.db").stat()
        except OSError as error:
            raise ClipretError(f"{self.path} cannot be read: {error.strerror}; restore it or index again") from None
        file = (status.st_dev, status.st_ino)
        if self._gallery is None or self._seen[:2] != file:  # another file: the gallery was made anew
            self.close()
            self._gallery = Gallery.open(self.path)
        # sqlite's own counter of what other connections have committed.
        seen = (*file, int(self._gallery.database.query("PRAGMA data_version")[0][0]))
        changed, self._seen = seen != self._seen, seen
        return changed

    def close(self) -> None:
        if self._gallery is not None:
            self._gallery.close()
        self._gallery, self._seen = None, ()
