"""A gallery in Milvus."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.milvus.search import open_milvus

__all__ = ["open_milvus"]

__getattr__ = lazy_face(__name__, {"search": ["open_milvus"]})
