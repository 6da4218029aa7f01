from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipret.errors import ClipretError
from clipret.ranking import embedding_shards, ranker, scan
from clipret.ranking import gpu_scan as device
from clipret.ranking.gpu_scan import DeviceScan
from clipret.ranking.quantization import QuantizedEmbeddings, mean, quantize
from clipret.ranking.ranker import Ranker, snap

pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow

Case = tuple[np.ndarray, np.ndarray, np.ndarray, int, Sequence[int]]


def brute_force(rows: np.ndarray, queries: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every live row of every query in order: scores, positions."""
    scores = snap(queries) @ rows.astype(np.float64).T
    scores[:, ~live] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(rows)), scores.shape), -scores))[:, : live.sum()]
    return np.take_along_axis(scores, order, axis=1), order


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-9)


def coded(shards: Sequence[np.ndarray]) -> list[QuantizedEmbeddings]:
    """As the gallery quantizes them: the center of the first shard for all."""
    filled = [shard for shard in shards if len(shard)]
    return [quantize(shard, mean(filled[0])) for shard in filled]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, width, queries = draw(st.integers(1, 90)), draw(st.sampled_from([1, 3, 8, 64])), draw(st.integers(1, 5))
    rows = unit(rng.normal(size=(count, width)))
    if draw(st.booleans()):  # a narrow cone, as real towers have
        rows = unit(rows * 0.05 + rows[:1])
    if draw(st.booleans()):  # many exact duplicates
        rows = rows[rng.integers(0, max(1, count // 4), count)]
    if draw(st.booleans()):
        rows[rng.integers(0, count)] = 0
    if draw(st.booleans()):  # a constant row, and a query like it
        rows[rng.integers(0, count)] = 1 / np.sqrt(width)
    live = rng.random(count) < draw(st.sampled_from([1.0, 0.6]))
    live[rng.integers(0, count)] = True
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=3)))
    asked = unit(rng.normal(size=(queries, width)))
    asked[0] = draw(st.sampled_from([asked[0], rows[0], np.zeros(width), np.full(width, 1 / np.sqrt(width))]))
    return rows.astype(np.float16), asked, live, draw(st.integers(1, 100)), cuts


# To pretend that there is no VNNI is right on every processor; to pretend that there is lets 16-bit sums overflow.
WAYS = ["float", "quantized without VNNI", "packed without VNNI", "device", "device quantized", "all rows"]
WITH_VNNI = [pytest.param(way, marks=pytest.mark.needs_vnni) for way in ("quantized", "packed")]


@pytest.fixture(params=[*WAYS, *WITH_VNNI])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of ranking, in blocks so small that the running limit, the pool and the joining all have work."""
    way: str = request.param
    if way != "all rows":
        monkeypatch.setattr(ranker, "_DIRECT", 0)
    monkeypatch.setattr(ranker, "_QUERIES", 2)
    monkeypatch.setattr(embedding_shards, "_PAIRS", 3)
    monkeypatch.setattr(ranker, "_SCORES", 200)
    monkeypatch.setattr(ranker, "_POOL", 40)
    monkeypatch.setattr(scan, "_FLOAT_ROWS", 16)
    monkeypatch.setattr(scan, "_BLOCK_SIZE", 16)
    monkeypatch.setattr(scan, "_PACKED_ROWS", 16)
    monkeypatch.setattr(device, "_CHUNK", 4)
    monkeypatch.setattr(device, "_SCORES", 24)
    if "without VNNI" in way:
        monkeypatch.setattr(scan, "int8_saturates", lambda: True)
    return way


def make(way: str, rows: np.ndarray, cuts: Sequence[int], live: np.ndarray | None) -> Ranker:
    shards = [shard for shard in np.split(rows, cuts) if len(shard)]
    if way.startswith(("float", "all")):
        return Ranker(shards, live)
    if way.startswith("device"):  # the GPU's graph and logic on the CPU, one block resident and the others sent
        quantized = coded(shards) if "quantized" in way else None
        made = Ranker(shards, live, quantized)
        made._device = DeviceScan(
            shards, "cpu", quantized=quantized, coded=bool(quantized), block_rows=16, resident_rows=30
        )
        made._length = made._device.longest
        return made
    return Ranker(shards, live, coded(shards), threads=1, resident=way.startswith("packed"))


@pytest.mark.exhaustive
def test_equals_brute_force_in_order(ways: str) -> None:
    @settings(deadline=None, max_examples=150)
    @given(cases())
    def check(case: Case) -> None:
        rows, queries, live, k, cuts = case
        expected_scores, expected = brute_force(rows, queries, live)
        made = make(ways, rows, cuts, live)
        scores, positions = made.rank(queries, k)
        np.testing.assert_array_equal(positions, expected[:, :k])
        np.testing.assert_array_equal(scores, expected_scores[:, :k])
        rng = np.random.default_rng(0)
        relevant = [[*rng.choice(np.flatnonzero(live), 2).tolist(), 0] for _ in queries]
        place = [{int(p): rank for rank, p in enumerate(order, 1)} for order in expected]
        first = [min(at[p] for p in some if p in at) for at, some in zip(place, relevant, strict=True)]
        np.testing.assert_array_equal(made.first_ranks(queries, relevant), first)

    check()


@pytest.mark.exhaustive
def test_filters_and_least_scores(ways: str) -> None:
    @settings(deadline=None, max_examples=80)
    @given(cases(), st.integers(0, 2**32), st.floats(-0.5, 0.9))
    def check(case: Case, seed: int, least: float) -> None:
        rows, queries, live, k, cuts = case
        among = np.random.default_rng(seed).random(len(rows)) < 0.5
        expected_scores, expected = brute_force(rows, queries, live & among)
        scores, positions = make(ways, rows, cuts, live).rank(queries, k, among=among, min_score=least)
        expected_scores, expected = expected_scores[:, :k], expected[:, :k]
        np.testing.assert_array_equal(positions, np.where(expected_scores >= least, expected, -1))
        np.testing.assert_array_equal(scores, np.where(expected_scores >= least, expected_scores, -np.inf))

    check()


@settings(deadline=None, max_examples=100)
@given(cases(), st.floats(-1, 1))
def test_quantization_loses_no_more_than_it_says(case: Case, offset: float) -> None:
    rows = case[0]
    for center in (mean(rows), mean(rows) + np.float32(offset)):
        quantized = quantize(rows, center)
        coded_part = (quantized.values.astype(np.float64) - 128) * quantized.scale
        lost = rows.astype(np.float64) - center.astype(np.float64) - coded_part
        # Below 1e-20 float32 squares are no normal numbers any more; the ranker allows for 1e-10.
        assert np.linalg.norm(lost, axis=1).max() <= quantized.residual + 1e-20
        assert np.linalg.norm(coded_part, axis=1).max() <= quantized.reach + 1e-20
        assert quantized.residual <= quantized.scale / 2 * np.sqrt(rows.shape[1]) * 1.001 + 1e-5 * np.sqrt(
            rows.shape[1]
        )


def test_no_two_products_overflow_16_bits_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that such processors add in pairs: bytes of embeddings by quantized queries, shifted queries by
    quantized embeddings."""
    monkeypatch.setattr(scan, "int8_saturates", lambda: True)
    queries = scan.QuantizedQueries.of(snap(unit(np.random.default_rng(0).normal(size=(50, 64)))))
    largest = int(np.abs(queries.values.astype(int)).max())
    assert largest == scan._limit()
    assert 2 * 255 * largest < 2**15
    assert 2 * (2 * scan._limit()) * 128 < 2**15


@pytest.mark.parametrize("cone", [False, True])
def test_a_larger_gallery_with_duplicates(cone: bool) -> None:
    """Real block sizes, several shards of one group, more candidates than one block holds."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(40_000, 32))
    if cone:
        rows = 0.3 * rows + rng.normal(size=(1, 32)) * 3
    rows[20_000:21_000] = rows[:1000]
    rows = unit(rows).astype(np.float16)
    queries = unit(rng.normal(size=(40, 32)) + rows[:40])
    shards = np.split(rows, [9000, 18000, 18010, 30000])
    _, expected = brute_force(rows, queries, np.ones(len(rows), bool))
    for resident in (False, True):
        made = Ranker(shards, quantized=coded(shards), resident=resident)
        for k, count in ((10, 40), (10, 3), (3000, 5)):
            np.testing.assert_array_equal(made.rank(queries[:count], k)[1], expected[:count, :k])


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
    position = unit(np.ones((1, 4))).astype(np.float16)
    _, positions = Ranker([np.repeat(position, 3, 0), np.repeat(position, 2, 0)]).rank(np.ones((1, 4)) / 2, 4)
    assert positions.tolist() == [[0, 1, 2, 3]]


def test_very_many_equal_rows(ways: str) -> None:
    """All rows are candidates to the end; the pool is emptied on the way and the first positions win."""
    rows = np.repeat(unit(np.ones((1, 4))).astype(np.float16), 500, axis=0)
    _, positions = make(ways, rows, [100, 101], None).rank(np.ones((2, 4)) / 2, 7)
    assert positions.tolist() == [list(range(7))] * 2


def test_no_rows_and_no_queries() -> None:
    empty = Ranker([])
    assert empty.rank(np.ones((2, 4)), 3)[1].shape == (2, 0)
    rows = np.ones((3, 4), np.float16)
    assert Ranker(rows).rank(np.ones((0, 4)), 3)[1].shape == (0, 3)
    assert Ranker(rows).rank(np.ones((2, 4)), 3, among=np.zeros(3, bool))[1].shape == (2, 0)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones((1, 4)), 0, "k is 0"),
        (np.ones((1, 5)), 1, r"shape \(1, 5\), the embeddings need \[Q,4\]"),
        (np.full((1, 4), np.nan), 1, "not finite"),
        (np.full((1, 4), 1000.0), 1, "too long for exact ranking"),
    ],
)
def test_bad_requests(queries: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ClipretError, match=message):
        Ranker(np.ones((3, 4), np.float16)).rank(queries, k)


