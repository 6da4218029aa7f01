"""The sqlite side of a gallery: which shards and images there are, what is known of each image, and filters."""

import contextlib
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.arrays import Ids
from clipret.errors import ClipretError
from clipret.sources.item import Value
from clipret.tables import OWN_COLUMNS, check_quotes, quoted, reading_only

__all__ = ["Database", "ImageRecord", "ShardEntry", "inherit_metadata", "name_shard", "write_metadata"]


_SCHEMA = """
CREATE TABLE shards (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- rows-NUMBER.npy and codes-NUMBER.npy; never used again
    ids BLOB NOT NULL,              -- int64, little-endian: the id of each row, ascending through all shards
    center BLOB NOT NULL,           -- float32 [D], little-endian; this and the rest belong to the quantized embeddings
    scale REAL NOT NULL,
    residual REAL NOT NULL,
    reach REAL NOT NULL
);
CREATE TABLE rows (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, also when the row is gone
    shard INTEGER NOT NULL,
    path TEXT NOT NULL,             -- relative to the images' root, with /; absolute for images outside it
    size INTEGER NOT NULL,          -- of the file, in bytes
    mtime_ns INTEGER NOT NULL,
    hash TEXT NOT NULL,             -- BLAKE2b-128 of the file, hex; empty where it is not known
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX rows_path ON rows (path) WHERE deleted = 0;
CREATE INDEX rows_hash ON rows (hash) WHERE deleted = 0;
CREATE INDEX rows_deleted ON rows (id) WHERE deleted = 1;
CREATE TABLE metadata (id INTEGER PRIMARY KEY);  -- a column for each that an input had
"""
_MANY = 500  # values a statement: old builds of sqlite take 999


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image of the gallery as its database knows it. `path` is relative to the root or absolute."""

    path: str
    size: int
    mtime_ns: int
    hash: str


@dataclass(frozen=True)
class ShardEntry:
    """A shard's entry in the database: its ids, int64 [n], and the parameters of its quantization."""

    number: int
    ids: Ids
    center: npt.NDArray[np.float32]
    scale: float
    residual: float
    reach: float


