"""From the bytes of an image to pixels."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.images.decode import load
    from clipret.images.walk import PictureError

__all__ = ["PictureError", "load"]

__getattr__ = lazy_face(__name__, {"decode": ["load"], "walk": ["PictureError"]})
