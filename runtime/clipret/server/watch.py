"""Detects changes of a gallery or collection, by this process or another."""

import time
from pathlib import Path
from typing import Protocol

from clipret.errors import ClipretError
from clipret.gallery.gallery import Gallery
from clipret.milvus.search import MilvusCollection, open_milvus

__all__ = ["CollectionWatch", "GalleryWatch", "Watch"]

_SECONDS = 15.0  # between two checks of a collection


class Watch(Protocol):
    """Detects changes. Use it from one thread at a time."""

    def changed(self) -> bool:
        """Whether there was a change since the last call; True at the first. Raises ClipretError if it is missing."""
        ...

    def close(self) -> None:
        """Forget the last check: the next call of `changed` returns True."""
        ...


class GalleryWatch:
    """A `Watch` of the folder of a gallery."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gallery: Gallery | None = None
        self._seen: tuple[int, ...] = ()

    def changed(self) -> bool:
        try:
            status = (self.path / "gallery.db").stat()
        except OSError as error:
            raise ClipretError(f"{self.path} cannot be read: {error.strerror}; restore it or index again") from error
        file = (status.st_dev, status.st_ino)
        if self._gallery is None or self._seen[:2] != file:  # another file: the gallery was replaced
            self.close()
            self._gallery = Gallery.open(self.path)
        # SQLite's counter of the commits of other connections.
        seen = (*file, int(self._gallery.database.query("PRAGMA data_version")[0][0]))
        changed, self._seen = seen != self._seen, seen
        return changed

    def close(self) -> None:
        if self._gallery is not None:
            self._gallery.close()
        self._gallery, self._seen = None, ()


class CollectionWatch:
    """A `Watch` of a Milvus collection: of its number of images and the progress of exports."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._collection: MilvusCollection | None = None
        self._checked = 0.0
        self._last: tuple[object, ...] = ()

    def changed(self) -> bool:
        if self._collection is not None and time.monotonic() < self._checked + _SECONDS:
            return False
        self._checked = time.monotonic()
        if self._collection is None:
            self._collection = open_milvus(self._address)
        facts = self._collection.client.facts()
        current = (self._collection.count(), tuple(facts["columns"]), facts["state"])
        changed, self._last = current != self._last, current
        return changed

    def close(self) -> None:
        if self._collection is not None:
            self._collection.close()
        self._collection, self._last = None, ()
