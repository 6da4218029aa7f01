"""Models that can be trained and exported, and how each is loaded."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret_training.models.early_pooling import pool_early
    from clipret_training.models.load import SMALL, anchored, architecture, describe, load_model, model_names
    from clipret_training.models.loaded import LoadedModel
    from clipret_training.models.structure import tower_of

__all__ = [
    "SMALL",
    "LoadedModel",
    "anchored",
    "architecture",
    "describe",
    "load_model",
    "model_names",
    "pool_early",
    "tower_of",
]

__getattr__ = lazy_face(
    __name__,
    {
        "early_pooling": ["pool_early"],
        "load": ["SMALL", "anchored", "architecture", "describe", "load_model", "model_names"],
        "loaded": ["LoadedModel"],
        "structure": ["tower_of"],
    },
)
