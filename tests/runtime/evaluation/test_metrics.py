"""Metrics against values computed by hand."""

import numpy as np
import pytest

from clipret.errors import ClipretError
from clipret.evaluation.metrics import Metric, average_precision, challenge_precision, evaluate
from clipret.ranking.ranker import Ranker


def test_average_precision_divides_by_the_relevant_images() -> None:
    assert average_precision([7, 1, 2], {7, 2}) == pytest.approx((1 + 2 / 3) / 2)
    # Three hits of many relevant images are not perfect, even on the first ranks.
    assert average_precision(list(range(10)), {0, 1, 2, *range(50, 100)}) == pytest.approx(3 / 10)
    assert average_precision([1, 2], set()) == 0


def test_metrics_of_a_known_order() -> None:
    # One dimension: embeddings 0..19 are ranked in this order for the first query, in reverse for the second.
    embeddings = np.linspace(1, -0.9, 20).astype(np.float16)[:, None]
    metrics = evaluate(Ranker(embeddings), np.array([[1.0], [-1.0]]), [[3, 19], [4]])
    assert metrics.queries == 2
    assert (metrics.recall_at_1, metrics.recall_at_5, metrics.recall_at_10) == (0.0, 0.5, 0.5)
    assert metrics.median_rank == (4 + 16) / 2
    assert metrics.map_at_10 == pytest.approx(((1 / 4) / 2 + 0) / 2)


def test_queries_without_relevant_images_are_refused() -> None:
    ranker = Ranker(np.ones((2, 1), np.float16))
    with pytest.raises(ClipretError, match="no relevant image"):
        evaluate(ranker, np.ones((1, 1)), [[]])
    with pytest.raises(ClipretError, match="no queries"):
        evaluate(ranker, np.ones((0, 1)), [])


def test_average_precision_at_k() -> None:
    assert average_precision([1, 7, 2], {7}, 1) == 0
    assert average_precision([7, 1, 2], {7, 2}, 1) == 1
    # Images that a short ranking leaves out count as not found.
    assert average_precision(["a"], {"a", "b"}, 10) == pytest.approx(1 / 2)


def test_the_challenge_metric_ignores_missing_images() -> None:
    ranked = [0, 1, 2, *range(100, 107)]
    assert challenge_precision(ranked, set(range(60))) == 1.0
    assert average_precision(ranked, set(range(60))) == pytest.approx(0.3)
    # Another relevant image on the last rank lowers it.
    assert challenge_precision([*ranked[:9], 59], set(range(60))) == pytest.approx((3 + 4 / 10) / 4)
    assert challenge_precision(ranked, {99}) == 0


def test_metrics_by_name() -> None:
    ranked, relevant = [3, 1, 2, 0], {1, 0}
    for name, shown, value in (
        ("map", "mAP", (1 / 2 + 2 / 4) / 2),
        ("mAP@2", "mAP@2", 1 / 4),
        ("Recall@1", "recall@1", 0),
        ("recall@2", "recall@2", 1),
        ("challenge", "challenge", 1 / 2),
        ("challenge@2", "challenge@2", 1 / 2),
    ):
        metric = Metric.parse(name)
        assert str(metric) == shown
        assert metric.of(ranked, relevant) == pytest.approx(value)
    assert Metric.parse("mAP").of([0], {0, 1, 2, 3}) == 1 / 4
    for name in ("recall", "mAP@0", "precision@1", "map@"):
        with pytest.raises(ClipretError, match="there is no metric"):
            Metric.parse(name)
