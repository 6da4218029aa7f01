"""The gallery: the folder of stored rows, readable with numpy and sqlite3 alone.

    gallery.json        format version, bundle fingerprint, dimension, where pictures and bundle lie
    rows-000017.npy     immutable shard, float16 [n,D]: the truth that results are exact against
    gallery.db          sqlite: shards, and a row for each picture, in the order of the shards

A shard is written under a temporary name, synced and renamed; the sqlite transaction that names it is the commit.
What no transaction names never happened and is swept by the next writer.
"""

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from clipret.bundle import Bundle
from clipret.errors import ClipretError
from clipret.files import sync_folder, write_file

__all__ = ["FORMAT", "Gallery", "GalleryInfo", "Picture", "Stored"]

FORMAT = 1

_SCHEMA = """
CREATE TABLE shards (number INTEGER PRIMARY KEY, rows INTEGER NOT NULL);
CREATE TABLE rows (
    id INTEGER PRIMARY KEY,         -- ascending in the order of the shards' rows
    shard INTEGER NOT NULL REFERENCES shards (number),
    path TEXT NOT NULL,             -- relative to the pictures' root, with /; absolute for pictures outside it
    size INTEGER NOT NULL,          -- of the file, in bytes
    mtime_ns INTEGER NOT NULL,
    hash TEXT NOT NULL,             -- BLAKE2b-128 of the file, hex
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX rows_path ON rows (path) WHERE deleted = 0;
"""


@dataclass(frozen=True)
class GalleryInfo:
    """gallery.json. `bundle` is where the bundle was at indexing time: the fingerprint decides, not the place."""

    format: int
    fingerprint: str
    embedding_dim: int
    root: str
    bundle: str
    bundle_relative: str


@dataclass(frozen=True)
class Picture:
    """A picture of the gallery as its database knows it. `path` is relative to the root or absolute."""

    path: str
    size: int
    mtime_ns: int
    hash: str


@dataclass(frozen=True)
class Stored:
    """What a gallery holds: shards float16 [n,D]; through all of them in order, each row's id (int64 [N],
    ascending) and whether it is live (bool [N]; None when all are)."""

    shards: list[npt.NDArray[np.float16]]
    ids: npt.NDArray[np.int64]
    live: npt.NDArray[np.bool_] | None


