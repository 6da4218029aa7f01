"""The command clipret-search."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.cli.app import main

__all__ = ["main"]

__getattr__ = lazy_face(__name__, {"app": ["main"]})
