"""What a scene is: one vehicle or one person, somewhere, at some time of day."""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

__all__ = ["COLORS", "LIGHTS", "PLACES", "TYPES", "Person", "Scene", "Style"]

Style = Literal["web", "surveillance"]

# The vocabulary of the traffic retrieval challenge. Nominal colours are far enough apart that a shade of one
# is never a shade of another.
COLORS: dict[str, tuple[int, int, int]] = {
    "black": (34, 35, 40),
    "blue": (38, 84, 190),
    "brown": (112, 72, 44),
    "green": (40, 132, 74),
    "grey": (128, 131, 135),
    "orange": (238, 126, 34),
    "pink": (242, 150, 186),
    "purple": (122, 62, 160),
    "red": (204, 36, 40),
    "white": (240, 241, 242),
    "yellow": (246, 206, 48),
}
TYPES = ("Bus", "Microbus", "Minivan", "SUV", "Sedan", "Truck")
PLACES = ("street", "highway", "parking", "country", "tunnel")
LIGHTS = ("day", "day", "overcast", "dusk", "night")
CLOTHES = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")


@dataclass(frozen=True)
class Person:
    """What is to be seen of a person. `upper` and `lower` are colour names."""

    female: bool
    age: Literal["child", "adult", "elder"]
    view: Literal["front", "side", "back"]
    upper: str
    lower: str
    hat: bool
    glasses: bool
    bag: Literal["none", "backpack", "hand bag", "shoulder bag"]
    sleeves: Literal["long", "short"]
    pattern: Literal["plain", "stripes", "plaid"]
    garment: Literal["trousers", "skirt", "coat"]

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        female = bool(rng.random() < 0.5)
        upper, lower = rng.choice(CLOTHES, 2, replace=False)
        return cls(
            female=female,
            age=rng.choice(["child", "adult", "elder"], p=[0.2, 0.6, 0.2]),
            view=rng.choice(["front", "side", "back"]),
            upper=str(upper),
            lower=str(lower),
            hat=bool(rng.random() < 0.3),
            glasses=bool(rng.random() < 0.25),
            bag=rng.choice(["none", "backpack", "hand bag", "shoulder bag"], p=[0.4, 0.25, 0.2, 0.15]),
            sleeves=rng.choice(["long", "short"]),
            pattern=rng.choice(["plain", "stripes", "plaid"], p=[0.6, 0.25, 0.15]),
            garment=rng.choice(["trousers", "skirt", "coat"], p=[0.5, 0.3, 0.2] if female else [0.8, 0.0, 0.2]),
        )


@dataclass(frozen=True)
class Scene:
    """`color` and `type` are empty for a person; `person` is None for a vehicle."""

    kind: Literal["vehicle", "person"]
    color: str = ""
    type: str = ""
    person: Person | None = None
    place: str = "street"
    light: str = "day"
    mirrored: bool = False

    @classmethod
    def vehicle(cls, rng: np.random.Generator, pair: int) -> Self:
        """A vehicle somewhere; colour and type are the `pair`-th of the 66, counted round and round."""
        color, kind = list(COLORS)[pair % len(COLORS)], TYPES[pair // len(COLORS) % len(TYPES)]
        place, light = str(rng.choice(PLACES)), str(rng.choice(LIGHTS))
        return cls("vehicle", color, kind, None, place, light, bool(rng.random() < 0.5))

    @classmethod
    def pedestrian(cls, rng: np.random.Generator) -> Self:
        place, light = str(rng.choice(["street", "parking", "country"])), str(rng.choice(LIGHTS))
        return cls("person", "", "", Person.sample(rng), place, light, bool(rng.random() < 0.5))
