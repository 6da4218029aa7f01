"""A snapshot of a gallery for a service, which other processes may change meanwhile.

Shards are immutable files, and mapped files stay readable after compaction has removed their names. The database can
change, so each snapshot has a copy of it: embeddings, paths, metadata and filters of an answer come from the same
commit. (An open read transaction would do the same but lock out every writer: the gallery uses sqlite's rollback
journal, which needs no files next to the database.)
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


_RETRIES = 5  # when compaction removes shards between the copy of the database and the opening of its files
_MASKS = 64  # filters remembered: a byte a row each
_LONGEST = 1 << 16  # bytes of a value inside a filter: what a single function does to it cannot be interrupted
_PATTERN = 200  # bytes of a pattern for LIKE and GLOB, for the same reason
_VALUES = 40  # distinct values of a column that are offered as a choice; columns with more are not


@dataclass(frozen=True)
class SearchSettings:
    """The settings of every search of a service: `templates` as for `Searcher`, and the steps of re-ranking.

    A result must not depend on requests that arrive at the same time, so hubness needs texts of its own, `reference`.
    Raises ClipretError without them.
    """

    templates: Forms = ("{}",)
    rerank: Rerank = field(default_factory=Rerank)
    reference: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rerank.hubness != "none" and not self.reference:
            raise ClipretError(
                "hubness is measured on the other queries, and those of a service come one at a time: "
                "name fixed texts with --rerank reference=FILE"
            )


class _Copy(Gallery):
    """A gallery whose database is a copy in a temporary folder."""

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
            raise ClipretError(f"{held} cannot be read ({error}): restore it or index again") from error

    @cached_property
    def database(self) -> Database:
        return Database(self.folder)


class _Filters(Database):
    """A connection for one expression of a client: read-only by `select`, and limited in time and memory."""

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
                raise ClipretError(f"where takes longer than {seconds:g} s: ask for something simpler") from error
            # The message names the folder of the copy, which is nobody's business.
            reason = str(error).replace(f" on {self._file.parent}", "").removeprefix("--")
            raise ClipretError(reason) from error
        finally:
            clock.cancel()
            clock.join()


class ServedSnapshot(GallerySnapshot):
    """A snapshot of a gallery for a service: its embeddings, a ranker over them, and records and metadata.

    Methods may be called from any thread, but `rank` only from the thread for the model.

    Args:
        path: The folder of the gallery.
        encoder: As for `GallerySnapshot`.
        rerank: The steps that `rank` takes.
        reference: Float [R,D], the embeddings of `SearchSettings.reference`.
        seconds: The most time that a filter may take.

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
        # Made now, with whatever is measured once, and not at the first query.
        ranker = self.ranker
        steps = rerank is not None and rerank.steps
        self._reranker = Reranker(self.stored, ranker, rerank, reference) if rerank and steps else None
        _ = self.columns
        self._seconds = seconds
        self._lock = threading.Lock()  # of the copy's one connection
        self._masks = OrderedDict[str, Mask]()

    def rank(
        self, queries: npt.ArrayLike, k: int, allowed: Mask | None = None, min_score: float | None = None
    ) -> tuple[Floats, Ids]:
        """As `Searchable.rank`, with the steps of re-ranking, which have no lowest score."""
        if self._reranker is None:
            return super().rank(queries, k, allowed, min_score)
        scores, positions = self._reranker.rank(queries, k, among=allowed)
        return scores, self.ids_at(positions)

    def records(self, ids: Sequence[int]) -> dict[int, ImageRecord]:
        with self._lock:
            found = self.gallery.database.images(ids)
        live, held = self.stored.live, self.stored.ids
        if live is None:
            return found
        at = {number: int(np.searchsorted(held, number)) for number in found}
        return {number: record for number, record in found.items() if at[number] < len(held) and live[at[number]]}

    def metadata(self, ids: Sequence[int]) -> dict[int, dict[str, Value]]:
        empty: dict[str, Value] = dict.fromkeys(self.columns)
        if not empty:
            return {number: {} for number in ids}
        with self._lock:
            found = self.gallery.database.metadata(ids)
        return {number: {name: scalar(value) for name, value in found.get(number, empty).items()} for number in ids}

    def _mask(self, where: str) -> Mask:
        """Raises ClipretError where the expression is wrong or takes too long."""
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
        """For each metadata column with few distinct values those values and how many images have each."""
        found = dict[str, list[tuple[Value, int]]]()
        live = "FROM rows r JOIN metadata m ON m.id = r.id WHERE r.deleted = 0 AND"
        with contextlib.closing(Database(self._copy.folder)) as database:  # of its own: searches do not wait for it
            for name in self.columns:
                column = f"m.{quoted(name)}"
                # Most columns with many values are left after few rows.
                some = database.query(f"SELECT DISTINCT {column} {live} {column} IS NOT NULL LIMIT {_VALUES + 1}")
                if 1 < len(some) <= _VALUES:
                    counted = f"SELECT {column}, count(*) {live} {column} IS NOT NULL GROUP BY 1 ORDER BY 1"
                    found[name] = [(scalar(value), int(count)) for value, count in database.query(counted)]
        return found
