"""From image files to pixels."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.images.decode import load
    from clipret.images.walk import ImageError

__all__ = ["ImageError", "load"]

__getattr__ = lazy_face(__name__, {"decode": ["load"], "walk": ["ImageError"]})
