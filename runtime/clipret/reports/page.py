"""A page with search results: one HTML file that includes its images, without network access or scripts."""

import base64
import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.images.decode import jpeg, thumbnail
from clipret.images.walk import ImageError
from clipret.reports.render import render
from clipret.sources.source import read_stored

__all__ = ["Card", "Section", "write_page"]

SIDE = 256  # longest side of a thumbnail, pixels
GAP = 10  # between images of a row, CSS pixels
NAVIGATION_FROM = 9  # sections; with fewer, scrolling is faster than reading a list
# The ratio of width to height of a row of images, for each page width that the style sheet distinguishes.
ROWS = {"xl": 10.0, "l": 6.2, "m": 4.4, "s": 2.2}

FOOTER = "Best match first. The score is the cosine similarity of text and image; an image links to its file."


@dataclass(frozen=True)
class Card:
    """One image on a page.

    Attributes:
        path: Its file, or the file of its archive with its name in it. A missing or broken file is shown as such.
        label: The text below it, usually the stored path.
        score: Its cosine similarity.
        relevant: Whether the image is right for the query; None if unknown.
        rank: Its rank. Default: its position among the cards, from 1.
    """

    path: Path
    label: str
    score: float
    relevant: bool | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Section:
    """One query with its results.

    Attributes:
        query: The query.
        cards: The results, best first.
        note: Shown next to the query.
        missed: Relevant images that are not among the results.
    """

    query: str
    cards: Sequence[Card]
    note: str = ""
    missed: Sequence[Card] = ()


@dataclass(frozen=True)
class _Tile:
    """A thumbnail, or the reason why there is none, and the aspect ratio of the tile."""

    ratio: float = 1.0
    error: str = ""
    source: str = ""  # the thumbnail as a data URL
    size: tuple[int, int] = (0, 0)  # width and height of the thumbnail, pixels
    link: str = ""  # to the file, if browsers can open it


def write_page(
    out: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    footer: str = FOOTER,
    template: str = "page.html.j2",
    **more: Any,
) -> None:
    """Write a page, completely or not at all.

    Images are embedded as thumbnails and link to their files, relative to the page.

    Args:
        out: The file of the page.
        title: The heading.
        facts: The main figures, name and value.
        sections: The queries and their results.
        footer: The text at the end.
        template: `page.html.j2` or a template that extends it.
        more: Further values for the template.

    Raises:
        ClipretError: The page's folder does not exist or cannot be written.
    """
    if not out.parent.is_dir():  # before the images are decoded
        raise ClipretError(f"{out.parent} is not a folder: create it, or choose another file for the page")
    # With many queries some images occur repeatedly.
    tile = functools.cache(functools.partial(_tile, folder=out.parent.absolute()))
    page = render(
        template,
        title=title,
        facts=facts,
        sections=[
            {
                "shown": section,
                "lists": [_cards(section.cards, tile), _cards(section.missed, tile)],
                "first": _first(section),
            }
            for section in sections
        ],
        navigation_from=NAVIGATION_FROM,
        judged=any(card.relevant is not None for section in sections for card in section.cards),
        footer=footer,
        gap=GAP,
        **more,
    )
    # File names that are not UTF-8 contain surrogates, which cannot be encoded.
    write_file(out, page.encode("utf-8", "replace"))


def _first(section: Section) -> bool | None:
    """Whether the first image of a query is right."""
    return section.cards[0].relevant if section.cards else None


def _cards(cards: Sequence[Card], tile: Callable[[Path], _Tile]) -> list[dict[str, Any]]:
    tiles = [tile(card.path) for card in cards]
    widths = [_justify([image.ratio for image in tiles], row) for row in ROWS.values()]
    return [
        {
            "card": card,
            "rank": card.rank or at + 1,
            "tile": tiles[at],
            "widths": {name: width[at] for name, width in zip(ROWS, widths, strict=True)},
        }
        for at, card in enumerate(cards)
    ]


def _tile(path: Path, *, folder: Path) -> _Tile:
    """The thumbnail of a file, upright and without its metadata, or the reason why there is none."""
    try:
        image = thumbnail(read_stored(path.parent, path.name).content, SIDE)
    except ImageError as error:
        return _Tile(error=str(error))
    return _Tile(
        # Very wide and very tall images are padded instead of filling a row or a column.
        ratio=min(max(image.width / image.height, 0.6), 2.2),
        source="data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode(),
        size=image.size,
        # Browsers cannot open a member of an archive.
        link=_link(path, folder) if path.is_file() else "",
    )


def _link(path: Path, folder: Path) -> str:
    """URL of a file relative to the page, so that the two can be moved together."""
    try:
        return quote(os.fsencode(Path(os.path.relpath(path.absolute(), folder)).as_posix()))
    except ValueError:  # on another Windows drive
        return path.absolute().as_uri()


def _justify(ratios: Sequence[float], row: float) -> list[str]:
    """CSS widths for images that fill rows of nearly equal height.

    Without a script the width of the window is unknown, so widths are computed for rows about `row` times as wide as
    high, and the style sheet chooses among several. Too few images for one row do not fill it.
    """
    if not ratios:
        return []

    def flaw(rows: list[list[float]]) -> float:
        lengths = [math.log(sum(line) / row) for line in rows]
        # Short rows have large images, which is worse than small ones: few fit on the screen.
        return max(max(length, -2 * length) for length in lengths) + max(lengths) - min(lengths)

    estimate = int(sum(ratios) / row)
    rows = min((_split(ratios, count) for count in range(max(1, estimate - 1), estimate + 3)), key=flaw)
    widths = []
    for line in rows:
        scale = max(sum(line), row) if len(rows) == 1 else sum(line)
        for ratio in line:
            share = ratio / scale
            # 0.01 % less, so that rounding does not move the last image to the next row.
            widths.append(f"calc({100 * share - 0.01:.2f}% - {GAP * (len(line) - 1) * share:.2f}px)")
    return widths


def _split(ratios: Sequence[float], count: int) -> list[list[float]]:
    """Images in order, in at most `count` rows of nearly equal sums."""
    total = sum(ratios)
    rows: defaultdict[int, list[float]] = defaultdict(list)
    for ratio, end in zip(ratios, accumulate(ratios), strict=True):
        rows[int((end - ratio / 2) * count / total)].append(ratio)
    return list(rows.values())
