"""The traffic retrieval challenge's label lines, checked one by one: `image$attribute$text`.

    vehicles/0001.jpg$white Audi.$A white Audi drives along the road.     colour and brand
    vehicles/0002.jpg$Truck$This is a truck.                              a type
    people/0001.jpg$1,0,1,0,…,0$A woman with a backpack.                  21 values of a person, 0 or 1

The parser never guesses: a line that is none of the three is named with its number and what is wrong with it.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipret.competitions.completion import Vocabulary
from clipret.errors import ClipretError

__all__ = [
    "COLORS",
    "COLUMNS",
    "PERSON_ATTRIBUTES",
    "TYPES",
    "Label",
    "Problem",
    "parse_labels",
    "rows_of",
    "statistics",
    "vocabulary_of",
]

COLORS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
TYPES = ("Bus", "Microbus", "Minivan", "SUV", "Sedan", "Truck")
# In the order of the values of a label line.
PERSON_ATTRIBUTES = (
    "female",
    "age over 60",
    "age 18-60",
    "age under 18",
    "front",
    "side",
    "back",
    "hat",
    "glasses",
    "hand bag",
    "shoulder bag",
    "backpack",
    "holds objects in front",
    "short sleeve",
    "long sleeve",
    "upper stripe",
    "upper logo",
    "upper plaid",
    "upper splice",
    "long coat",
    "skirt or dress",
)
_ONE_OF = (PERSON_ATTRIBUTES[1:4], PERSON_ATTRIBUTES[4:7], PERSON_ATTRIBUTES[13:15])
COLUMNS: tuple[str, ...] = ("path", "caption", "kind", "color", "brand", "type", "attributes", "split")


@dataclass(frozen=True)
class Label:
    """A line. Of a vehicle `color` and `brand`, or `type`, are set; of a person `attributes`, by their names."""

    line: int
    image: str
    text: str
    kind: Literal["vehicle", "person"]
    color: str = ""
    brand: str = ""
    type: str = ""
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line, and what to do about it."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


def parse_labels(
    path: Path, *, colors: Sequence[str] = COLORS, types: Sequence[str] = TYPES, images: Path | None = None
) -> tuple[list[Label], list[Problem]]:
    """The labels of a file and what is wrong with the lines that are none, both in the order of the lines.

    Colours and types are compared without regard to capitals and come out as they are spelt in `colors` and `types`;
    brands are free. `images`: the folder that must hold every image. An image may have several lines
    as long as they do not contradict each other. Raises ClipretError for a file that cannot be read or is empty.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ClipretError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ClipretError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ClipretError(f"{path} holds no lines: nothing to do")
    words = {color.lower(): color for color in colors}, {kind.lower(): kind for kind in types}
    labels: list[Label] = []
    problems: list[Problem] = []
    seen = defaultdict[str, list[Label]](list)
    for number, line in enumerate(lines, 1):
        label = _parse(number, line.rstrip("\r"), *words)
        if isinstance(label, Label):
            label = _placed(label, seen, images)
        if isinstance(label, Label):
            labels.append(label)
        else:
            problems.append(Problem(number, label))
    return labels, problems


def _parse(number: int, line: str, colors: Mapping[str, str], types: Mapping[str, str]) -> Label | str:
    """The label of a line, or what is wrong with it."""
    fields = [field.strip() for field in line.split("$")]
    if len(fields) != 3:
        return f"has {len(fields)} fields between $ signs, not the three of image$attribute$text"
    image, attribute, text = fields
    for name, field in (("image", image), ("attribute", attribute), ("text", text)):
        if not field:
            return f"has no {name}: fill it in"
    if "," in attribute or attribute in ("0", "1"):
        return _person(number, image, attribute, text)
    bare = attribute.removesuffix(".").strip()
    if bare.lower() in types:
        return Label(number, image, text, "vehicle", type=types[bare.lower()])
    color, _, brand = bare.partition(" ")
    brand = " ".join(brand.split())
    if color.lower() not in colors:
        return (
            f"attribute {attribute!r} is no type ({', '.join(types.values())}), does not begin with a colour "
            f"({', '.join(colors.values())}) and is no list of 0 and 1: correct it or extend the vocabulary"
        )
    if not brand:
        return f"attribute {attribute!r} is a colour without a brand: add one"
    strange = [word for word in brand.split() if word.lower() in types or word.lower() in colors]
    if strange:
        return (
            f"attribute {attribute!r} has {strange[0]!r} where the brand stands: it is a colour and a brand, or a type"
        )
    return Label(number, image, text, "vehicle", color=colors[color.lower()], brand=brand)


