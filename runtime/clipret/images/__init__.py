"""From the bytes of an image to pixels."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.images.decode import PictureError, load

__all__ = ["PictureError", "load"]

__getattr__ = lazy_face(__name__, {"decode": ["PictureError", "load"]})
