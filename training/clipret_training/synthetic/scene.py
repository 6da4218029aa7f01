"""Scenes: a vehicle or a person at a place and in a light."""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

__all__ = ["COLORS", "LIGHTS", "PLACES", "TYPES", "Person", "Scene"]

# The vocabulary of the traffic retrieval challenge. The colours differ so much that their shades do not overlap.
COLORS: dict[str, tuple[int, int, int]] = {
    "black": (36, 38, 44),
    "blue": (34, 92, 200),
    "brown": (112, 70, 42),
    "green": (38, 140, 78),
    "grey": (134, 137, 142),
    "orange": (244, 128, 28),
    "pink": (246, 152, 190),
    "purple": (126, 64, 168),
    "red": (208, 34, 40),
    "white": (240, 241, 243),
    "yellow": (250, 210, 44),
}
TYPES = ("Bus", "Microbus", "Minivan", "SUV", "Sedan", "Truck")
PLACES = ("street", "highway", "parking", "country", "coast", "tunnel")
LIGHTS = ("day", "overcast", "dusk", "night")
_WALKS = ("street", "parking", "country", "coast")  # places where people walk


def _pick(rng: np.random.Generator, **weights: float) -> str:
    """A random name by its weight, with spaces for underscores."""
    shares = np.array(list(weights.values()))
    return str(rng.choice(list(weights), p=shares / shares.sum())).replace("_", " ")


@dataclass(frozen=True)
class Person:
    """The visible attributes of a person.

    `upper` and `lower` are names of colours. A dress or a coat has the colour `upper`.
    """

    female: bool
    age: str  # child | adult | elder
    view: str  # front | side | back
    upper: str
    lower: str
    hat: bool = False
    glasses: bool = False
    bag: str = "none"  # none | backpack | hand bag | shoulder bag
    sleeves: str = "long"  # long | short
    pattern: str = "plain"  # plain | stripes | plaid | logo
    garment: str = "trousers"  # trousers | skirt | dress | coat

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """Draw a random person whose attributes are all visible: no glasses from behind, no logo from the side."""
        female = bool(rng.random() < 0.5)
        upper, lower = (str(name) for name in rng.choice(list(COLORS), 2, replace=False))
        view = _pick(rng, front=1, side=1, back=1)
        bag = _pick(rng, none=4, backpack=3, hand_bag=2, shoulder_bag=2)
        garment = _pick(rng, trousers=5, skirt=2, dress=2, coat=2) if female else _pick(rng, trousers=4, coat=1)
        covered = garment == "coat" or (bag == "backpack" and view == "back")
        logo = 0 if view == "side" else 2
        return cls(
            female=female,
            age=_pick(rng, child=2, adult=6, elder=2),
            view=view,
            upper=upper,
            lower=lower,
            hat=bool(rng.random() < 0.3),
            glasses=bool(rng.random() < 0.3) and view != "back",
            bag=bag,
            sleeves="long" if garment == "coat" else _pick(rng, long=1, short=1),
            pattern="plain" if covered else _pick(rng, plain=5, stripes=3, plaid=2, logo=logo),
            garment=garment,
        )


@dataclass(frozen=True)
class Scene:
    """A vehicle with `color`, `type` and `view`, or a `person`, at a place and in a light."""

    kind: Literal["vehicle", "person"]
    color: str = ""
    type: str = ""
    view: str = ""  # side | front | rear
    person: Person | None = None
    place: str = "street"
    light: str = "day"
    flipped: bool = False

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """Draw a random scene: a vehicle with probability 0.8, otherwise a pedestrian."""
        return cls.pedestrian(rng) if rng.random() < 0.2 else cls.vehicle(rng, int(rng.integers(66)))

    @classmethod
    def vehicle(cls, rng: np.random.Generator, pair: int) -> Self:
        """Draw a random scene with a vehicle.

        Args:
            rng: Random numbers.
            pair: The number of its colour and type among the 66 pairs, modulo 66.
        """
        color, kind = list(COLORS)[pair % len(COLORS)], TYPES[pair // len(COLORS) % len(TYPES)]
        return cls(
            kind="vehicle",
            color=color,
            type=kind,
            view=_pick(rng, side=9, front=1, rear=1),
            place=str(rng.choice(PLACES)),
            light=_pick(rng, day=4, overcast=2, dusk=2, night=2),
            flipped=bool(rng.random() < 0.5),
        )

    @classmethod
    def pedestrian(cls, rng: np.random.Generator) -> Self:
        """Draw a random scene with a person."""
        return cls(
            kind="person",
            person=Person.sample(rng),
            place=str(rng.choice(_WALKS)),
            light=_pick(rng, day=4, overcast=2, dusk=2, night=2),
            flipped=bool(rng.random() < 0.5),
        )
