"""From queries to hits."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.search.searcher import Hit, Part, Query, Searcher

__all__ = ["Hit", "Part", "Query", "Searcher"]

__getattr__ = lazy_face(__name__, {"searcher": ["Hit", "Part", "Query", "Searcher"]})
