"""The label files of the traffic retrieval challenge. A line has one of three forms, `image$attribute$text`:

    vehicles/0001.jpg$white Audi.$A white Audi drives along the road.     colour and brand
    vehicles/0002.jpg$Truck$This is a truck.                              a type
    people/0001.jpg$1,0,1,0,…,0$A woman with a backpack.                  21 values of a person, 0 or 1

The parser does not guess. It reports every other line with its number and what is wrong.
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
    """A line of a label file.

    Args:
        line: Its number, from 1.
        image: The path of the image.
        text: The caption.
        kind: What the image shows.
        color: The colour of a vehicle with a brand.
        brand: The brand of a vehicle with a colour.
        type: The type of a vehicle.
        attributes: The names of a person's attributes.
    """

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
    """A line with an error, and how to correct it."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


def parse_labels(
    path: Path, *, colors: Sequence[str] = COLORS, types: Sequence[str] = TYPES, images: Path | None = None
) -> tuple[list[Label], list[Problem]]:
    """Read a label file.

    An image may have several lines if they do not contradict each other.

    Args:
        path: The label file.
        colors: The allowed colours. Case does not matter; labels have the spelling of this argument.
        types: The allowed types, likewise. Brands are free.
        images: A folder that must have every image; None to skip this check.

    Returns:
        The labels, and the lines with an error, both in the order of the lines.

    Raises:
        ClipretError: The file cannot be read or is empty.
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
        raise ClipretError(f"{path} is empty: pass a file with lines such as image$attribute$text")
    vocabulary = {color.lower(): color for color in colors}, {kind.lower(): kind for kind in types}
    labels: list[Label] = []
    problems: list[Problem] = []
    of_image = defaultdict[str, list[Label]](list)
    for number, line in enumerate(lines, 1):
        label = _parse(number, line.rstrip("\r"), *vocabulary)
        if isinstance(label, Label):
            label = _consistent(label, of_image, images)
        if isinstance(label, Label):
            labels.append(label)
        else:
            problems.append(Problem(number, label))
    return labels, problems


def _parse(number: int, line: str, colors: Mapping[str, str], types: Mapping[str, str]) -> Label | str:
    """The label of a line, or the error in it."""
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
            f"attribute {attribute!r} is not a type ({', '.join(types.values())}), does not start with a colour "
            f"({', '.join(colors.values())}) and is not a list of 0 and 1: correct it or extend the vocabulary"
        )
    if not brand:
        return f"attribute {attribute!r} is a colour without a brand: add the brand"
    not_brand = [word for word in brand.split() if word.lower() in types or word.lower() in colors]
    if not_brand:
        return (
            f"attribute {attribute!r} has {not_brand[0]!r} in place of a brand: write a colour and a brand, or a type"
        )
    return Label(number, image, text, "vehicle", color=colors[color.lower()], brand=brand)


def _person(number: int, image: str, attribute: str, text: str) -> Label | str:
    values = [value.strip() for value in attribute.removesuffix(".").split(",")]
    count = len(PERSON_ATTRIBUTES)
    if len(values) != count:
        return f"has {len(values)} values of a person, not {count}"
    for number_of_value, value in enumerate(values, 1):
        if value not in ("0", "1"):
            return f"value {number_of_value} ({PERSON_ATTRIBUTES[number_of_value - 1]}) is {value!r}: it must be 0 or 1"
    attributes = tuple(name for name, value in zip(PERSON_ATTRIBUTES, values, strict=True) if value == "1")
    return Label(number, image, text, "person", attributes=attributes)


def _consistent(label: Label, of_image: dict[str, list[Label]], images: Path | None) -> Label | str:
    """The label, or how it contradicts the images or an earlier line of its image."""
    if images is not None and not (images / label.image).is_file():
        return f"{images} has no image {label.image}: correct the name or add the image"
    for earlier in of_image[label.image]:
        if earlier.kind != label.kind or earlier.attributes != label.attributes:
            return f"{label.image} has a different attribute on line {earlier.line}: correct one of them"
        for slot in ("color", "brand", "type"):
            old, new = getattr(earlier, slot), getattr(label, slot)
            if old and new and old != new:
                return f"{label.image} is {old} on line {earlier.line} and {new} here: correct one of them"
        if (earlier.text, earlier.color, earlier.type) == (label.text, label.color, label.type):
            return f"is the same as line {earlier.line}: remove it"
    of_image[label.image].append(label)
    return label


def vocabulary_of(labels: Iterable[Label], base: Vocabulary | None = None) -> dict[str, object]:
    """Return the content of a vocabulary file (see `clipret.competitions.completion.Vocabulary`).

    Args:
        labels: Their brands are added, the most frequent first.
        base: A vocabulary to extend; None for the colours and types of the challenge.

    Returns:
        The words of each slot, and the names of a person's attributes.
    """
    brands = Counter(label.brand for label in labels if label.brand)
    slots: dict[str, Sequence[str]] = {"color": COLORS, "brand": (), "type": TYPES}
    slots |= {} if base is None else base.slots
    new_brands = sorted(set(brands).difference(slots["brand"]), key=lambda brand: (-brands[brand], brand))
    return {
        "slots": {slot: [*words, *(new_brands if slot == "brand" else ())] for slot, words in slots.items()},
        "other": {} if base is None else {slot: list(words) for slot, words in base.other.items()},
        "persons": list(PERSON_ATTRIBUTES),
    }


def rows_of(labels: Iterable[Label], val_share: float, seed: int) -> list[dict[str, str]]:
    """Return the rows of an annotations file with the COLUMNS.

    A hash of its name and the seed decides whether an image is held out, so this does not change when images are added.

    Args:
        labels: The labels.
        val_share: Share of the images with `split` val, 0 to 1.
        seed: Decides which.
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
    """Count lines, images, vehicles, persons, words and different texts, and likely mistakes.

    Likely mistakes are `unclear persons`, who have none or several of the attributes of which everybody has exactly one
    (an age, a side, a length of sleeves), and `brands spelt in several ways`, which differ in case only.
    """
    persons = [label for label in labels if label.kind == "person"]
    brands = Counter(label.brand for label in labels if label.brand)
    spellings = Counter(brand.lower() for brand in brands)
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
        "brands spelt in several ways": sorted(brand for brand in brands if spellings[brand.lower()] > 1),
    }
