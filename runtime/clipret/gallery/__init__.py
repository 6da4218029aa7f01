"""Embeddings and metadata on disk."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.gallery.compaction import compact_gallery
    from clipret.gallery.gallery import Gallery

__all__ = ["Gallery", "compact_gallery"]

__getattr__ = lazy_face(__name__, {"compaction": ["compact_gallery"], "gallery": ["Gallery"]})
