from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipret import ranker as module
from clipret.errors import ClipretError
from clipret.ranker import Ranker, snap


def brute_force(rows: np.ndarray, queries: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every live row of every query in order: scores, positions."""
    scores = snap(queries) @ rows.astype(np.float64).T
    scores[:, ~live] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(rows)), scores.shape), -scores))[:, : live.sum()]
    return np.take_along_axis(scores, order, axis=1), order


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-9)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, Sequence[int]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, width, queries = draw(st.integers(1, 90)), draw(st.sampled_from([1, 3, 8, 64])), draw(st.integers(1, 5))
    rows = unit(rng.normal(size=(count, width)))
    if draw(st.booleans()):  # a narrow cone, as real towers have
        rows = unit(rows * 0.05 + rows[:1])
    if draw(st.booleans()):  # many exact duplicates
        rows = rows[rng.integers(0, max(1, count // 4), count)]
    if draw(st.booleans()):
        rows[rng.integers(0, count)] = 0
    live = rng.random(count) < draw(st.sampled_from([1.0, 0.6]))
    live[rng.integers(0, count)] = True
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=3)))
    return rows.astype(np.float16), unit(rng.normal(size=(queries, width))), live, draw(st.integers(1, 100)), cuts


@settings(deadline=None, max_examples=200)
@given(cases())
def test_equals_brute_force_in_order(case: tuple[np.ndarray, np.ndarray, np.ndarray, int, Sequence[int]]) -> None:
    rows, queries, live, k, cuts = case
    expected_scores, expected = brute_force(rows, queries, live)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", 16)  # many blocks, so that the running threshold works
        patch.setattr(module, "_QUERIES", 2)
        patch.setattr(module, "_PAIRS", 100)
        ranker = Ranker(np.split(rows, cuts), live)
        scores, positions = ranker.rank(queries, k)
        np.testing.assert_array_equal(positions, expected[:, :k])
        np.testing.assert_array_equal(scores, expected_scores[:, :k])
        rng = np.random.default_rng(0)
        relevant = [[*rng.choice(np.flatnonzero(live), 2).tolist(), 0] for _ in queries]
        place = [{int(p): rank for rank, p in enumerate(order, 1)} for order in expected]
        first = [min(at[p] for p in some if p in at) for at, some in zip(place, relevant, strict=True)]
        np.testing.assert_array_equal(ranker.first_ranks(queries, relevant), first)


def test_scores_are_exact_numbers() -> None:
    """The float64 score equals the sum in exact rational arithmetic, so no order of summation can change it."""
    rng = np.random.default_rng(1)
    rows = unit(rng.normal(size=(20, 300))).astype(np.float16)
    query = unit(rng.normal(size=(1, 300)))
    scores, positions = Ranker(rows).rank(query, 20)
    grid = [Fraction(float(x)) for x in snap(query)[0]]
    for score, position in zip(scores[0], positions[0], strict=True):
        exact = sum(a * Fraction(float(b)) for a, b in zip(grid, rows[position], strict=True))
        assert Fraction(float(score)) == exact


def test_ties_are_ordered_by_position_over_shards() -> None:
    row = unit(np.ones((1, 4))).astype(np.float16)
    _, positions = Ranker([np.repeat(row, 3, 0), np.repeat(row, 2, 0)]).rank(np.ones((1, 4)) / 2, 4)
    assert positions.tolist() == [[0, 1, 2, 3]]


def test_no_rows_and_no_queries() -> None:
    empty = Ranker([])
    assert empty.rank(np.ones((2, 4)), 3)[1].shape == (2, 0)
    assert Ranker(np.ones((3, 4), np.float16)).rank(np.ones((0, 4)), 3)[1].shape == (0, 3)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones((1, 4)), 0, "k is 0"),
        (np.ones((1, 5)), 1, r"shape \(1, 5\), the rows need \[Q,4\]"),
        (np.full((1, 4), np.nan), 1, "not finite"),
        (np.full((1, 4), 1000.0), 1, "beyond exact ranking"),
    ],
)
def test_bad_requests(queries: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ClipretError, match=message):
        Ranker(np.ones((3, 4), np.float16)).rank(queries, k)


def test_rows_must_be_float16_of_one_width() -> None:
    with pytest.raises(ClipretError, match="float16 of one width"):
        Ranker([np.ones((1, 4), np.float16), np.ones((1, 5), np.float16)])
    with pytest.raises(ClipretError, match="2 live flags for 1 rows"):
        Ranker(np.ones((1, 4), np.float16), np.array([True, True]))
