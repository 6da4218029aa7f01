"""Evaluation of a search with ground truth."""

from typing import TYPE_CHECKING

from clipret._faces import lazy_face

if TYPE_CHECKING:
    from clipret.evaluation.evaluate import evaluate_search
    from clipret.evaluation.metrics import Metrics

__all__ = ["Metrics", "evaluate_search"]

__getattr__ = lazy_face(__name__, {"evaluate": ["evaluate_search"], "metrics": ["Metrics"]})
