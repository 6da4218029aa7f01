"""Sets of scenes on disk: pictures, captions, queries with their answers."""

import csv
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from clipret.console import progress
from clipret.files import new_folder
from clipret.training.scenes.draw import draw
from clipret.training.scenes.scene import COLORS, TYPES, Scene, Style
from clipret.training.scenes.words import LANGS, captions, query

__all__ = ["write_set"]

_EACH = 3  # captions a scene and language
_PERSON_EVERY = 5  # one scene in five shows a person


def write_set(out: Path, *, count: int, style: Style, seed: int, workers: int = 1) -> None:
    """Draw `count` scenes into the new folder `out`.

        images/000000.jpg …
        captions.csv    path,lang,title,kind,color,type: three English and three Chinese captions a picture
        queries.csv     title,path,lang,color,type: a query for each colour and type, a row for each answer

    Every scene has a generator of its own, so the same seed gives the same bytes with any number of `workers`
    (processes). The 66 pairs of colour and type occur equally often, to one. Raises ClipretError when `out` is not
    empty; a run that is interrupted leaves nothing.
    """
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        # Styles draw from different streams: the same seed must not give the same scenes twice.
        seeds = np.random.SeedSequence([seed, int(style == "surveillance")]).spawn(count)
        make = partial(_make, folder=folder, style=style)
        pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext()
        with pool as executor:
            apply = partial(executor.map, chunksize=8) if executor is not None else map
            drawn = progress(apply(make, range(count), seeds), total=count, desc="draw", unit="scene")
            scenes = [(name, scene, rows) for name, scene, rows in drawn]
        rows = [row for _, _, rows in scenes for row in rows]
        (folder / "captions.csv").write_text(_csv(("path", "lang", "title", "kind", "color", "type"), rows), "utf-8")
        answers = _answers([(name, scene) for name, scene, _ in scenes])
        (folder / "queries.csv").write_text(_csv(("title", "path", "lang", "color", "type"), answers), "utf-8")


Row = tuple[str, ...]


def _make(number: int, seed: np.random.SeedSequence, *, folder: Path, style: Style) -> tuple[str, Scene, list[Row]]:
    rng = np.random.default_rng(seed)
    person = number % _PERSON_EVERY == _PERSON_EVERY - 1
    scene = Scene.pedestrian(rng) if person else Scene.vehicle(rng, number - number // _PERSON_EVERY)
    name = f"images/{number:06d}.jpg"
    draw(scene, rng, style).save(folder / name, quality=90)
    titles = [(lang, title) for lang in LANGS for title in captions(scene, rng, lang, _EACH)]
    return name, scene, [(name, lang, title, scene.kind, scene.color, scene.type) for lang, title in titles]


def _answers(scenes: Sequence[tuple[str, Scene]]) -> Iterable[Row]:
    for kind, color, lang in product(TYPES, COLORS, LANGS):
        for name, scene in scenes:
            if (scene.type, scene.color) == (kind, color):
                yield query(color, kind, lang), name, lang, color, kind


def _csv(header: Row, rows: Iterable[Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
