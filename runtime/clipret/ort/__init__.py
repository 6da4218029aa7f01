"""Sessions of onnxruntime."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.ort.session import has_device, open_session

__all__ = ["has_device", "open_session"]

__getattr__ = lazy_face(__name__, {"session": ["has_device", "open_session"]})
