"""Captions in English and Chinese, from a name to a whole sentence. They mention only what is visible."""

from collections.abc import Callable
from typing import get_args

import numpy as np

from clipret.errors import ClipretError
from clipret_training.choices import Language
from clipret_training.synthetic.scene import COLORS, Person, Scene

__all__ = ["LANGS", "PERSON_QUERIES", "captions", "query"]

LANGS: tuple[Language, ...] = get_args(Language)
_MOST = 4  # captions of a person with one attribute: with or without the place, with or without the side

_COLORS_ZH = {
    "black": "黑色",
    "blue": "蓝色",
    "brown": "棕色",
    "green": "绿色",
    "grey": "灰色",
    "orange": "橙色",
    "pink": "粉色",
    "purple": "紫色",
    "red": "红色",
    "white": "白色",
    "yellow": "黄色",
}
# The first name is the one that queries use.
_TYPES_ZH = {
    "Bus": ("公交车", "大巴"),
    "Microbus": ("面包车",),
    "Minivan": ("商务车", "MPV"),
    "SUV": ("越野车", "SUV"),
    "Sedan": ("轿车",),
    "Truck": ("卡车", "货车"),
}
_PLACES = {
    "street": ("on a city street", "城市街道上"),
    "highway": ("on the highway", "高速公路上"),
    "parking": ("in a parking lot", "停车场里"),
    "country": ("on a country road", "乡间公路上"),
    "coast": ("by the sea", "海边"),
    "tunnel": ("in a tunnel", "隧道里"),
}
_LIGHTS = {
    "day": ("by day", "白天"),
    "overcast": ("on an overcast day", "阴天"),
    "dusk": ("at dusk", "黄昏"),
    "night": ("at night", "夜晚"),
}
_VIEWS = {"side": ("side", "侧面"), "front": ("front", "正面"), "rear": ("rear", "尾部")}

# The first three of each language name colour and type. {light} is empty in a tunnel, where the time is not visible.
_VEHICLE = {
    "en": (
        "{a_color} {type}",
        "{a_color} {type} {place}",
        "{a_color} {type} {place} {light}",
        "{view} view of {a_color} {type}",
        "there is {a_color} {type} {place}",
        "the color of the {type} is {color}",
        "{a_type} painted {color}",
        "{a_type} {place} {light}",
        "{a_type} seen from the {view}",
        "{a_color} vehicle {place}",
    ),
    "zh": (
        "一辆{color}的{type}",
        "{light}{place}的{color}{type}",
        "{place}有一辆{color}的{type}",
        "{color}{type}",
        "一辆{color}{type}的{view}",
        "这辆{type}是{color}的",
        "{light}{place}的一辆{type}",
        "{place}的{color}车辆",
        "一辆{type}的{view}",
    ),
}

_WHO = {  # female, male
    "child": (("girl", "女孩"), ("boy", "男孩")),
    "adult": (("woman", "女士"), ("man", "男士")),
    "elder": (("elderly woman", "老奶奶"), ("elderly man", "老爷爷")),
}
_PERSON_VIEWS = {
    "front": ("seen from the front", "正面"),
    "side": ("seen from the side", "侧面"),
    "back": ("seen from behind", "背面"),
}
_BAGS_ZH = {"backpack": "背着双肩包", "hand bag": "提着手提包", "shoulder bag": "挎着单肩包"}
_PATTERNS = {"plain": ("", ""), "stripes": ("striped ", "条纹"), "plaid": ("plaid ", "格子"), "logo": ("", "")}
_UPPERS = {"coat": ("long coat", "长大衣"), "dress": ("dress", "连衣裙")}
_LOWERS = {"skirt": ("skirt", "裙子"), "trousers": ("trousers", "裤子")}


def captions(scene: Scene, rng: np.random.Generator, lang: Language, n: int) -> list[str]:
    """Return different captions of a scene. The first caption of a vehicle always names colour and type.

    Args:
        scene: The scene.
        rng: Random numbers.
        lang: en or zh.
        n: How many, up to 4: a person with one attribute has no more.

    Raises:
        ClipretError: `n` is too large.
    """
    if n > _MOST:
        raise ClipretError(f"a scene does not have {n} different captions in each language: use {_MOST} at most")
    texts: list[str] = []
    while len(texts) < n:
        text = _of_vehicle(scene, rng, lang, full=not texts) if scene.person is None else _of_person(scene, rng, lang)
        if text not in texts:
            texts.append(text)
    return texts


def query(color: str, kind: str, lang: Language) -> str:
    """Return a query for vehicles of a colour and type."""
    return _a(f"{color} {_type_en(kind)}") if lang == "en" else f"一辆{_COLORS_ZH[color]}的{_TYPES_ZH[kind][0]}"


