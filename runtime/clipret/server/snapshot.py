"""A snapshot of a gallery that other processes may change.

Shards are immutable files, and mapped files stay readable after compaction has deleted them. The database can change,
so each snapshot has a copy of it: embeddings, paths, metadata and filters of a response come from the same commit. (An
open read transaction would do the same but lock out every writer, because the gallery uses SQLite's rollback journal,
which needs no files next to the database.)
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipret.arrays import Floats, Ids, Mask
from clipret.errors import ClipretError
from clipret.gallery.database import Database, ImageRecord
from clipret.gallery.gallery import Gallery
from clipret.gallery.info import GalleryInfo
from clipret.inference.encoder import Encoder
from clipret.search.rerank import Rerank, Reranker
from clipret.search.searcher import Forms
from clipret.search.snapshot import GallerySnapshot
from clipret.sources.item import Value, scalar
from clipret.tables import quoted

__all__ = ["SearchSettings", "ServedSnapshot"]


_RETRIES = 5  # if compaction removes shards between copying the database and opening its files
_MASKS = 64  # cached filters; each takes a byte per image
_MAX_VALUE = 1 << 16  # bytes of a value inside a filter: a single SQL function cannot be interrupted
_MAX_PATTERN = 200  # bytes of a pattern for LIKE and GLOB, for the same reason
_MAX_VALUES = 40  # distinct values of a column that is offered as a choice


@dataclass(frozen=True)
class SearchSettings:
    """The settings of every search of a service.

    Attributes:
        templates: As for `Searcher`.
        rerank: The steps of re-ranking.
        reference: The texts that hubness is measured on. A result must not depend on the other requests of a batch.

    Raises:
        ClipretError: Hubness without `reference`.
    """

    templates: Forms = ("{}",)
    rerank: Rerank = field(default_factory=Rerank)
    reference: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rerank.hubness != "none" and not self.reference:
            raise ClipretError(
                "hubness compares queries with each other, but a service receives them one at a time: "
                "name fixed texts with --rerank reference=FILE"
            )


class _Copy(Gallery):
    """A gallery whose database is a copy in a temporary folder."""

    def __init__(self, path: Path, info: GalleryInfo) -> None:
        super().__init__(path, info)
        self.folder = Path(tempfile.mkdtemp(prefix="clipret-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)  # at the latest when Python exits
        original = path / "gallery.db"
        # As in Database: rolling back an interrupted transaction needs write access.
        uri = original.as_uri() + ("?mode=rw" if os.access(original, os.W_OK) else "?mode=ro")
        try:
            with (
                contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as source,
                contextlib.closing(sqlite3.connect(self.folder / "gallery.db")) as target,
            ):
                source.backup(target)
        except sqlite3.Error as error:
            raise ClipretError(f"{original} cannot be read ({error}): restore it or index again") from error

    @cached_property
    def database(self) -> Database:
        return Database(self.folder)


class _Filters(Database):
    """A connection for one filter from a client: read-only, as `select` is, and limited in time and memory."""

    def mask(self, where: str, ids: Ids, seconds: float) -> Mask:
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _MAX_PATTERN)
        end = time.monotonic() + seconds
        # SQLite checks for interruption before each jump; a progress handler runs after n instructions, slow or not.
        timer = threading.Timer(seconds, self._connection.interrupt)
        timer.start()
        try:
            return np.isin(ids, self.select(where))
        except ClipretError as error:
            if time.monotonic() >= end:
                raise ClipretError(f"where takes longer than {seconds:g} s: simplify the expression") from error
            # Hide the folder of the copy from the client.
            reason = str(error).replace(f" on {self._file.parent}", "").removeprefix("--")
            raise ClipretError(reason) from error
        finally:
            timer.cancel()
            timer.join()


class ServedSnapshot(GallerySnapshot):
    """A snapshot of a gallery for a service: its embeddings, a ranker, records and metadata.

    Its methods are thread-safe, except for `rank`, which must be called from the compute thread.

    Args:
        path: The folder of the gallery.
        encoder: As for `GallerySnapshot`.
        rerank: The steps of re-ranking that `rank` applies.
        reference: Float [R,D], the embeddings of `SearchSettings.reference`.
        seconds: Time limit of a filter.

    Raises:
        ClipretError: As `Gallery.read`.
    """

    def __init__(
        self,
        path: Path,
        encoder: Encoder,
        rerank: Rerank | None = None,
        reference: Floats | None = None,
        seconds: float = 5.0,
    ) -> None:
        for attempt in range(_RETRIES):
            self._copy = _Copy(path, Gallery.open(path).info)
            super().__init__(self._copy, encoder, resident=True)
            try:
                _ = self.stored
                break
            except ClipretError:
                self.close()
                if attempt == _RETRIES - 1:
                    raise
        # Build the ranker, with its one-time measurements, before the first query.
        ranker = self.ranker
        steps = rerank is not None and rerank.steps
        self._reranker = Reranker(self.stored, ranker, rerank, reference) if rerank and steps else None
        _ = self.columns
        self._seconds = seconds
        self._lock = threading.Lock()  # for the connection to the copy
        self._masks = OrderedDict[str, Mask]()

    def rank(
        self, queries: npt.ArrayLike, k: int, allowed: Mask | None = None, min_score: float | None = None
    ) -> tuple[Floats, Ids]:
        """As `Searchable.rank`; with re-ranking, `min_score` is ignored."""
        if self._reranker is None:
            return super().rank(queries, k, allowed, min_score)
        scores, positions = self._reranker.rank(queries, k, among=allowed)
        return scores, self.ids_at(positions)

    def records(self, ids: Sequence[int]) -> dict[int, ImageRecord]:
        with self._lock:
            records = self.gallery.database.images(ids)
        live, stored_ids = self.stored.live, self.stored.ids
        if live is None:
            return records
        at = {id: int(np.searchsorted(stored_ids, id)) for id in records}
        return {id: record for id, record in records.items() if at[id] < len(stored_ids) and live[at[id]]}

    def metadata(self, ids: Sequence[int]) -> dict[int, dict[str, Value]]:
        empty: dict[str, Value] = dict.fromkeys(self.columns)
        if not empty:
            return {id: {} for id in ids}
        with self._lock:
            metadata = self.gallery.database.metadata(ids)
        return {id: {name: scalar(value) for name, value in metadata.get(id, empty).items()} for id in ids}

    def _mask(self, where: str) -> Mask:
        """Raises ClipretError if the expression is wrong or takes too long."""
        with self._lock:
            if where in self._masks:
                self._masks.move_to_end(where)
                return self._masks[where]
        filters = _Filters(self._copy.folder)
        try:
            mask = filters.mask(where, self.stored.ids, self._seconds)
        finally:
            filters.close()
        with self._lock:
            self._masks[where] = mask
            while len(self._masks) > _MASKS:
                self._masks.popitem(last=False)
        return mask

    @cached_property
    def choices(self) -> dict[str, list[tuple[Value, int]]]:
        """The distinct values of each metadata column that has few, with their numbers of images."""
        choices = dict[str, list[tuple[Value, int]]]()
        live = "FROM rows r JOIN metadata m ON m.id = r.id WHERE r.deleted = 0 AND"
        # A separate connection, so that searches do not wait.
        with contextlib.closing(Database(self._copy.folder)) as database:
            for name in self.columns:
                column = f"m.{quoted(name)}"
                # SQLite stops after few rows if there are many values.
                values = database.query(f"SELECT DISTINCT {column} {live} {column} IS NOT NULL LIMIT {_MAX_VALUES + 1}")
                if 1 < len(values) <= _MAX_VALUES:
                    counted = f"SELECT {column}, count(*) {live} {column} IS NOT NULL GROUP BY 1 ORDER BY 1"
                    choices[name] = [(scalar(value), int(count)) for value, count in database.query(counted)]
        return choices
