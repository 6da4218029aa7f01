"""Drawn scenes as the files of the traffic retrieval challenge, with the ground truth.

As in the challenge, training labels name colour and brand or only the type, and test texts name all three; training
images are clean, and test images look like those of surveillance cameras. A drawing does not show a brand, so the
ground truth is the colour and type of vehicles and, for persons, the attributes in the text.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from clipret.console import progress
from clipret.files import new_folder
from clipret_training.choices import Style
from clipret_training.competitions import PERSON_ATTRIBUTES
from clipret_training.synthetic.draw import draw
from clipret_training.synthetic.scene import Person, Scene

__all__ = ["attributes_of", "write_challenge"]

_PERSON_EVERY = 5  # one scene in five shows a person
_BRANDS = {
    "Bus": ("Yutong", "Benz"),
    "Microbus": ("Ford", "Jinbei"),
    "Minivan": ("Buick", "Toyota"),
    "SUV": ("Audi", "BMW", "Toyota"),
    "Sedan": ("Audi", "BMW", "Buick"),
    "Truck": ("Benz", "Ford", "Foton"),
}
_WHO = {("child", True): "girl", ("child", False): "boy", ("adult", True): "woman", ("adult", False): "man"}
_WHO |= {("elder", True): "elderly woman", ("elder", False): "elderly man"}
_AGES = {"elder": "age over 60", "adult": "age 18-60", "child": "age under 18"}
_PATTERNS = {"stripes": "upper stripe", "logo": "upper logo", "plaid": "upper plaid"}
_GARMENTS = {"coat": "long coat", "skirt": "skirt or dress", "dress": "skirt or dress"}
# How a text describes each attribute. Texts also start with the person (a man, a girl, …).
_PHRASES = {
    "front": "seen from the front",
    "side": "seen from the side",
    "back": "seen from behind",
    "hat": "with a hat",
    "glasses": "with glasses",
    "hand bag": "with a hand bag",
    "shoulder bag": "with a shoulder bag",
    "backpack": "with a backpack",
    "short sleeve": "with short sleeves",
    "upper stripe": "in a striped top",
    "upper logo": "in a top with a logo",
    "upper plaid": "in a plaid top",
    "long coat": "in a long coat",
    "skirt or dress": "in a skirt or a dress",
}
_VEHICLE = ("{}.", "This is {}.", "{} drives along the road.", "There is {} on the road.")

Drawn = tuple[str, Scene]
Fields = tuple[str, ...]


def attributes_of(person: Person) -> tuple[str, ...]:
    """Return the attributes of a person, with the names and in the order of the challenge."""
    attributes = {_AGES[person.age], person.view, f"{person.sleeves} sleeve"}
    attributes |= {"female"} if person.female else set()
    attributes |= {name for name in ("hat", "glasses") if getattr(person, name)}
    attributes |= {person.bag} - {"none"}
    attributes |= {_PATTERNS[person.pattern]} if person.pattern in _PATTERNS else set()
    attributes |= {_GARMENTS[person.garment]} if person.garment in _GARMENTS else set()
    return tuple(name for name in PERSON_ATTRIBUTES if name in attributes)


def write_challenge(out: Path, *, train: int, test: int, seed: int, workers: int = 1) -> None:
    """Draw training and test scenes and write their files.

        train_images/000000.jpg …
        train_label.txt     image$attribute$text, as in the challenge
        test_images/000000.jpg …
        test_text.txt       a query on each line
        test_images.csv     path,kind,color,type,attributes: the ground truth, to index the test images with
        test_queries.csv    caption,kind,color,type,attributes: the attributes of the answers to each query

    The seed decides all bytes, whatever the number of workers. An interruption leaves no folder.

    Args:
        out: The folder to create.
        train: Number of training scenes.
        test: Number of test scenes.
        seed: Decides the scenes.
        workers: Number of processes.

    Raises:
        ClipretError: The folder is not empty.
    """
    with new_folder(out) as folder:
        parts: dict[str, list[Drawn]] = {}
        styles: dict[str, tuple[int, Style]] = {"train": (train, "web"), "test": (test, "surveillance")}
        for part, (count, style) in styles.items():
            (folder / f"{part}_images").mkdir()
            # The parts have different random streams: no scene is in both.
            seeds = np.random.SeedSequence([seed, int(part == "test")]).spawn(count)
            make = partial(_make, folder=folder / f"{part}_images", style=style)
            pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext()
            with pool as executor:
                apply: Callable[..., Iterable[Drawn]] = map
                if executor is not None:
                    apply = partial(executor.map, chunksize=8)
                drawn = apply(make, range(count), seeds)
                parts[part] = list(progress(drawn, total=count, desc=f"draw {part}", unit="scene"))
        rng = np.random.default_rng([seed, 2])
        lines = [_line(number, name, scene, rng) for number, (name, scene) in enumerate(parts["train"])]
        (folder / "train_label.txt").write_text("\n".join(lines) + "\n", "utf-8")
        images = [(name, *_truth(scene)) for name, scene in parts["test"]]
        queries = _queries([scene for _, scene in parts["test"]], rng)
        (folder / "test_text.txt").write_text("\n".join(query[0] for query in queries) + "\n", "utf-8")
        _write(folder / "test_images.csv", "path", images)
        _write(folder / "test_queries.csv", "caption", queries)


def _make(number: int, seed: np.random.SeedSequence, *, folder: Path, style: Style) -> Drawn:
    rng = np.random.default_rng(seed)
    person = number % _PERSON_EVERY == _PERSON_EVERY - 1
    scene = Scene.pedestrian(rng) if person else Scene.vehicle(rng, number - number // _PERSON_EVERY)
    name = f"{number:06d}.jpg"
    draw(scene, rng, style).save(folder / name, quality=90)
    return name, scene


def _line(number: int, name: str, scene: Scene, rng: np.random.Generator) -> str:
    if scene.person is not None:
        attributes = attributes_of(scene.person)
        values = ",".join("1" if attribute in attributes else "0" for attribute in PERSON_ATTRIBUTES)
        return f"{name}${values}${_person_text(scene.person, attributes, rng, 4)[0]}"
    # The 66 pairs of colour and type come in order, so without the offset a pair would always have the same form.
    if (number + number // 66) % 2:
        return f"{name}${scene.type}${_vehicle_text(scene.type, rng)}"
    brand = str(rng.choice(_BRANDS[scene.type]))
    return f"{name}${scene.color} {brand}.${_vehicle_text(f'{scene.color} {brand}', rng)}"


def _queries(scenes: Sequence[Scene], rng: np.random.Generator) -> list[Fields]:
    """A text for each pair of colour and type, and for the attributes of every fourth person."""
    queries: dict[str, Fields] = {}
    for color, kind in dict.fromkeys((scene.color, scene.type) for scene in scenes if scene.person is None):
        text = _vehicle_text(f"{color} {rng.choice(_BRANDS[kind])} {kind}", rng)
        queries[text] = (text, "vehicle", color, kind, "")
    for person in [scene.person for scene in scenes if scene.person is not None][::4]:
        text, attributes = _person_text(person, attributes_of(person), rng, 2)
        queries.setdefault(text, (text, "person", "", "", "; ".join(attributes)))
    return list(queries.values())


def _vehicle_text(words: str, rng: np.random.Generator) -> str:
    vehicle = f"{'an' if words.startswith(('orange', 'SUV')) else 'a'} {words}"
    text = str(rng.choice(_VEHICLE)).format(vehicle)
    return text[0].upper() + text[1:]


def _person_text(
    person: Person, attributes: Sequence[str], rng: np.random.Generator, most: int
) -> tuple[str, tuple[str, ...]]:
    """A text with up to `most` attributes of a person in addition to sex and age, and all attributes in it."""
    candidates = [name for name in attributes if name in _PHRASES]
    chosen = [candidates[number] for number in sorted(rng.permutation(len(candidates))[:most])]
    who = _WHO[person.age, person.female]
    text = f"{'An' if who[0] == 'e' else 'A'} {who} {', '.join(_PHRASES[name] for name in chosen)}."
    sex_and_age = (("female",) if person.female else ()) + (_AGES[person.age],)
    return text, (*sex_and_age, *chosen)


def _truth(scene: Scene) -> Fields:
    attributes = () if scene.person is None else attributes_of(scene.person)
    return scene.kind, scene.color, scene.type, "; ".join(attributes)


def _write(file: Path, first: str, rows: Iterable[Fields]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([(first, "kind", "color", "type", "attributes"), *rows])
    file.write_text(text.getvalue(), "utf-8")
