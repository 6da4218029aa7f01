"""Knows when what a service searches was changed, by this process or another."""

import time
from pathlib import Path
from typing import Protocol

from clipret.errors import ClipretError
from clipret.gallery.gallery import Gallery
from clipret.milvus.search import MilvusCollection, open_milvus

__all__ = ["CollectionWatch", "GalleryWatch", "Watch"]

_SECONDS = 15.0  # between two looks at a collection


class Watch(Protocol):
    """One thread at a time."""

    def changed(self) -> bool:
        """Whether it was changed since the last call; True at the first. Raises ClipretError where it is gone."""
        ...

    def close(self) -> None:
        """Forget what was seen: the next call of `changed` says True."""
        ...


class GalleryWatch:
    """A `Watch` of a gallery's folder."""

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
        if self._gallery is None or self._seen[:2] != file:  # another file: a new gallery in the same place
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


class CollectionWatch:
    """A `Watch` of a collection in Milvus: of how many images there are, and of what an export says of itself."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._collection: MilvusCollection | None = None
        self._looked = 0.0
        self._last: tuple[object, ...] = ()

    def changed(self) -> bool:
        if self._collection is not None and time.monotonic() < self._looked + _SECONDS:
            return False
        self._looked = time.monotonic()
        if self._collection is None:
            self._collection = open_milvus(self._place)
        facts = self._collection.client.facts()
        now = (self._collection.count(), tuple(facts["columns"]), facts["state"])
        changed, self._last = now != self._last, now
        return changed

    def close(self) -> None:
        if self._collection is not None:
            self._collection.close()
        self._collection, self._last = None, ()
