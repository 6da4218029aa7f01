"""HTML pages."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.reports.page import write_page

__all__ = ["write_page"]

__getattr__ = lazy_face(__name__, {"page": ["write_page"]})
