"""The page of an evaluation: every number on it against a brute force over the stored embeddings."""

from pathlib import Path

import numpy as np
import pytest

from clipret import Bundle, Encoder, EncoderConfig, Gallery, Searcher
from clipret.evaluation.evaluate import GroundTruth, evaluate_search, read_attribute_truth, read_ground_truth
from clipret.evaluation.report import attributes, recall_curve, scores_of, worst


@pytest.fixture
def searcher(listed_gallery: Path, tiny_bundle: Path) -> Searcher:
    return Searcher(
        Gallery.open(listed_gallery), Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))
    )


def order_by_hand(searcher: Searcher, truth: GroundTruth) -> tuple[np.ndarray, list[list[str]]]:
    """Scores [Q,N], and of each query all paths, best first."""
    rows = np.concatenate(searcher.stored.shards).astype(np.float64)
    paths = searcher.gallery.paths(searcher.stored.ids)
    scores = searcher.embed(list(truth.relevant)) @ rows.T
    return scores, [[paths[at] for at in np.lexsort((np.arange(len(rows)), -np.round(line, 12)))] for line in scores]


def test_recall_at_every_k_is_that_of_the_whole_order(searcher: Searcher, query_list: Path) -> None:
    truth = read_ground_truth(searcher, query_list)
    result = evaluate_search(searcher, truth)
    _, orders = order_by_hand(searcher, truth)
    points = recall_curve(result.first, 12)
    assert [k for k, _ in points] == list(range(1, 13))
    for k, share in points:
        right = [
            bool(set(order[:k]) & set(truth.relevant[text])) for text, order in zip(truth.relevant, orders, strict=True)
        ]
        assert share == pytest.approx(np.mean(right))
    assert dict(points)[1] == result.metrics.recall_at_1
    assert dict(points)[5] == result.metrics.recall_at_5
    assert 0 < points[0][1] < points[-1][1] == 1
    long = recall_curve(np.array([1, 7, 40_000, 90_000]), 100_000)
    assert len(long) < 200
    assert (dict(long)[1], dict(long)[10], dict(long)[10_000], dict(long)[100_000]) == (0.25, 0.5, 0.5, 1)


def test_scores_of_right_and_wrong(searcher: Searcher, query_list: Path) -> None:
    with searcher.gallery.writing():
        searcher.gallery.remove([searcher.gallery.id_of("grey/2.png")])
    truth = read_ground_truth(searcher, query_list)
    result = evaluate_search(searcher, truth)
    scores, _ = order_by_hand(searcher, truth)
    paths = searcher.gallery.paths(searcher.stored.ids)
    right, wrong = [], []
    for line, answers in zip(scores, truth.relevant.values(), strict=True):
        for path, score in zip(paths, line, strict=True):
            if path != "grey/2.png":
                (right if path in answers else wrong).append(score)
    found = scores_of(searcher, result)
    assert not found.drawn
    assert (sum(found.right), sum(found.wrong)) == (len(right), len(wrong)) == (9, 57)
    # An edge may fall on a score, which then lies a rounding to its left or right.
    for given, values in ((found.right, right), (found.wrong, wrong)):
        below = np.cumsum(given)
        for edge, count in zip(found.edges[1:], below, strict=True):
            assert np.sum(np.array(values) < edge - 1e-6) <= count <= np.sum(np.array(values) < edge + 1e-6)
    pairs = np.sign(np.round(np.subtract.outer(right, wrong), 6))
    assert found.above == pytest.approx(np.mean((pairs + 1) / 2), abs=1e-3)
    sample = scores_of(searcher, result, most=8)
    assert sample.drawn
    assert (sum(sample.right), sum(sample.wrong)) == (8, 8)


def test_the_worst_come_first(searcher: Searcher, query_list: Path) -> None:
    truth = read_ground_truth(searcher, query_list)
    result = evaluate_search(searcher, truth)
    order = [list(truth.relevant)[at] for at in worst(result)]
    assert set(order[-2:]) == {"grey", "red"}
    assert set(order[:2]) <= {"green", "white", "a blue one", "blue 红色"}
    first = [int(result.first[at]) for at in worst(result)]
    assert first[0] == max(first)


def test_confusion_by_what_was_asked(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(
        "title,colour,number\nred,red,\na red thing,red,\nblue,blue,\ngreen,grey,\nwhite,grey,1\n"
    )
    truth = read_attribute_truth(searcher, tmp_path / "q.csv", equal=["colour", "number"])
    result = evaluate_search(searcher, truth)
    colour, number = attributes(searcher, result)
    assert (colour.column, colour.wanted) == ("colour", ["grey", "red", "blue"])
    assert colour.found[:3] == colour.wanted
    firsts = dict(zip(truth.relevant, searcher.search(list(truth.relevant), 10), strict=True))
    for want, line, share in zip(colour.wanted, colour.counts, colour.among, strict=True):
        asked = [text for text, one in truth.asked.items() if one["colour"] == want]
        seen = [[hit.path.split("/")[0] for hit in firsts[text]] for text in asked]
        for found, count in zip(colour.found, line, strict=True):
            expected = [one[0] == found or (found == "(others)" and one[0] not in colour.found) for one in seen]
            assert count == sum(expected)
        assert share == pytest.approx(np.mean([name == want for one in seen for name in one]))
    assert sum(map(sum, colour.counts)) == 5
    assert (number.wanted, sum(map(sum, number.counts))) == (["1"], 1)


def test_confusion_by_columns_of_the_gallery(searcher: Searcher, query_list: Path) -> None:
    truth = read_ground_truth(searcher, query_list)
    colour, number = attributes(searcher, evaluate_search(searcher, truth))
    # "blue 红色" is answered by a green and a red image, which have their number in common and no colour
    assert (colour.column, sum(map(sum, colour.counts))) == ("colour", 5)
    assert sum(map(sum, number.counts)) == 4
    assert colour.counts[colour.wanted.index("grey")][colour.found.index("grey")] == 1