def test_long_queries_are_refused_in_every_way(ways: str) -> None:
    with pytest.raises(ClipretError, match="too long for exact ranking"):
        make(ways, np.ones((3, 4), np.float16), [], None).rank(np.full((1, 4), 1000.0), 1)


def test_rows_must_be_float16_of_one_width() -> None:
    with pytest.raises(ClipretError, match="float16 of one width"):
        Ranker([np.ones((1, 4), np.float16), np.ones((1, 5), np.float16)])
    rows = np.ones((1, 4), np.float16)
    with pytest.raises(ClipretError, match="2 live flags for 1 embeddings"):
        Ranker(rows, np.array([True, True]))
    with pytest.raises(ClipretError, match="2 flags for 1 embeddings"):
        Ranker(rows).rank(np.ones((1, 4)), 1, among=np.array([True, True]))
    with pytest.raises(ClipretError, match="quantized embeddings do not match"):
        Ranker(rows, quantized=[])


def test_the_device_lists_more_where_its_own_order_is_too_coarse() -> None:
    """The best row differs from hundreds of others by less than its arithmetic shows, and stands last."""
    rng = np.random.default_rng(0)
    rows = np.repeat(unit(rng.normal(size=(1, 32))), 600, axis=0).astype(np.float16)
    queries = snap(unit(rows[:1].astype(np.float64)))
    queries[0, 7] = 2.0**-20  # next to it a row's last bit moves the score by less than float32 shows
    rows[-1, 7] = np.nextafter(rows[-1, 7], np.float16(1))
    made = Ranker(rows)
    scan = DeviceScan(made.shards, "cpu", block_rows=250)
    listed = scan.top(2, queries, 2, None)[0].position
    assert 599 not in listed
    expected_scores, expected = brute_force(rows, queries, np.ones(600, bool))
    made._device = scan
    scores, positions = made._best_by_device(queries, 3, None, -np.inf)
    np.testing.assert_array_equal(positions, expected[:, :3])
    np.testing.assert_array_equal(scores, expected_scores[:, :3])


