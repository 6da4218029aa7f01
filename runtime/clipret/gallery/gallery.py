"""The gallery: a folder of stored embeddings, readable with numpy and sqlite3 alone.

    gallery.json        format version, bundle fingerprint, dimension, where images and bundle lie
    rows-000017.npy     immutable shard of embeddings, float16 [n,D]; results are exact with respect to these
    codes-000017.npy    the same quantized, uint8 [n,D], for the first stage of the exact search
    gallery.db          sqlite: shards, a row for each image, metadata (the schema is in clipret.gallery.database)

A shard is written under a temporary name, synced and renamed. The sqlite transaction that lists it is the commit. The
next writer removes files that no transaction lists.
"""

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from clipret.arrays import Ids
from clipret.bundle import Bundle, check_bundle, find_bundle
from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.gallery.database import Database, ImageRecord, ShardEntry, inherit_metadata, name_shard, write_metadata
from clipret.gallery.info import GalleryInfo, Stored, id_of, stored_path
from clipret.gallery.shards import ids_and_live, open_quantized, open_rows, sweep, write_shard
from clipret.ranking.quantization import QuantizedEmbeddings, mean, quantize
from clipret.schema import checked
from clipret.sources.item import Value

__all__ = ["FORMAT", "Gallery", "ImageRecord"]

_log = logging.getLogger(__name__)

FORMAT = 2
_RETRIES = 5  # of a reader that compaction has taken the files away from

T = TypeVar("T")