def _of_vehicle(scene: Scene, rng: np.random.Generator, lang: Language, full: bool) -> str:
    language = LANGS.index(lang)
    template = str(rng.choice(_VEHICLE[lang][:3] if full else _VEHICLE[lang]))
    names = (_type_en(scene.type),) if lang == "en" else _TYPES_ZH[scene.type]
    kind = str(rng.choice(names))
    text = template.format(
        color=scene.color if lang == "en" else _COLORS_ZH[scene.color],
        a_color=_a(scene.color),
        type=kind,
        a_type=_a(kind),
        place=_PLACES[scene.place][language],
        light="" if scene.place == "tunnel" else _LIGHTS[scene.light][language],
        view=_VIEWS[scene.view][language],
    )
    return text.strip()


def _of_person(scene: Scene, rng: np.random.Generator, lang: Language) -> str:
    """The person with one to three attributes, and sometimes the place or the side."""
    person = scene.person
    assert person is not None
    language = LANGS.index(lang)
    facts = _facts(person, language)
    chosen = [facts[n] for n in sorted(rng.permutation(len(facts))[: int(rng.integers(1, 4))])]
    who = _WHO[person.age][0 if person.female else 1][language]
    place = _PLACES[scene.place][language] if rng.random() < 0.35 else ""
    view = _PERSON_VIEWS[person.view][language] if rng.random() < 0.4 else ""
    if lang == "en":
        return ", ".join(part for part in (f"{_a(who)} {place or chosen.pop(0)}", *chosen, view) if part)
    return f"{place}{'有' if place else ''}一位{'、'.join(chosen)}的{who}{'，' if view else ''}{view}"


def _facts(person: Person, language: int) -> list[str]:
    """A phrase for each visible attribute of a person. `language` is an index of `LANGS`."""
    pattern = _PATTERNS[person.pattern][language]
    top = pattern + _UPPERS.get(person.garment, ("top", "上衣"))[language]
    facts = [(f"in {_a(f'{person.upper} {top}')}", f"穿{_COLORS_ZH[person.upper]}{top}")[language]]
    if person.garment in _LOWERS:
        name = _LOWERS[person.garment][language]
        english = f"{person.lower} {name}" if person.garment == "trousers" else _a(f"{person.lower} {name}")
        facts.append((f"wearing {english}", f"穿{_COLORS_ZH[person.lower]}{name}")[language])
    if person.sleeves == "short":
        facts.append(("with short sleeves", "穿短袖")[language])
    if person.pattern == "logo":
        facts.append((f"with a logo on the {'chest' if person.view == 'front' else 'back'}", "衣服上有图案")[language])
    if person.hat:
        facts.append(("with a hat", "戴帽子")[language])
    if person.glasses:
        facts.append(("with glasses", "戴眼镜")[language])
    if person.bag != "none":
        facts.append((f"with a {person.bag}", _BAGS_ZH[person.bag])[language])
    return facts


def _a(words: str) -> str:
    return f"{'an' if words.startswith(('orange', 'SUV', 'elderly')) else 'a'} {words}"


def _type_en(kind: str) -> str:
    return kind if kind == "SUV" else kind.lower()


def _is(person: Person, age: str, female: bool) -> bool:
    return person.age == age and person.female == female


def _wears(color: str) -> Callable[[Person], bool]:
    return lambda person: person.upper == color and person.garment in _LOWERS


# Queries for persons in English and Chinese, and for each the rule that decides who is an answer.
PERSON_QUERIES: tuple[tuple[str, str, Callable[[Person], bool]], ...] = (
    *((f"a person in {_a(name)} top", f"穿{_COLORS_ZH[name]}上衣的人", _wears(name)) for name in COLORS),
    ("a woman with a backpack", "背着双肩包的女士", lambda who: _is(who, "adult", True) and who.bag == "backpack"),
    ("a man with a backpack", "背着双肩包的男士", lambda who: _is(who, "adult", False) and who.bag == "backpack"),
    ("a woman with a hat", "戴帽子的女士", lambda who: _is(who, "adult", True) and who.hat),
    ("a man with a hat", "戴帽子的男士", lambda who: _is(who, "adult", False) and who.hat),
    ("a woman in a dress", "穿连衣裙的女士", lambda who: _is(who, "adult", True) and who.garment == "dress"),
    ("a child with glasses", "戴眼镜的孩子", lambda who: who.age == "child" and who.glasses),
    ("an elderly person with a hand bag", "提着手提包的老人", lambda who: who.age == "elder" and who.bag == "hand bag"),
    ("a person in a long coat", "穿长大衣的人", lambda who: who.garment == "coat"),
    ("a person seen from behind", "一个人的背影", lambda who: who.view == "back"),
)
