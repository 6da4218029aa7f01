"""Index images into a gallery."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.indexing.index import IndexReport, index_images

__all__ = ["IndexReport", "index_images"]

__getattr__ = lazy_face(__name__, {"index": ["IndexReport", "index_images"]})
