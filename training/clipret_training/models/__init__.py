"""Models that can be trained and exported, and how each is loaded."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret_training.models.load import load_model
    from clipret_training.models.loaded import LoadedModel

__all__ = ["LoadedModel", "load_model"]

__getattr__ = lazy_face(__name__, {"load": ["load_model"], "loaded": ["LoadedModel"]})
