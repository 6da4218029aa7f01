"""Re-ranking: each step against its definition written out, and what must not change."""

import numpy as np
import pytest

from clipret.errors import ClipretError
from clipret.gallery.info import Stored
from clipret.ranking.quantization import mean, quantize
from clipret.ranking.ranker import Ranker, snap
from clipret.search.rerank import Rerank, Reranker, adapted, k_reciprocal_order


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def stored(rows: np.ndarray, live: np.ndarray | None = None) -> Stored:
    shards = [part.astype(np.float16) for part in np.array_split(rows, 3)]
    return Stored(shards, np.arange(len(rows)), live, [quantize(part, mean(part)) for part in shards])


def reranker(held: Stored, how: Rerank, reference: np.ndarray | None = None) -> Reranker:
    return Reranker(held, Ranker(held.shards, held.live, held.quantized), how, reference)


@pytest.fixture
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(300, 16)))
    rows[200:220] = rows[100:120]  # equal rows, in another shard
    return rows


@pytest.fixture
def queries() -> np.ndarray:
    return unit(np.random.default_rng(1).normal(size=(7, 16)))


def by_order(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k best of each line, ties by position."""
    return np.stack([np.lexsort((np.arange(len(line)), -line))[:k] for line in scores])


def wide(held: Stored) -> np.ndarray:
    return np.concatenate(held.shards).astype(np.float64)


def test_no_step_is_the_exact_ranking(rows: np.ndarray, queries: np.ndarray) -> None:
    held = stored(rows)
    expected = Ranker(held.shards).rank(queries, 9)
    for own, other in zip(reranker(held, Rerank()).rank(queries, 9), expected, strict=True):
        np.testing.assert_array_equal(own, other)
    assert Rerank().steps == []
    assert Rerank(adapt=50, hubness="nnn", k_reciprocal=100).steps == ["adapt 50", "nnn", "k-reciprocal 100"]


def test_nnn_takes_the_mean_of_the_nearest_queries_off(rows: np.ndarray, queries: np.ndarray) -> None:
    live = np.arange(300) % 5 != 0
    held = stored(rows, live)
    reference = unit(np.random.default_rng(2).normal(size=(40, 16)))
    how = Rerank(hubness="nnn", neighbours=4, strength=0.8)
    scores, found = reranker(held, how, reference).rank(queries, 20)
    nearest = np.sort(snap(reference) @ wide(held).T, axis=0)[-4:]
    expected = snap(queries) @ wide(held).T - 0.8 * nearest.mean(axis=0)
    expected[:, ~live] = -np.inf
    np.testing.assert_array_equal(found, by_order(snap(expected), 20))
    np.testing.assert_allclose(scores, np.take_along_axis(expected, found, axis=1), atol=1e-6)
    # Without a reference the queries measure each other: one of them alone is answered otherwise.
    together = reranker(held, Rerank(hubness="nnn", neighbours=4)).rank(queries, 20)[1]
    alone = reranker(held, Rerank(hubness="nnn", neighbours=4)).rank(queries[:1], 20)[1]
    assert together[:1].tolist() != alone.tolist()


def test_dual_softmax_shares_an_image_among_the_queries(rows: np.ndarray, queries: np.ndarray) -> None:
    held = stored(rows)
    _, found = reranker(held, Rerank(hubness="dual-softmax", temperature=20)).rank(queries, 300)
    plain = snap(queries) @ wide(held).T
    heat = np.exp(20 * plain)
    expected = np.where(plain > 0, plain * heat / heat.sum(axis=0), plain)
    same = by_order(expected, 300)
    values = np.take_along_axis(expected, found, axis=1)
    np.testing.assert_allclose(values, np.take_along_axis(expected, same, axis=1), rtol=1e-9)


def test_equal_rows_keep_their_order_and_blocks_change_nothing(
    rows: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = stored(rows)
    how = Rerank(hubness="nnn", neighbours=3)
    whole = reranker(held, how).rank(queries, 300)
    for line in whole[1].tolist():
        assert all(line.index(100 + n) < line.index(200 + n) for n in range(20))
    monkeypatch.setattr("clipret.search.rerank._SCORES", 7 * 5)
    for one, other in zip(whole, reranker(held, how).rank(queries, 300), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_allowed_rows_are_found(rows: np.ndarray, queries: np.ndarray) -> None:
    among = np.arange(300) < 12
    for how in (Rerank(adapt=5), Rerank(hubness="nnn"), Rerank(k_reciprocal=30), Rerank(hubness="dual-softmax")):
        scores, found = reranker(stored(rows), how).rank(queries, 30, among=among)
        assert found.shape == scores.shape == (7, 12)
        assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(12), (7, 1)))
        assert (np.diff(scores, axis=1) <= 0).all()


def test_a_query_moves_to_what_its_images_share() -> None:
    rng = np.random.default_rng(0)
    centre = unit(rng.normal(size=16))
    rows = unit(centre + 0.1 * rng.normal(size=(50, 16)))
    query = unit(centre + 0.4 * rng.normal(size=16))
    scores = rows @ query
    _, _, right = np.linalg.svd(scores[:, None] * rows, full_matrices=False)
    component = right[0] * np.sign(right[0] @ centre)
    np.testing.assert_allclose(adapted(query, rows, scores, 1.0), component, atol=1e-12)
    np.testing.assert_allclose(adapted(query, rows, scores, 0.0), query, atol=1e-12)
    assert adapted(query, rows, scores, 0.5) @ centre > query @ centre + 0.05
    np.testing.assert_array_equal(adapted(query, rows, -np.ones(50), 0.5), query)


def test_images_that_share_neighbours_with_the_first_rise() -> None:
    """One image of the cluster that fills the head of the list scores badly, one stranger scores well."""
    rng = np.random.default_rng(3)
    cluster = unit(np.eye(8)[0] + 0.05 * rng.normal(size=(12, 8)))
    others = unit(rng.normal(size=(12, 8)) * [0, 1, 1, 1, 1, 1, 1, 1])
    rows = np.concatenate([cluster[:11], others[:1], cluster[11:], others[1:]])  # by falling score
    scores = np.linspace(0.3, 0.2, 24)
    distance = k_reciprocal_order(scores, rows, k1=10, k2=3)
    assert distance[12] < distance[11]
    assert ((distance >= 0) & (distance <= 1)).all()
    np.testing.assert_array_equal(np.argsort(k_reciprocal_order(scores, rows, share=1.0)), np.arange(24))


def test_the_reciprocal_distance_is_the_paper_s() -> None:
    """Against sets and loops, as the paper writes it down."""
    rng = np.random.default_rng(5)
    rows, scores, k1, k2 = unit(rng.normal(size=(30, 6))), np.sort(rng.uniform(size=30))[::-1].copy(), 8, 3
    near = rows @ rows.T
    order = np.argsort(-near, axis=1, kind="stable")

    def mutual(i: int, k: int) -> set[int]:
        return {int(j) for j in order[i, : k + 1] if i in order[j, : k + 1]}

    def widened(own: set[int]) -> set[int]:
        result = set(own)
        for j in own:
            half = mutual(j, k1 // 2)
            if len(own & half) >= 2 / 3 * len(half):
                result |= half
        return result

    def described(members: set[int], similarity: np.ndarray) -> np.ndarray:
        row = np.zeros(30)
        for j in members:
            row[j] = np.exp(-(2 - 2 * similarity[j]))
        return row / row.sum()

    asked = described(widened(set(range(k1))), scores)
    own = np.array([described(widened(mutual(i, k1)), near[i]) for i in range(30)])
    blurred = np.array([own[order[i, :k2]].mean(axis=0) for i in range(30)])
    asked = np.mean([asked, *own[:k2]], axis=0)
    jaccard = [1 - np.minimum(asked, row).sum() / np.maximum(asked, row).sum() for row in blurred]
    original = (scores.max() - scores) / (scores.max() - scores.min())
    expected = 0.7 * np.array(jaccard) + 0.3 * original
    np.testing.assert_allclose(k_reciprocal_order(scores, rows, k1=k1, k2=k2), expected, atol=1e-12)


def test_what_is_out_of_range_is_refused(rows: np.ndarray, queries: np.ndarray) -> None:
    for values, message in (
        ({"adapt": -1}, "adapt is -1"),
        ({"adapt_weight": 2.0}, "adapt_weight is 2.0"),
        ({"share": -0.1}, "share is -0.1"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"hubness": "knn"}, "hubness 'knn' is unknown"),
    ):
        with pytest.raises(ClipretError, match=message):
            Rerank(**values)
    with pytest.raises(ClipretError, match="the embeddings need"):
        reranker(stored(rows), Rerank(hubness="nnn")).rank(queries[:, :3], 5)
    with pytest.raises(ClipretError, match="no queries to measure"):
        reranker(stored(rows), Rerank(hubness="nnn"), np.empty((0, 16))).rank(queries, 5)
