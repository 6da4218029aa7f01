"""One image a query: against trying all, and against the matrix of all scores."""

import itertools

import numpy as np
import pytest

from clipret.competitions.assignment import assign
from clipret.errors import ClipretError
from clipret.ranking.ranker import Ranker

pytest.importorskip("scipy", reason="needs clipret[assignment]")


class Scores:
    """A matrix of scores, searched as a ranker is; `asked` counts the scores that were looked at."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores
        self.asked = 0

    def __call__(self, which: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        part = self.scores[which]
        order = np.argsort(-part, axis=1, kind="stable")[:, :k]
        self.asked += order.size
        return np.take_along_axis(part, order, axis=1), order


def dense(scores: np.ndarray) -> float:
    """The best total by augmenting paths over the whole matrix (Bellman-Ford, nothing shared with the code)."""
    Q, N = scores.shape
    owner = np.full(N, -1)
    for start in range(Q):
        best, came = -scores[start], np.full(N, start)
        for _ in range(Q):
            before = best.copy()
            for column in np.flatnonzero(owner >= 0):
                row = owner[column]
                through = best[column] + scores[row, column] - scores[row]
                better = through < best - 1e-12
                best, came = np.where(better, through, best), np.where(better, row, came)
            if np.array_equal(before, best):
                break
        column = int(np.where(owner < 0, best, np.inf).argmin())
        while True:
            row = came[column]
            previous = np.flatnonzero(owner == row)
            owner[column] = row
            if row == start:
                break
            column = int(previous[0])
    return float(sum(scores[owner[column], column] for column in np.flatnonzero(owner >= 0)))


def test_small_ones_against_all_permutations() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        Q = int(rng.integers(1, 5))
        scores = rng.normal(size=(Q, int(rng.integers(Q, 7)))).round(1)  # rounded, so that some are equal
        values, chosen = assign(Scores(scores), Q)
        assert len(set(chosen.tolist())) == Q
        np.testing.assert_array_equal(values, scores[np.arange(Q), chosen])
        best = max(
            scores[np.arange(Q), list(order)].sum() for order in itertools.permutations(range(scores.shape[1]), Q)
        )
        assert values.sum() == pytest.approx(best)


def test_queries_that_all_want_the_same_images() -> None:
    """Lists of sixteen cannot seat sixty queries with one taste: they are lengthened as far as it takes, and the sum is
    that of the whole matrix."""
    rng = np.random.default_rng(1)
    taste = rng.normal(size=400)
    scores = taste + 0.3 * rng.normal(size=(60, 400))
    find = Scores(scores)
    values, chosen = assign(find, 60)
    assert len(set(chosen.tolist())) == 60
    assert values.sum() == pytest.approx(dense(scores))
    apart = Scores(rng.normal(size=(60, 400)))
    assert assign(apart, 60)[0].sum() == pytest.approx(dense(apart.scores))
    assert apart.asked == 60 * 16


def test_the_first_of_a_ranker_where_no_two_collide() -> None:
    rows = np.eye(8, dtype=np.float16)
    queries = np.eye(8)[[3, 5, 1]] + 0.01
    ranker = Ranker(rows)
    values, chosen = assign(lambda which, k: ranker.rank(queries[which], k), 3)
    assert chosen.tolist() == [3, 5, 1]
    np.testing.assert_array_equal(values, ranker.rank(queries, 1)[0][:, 0])


def test_too_few_images() -> None:
    with pytest.raises(ClipretError, match="not each of the 4 queries can have an image of its own"):
        assign(Scores(np.random.default_rng(0).normal(size=(4, 3))), 4)


def test_many_with_scarce_images_and_ties_against_the_whole_matrix() -> None:
    """Lists that are lengthened, images of one list alone, scores that are equal."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(2)
    for number in range(60):
        Q = int(rng.integers(15, 50))
        N = int(rng.integers(Q, 150))
        scores = rng.normal(size=N) * (number % 3) + rng.normal(size=(Q, N)) * rng.choice([0.1, 1])
        scores = scores.round(1) if number % 2 else scores
        values, chosen = assign(Scores(scores), Q)
        assert len(set(chosen.tolist())) == Q
        np.testing.assert_array_equal(values, scores[np.arange(Q), chosen])
        assert values.sum() == pytest.approx(scores[linear_sum_assignment(scores, maximize=True)].sum(), abs=1e-9)
