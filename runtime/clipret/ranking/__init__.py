"""Exact top-k over embeddings."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.ranking.ranker import Ranker

__all__ = ["Ranker"]

__getattr__ = lazy_face(__name__, {"ranker": ["Ranker"]})