@pytest.mark.parametrize("form", ["embeddings", "quantized"])
def test_a_device_finds_what_the_cpu_finds(form: str) -> None:
    """Chunks, blocks and limits at their real sizes."""
    rng = np.random.default_rng(1)
    rows = unit(rng.normal(size=(20_000, 48)) + 1.5 * rng.normal(size=48)).astype(np.float16)
    rows[99::100] = rows[: len(rows[99::100])]
    shards = np.split(rows, [7_000, 15_000])
    center = mean(shards[0])
    scale = quantize(rows, center).scale
    quantized = [quantize(shard, center, scale) for shard in shards]
    queries, live = unit(rng.normal(size=(40, 48))), rng.random(len(rows)) < 0.9
    made = Ranker(shards, live, quantized, threads=1)
    expected = made.rank(queries, 10)
    made._device = DeviceScan(shards, "cpu", quantized=quantized, coded=form == "quantized")
    assert len(made._device.parts) == 1
    for got, wanted in zip(made.rank(queries, 10), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_quantized_embeddings_go_to_a_device_without_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [np.zeros((10, 8), np.float16)]
    made = DeviceScan(shards, "cpu", quantized=coded(shards))
    assert not made.coded  # on the CPU this form is for tests alone
    for free, room in ((6 * device._SCORES, False), (6 * device._SCORES + 1000, True)):
        monkeypatch.setattr(device, "free_memory", lambda _, free=free: free)
        assert made._has_room(shards) is room


def test_a_device_that_onnxruntime_lacks_is_an_error() -> None:
    with pytest.raises(ClipretError, match=r"CUDAExecutionProvider.*CPUExecutionProvider"):
        Ranker(np.ones((1, 4), np.float16), device="cuda:1")