class Database:
    """gallery.db in `folder`. Every method raises ClipretError where the file is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "gallery.db"
        # Never mode=rwc, with which sqlite would make an empty database of a missing one.
        uri = self._file.as_uri() + ("?mode=rw" if os.access(self._file, os.W_OK) else "?mode=ro")
        try:
            self._connection = sqlite3.connect(uri, uri=True, timeout=60, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as error:
            raise ClipretError(f"{self._file} cannot be opened ({error}): restore it or index again") from error
        # A gallery that is dropped unclosed closes it too: from Python 3.13 on an open one is a ResourceWarning.
        weakref.finalize(self, self._connection.close)
        self._lock = threading.RLock()  # threads may share a gallery, a statement and its authorizer may not be shared
        # Also the end of a transaction, which is the deletion of the journal, survives a power cut.
        self.query("PRAGMA synchronous = EXTRA")

    @staticmethod
    def create(folder: Path) -> None:
        """Make the tables where there are none. Raises sqlite3.Error."""
        with contextlib.closing(sqlite3.connect(folder / "gallery.db")) as connection:
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")

    def close(self) -> None:
        self._connection.close()

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise ClipretError(f"{self._file} {_told(error)}") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the statements in the block or none of them. Raises sqlite3.Error as they do."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def snapshot(self) -> tuple[list[ShardEntry], Ids]:
        """The shards and the ids of deleted rows, ascending, both of the same moment."""
        with self._lock:
            self.query("BEGIN")
            try:
                table = self.query("SELECT number, ids, center, scale, residual, reach FROM shards ORDER BY number")
                deleted = self.query("SELECT id FROM rows WHERE deleted = 1 ORDER BY id")
            finally:
                self.query("ROLLBACK")
        shards = [
            ShardEntry(number, np.frombuffer(ids, "<i8"), np.frombuffer(center, "<f4"), *rest)
            for number, ids, center, *rest in table
        ]
        return shards, np.array(deleted, dtype=np.int64).reshape(-1)

    def next_id(self) -> int:
        return self._next("rows")

    def next_shard(self) -> int:
        return self._next("shards")

    def _next(self, table: str) -> int:
        """One more than was ever used: what a reader has just looked up must not become something else."""
        return int((self.query("SELECT seq FROM sqlite_sequence WHERE name = ?", table) or [(0,)])[0][0]) + 1

    def count(self) -> int:
        """Live images."""
        return int(self.query("SELECT count(*) FROM rows WHERE deleted = 0")[0][0])

    def columns(self) -> list[str]:
        """The metadata columns."""
        return [name for _, name, *_ in self.query("PRAGMA table_info(metadata)") if name != "id"]

    def select(self, where: str) -> Ids:
        """The ids of live images for which an SQL expression over their columns holds, ascending."""
        columns = self.columns()
        shown = "".join(f", m.{quoted(name)} AS {quoted(name)}" for name in columns)
        source = (
            f"SELECT r.id AS id, r.path AS path, r.size AS size, r.mtime_ns AS mtime_ns, r.hash AS hash{shown} "
            "FROM rows r LEFT JOIN metadata m ON m.id = r.id WHERE r.deleted = 0"
        )
        check_quotes(where, (*OWN_COLUMNS, *columns))
        try:
            with self._lock, reading_only(self._connection, selects=2):
                found = self._connection.execute(f"SELECT id FROM ({source}) WHERE ({where}\n) ORDER BY id").fetchall()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ClipretError(
                f"--where {where!r} cannot be used on {self._file.parent}: {error}; its columns are "
                f"{', '.join((*OWN_COLUMNS, *columns))}"
            ) from error
        return np.array(found, dtype=np.int64).reshape(-1)

    def images(self, ids: Sequence[int] | Ids) -> dict[int, ImageRecord]:
        """What is known of each of these images, deleted or not."""
        rows = self._many("SELECT id, path, size, mtime_ns, hash FROM rows WHERE id", [int(number) for number in ids])
        return {number: ImageRecord(*rest) for number, *rest in rows}

    def by_path(self, paths: Sequence[str]) -> dict[str, tuple[int, ImageRecord]]:
        """Id and record of each of these paths that is live."""
        rows = self._many("SELECT id, path, size, mtime_ns, hash FROM rows WHERE deleted = 0 AND path", paths)
        return {rest[0]: (number, ImageRecord(*rest)) for number, *rest in rows}

    def by_hash(self, digest: str) -> int | None:
        """The oldest live image whose file has these bytes."""
        found = self.query("SELECT id FROM rows WHERE deleted = 0 AND hash = ? ORDER BY id LIMIT 1", digest)
        return int(found[0][0]) if found else None

    def live_paths(self) -> Iterator[tuple[int, str]]:
        """Id and path of every live image, a few thousand of them in memory at a time."""
        last = 0
        statement = "SELECT id, path FROM rows WHERE deleted = 0 AND id > ? ORDER BY id LIMIT 8192"
        while part := self.query(statement, last):
            yield from part
            last = part[-1][0]

    def metadata(self, ids: Sequence[int] | Ids) -> dict[int, dict[str, Value]]:
        """The metadata of those of these images that have any."""
        columns = self.columns()
        names = "".join(f", {quoted(name)}" for name in columns)
        rows = self._many(f"SELECT id{names} FROM metadata WHERE id", [int(number) for number in ids])
        return {number: dict(zip(columns, values, strict=True)) for number, *values in rows}

    def _many(self, statement: str, values: Sequence[object]) -> Iterator[tuple[Any, ...]]:
        for low in range(0, len(values), _MANY):
            part = values[low : low + _MANY]
            yield from self.query(f"{statement} IN ({','.join('?' * len(part))})", *part)


def name_shard(transaction: sqlite3.Connection, entry: ShardEntry) -> None:
    ids, center = entry.ids.astype("<i8").tobytes(), entry.center.astype("<f4").tobytes()
    values = (entry.number, ids, center, entry.scale, entry.residual, entry.reach)
    transaction.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?)", values)


def write_metadata(
    transaction: sqlite3.Connection, ids: Sequence[int], metadata: Sequence[Mapping[str, Value]]
) -> None:
    """Keep the columns that each record names, in the place of what they held; new names become new columns.

    A column compares as a number where its values look like one (sqlite's NUMERIC), in a gallery as in a list: 0012
    becomes 12, and integers of more than 18 digits are rounded.
    """
    held = {_fold(name) for _, name, *_ in transaction.execute("PRAGMA table_info(metadata)")}
    cleaned = [{_clean(name) or "_": _clean(value) for name, value in record.items()} for record in metadata]
    for name in dict.fromkeys(name for record in cleaned for name in record):
        if _fold(name) not in held:
            transaction.execute(f"ALTER TABLE metadata ADD COLUMN {quoted(name)} NUMERIC")
            held.add(_fold(name))
    for number, record in zip(ids, cleaned, strict=True):
        if record:
            names, places = "".join(f", {quoted(name)}" for name in record), ", ?" * len(record)
            kept = ", ".join(f"{quoted(name)} = excluded.{quoted(name)}" for name in record)
            transaction.execute(
                f"INSERT INTO metadata (id{names}) VALUES (?{places}) ON CONFLICT (id) DO UPDATE SET {kept}",
                (number, *record.values()),
            )


def inherit_metadata(transaction: sqlite3.Connection, heirs: Mapping[int, int]) -> None:
    """Give new images, the keys, the metadata of those that they replace."""
    columns = [quoted(name) for _, name, *_ in transaction.execute("PRAGMA table_info(metadata)") if name != "id"]
    if columns:
        names = ", ".join(columns)
        statement = f"INSERT INTO metadata (id, {names}) SELECT ?, {names} FROM metadata WHERE id = ?"
        transaction.executemany(statement, heirs.items())


def _clean(value: Any) -> Any:
    """What sqlite takes of a name or value: lone surrogates and NUL are none of UTF-8's and of a name's characters."""
    return value.encode("utf-8", "replace").decode().replace("\0", "?") or None if isinstance(value, str) else value


def _fold(name: str) -> str:
    """As sqlite compares names of columns: it folds ASCII only."""
    return "".join(c.lower() if c.isascii() else c for c in name)


def _told(error: sqlite3.Error) -> str:
    """What an error of sqlite means for the user."""
    if "locked" in str(error) or "busy" in str(error):
        return f"is in use by another process ({error}): try again when that has ended"
    if "readonly" in str(error):
        return f"may not be written ({error}): run any command that may write there, to finish an interrupted one"
    return f"is damaged ({error}): restore it or index again"