class Gallery:
    """An opened gallery. Reading needs no lock and sees the last commit at the time of opening."""

    def __init__(self, path: Path, info: GalleryInfo) -> None:
        self.path = path
        self.info = info

    @classmethod
    def create(cls, path: str | Path, bundle: Bundle, root: Path) -> Self:
        """Make an empty gallery in a folder that is new or empty. Raises ClipretError."""
        folder = Path(path).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(not entry.name.startswith(("gallery.db", ".gallery.json")) for entry in folder.iterdir()):
                raise ClipretError(f"{folder} is not empty and no gallery: choose a new folder")
            with contextlib.closing(sqlite3.connect(folder / "gallery.db")) as database:
                if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        except OSError as error:
            raise ClipretError(f"{folder} cannot be made: {error.strerror}; choose another place") from None
        except sqlite3.Error as error:
            raise ClipretError(f"{folder} cannot hold a gallery: {error}; choose a new folder") from None
        info = GalleryInfo(
            format=FORMAT,
            fingerprint=bundle.fingerprint,
            embedding_dim=bundle.manifest.embedding_dim,
            root=str(root.absolute()),
            bundle=str(bundle.path),
            bundle_relative=os.path.relpath(bundle.path, folder),
        )
        # Last: a folder without gallery.json is no gallery yet, and making one may start over.
        write_file(folder / "gallery.json", json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n")
        return cls(folder, info)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open for reading or appending. Raises ClipretError when `path` is no gallery or one of another format."""
        folder = Path(path).absolute()
        file = folder / "gallery.json"
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise ClipretError(
                    f"{folder} has gallery format {value['format']}, this clipret reads {FORMAT}: index again"
                )
            info = GalleryInfo(**value)
        except (FileNotFoundError, NotADirectoryError):
            raise ClipretError(
                f"{folder} is no gallery (no gallery.json): make one with clipret-search index"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise ClipretError(f"{file} is damaged ({error}): restore it or index again") from None
        return cls(folder, info)

    @cached_property
    def _database(self) -> sqlite3.Connection:
        file = self.path / "gallery.db"
        # Never mode=rwc, with which sqlite would make an empty database of a missing one.
        uri = file.as_uri() + ("?mode=rw" if os.access(file, os.W_OK) else "?mode=ro")
        try:
            return sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)
        except sqlite3.Error as error:
            raise ClipretError(
                f"{self.path}/gallery.db cannot be opened ({error}): restore it or index again"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if "_database" in self.__dict__:
            self._database.close()
            del self.__dict__["_database"]

    def bundle(self, path: str | Path | None = None) -> Bundle:
        """The bundle that made these rows: `path`, or where it lay when the gallery was made.

        Raises ClipretError when none is found or the one given has another fingerprint.
        """
        if path is not None:
            bundle = Bundle.open(path)
            self.check(bundle)
            return bundle
        places = (self.path / self.info.bundle_relative, Path(self.info.bundle))
        for place in places:
            if (place / "bundle.json").is_file():
                bundle = Bundle.open(place.resolve())
                self.check(bundle)
                return bundle
        raise ClipretError(f"the bundle of {self.path} is not at {self.info.bundle} any more: name it with --bundle")

    def check(self, bundle: Bundle) -> None:
        """Raise ClipretError unless `bundle` gives the embeddings that this gallery holds."""
        if bundle.fingerprint != self.info.fingerprint:
            raise ClipretError(
                f"gallery {self.path} was made with another bundle (fingerprint {self.info.fingerprint[:12]}…, "
                f"{bundle.path} has {bundle.fingerprint[:12]}…): use that one or index into a new gallery"
            )

    def __len__(self) -> int:
        return int(self._query("SELECT count(*) FROM rows WHERE deleted = 0")[0][0])

    def read(self) -> Stored:
        """Everything that is committed at this moment, memory-mapped.

        Raises ClipretError for a shard that is missing or of another shape than the database says.
        """
        self._query("BEGIN")  # one consistent view over both tables while another process may append
        table = self._query("SELECT number, rows FROM shards ORDER BY number")
        rows = self._query("SELECT id, deleted FROM rows ORDER BY id")
        self._query("COMMIT")
        values = np.array(rows, dtype=np.int64).reshape(-1, 2)
        deleted = values[:, 1] != 0
        return Stored(
            shards=[self._shard(number, count) for number, count in table],
            ids=values[:, 0],
            live=~deleted if deleted.any() else None,
        )

    def _shard(self, number: int, count: int) -> npt.NDArray[np.float16]:
        file = self.path / _shard_name(number)
        try:
            rows: npt.NDArray[np.float16] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ClipretError(f"{file} cannot be read ({error}): restore it or index again") from None
        if rows.dtype != np.float16 or rows.shape != (count, self.info.embedding_dim):
            raise ClipretError(
                f"{file} holds {rows.dtype} {list(rows.shape)}, the database says float16 "
                f"{[count, self.info.embedding_dim]}: restore it or index again"
            )
        return rows

    def paths(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> list[str]:
        """The stored path of each id."""
        found: dict[int, str] = {}
        wanted = [int(value) for value in ids]
        for low in range(0, len(wanted), 500):  # sqlite's parameter limit is 999 in old builds
            part = wanted[low : low + 500]
            found.update(self._query(f"SELECT id, path FROM rows WHERE id IN ({','.join('?' * len(part))})", *part))
        return [found[value] for value in wanted]

    def ids_by_path(self) -> dict[str, int]:
        """The id of every live picture by its stored path."""
        return dict(self._query("SELECT path, id FROM rows WHERE deleted = 0"))

    def pictures(self) -> dict[str, Picture]:
        """Every live picture by its stored path."""
        rows = self._query("SELECT path, size, mtime_ns, hash FROM rows WHERE deleted = 0")
        return {row[0]: Picture(*row) for row in rows}

    def stored_path(self, file: Path) -> str:
        """How the database names a file: relative to the root where it lies below it, else absolute."""
        absolute = Path(os.path.abspath(file))  # noqa: PTH100 (Path.resolve would follow links out of the root)
        root = Path(self.info.root)
        return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.as_posix()

    def file(self, stored: str) -> Path:
        """Where the picture with this stored path lies."""
        return Path(self.info.root, stored)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer, after sweeping what an interrupted one left. Raises ClipretError beside another."""
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context((self.path / "gallery.lock").open("w"))
                _lock(lock.fileno(), self.path)
                named = {_shard_name(number) for (number,) in self._query("SELECT number FROM shards")}
                for file in self.path.iterdir():
                    if file.suffix == ".tmp" or (file.name.startswith("rows-") and file.name not in named):
                        file.unlink()
            except OSError as error:
                raise ClipretError(f"{self.path} cannot be written: {error.strerror}; mend its permissions") from None
            yield

    def append(self, pictures: Sequence[Picture], rows: npt.NDArray[np.float32]) -> None:
        """Commit one shard: float32 or float16 rows [n,D] of n pictures. Only inside `writing()`.

        A picture whose path is there already takes the old one's place. Raises ClipretError when the disk refuses or
        a row is not finite; nothing is then changed.
        """
        if len(pictures) != len(rows):
            raise ClipretError(f"{len(rows)} rows for {len(pictures)} pictures: give one for each")
        if not len(pictures):
            return
        stored = np.ascontiguousarray(rows, dtype=np.float16)
        if not np.isfinite(stored).all():
            raise ClipretError("an embedding is not finite: the image tower overflowed; export the model again")
        number = (self._query("SELECT max(number) FROM shards")[0][0] or 0) + 1
        temporary = self.path / f"rows.{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("wb") as file:
                np.save(file, stored)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.path / _shard_name(number))
            sync_folder(self.path)
            with self._database as transaction:
                transaction.execute("INSERT INTO shards VALUES (?, ?)", (number, len(stored)))
                transaction.executemany(
                    "UPDATE rows SET deleted = 1 WHERE path = ? AND deleted = 0", [(p.path,) for p in pictures]
                )
                transaction.executemany(
                    "INSERT INTO rows (shard, path, size, mtime_ns, hash) VALUES (?, ?, ?, ?, ?)",
                    [(number, p.path, p.size, p.mtime_ns, p.hash) for p in pictures],
                )
        except (OSError, sqlite3.Error) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise ClipretError(
                f"{self.path} cannot be written ({error}): free space; what was committed before is kept"
            ) from None

    def _query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise ClipretError(f"{self.path}/gallery.db is damaged ({error}): restore it or index again") from None


def _shard_name(number: int) -> str:
    return f"rows-{number:06d}.npy"


def _lock(handle: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: sqlite still refuses two transactions at a time
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ClipretError(f"another process is writing to {path}: wait for it to end, then try again") from None
