"""Writing drawn scenes as a data set: images, captions, and queries with their answers."""

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
from clipret_training.choices import Style
from clipret_training.synthetic.draw import draw
from clipret_training.synthetic.scene import COLORS, TYPES, Scene
from clipret_training.synthetic.words import LANGS, PERSON_QUERIES, captions, query

__all__ = ["write_set"]

_EACH = 3  # captions per scene and language
_PERSON_EVERY = 5  # one scene in five shows a person


def write_set(out: Path, *, count: int, style: Style, seed: int, workers: int = 1) -> None:
    """Draw scenes and write their files.

        images/000000.jpg …
        captions.csv        path,lang,caption,kind,color,type: three English and three Chinese captions per image
        queries.csv         caption,path,lang,color,type: a query for each colour and type, a row for each answer
        person_queries.csv  caption,path,lang: queries for people, a row for each answer

    The seed decides all bytes, whatever the number of workers. The counts of the 66 pairs of colour and type differ by
    at most one. An interruption leaves no folder.

    Args:
        out: The folder to create.
        count: Number of scenes.
        style: See `draw`.
        seed: Decides the scenes.
        workers: Number of processes.

    Raises:
        ClipretError: The folder is not empty.
    """
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        # Each style has its own random stream, so that the same seed does not give the same scenes.
        seeds = np.random.SeedSequence([seed, int(style == "surveillance")]).spawn(count)
        make = partial(_make, folder=folder, style=style)
        pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext()
        with pool as executor:
            apply = partial(executor.map, chunksize=8) if executor is not None else map
            drawn = list(progress(apply(make, range(count), seeds), total=count, desc="draw", unit="scene"))
        scenes = [(name, scene) for name, scene, _ in drawn]
        texts = [row for _, _, rows in drawn for row in rows]
        _write(folder / "captions.csv", ("path", "lang", "caption", "kind", "color", "type"), texts)
        _write(folder / "queries.csv", ("caption", "path", "lang", "color", "type"), _answers(scenes))
        _write(folder / "person_queries.csv", ("caption", "path", "lang"), _person_answers(scenes))


Row = tuple[str, ...]
Drawn = Sequence[tuple[str, Scene]]


def _make(number: int, seed: np.random.SeedSequence, *, folder: Path, style: Style) -> tuple[str, Scene, list[Row]]:
    rng = np.random.default_rng(seed)
    person = number % _PERSON_EVERY == _PERSON_EVERY - 1
    scene = Scene.pedestrian(rng) if person else Scene.vehicle(rng, number - number // _PERSON_EVERY)
    name = f"images/{number:06d}.jpg"
    draw(scene, rng, style).save(folder / name, quality=90)
    texts = [(lang, text) for lang in LANGS for text in captions(scene, rng, lang, _EACH)]
    return name, scene, [(name, lang, text, scene.kind, scene.color, scene.type) for lang, text in texts]


def _answers(scenes: Drawn) -> Iterable[Row]:
    for kind, color, lang in product(TYPES, COLORS, LANGS):
        for name, scene in scenes:
            if (scene.type, scene.color) == (kind, color):
                yield query(color, kind, lang), name, lang, color, kind


def _person_answers(scenes: Drawn) -> Iterable[Row]:
    for english, chinese, answers in PERSON_QUERIES:
        for lang, text in zip(LANGS, (english, chinese), strict=True):
            for name, scene in scenes:
                if scene.person is not None and answers(scene.person):
                    yield text, name, lang


def _write(file: Path, header: Row, rows: Iterable[Row]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    file.write_text(text.getvalue(), "utf-8")
