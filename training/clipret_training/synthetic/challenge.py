"""Drawn scenes as the files of the traffic retrieval challenge, with the truth.

Its gap is kept: training labels name colour and brand or only the type, test texts name all three; and its two domains:
training images are clean, test images are what a camera on a pole sees. A brand is not to be seen in a drawing,
so the truth is colour and type for vehicles and the attributes that a text names for persons.
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
# How a text says it; who it is comes first, and what everybody has one of (a side, a sleeve) is said of some.
_SAID = {
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

Seen = tuple[str, Scene]
Fields = tuple[str, ...]


def attributes_of(person: Person) -> tuple[str, ...]:
    """What the challenge's label of somebody says, by its names and in their order."""
    held = {_AGES[person.age], person.view, f"{person.sleeves} sleeve"}
    held |= {"female"} if person.female else set()
    held |= {name for name in ("hat", "glasses") if getattr(person, name)}
    held |= {person.bag} - {"none"}
    held |= {_PATTERNS[person.pattern]} if person.pattern in _PATTERNS else set()
    held |= {_GARMENTS[person.garment]} if person.garment in _GARMENTS else set()
    return tuple(name for name in PERSON_ATTRIBUTES if name in held)


def write_challenge(out: Path, *, train: int, test: int, seed: int, workers: int = 1) -> None:
    """Draw both parts into the new folder `out`.

        train_images/000000.jpg …   train_label.txt   image$attribute$text, as the challenge has it
        test_images/000000.jpg …    test_text.txt     a query a line
        test_images.csv   path,kind,color,type,attributes: the truth, to index the test images with
        test_queries.csv    caption,kind,color,type,attributes: what each line of test_text.txt asks for

    The same seed gives the same bytes with any number of `workers` (processes). Raises ClipretError when `out` is not
    empty; a run that is interrupted leaves nothing.
    """
    with new_folder(out) as folder:
        parts: dict[str, list[Seen]] = {}
        styles: dict[str, tuple[int, Style]] = {"train": (train, "web"), "test": (test, "surveillance")}
        for part, (count, style) in styles.items():
            (folder / f"{part}_images").mkdir()
            # The parts draw from different streams: no scene is in both.
            seeds = np.random.SeedSequence([seed, int(part == "test")]).spawn(count)
            make = partial(_make, folder=folder / f"{part}_images", style=style)
            pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext()
            with pool as executor:
                apply: Callable[..., Iterable[Seen]] = map
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


def _make(number: int, seed: np.random.SeedSequence, *, folder: Path, style: Style) -> Seen:
    rng = np.random.default_rng(seed)
    person = number % _PERSON_EVERY == _PERSON_EVERY - 1
    scene = Scene.pedestrian(rng) if person else Scene.vehicle(rng, number - number // _PERSON_EVERY)
    name = f"{number:06d}.jpg"
    draw(scene, rng, style).save(folder / name, quality=90)
    return name, scene


def _line(number: int, name: str, scene: Scene, rng: np.random.Generator) -> str:
    if scene.person is not None:
        held = attributes_of(scene.person)
        values = ",".join("1" if attribute in held else "0" for attribute in PERSON_ATTRIBUTES)
        return f"{name}${values}${_person_text(scene.person, held, rng, 4)[0]}"
    # The pairs of colour and type go round in order, so that every second one would always leave the same word out.
    if (number + number // 66) % 2:
        return f"{name}${scene.type}${_vehicle_text(scene.type, rng)}"
    brand = str(rng.choice(_BRANDS[scene.type]))
    return f"{name}${scene.color} {brand}.${_vehicle_text(f'{scene.color} {brand}', rng)}"


def _queries(scenes: Sequence[Scene], rng: np.random.Generator) -> list[Fields]:
    """A text for each colour and type there is, and one for what some of the persons show."""
    made: dict[str, Fields] = {}
    for color, kind in dict.fromkeys((scene.color, scene.type) for scene in scenes if scene.person is None):
        text = _vehicle_text(f"{color} {rng.choice(_BRANDS[kind])} {kind}", rng)
        made[text] = (text, "vehicle", color, kind, "")
    for person in [scene.person for scene in scenes if scene.person is not None][::4]:
        text, said = _person_text(person, attributes_of(person), rng, 2)
        made.setdefault(text, (text, "person", "", "", "; ".join(said)))
    return list(made.values())


def _vehicle_text(words: str, rng: np.random.Generator) -> str:
    named = f"{'an' if words.startswith(('orange', 'SUV')) else 'a'} {words}"
    text = str(rng.choice(_VEHICLE)).format(named)
    return text[0].upper() + text[1:]


def _person_text(
    person: Person, held: Sequence[str], rng: np.random.Generator, most: int
) -> tuple[str, tuple[str, ...]]:
    """A text that says up to `most` things of somebody, and the attributes that it names."""
    sayable = [name for name in held if name in _SAID]
    said = [sayable[at] for at in sorted(rng.permutation(len(sayable))[:most])]
    who = _WHO[person.age, person.female]
    text = f"{'An' if who[0] == 'e' else 'A'} {who} {', '.join(_SAID[name] for name in said)}."
    who_is = (("female",) if person.female else ()) + (_AGES[person.age],)
    return text, (*who_is, *said)


def _truth(scene: Scene) -> Fields:
    held = () if scene.person is None else attributes_of(scene.person)
    return scene.kind, scene.color, scene.type, "; ".join(held)


def _write(file: Path, first: str, rows: Iterable[Fields]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([(first, "kind", "color", "type", "attributes"), *rows])
    file.write_text(text.getvalue(), "utf-8")
