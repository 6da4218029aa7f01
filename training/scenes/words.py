"""Captions: only what is to be seen, in English and Chinese, from the bare name to a whole sentence."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from clipret.training.scenes.scene import Person, Scene

__all__ = ["LANGS", "Lang", "captions", "query"]

Lang = Literal["en", "zh"]
LANGS: tuple[Lang, ...] = ("en", "zh")

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
_TYPES_ZH = {
    "Bus": "公交车",
    "Microbus": "面包车",
    "Minivan": "商务车",
    "SUV": "越野车",
    "Sedan": "轿车",
    "Truck": "卡车",
}
_PLACES = {
    "street": ("on a city street", "在城市街道上"),
    "highway": ("on the highway", "在高速公路上"),
    "parking": ("in a parking lot", "在停车场"),
    "country": ("on a country road", "在乡间公路上"),
    "tunnel": ("in a tunnel", "在隧道里"),
}
_LIGHTS = {
    "day": ("by day", "白天"),
    "overcast": ("on a grey day", "阴天"),
    "dusk": ("at dusk", "黄昏"),
    "night": ("at night", "夜晚"),
}
_VIEWS = {
    "front": ("seen from the front", "正面"),
    "side": ("seen from the side", "侧面"),
    "back": ("seen from behind", "背面"),
}
_BAGS_ZH = {"backpack": "背着双肩包", "hand bag": "提着手提包", "shoulder bag": "背着单肩包"}
_GARMENTS = {"skirt": ("skirt", "裙子"), "trousers": ("trousers", "裤子")}

_VEHICLE = {
    "en": (
        "{a_color} {type}",
        "{a_color} {type} {place}",
        "{a_color} {type} {place} {light}",
        "there is {a_color} {type} {place}",
        "side view of {a_color} {type}",
        "{a_type} painted {color}",
        "the colour of the {type} is {color}",
        "{a_type} {place} {light}",
        "{a_color} vehicle {place}",
    ),
    "zh": (
        "一辆{color}的{type}",
        "{color}{type}",
        "{place}有一辆{color}的{type}",
        "{light}，一辆{color}{type}{place}",
        "一辆{color}{type}的侧面",
        "这辆{type}是{color}的",
        "{light}{place}的一辆{type}",
        "{place}的{color}车辆",
    ),
}


def captions(scene: Scene, rng: np.random.Generator, lang: Lang, n: int) -> list[str]:
    """`n` different captions; the first of a vehicle always names colour and type."""
    made: list[str] = []
    while len(made) < n:
        text = _of_person(scene.person, rng, lang) if scene.person else _of_vehicle(scene, rng, lang, full=not made)
        if text not in made:
            made.append(text)
    return made


def query(color: str, kind: str, lang: Lang) -> str:
    """What somebody who looks for vehicles of this colour and type would type."""
    return f"{_article(color)} {_type_en(kind)}" if lang == "en" else f"一辆{_COLORS_ZH[color]}的{_TYPES_ZH[kind]}"


def _of_vehicle(scene: Scene, rng: np.random.Generator, lang: Lang, full: bool) -> str:
    at = 0 if lang == "en" else 1
    templates = _VEHICLE[lang][:3] if full else _VEHICLE[lang]
    kind = _type_en(scene.type) if lang == "en" else _TYPES_ZH[scene.type]
    light = _LIGHTS["overcast" if scene.place == "tunnel" else scene.light][at]
    text = templates[int(rng.integers(len(templates)))].format(
        color=scene.color if lang == "en" else _COLORS_ZH[scene.color],
        a_color=_article(scene.color),
        type=kind,
        a_type=_article(kind),
        place=_PLACES[scene.place][at],
        light="" if scene.place == "tunnel" else light,
    )
    return " ".join(text.split()).removeprefix("，")


def _of_person(person: Person, rng: np.random.Generator, lang: Lang) -> str:
    """Who it is, with one to three of the things to be seen."""
    details = _details(person, lang)
    chosen: Sequence[str] = [details[at] for at in rng.permutation(len(details))[: int(rng.integers(1, 4))]]
    who = _who(person, lang)
    if lang == "en":
        return f"{who} {', '.join(chosen)}"
    return f"一位{'、'.join(chosen)}的{who}"


def _who(person: Person, lang: Lang) -> str:
    names = {
        "child": (("a girl", "女孩"), ("a boy", "男孩")),
        "adult": (("a woman", "女士"), ("a man", "男士")),
        "elder": (("an elderly woman", "老奶奶"), ("an elderly man", "老爷爷")),
    }
    pair = names[person.age][0 if person.female else 1]
    return pair[0 if lang == "en" else 1]


def _details(person: Person, lang: Lang) -> list[str]:
    en = lang == "en"
    coat = person.garment == "coat"
    pattern, pattern_zh = {"plain": ("", ""), "stripes": ("striped ", "条纹"), "plaid": ("plaid ", "格子")}[
        person.pattern
    ]
    top_zh = f"穿{_COLORS_ZH[person.upper]}{pattern_zh}{'大衣' if coat else '上衣'}"
    facts = [
        f"in {_article(person.upper)} {pattern}{'coat' if coat else 'top'}" if en else top_zh,
        _VIEWS[person.view][0 if en else 1],
    ]
    if person.garment in _GARMENTS:
        name_en, name_zh = _GARMENTS[person.garment]
        plural = "" if name_en == "trousers" else "a "
        facts.append(f"wearing {plural}{person.lower} {name_en}" if en else f"穿{_COLORS_ZH[person.lower]}{name_zh}")
    if person.sleeves == "short":
        facts.append("with short sleeves" if en else "穿短袖")
    if person.hat:
        facts.append("with a hat" if en else "戴帽子")
    if person.glasses and person.view != "back":
        facts.append("with glasses" if en else "戴眼镜")
    if person.bag != "none":
        facts.append(f"with a {person.bag}" if en else _BAGS_ZH[person.bag])
    return facts


def _type_en(kind: str) -> str:
    return kind if kind == "SUV" else kind.lower()


def _article(word: str) -> str:
    return f"{'an' if word in ('orange', 'SUV') else 'a'} {word}"