def _person(number: int, image: str, attribute: str, text: str) -> Label | str:
    values = [value.strip() for value in attribute.removesuffix(".").split(",")]
    wanted = len(PERSON_ATTRIBUTES)
    if len(values) != wanted:
        return f"has {len(values)} values of a person, not {wanted}"
    for place, value in enumerate(values, 1):
        if value not in ("0", "1"):
            return f"value {place} ({PERSON_ATTRIBUTES[place - 1]}) is {value!r}: it is 0 or 1"
    held = tuple(name for name, value in zip(PERSON_ATTRIBUTES, values, strict=True) if value == "1")
    return Label(number, image, text, "person", attributes=held)


def _placed(label: Label, seen: dict[str, list[Label]], images: Path | None) -> Label | str:
    """The label, or why it does not fit the images or an earlier line."""
    if images is not None and not (images / label.image).is_file():
        return f"{images} has no image {label.image}: correct the name or add the image"
    for before in seen[label.image]:
        if before.kind != label.kind or before.attributes != label.attributes:
            return f"{label.image} is something else on line {before.line}: correct one of them"
        for slot in ("color", "brand", "type"):
            old, new = getattr(before, slot), getattr(label, slot)
            if old and new and old != new:
                return f"{label.image} is {old} on line {before.line} and {new} here: correct one of them"
        if (before.text, before.color, before.type) == (label.text, label.color, label.type):
            return f"says the same as line {before.line}: remove it"
    seen[label.image].append(label)
    return label


def vocabulary_of(labels: Iterable[Label], given: Vocabulary | None = None) -> dict[str, object]:
    """What a vocabulary file holds (see `clipret.competitions.completion.Vocabulary`).

    The challenge's words or those of `given`, the brands of the labels, the most frequent first, and the names of a
    person's values.
    """
    brands = Counter(label.brand for label in labels if label.brand)
    slots: dict[str, Sequence[str]] = {"color": COLORS, "brand": (), "type": TYPES}
    slots |= {} if given is None else given.slots
    more = sorted(set(brands).difference(slots["brand"]), key=lambda brand: (-brands[brand], brand))
    return {
        "slots": {slot: [*words, *(more if slot == "brand" else ())] for slot, words in slots.items()},
        "other": {} if given is None else {slot: list(words) for slot, words in given.other.items()},
        "persons": list(PERSON_ATTRIBUTES),
    }


def rows_of(labels: Iterable[Label], val_share: float, seed: int) -> list[dict[str, str]]:
    """Rows with the COLUMNS of a training list.

    An image is in `split` val by a hash of its name and the seed, so that it stays there when images are added.
    """
    rows = []
    for label in labels:
        digest = hashlib.sha256(f"{seed}\0{label.image}".encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < val_share * 2**64
        row = {"path": label.image, "caption": label.text, "kind": label.kind, "color": label.color}
        row |= {"brand": label.brand, "type": label.type, "attributes": "; ".join(label.attributes)}
        rows.append(row | {"split": "val" if held_out else "train"})
    return rows


def statistics(labels: Sequence[Label]) -> dict[str, object]:
    """Counts: lines and images, vehicles and persons, each word, different texts, and what may be a slip.

    `unclear persons`: those with none or several of what everybody has one of (an age, a side, a length of sleeve).
    `brands spelt in several ways`: those that differ in capitals only.
    """
    persons = [label for label in labels if label.kind == "person"]
    brands = Counter(label.brand for label in labels if label.brand)
    spelt = Counter(brand.lower() for brand in brands)
    unclear = {
        " / ".join(group): sum(len(set(label.attributes).intersection(group)) != 1 for label in persons)
        for group in _ONE_OF
    }
    return {
        "lines": len(labels),
        "images": len({label.image for label in labels}),
        "different texts": len({label.text for label in labels}),
        "vehicles by colour and brand": sum(bool(label.color) for label in labels),
        "vehicles by type": sum(bool(label.type) for label in labels),
        "persons": len(persons),
        "color": dict(Counter(label.color for label in labels if label.color).most_common()),
        "type": dict(Counter(label.type for label in labels if label.type).most_common()),
        "brand": dict(brands.most_common()),
        "attributes": dict(Counter(name for label in persons for name in label.attributes).most_common()),
        "unclear persons": unclear,
        "brands spelt in several ways": sorted(brand for brand in brands if spelt[brand.lower()] > 1),
    }
