"""Where images come from: folders, annotation files, archives, Parquet, object stores."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.sources.item import Item
    from clipret.sources.source import Source, open_source

__all__ = ["Item", "Source", "open_source"]

__getattr__ = lazy_face(__name__, {"item": ["Item"], "source": ["Source", "open_source"]})
