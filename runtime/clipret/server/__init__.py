"""Search over HTTP."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.server.run import open_service, serve

__all__ = ["open_service", "serve"]

__getattr__ = lazy_face(__name__, {"run": ["open_service", "serve"]})
