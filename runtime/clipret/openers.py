"""Open what a search runs on: a gallery folder or a Milvus collection."""

from pathlib import Path
from typing import TYPE_CHECKING

from clipret.gallery.gallery import Gallery

if TYPE_CHECKING:
    from clipret.milvus.search import MilvusCollection

__all__ = ["open_searchable"]


def open_searchable(place: Path | str) -> "Gallery | MilvusCollection":
    """Open a gallery or a Milvus collection.

    Args:
        place: The folder of a gallery, or milvus+URI.

    Raises:
        ClipretError: It cannot be opened.
    """
    if isinstance(place, Path):
        return Gallery.open(place)
    from clipret.milvus.search import open_milvus  # imported late: few searches need it

    return open_milvus(place)
