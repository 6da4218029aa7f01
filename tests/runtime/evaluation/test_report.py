"""The report of an evaluation: every number against a brute force over the stored embeddings."""

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
    """Scores [Q,N], and all paths of each query, best first."""
    embeddings = np.concatenate(searcher.stored.shards).astype(np.float64)
    paths = searcher.gallery.paths(searcher.stored.ids)
    scores = searcher.embed(list(truth.relevant)) @ embeddings.T
    return scores, [
        [paths[at] for at in np.lexsort((np.arange(len(embeddings)), -np.round(values, 12)))] for values in scores
    ]


def test_recall_at_every_k_is_that_of_the_brute_force(searcher: Searcher, query_list: Path) -> None:
    truth = read_ground_truth(searcher, query_list)
    result = evaluate_search(searcher, truth)
    _, orders = order_by_hand(searcher, truth)
    points = recall_curve(result.first_ranks, 12)
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
    distribution = scores_of(searcher, result)
    assert not distribution.sampled
    assert (sum(distribution.right), sum(distribution.wrong)) == (len(right), len(wrong)) == (9, 57)
    # A score may be equal to an edge up to rounding.
    for counts, values in ((distribution.right, right), (distribution.wrong, wrong)):
        below = np.cumsum(counts)
        for edge, count in zip(distribution.edges[1:], below, strict=True):
            assert np.sum(np.array(values) < edge - 1e-6) <= count <= np.sum(np.array(values) < edge + 1e-6)
    pairs = np.sign(np.round(np.subtract.outer(right, wrong), 6))
    assert distribution.above == pytest.approx(np.mean((pairs + 1) / 2), abs=1e-3)
    sample = scores_of(searcher, result, pairs=8)
    assert sample.sampled
    assert (sum(sample.right), sum(sample.wrong)) == (8, 8)


def test_the_worst_come_first(searcher: Searcher, query_list: Path) -> None:
    truth = read_ground_truth(searcher, query_list)
    result = evaluate_search(searcher, truth)
    order = [list(truth.relevant)[at] for at in worst(result)]
    assert set(order[-2:]) == {"grey", "red"}
    assert set(order[:2]) <= {"green", "white", "a blue one", "blue 红色"}
    ranks = [int(result.first_ranks[at]) for at in worst(result)]
    assert ranks[0] == max(ranks)


def test_confusion_by_the_attributes_of_the_ground_truth(searcher: Searcher, tmp_path: Path) -> None:
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
        texts = [text for text, values in truth.wanted.items() if values["colour"] == want]
        results = [[hit.path.split("/")[0] for hit in firsts[text]] for text in texts]
        for found, count in zip(colour.found, line, strict=True):
            others = found == "(others)"
            expected = [ranked[0] == found or (others and ranked[0] not in colour.found) for ranked in results]
            assert count == sum(expected)
        assert share == pytest.approx(np.mean([name == want for ranked in results for name in ranked]))
    assert sum(map(sum, colour.counts)) == 5
    assert (number.wanted, sum(map(sum, number.counts))) == (["1"], 1)


def test_confusion_by_columns_of_the_gallery(searcher: Searcher, query_list: Path) -> None:
    truth = read_ground_truth(searcher, query_list)
    colour, number = attributes(searcher, evaluate_search(searcher, truth))
    # The relevant images of "blue 红色" are green and red: they have a number in common, but no colour.
    assert (colour.column, sum(map(sum, colour.counts))) == ("colour", 5)
    assert sum(map(sum, number.counts)) == 4
    assert colour.counts[colour.wanted.index("grey")][colour.found.index("grey")] == 1