class Gallery:
    """An open gallery: embeddings, paths and metadata of images, in a folder.

    Reading needs no lock and sees the last commit at the time of reading. Methods that change a gallery must be called
    inside `writing()`; there is one writer at a time, and nothing of an interrupted change is visible.
    """

    def __init__(self, path: Path, info: GalleryInfo) -> None:
        self.path = path
        self.info = info

    @classmethod
    def create(cls, path: str | Path, bundle: Bundle, root: Path, flipped: bool = False) -> Self:
        """Create an empty gallery.

        Args:
            path: A folder that is new or empty.
            bundle: The bundle that the embeddings will be made with.
            root: What stored paths are relative to.
            flipped: Whether embeddings will be means of an image's and its horizontal flip's.

        Raises:
            ClipretError: The folder is not empty or cannot be written.
        """
        folder = Path(path).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(not entry.name.startswith(("gallery.db", ".gallery.json")) for entry in folder.iterdir()):
                raise ClipretError(f"{folder} is not empty and no gallery: choose a new folder")
            Database.create(folder)
        except OSError as error:
            raise ClipretError(f"{folder} cannot be made: {error.strerror}; choose another place") from error
        except sqlite3.Error as error:
            raise ClipretError(f"{folder} cannot hold a gallery: {error}; choose a new folder") from error
        info = GalleryInfo(
            format=FORMAT,
            fingerprint=bundle.fingerprint,
            embedding_dim=bundle.manifest.embedding_dim,
            root=os.path.abspath(root),  # noqa: PTH100 (without .., by which nothing would be found again)
            bundle=str(bundle.path),
            bundle_relative=os.path.relpath(bundle.path, folder),
            flipped=flipped,
        )
        # Last: a folder without gallery.json is no gallery yet, and making one may start over.
        write_file(folder / "gallery.json", _json(info))
        return cls(folder, info)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a gallery for reading or writing.

        Raises:
            ClipretError: `path` is not a gallery, is damaged, or has another format version.
        """
        folder = Path(path).absolute()
        file = folder / "gallery.json"
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise ClipretError(
                    f"{folder} has gallery format {value['format']}, this clipret reads {FORMAT}: index again"
                )
            info = checked(value, GalleryInfo)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ClipretError(
                f"{folder} is no gallery (no gallery.json): make one with clipret-search index"
            ) from error
        except OSError as error:
            raise ClipretError(f"{file} cannot be read: {error.strerror}; fix its permissions") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ClipretError(f"{file} is damaged ({error}): restore it or index again") from error
        return cls(folder, info)

    def rooted(self, root: Path) -> Self:
        """The same gallery with another root; only for a gallery without images."""
        info = msgspec.structs.replace(self.info, root=os.path.abspath(root))  # noqa: PTH100
        if info != self.info:
            write_file(self.path / "gallery.json", _json(info))
        return type(self)(self.path, info)

    @cached_property
    def database(self) -> Database:
        return Database(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if "database" in self.__dict__:
            self.database.close()
            del self.__dict__["database"]

    def bundle(self, path: str | Path | None = None) -> Bundle:
        """The bundle that made the embeddings.

        Args:
            path: The bundle, if it has moved. Default: where it was at indexing time.

        Raises:
            ClipretError: There is no bundle, or it has another fingerprint.
        """
        places = (self.path / self.info.bundle_relative, Path(self.info.bundle))
        return find_bundle(path, places, self.info.fingerprint, f"gallery {self.path}")

    def check(self, bundle: Bundle) -> None:
        """Raise ClipretError unless `bundle` made the embeddings of this gallery."""
        check_bundle(bundle, self.info.fingerprint, f"gallery {self.path}")

    def __len__(self) -> int:
        return self.database.count()

    def read(self) -> Stored:
        """Everything that is committed now, memory-mapped.

        Raises:
            ClipretError: A shard is missing or does not have the shape in the database.
        """
        entries, deleted, shards, quantized = self.consistent(lambda entry: open_quantized(self.path, entry))
        return Stored(shards, *ids_and_live(entries, deleted), quantized)

    def consistent(
        self, more: Callable[[ShardEntry], T]
    ) -> tuple[list[ShardEntry], Ids, list[npt.NDArray[np.float16]], list[T]]:
        """The shards of one commit, the ids deleted by then, the shards' embeddings, and `more` of each shard."""
        for attempt in range(_RETRIES):
            entries, deleted = self.database.snapshot()
            try:
                return entries, deleted, [open_rows(self.path, e) for e in entries], [more(e) for e in entries]
            except FileNotFoundError as error:
                lost = error
            if attempt and [e.number for e in self.database.snapshot()[0]] == [e.number for e in entries]:
                break  # nobody compacts: it is really missing
        advice = "compact the gallery" if Path(lost.filename).name.startswith("codes") else "restore it or index again"
        raise ClipretError(f"{lost.filename} is missing: {advice}")

    def paths(self, ids: Sequence[int] | Ids) -> list[str]:
        """The stored path of each id. Raises ClipretError for an id that compaction has removed."""
        return [image.path for image in self.images_of(ids)]

    def images_of(self, ids: Sequence[int] | Ids) -> list[ImageRecord]:
        """The record of each image, deleted or not. Raises ClipretError for an id that compaction has removed."""
        found = self.database.images(ids)
        lost = next((int(number) for number in ids if int(number) not in found), None)
        if lost is not None:
            raise ClipretError(f"{self.path} holds no image {lost} any more: open the gallery again")
        return [found[int(number)] for number in ids]

    def metadata(self, ids: Sequence[int] | Ids) -> list[dict[str, Value]]:
        """The metadata of each image: all columns, None without a value."""
        found, empty = self.database.metadata(ids), dict.fromkeys(self.columns())
        return [dict(found.get(int(number), empty)) for number in ids]

    def columns(self) -> list[str]:
        """The metadata columns."""
        return self.database.columns()

    def select(self, where: str) -> Ids:
        """The ids of the live images for which an SQL expression holds.

        Args:
            where: Such as  camera = 'A3' and hour < 6.  Columns are id, path, size, mtime_ns, hash and the metadata.

        Returns:
            Ids, int64, ascending.

        Raises:
            ClipretError: The expression is wrong.
        """
        return self.database.select(where)

    def ids_of(self, paths: Collection[str]) -> dict[str, int]:
        """The ids of live images by stored path, for those of `paths` that there are."""
        return {path: number for path, (number, *_) in self.database.by_path(list(paths)).items()}

    def id_of(self, name: str) -> int:
        """The id of a live image, by its stored path or its file. Raises ClipretError if there is none."""
        return id_of(name, Path(self.info.root), self.ids_of, str(self.path))

    def ids_by_path(self) -> dict[str, int]:
        """The id of every live image by its stored path."""
        return dict(self.database.query("SELECT path, id FROM rows WHERE deleted = 0"))

    def images(self) -> dict[str, ImageRecord]:
        """Every live image by its stored path."""
        rows = self.database.query("SELECT path, size, mtime_ns, hash FROM rows WHERE deleted = 0")
        return {row[0]: ImageRecord(*row) for row in rows}

    def duplicates(self) -> list[list[str]]:
        """Groups of live images with identical files: their paths, oldest first."""
        rows = self.database.query(
            "SELECT hash, path FROM rows WHERE deleted = 0 AND hash IN "
            "(SELECT hash FROM rows WHERE deleted = 0 AND hash <> '' GROUP BY hash HAVING count(*) > 1) ORDER BY id"
        )
        groups: dict[str, list[str]] = {}
        for digest, path in rows:
            groups.setdefault(digest, []).append(path)
        return list(groups.values())

    def stored_path(self, file: Path) -> str:
        """The path under which the database has a file: relative to the root if it is below it, else absolute."""
        return stored_path(file, Path(self.info.root))

    def file(self, stored: str) -> Path:
        """The file of a stored path."""
        return Path(self.info.root, stored)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Become the only writer, after removing what an interrupted one left. Raises ClipretError if there is
        another writer."""
        files = [file for file in (self.path, self.path / "gallery.db") if file.exists()]
        if not all(os.access(file, os.W_OK) for file in files):
            raise ClipretError(f"{self.path} cannot be written: fix its permissions, or work on a copy")
        try:
            # sqlite's own lock, on a database of nothing: the same on every system, and it ends with its process.
            with contextlib.closing(sqlite3.connect(self.path / "gallery.lock", timeout=0)) as lock:
                lock.execute("BEGIN EXCLUSIVE")
                self.sweep()
                yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ClipretError(
                    f"another process is writing to {self.path}: wait for it to end, then try again"
                ) from error
            raise ClipretError(f"{self.path} cannot be written: {error}; fix its permissions") from error

    def sweep(self) -> None:
        """Remove files that no transaction lists. Only inside `writing()`."""
        try:
            sweep(self.path, {number for (number,) in self.database.query("SELECT number FROM shards")})
        except OSError as error:
            raise ClipretError(f"{self.path} cannot be written: {error.strerror}; fix its permissions") from error

    @contextlib.contextmanager
    def refusable(self) -> Iterator[None]:
        """Turns an error of the disk inside the block into a ClipretError."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            locked = "locked" in str(error)
            advice = "close what reads it for so long" if locked else "free space, or change what it names"
            raise ClipretError(
                f"{self.path} cannot be written ({error}): {advice}; what was committed before is kept"
            ) from error

    def append(
        self,
        images: Sequence[ImageRecord],
        embeddings: npt.NDArray[np.floating[Any]],
        metadata: Sequence[Mapping[str, Value]] | None = None,
    ) -> None:
        """Commit one shard. Only inside `writing()`.

        An image whose path is already in the gallery replaces the old one.

        Args:
            images: The records of n images.
            embeddings: float32 or float16 [n,D]; stored as float16.
            metadata: Of each image; new names become columns.

        Raises:
            ClipretError: An embedding is not finite, the counts differ, or the disk refuses. Nothing is changed then.
        """
        if len(images) != len(embeddings):
            raise ClipretError(f"{len(embeddings)} embeddings for {len(images)} images: give one for each")
        if not len(images):
            return
        stored = np.ascontiguousarray(embeddings, dtype=np.float16)
        if not np.isfinite(stored).all():
            raise ClipretError("an embedding is not finite: the image tower overflowed; export the model again")
        number, first = self.database.next_shard(), self.database.next_id()
        quantized = self._quantize(stored)
        replaced = self.database.by_path([image.path for image in images])
        ids = np.arange(first, first + len(stored), dtype=np.int64)
        with self.refusable():
            write_shard(self.path, number, stored, quantized)
            with self.database.transaction() as transaction:
                entry = ShardEntry(number, ids, quantized.center, quantized.scale, quantized.residual, quantized.reach)
                name_shard(transaction, entry)
                transaction.executemany(
                    "UPDATE rows SET deleted = 1 WHERE path = ? AND deleted = 0", ((p.path,) for p in images)
                )
                transaction.executemany(
                    "INSERT INTO rows (id, shard, path, size, mtime_ns, hash) VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        (row, number, p.path, p.size, p.mtime_ns, p.hash)
                        for row, p in zip(ids.tolist(), images, strict=True)
                    ),
                )
                places = zip(ids.tolist(), images, strict=True)
                inherit_metadata(transaction, {new: replaced[p.path][0] for new, p in places if p.path in replaced})
                if metadata is not None:
                    write_metadata(transaction, ids.tolist(), metadata)
        _log.debug("committed shard %d of %s: %d embeddings", number, self.path, len(ids))

    def _quantize(self, embeddings: npt.NDArray[np.float16]) -> QuantizedEmbeddings:
        """With the center and scale of the last shard, so that the search can scan the two as one, unless its center
        comes from far fewer embeddings than these."""
        last = self.database.query("SELECT center, scale FROM shards ORDER BY number DESC LIMIT 1")
        if last:
            center, scale = last[0]
            first = self.database.query("SELECT length(ids) / 8 FROM shards WHERE center = ? LIMIT 1", center)
            if len(embeddings) < 4 * first[0][0]:
                return quantize(embeddings, np.frombuffer(center, "<f4"), scale)
        return quantize(embeddings, mean(embeddings))

    def update(self, changes: Mapping[int, tuple[ImageRecord, Mapping[str, Value]]]) -> None:
        """Replace records and metadata of images, by id; their embeddings stay. Only inside `writing()`.

        Raises:
            ClipretError: The disk refuses. Nothing is changed then.
        """
        if not changes:
            return
        with self.refusable(), self.database.transaction() as transaction:
            transaction.executemany(
                "UPDATE rows SET path = ?, size = ?, mtime_ns = ?, hash = ? WHERE id = ?",
                [(p.path, p.size, p.mtime_ns, p.hash, number) for number, (p, _) in changes.items()],
            )
            write_metadata(transaction, list(changes), [metadata for _, metadata in changes.values()])

    def remove(self, ids: Sequence[int] | Ids) -> int:
        """Delete images. Their embeddings stay in the files until `compact_gallery`. Only inside `writing()`.

        Args:
            ids: Ids of images; unknown ones are ignored.

        Returns:
            The number of deleted images.

        Raises:
            ClipretError: The disk refuses. Nothing is changed then.
        """
        with self.refusable(), self.database.transaction() as transaction:
            return transaction.executemany(
                "UPDATE rows SET deleted = 1 WHERE id = ? AND deleted = 0", [(int(number),) for number in ids]
            ).rowcount


def _json(info: GalleryInfo) -> str:
    return json.dumps(msgspec.to_builtins(info), indent=2, ensure_ascii=False) + "\n"
