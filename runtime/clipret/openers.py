"""Opens what is searched, by its place: the folder of a gallery, or a collection in Milvus."""

from pathlib import Path
from typing import TYPE_CHECKING

from clipret.gallery.gallery import Gallery

if TYPE_CHECKING:
    from clipret.milvus.search import MilvusCollection

__all__ = ["open_searchable"]


def open_searchable(place: Path | str) -> "Gallery | MilvusCollection":
    """A gallery by its folder, or the collection that milvus+URI names. Raises ClipretError."""
    if isinstance(place, Path):
        return Gallery.open(place)
    from clipret.milvus.search import open_milvus  # few searches need it

    return open_milvus(place)
