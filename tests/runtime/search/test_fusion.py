"""Merging: against all scores written out, for galleries, files and both."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clipret.errors import ClipretError
from clipret.gallery.info import Stored
from clipret.ranking.ranker import Ranker, snap
from clipret.search.fusion import FusionSource, merge
from clipret.search.results import RankedPaths, as_results, read_results

TEXTS = ["one", "two", "three", "four", "five"]
D = 12


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class Model:
    """A gallery of random rows under the names given, and a text tower of random rows; as a Searcher has them."""

    def __init__(self, seed: int, names: list[str], spread: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        common = np.random.default_rng(99).normal(size=D)
        rows = unit(common + spread * rng.normal(size=(len(names), D))).astype(np.float16)
        self.queries = dict(zip(TEXTS, unit(rng.normal(size=(len(TEXTS), D))), strict=True))
        self.names = names
        self.stored = Stored([rows[:50], rows[50:]], np.arange(len(names)) * 3, None, [])
        self.ranker = Ranker(self.stored.shards)
        self.gallery = SimpleNamespace(ids_by_path=lambda: dict(zip(names, self.stored.ids.tolist(), strict=True)))

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.array([self.queries[text] for text in texts])

    def scores(self, text: str) -> dict[str, float]:
        rows = np.concatenate(self.stored.shards).astype(np.float64)
        return dict(zip(self.names, (rows @ snap(self.queries[text])).tolist(), strict=True))


NAMES = [f"{number:03d}.jpg" for number in range(400)]


@pytest.fixture
def models() -> list[Model]:
    """Two models of different scale, that hold mostly the same images in another order."""
    other = list(np.random.default_rng(4).permutation(NAMES[20:]))
    return [Model(1, NAMES), Model(2, [str(name) for name in other], spread=0.1)]


def standard(scores: dict[str, float]) -> dict[str, float]:
    values = np.array(list(scores.values()))
    return {name: (score - values.mean()) / values.std() for name, score in scores.items()}


def best(total: dict[str, float], k: int) -> list[str]:
    return sorted(total, key=lambda name: (-total[name], name))[:k]


@pytest.mark.parametrize("how", ["sum", "z"])
def test_the_first_k_are_those_of_all_scores_summed_up(how: str, models: list[Model]) -> None:
    sources = [FusionSource("a", models[0], weight=0.7), FusionSource("b", models[1], weight=2.0)]
    for k in (1, 10, 1000):
        merged = merge(sources, TEXTS, k, how=how)
        for text, found in zip(TEXTS, merged, strict=True):
            scales: Callable = standard if how == "z" else dict
            a = scales({name: score for name, score in models[0].scores(text).items() if name in models[1].names})
            b = scales(models[1].scores(text))
            total = {name: 0.7 * a[name] + 2.0 * b[name] for name in b}
            assert list(found.paths) == best(total, k)
            assert found.scores == pytest.approx([total[name] for name in found.paths], abs=1e-7)


def test_lists_are_lengthened_until_nothing_could_be_better() -> None:
    """Two models that rank the images in opposite orders: the best by both is in the middle of either list."""
    count = 1000
    angle = np.linspace(0, np.pi / 2, count)
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float16)
    names = [f"{number:04d}" for number in range(count)]
    sources = []
    for axis in (0, 1):
        model = Model(axis, NAMES)
        model.names, model.stored = names, Stored([rows], np.arange(count), None, [])
        model.ranker = Ranker([rows])
        model.gallery = SimpleNamespace(ids_by_path=lambda: dict(zip(names, range(count), strict=True)))
        model.queries = {"one": np.eye(2)[axis]}
        sources.append(FusionSource(str(axis), model))
    found = merge(sources, ["one"], 3, how="sum")[0]
    total = rows.astype(np.float64).sum(axis=1)
    assert list(found.paths) == best(dict(zip(names, total, strict=True)), 3)
    assert 480 < int(found.paths[0]) < 520


def test_ranks_are_fused(models: list[Model]) -> None:
    merged = merge(
        [FusionSource("a", models[0], weight=2.0), FusionSource("b", models[1])], TEXTS, 10, how="rrf", depth=30
    )
    for text, found in zip(TEXTS, merged, strict=True):
        total: dict[str, float] = {}
        common = set(models[1].names)
        for model, weight in zip(models, (2.0, 1.0), strict=True):
            scores = {name: score for name, score in model.scores(text).items() if name in common}
            order = sorted(scores, key=lambda name: (-scores[name], model.names.index(name)))
            for rank, name in enumerate(order[:30], 1):
                total[name] = total.get(name, 0) + weight / (60 + rank)
        assert list(found.paths) == best(total, 10)


def test_a_file_counts_as_its_last_score_where_it_lists_nothing(models: list[Model]) -> None:
    listed = {text: RankedPaths(("399.jpg", "gone.jpg", "007.jpg"), (3.0, 2.0, 1.0)) for text in TEXTS}
    for how in ("sum", "z"):
        merged = merge(
            [FusionSource("a", models[0]), FusionSource("f", results=listed, weight=0.3)], TEXTS, 400, how=how
        )
        for text, found in zip(TEXTS, merged, strict=True):
            scores, values = models[0].scores(text), {"399.jpg": 3.0, "gone.jpg": 2.0, "007.jpg": 1.0}
            if how == "z":
                scores, values = standard(scores), standard(values)
            total = {name: score + 0.3 * values.get(name, min(values.values())) for name, score in scores.items()}
            assert list(found.paths) == best(total, 400)


def test_files_alone(tmp_path: Path) -> None:
    def write(name: str, found: RankedPaths) -> dict[str, RankedPaths]:
        (tmp_path / name).write_text(json.dumps(as_results(["q"], [found])))
        return read_results(tmp_path / name)

    a = write("a.json", RankedPaths(("x", "y", "z"), (0.9, 0.5, 0.1)))
    b = write("b.json", RankedPaths(("y", "w"), (0.4, 0.3)))
    sources = [FusionSource("a", results=a), FusionSource("b", results=b)]
    # x 0.9 + 0.3, y 0.5 + 0.4, z 0.1 + 0.3, w 0.1 + 0.3; of equal ones the one that is listed first
    assert merge(sources, ["q"], 9, how="sum")[0].paths == ("x", "y", "z", "w")
    assert merge(sources, ["q"], 2, how="rrf")[0].paths == ("y", "x")
    (tmp_path / "c.json").write_text(json.dumps({"results": [{"text": "q ", "image_names": ["z", "x"]}]}))
    names = FusionSource("c", results=read_results(tmp_path / "c.json"))
    assert merge([names, sources[0]], ["q"], 9, how="rrf")[0].paths == ("x", "z", "y")
    with pytest.raises(ClipretError, match="c has no scores: merge it with rrf"):
        merge([names, sources[0]], ["q"], how="z")
    with pytest.raises(ClipretError, match="a has no results for 'r'"):
        merge(sources, ["r"])


def test_texts_may_have_models_of_their_own(models: list[Model]) -> None:
    sources = [
        FusionSource("a", models[0], answers=frozenset(["one", "three"])),
        FusionSource("b", models[1], answers=frozenset(["two", "three"])),
    ]
    merged = merge(sources, TEXTS[:3], 5, how="sum")
    assert merged[:1] == merge([FusionSource("a", models[0])], ["one"], 5, how="sum")
    assert merged[1:2] == merge([FusionSource("b", models[1])], ["two"], 5, how="sum")
    assert merged[2:] == merge([FusionSource("a", models[0]), FusionSource("b", models[1])], ["three"], 5, how="sum")
    with pytest.raises(ClipretError, match="no source answers the text 'four'"):
        merge(sources, ["four"])


def test_what_cannot_be_merged(models: list[Model]) -> None:
    with pytest.raises(ClipretError, match="no image in common"):
        merge([FusionSource("a", models[0]), FusionSource("b", Model(3, [f"b/{name}" for name in NAMES]))], TEXTS)
    with pytest.raises(ClipretError, match="the weight of a is 0"):
        FusionSource("a", models[0], weight=0)
    with pytest.raises(ClipretError, match="k is 0"):
        merge([FusionSource("a", models[0])], TEXTS, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no queries"),
        ('{"a": 1}', "is no result file"),
        ('[{"query": 1, "hits": []}]', "is no result file"),
        ('[{"query": "q", "hits": [{"rank": 1, "path": "a"}]}]', "is no result file"),
        ('{"results": [{"text": "q", "image_names": ["a", "b", "a"]}]}', "lists a twice"),
        (
            '[{"query": "q", "hits": [{"rank": 2, "path": "a", "score": 2}, {"rank": 1, "path": "b", "score": 1}]}]',
            "scores that rise",
        ),
        ('[{"query": "q", "hits": [{"rank": 1, "path": "a", "score": NaN}]}]', "are no numbers"),
        ('{"results": [{"text": "q", "image_names": ["a"]}, {"text": "q", "image_names": ["b"]}]}', "is there twice"),
    ],
)
def test_files_that_are_no_results(value: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(value)
    with pytest.raises(ClipretError, match=message):
        read_results(tmp_path / "r.json")
    with pytest.raises(ClipretError, match="cannot be read"):
        read_results(tmp_path / "none.json")
