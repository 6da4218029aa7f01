"""The page that shows what a search found: one HTML file, no network, no script, pictures inside."""

import base64
import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from string import Template
from urllib.parse import quote

from clipret.errors import ClipretError
from clipret.files import write_file
from clipret.images.decode import PictureError, jpeg, thumbnail
from clipret.sources.source import read_stored

__all__ = ["Card", "Section", "write_page"]

SIDE = 256  # longest side of a thumbnail, pixels
GAP = 10  # between pictures of a row, CSS pixels
NAVIGATION_FROM = 9  # sections; fewer are scrolled through sooner than a list of them is read
# How many times as wide as high a row of pictures should be, on each width of page that the style sheet tells apart.
ROWS = {"xl": 10.0, "l": 6.2, "m": 4.4, "s": 2.2}
# Sign and word that say whether a picture is right.
MARKS = {
    None: ("", ""),
    True: ('<i class="yes" aria-hidden="true">✓</i> ', ' <span class="yes word">right</span>'),
    False: ('<i aria-hidden="true">✗</i> ', ' <span class="word">wrong</span>'),
}


FOOTER = "Best match first. The score is the cosine similarity of text and picture; a picture links to its file."


@dataclass(frozen=True)
class Card:
    """One picture found.

    path: the file on disk, or that of its archive with its name in it; where it is missing or broken, a tile says so.
    label: what is written under it, usually the path relative to the gallery's root. score: cosine similarity.
    relevant: whether the picture answers the query, None where nobody said. rank: default: the place among the cards.
    """

    path: Path
    label: str
    score: float
    relevant: bool | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Section:
    """One query and the pictures it found, best first. `note` stands beside the query; `missed`: pictures that should
    have been among them."""

    query: str
    cards: Sequence[Card]
    note: str = ""
    missed: Sequence[Card] = ()


def write_page(
    out: Path,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    footer: str = FOOTER,
    above: str = "",
    style: str = "",
) -> None:
    """Write the page, whole or not at all.

    `facts` are the headline figures, name and value; `above` is HTML that stands above the queries, `style` its style
    sheet. Pictures are embedded as thumbnails and link to their files, relative to the page. Raises ClipretError when
    the page's folder does not exist or cannot be written.
    """
    if not out.parent.is_dir():  # before all those pictures are decoded
        raise ClipretError(f"{out.parent} is not a folder: make it first, or write the page somewhere else")
    # A search for many queries finds some pictures again and again.
    preview = functools.cache(functools.partial(_preview, folder=out.parent.absolute()))
    page = PAGE.substitute(
        style=STYLE + style,
        title=escape(title),
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts),
        navigation=_navigation(sections) if len(sections) >= NAVIGATION_FROM else "",
        above=above,
        sections="\n".join(_section(number, section, preview) for number, section in enumerate(sections, 1)),
        footer=escape(footer),
    )
    # File names that are not UTF-8 reach us with surrogates, which no page can hold.
    write_file(out, page.encode("utf-8", "replace"))


def _navigation(sections: Sequence[Section]) -> str:
    rows = []
    for number, section in enumerate(sections, 1):
        sign, word = MARKS[section.cards[0].relevant if section.cards else None]
        query = f'<span lang="" dir="auto">{escape(section.query)}</span>'
        rows.append(f'<li{_hit(section)}><a href="#q{number}">{sign}{query}{word}</a></li>')
    judged = any(card.relevant is not None for section in sections for card in section.cards)
    choice = '<label><input type="checkbox" id="misses"> Only where the first is wrong</label>' if judged else ""
    skip = '<a class="skip" href="#found">Skip to the pictures</a>'
    return f'{skip}<nav aria-label="Queries"><h2>{len(sections)} queries</h2>{choice}<ol>{"".join(rows)}</ol></nav>'


def _section(number: int, section: Section, preview: Callable[[Path, str], tuple[str, float]]) -> str:
    found = _cards(section.cards, preview) if section.cards else "<p>Nothing found.</p>"
    missed = f"<h3>should have been found</h3>\n{_cards(section.missed, preview)}" if section.missed else ""
    return (
        f'<section id="q{number}"{_hit(section)}><header><h2 lang="" dir="auto">{escape(section.query)}</h2>'
        f"<p>{escape(section.note)}</p></header>\n{found}{missed}</section>"
    )


def _cards(cards: Sequence[Card], preview: Callable[[Path, str], tuple[str, float]]) -> str:
    previews = [preview(card.path, card.label) for card in cards]
    widths = [_justify([ratio for _, ratio in previews], row) for row in ROWS.values()]
    shown = []
    for at, (card, (tile, ratio)) in enumerate(zip(cards, previews, strict=True)):
        style = "".join(f"--{name}:{width[at]};" for name, width in zip(ROWS, widths, strict=True))
        shown.append(_card(card.rank or at + 1, card, tile, f"{style}--ratio:{ratio:.4f}"))
    return "<ol>\n" + "\n".join(shown) + "\n</ol>"


def _card(rank: int, card: Card, tile: str, style: str) -> str:
    label = escape(card.label)
    sign, word = MARKS[card.relevant]
    right = ' class="right"' if card.relevant else ""
    return (
        f'<li style="{style}"{right}><figure>{tile}<figcaption>'
        f'<span class="line"><b>{rank:,}</b> {sign}<data value="{card.score}">{card.score:z.3f}</data>{word}</span>'
        f'<span class="label" lang="" title="{label}">{label}</span>'
        "</figcaption></figure></li>"
    )


def _hit(section: Section) -> str:
    """Marks what the check box hides: queries whose first picture is right."""
    return ' class="hit"' if section.cards and section.cards[0].relevant else ""


def _preview(path: Path, label: str, *, folder: Path) -> tuple[str, float]:
    """What fills a card, and its ratio of width to height.

    The thumbnail, upright and without its metadata, as a link to its file; or a tile with the reason why not.
    """
    alt = escape(label)
    try:
        image = thumbnail(read_stored(path.parent, path.name).content, SIDE)
    except PictureError as error:
        return f'<div class="tile" role="img" aria-label="{alt}">{NO_PICTURE}{escape(str(error))}</div>', 1.0
    uri = "data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode()
    attributes = f'width="{image.width}" height="{image.height}" loading="lazy" decoding="async"'
    picture = f'<img class="tile" src="{uri}" alt="{alt}" {attributes}>'
    # Panoramas and pillars get bars beside them rather than a row of their own.
    ratio = min(max(image.width / image.height, 0.6), 2.2)
    # A member of an archive is no file that a browser could open.
    return f'<a href="{_link(path, folder)}">{picture}</a>' if path.is_file() else picture, ratio


def _link(path: Path, folder: Path) -> str:
    """URL of a file as seen from the page, so that the two can be moved together."""
    try:
        return quote(os.fsencode(Path(os.path.relpath(path.absolute(), folder)).as_posix()))
    except ValueError:  # on another Windows drive
        return path.absolute().as_uri()


def _justify(ratios: Sequence[float], row: float) -> list[str]:
    """CSS widths of pictures such that they fill rows of nearly equal height from side to side.

    A script would measure the window. Without one, widths are made for rows about `row` times as wide as high, and
    the style sheet chooses among several. Too few pictures for one row do not fill it.
    """
    if not ratios:
        return []

    def flaw(rows: list[list[float]]) -> float:
        lengths = [math.log(sum(line) / row) for line in rows]
        # Short rows make large pictures, which is worse than small ones: few fit on the screen.
        return max(max(length, -2 * length) for length in lengths) + max(lengths) - min(lengths)

    guess = int(sum(ratios) / row)
    rows = min((_split(ratios, count) for count in range(max(1, guess - 1), guess + 3)), key=flaw)
    widths = []
    for line in rows:
        scale = max(sum(line), row) if len(rows) == 1 else sum(line)
        for ratio in line:
            share = ratio / scale
            # 0.01 % less, lest rounding push the last picture of a row into the next.
            widths.append(f"calc({100 * share - 0.01:.2f}% - {GAP * (len(line) - 1) * share:.2f}px)")
    return widths


def _split(ratios: Sequence[float], count: int) -> list[list[float]]:
    """Pictures in order, in at most `count` rows of nearly equal sums."""
    total = sum(ratios)
    rows: defaultdict[int, list[float]] = defaultdict(list)
    for ratio, end in zip(ratios, accumulate(ratios), strict=True):
        rows[int((end - ratio / 2) * count / total)].append(ratio)
    return list(rows.values())


NO_PICTURE = (
    '<svg viewBox="0 0 24 24" width="28" height="28" fill="none" stroke="currentColor" stroke-width="1.5">'
    '<path d="M3 3l18 18M8 4h12v12M17.5 20H4V6.5M4 17l5-5 3 3"/></svg>'
)

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header class="top"><h1 lang="" dir="auto">$title</h1><dl>$facts</dl></header>
$navigation
<main id="found">
$above
$sections
</main>
<footer>$footer</footer>
</body>
</html>
""")

STYLE = """
:root { --paper: #fbfbfa; --tile: #efeeec; --line: #e2e0dc; --ink: #1d1c1a; --soft: #5f5b55; --right: #15753a;
  --link: #1f5fbf; font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
  "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC", "Source Han Sans SC", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #151617; --tile: #222426; --line: #303336; --ink: #ecebe8;
  --soft: #a5a29c; --right: #5fd38a; --link: #8ab8ff; } }
* { box-sizing: border-box; margin: 0; }
body { max-width: 2000px; margin: auto; padding: 28px clamp(14px, 3vw, 40px); background: var(--paper);
  color: var(--ink); display: grid; grid-template-columns: minmax(0, 1fr); gap: 26px 36px; overflow-wrap: anywhere; }
ol { list-style: none; padding: 0; }
a { color: inherit; text-decoration: none; border-radius: 6px; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -9999px; }
.skip:focus { left: 14px; top: 6px; background: var(--paper); z-index: 1; }

.top { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
h1 { font-size: 1.5rem; font-weight: 650; letter-spacing: -.015em; line-height: 1.2; }
dl { display: flex; flex-wrap: wrap; gap: 14px 45px; overflow: hidden; }
dl div { display: flex; flex-direction: column-reverse; justify-content: flex-end; position: relative; }
dl div::before { content: ""; position: absolute; inset: 2px auto 2px -23px; border-left: 1px solid var(--line); }
@media (max-width: 560px) {
  dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 12px; }
  dl div::before { content: none; }
}
dd { font-size: 1.35rem; font-weight: 600; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
dt, footer, section p, nav { color: var(--soft); font-size: .82rem; }

nav { max-height: 15rem; overflow: auto; border: solid var(--line); border-width: 1px 0; padding: 10px 0; }
nav h2 { font-size: inherit; font-weight: 600; color: var(--ink); }
nav label { display: flex; gap: 6px; align-items: center; padding: 4px 0 8px; }
nav input { accent-color: var(--right); }
nav a { display: flex; gap: 8px; padding: 3px 4px; }
nav a > span:not(.word) { flex: 1; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
  overflow: hidden; }
nav a:hover { background: var(--tile); color: var(--ink); }
nav .word { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
body:has(#misses:checked) .hit { display: none; }
@media (min-width: 1080px) {
  body:has(nav) { grid-template-columns: 232px minmax(0, 1fr); }
  .top, footer { grid-column: 1 / -1; }
  nav { position: sticky; top: 0; max-height: 100vh; border-width: 0 1px 0 0; padding: 4px 12px 20px 0; }
}

main { container-type: inline-size; display: grid; grid-template-columns: minmax(0, 1fr); gap: 30px;
  align-content: start; }
/* The padding is room for outlines, which content-visibility would clip. */
section { content-visibility: auto; contain-intrinsic-height: auto 450px; padding: 5px; margin: -5px; }
section header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; padding-bottom: 9px; }
section h2 { font-size: 1.08rem; font-weight: 600; line-height: 1.35; }
section h3 { font-size: .82rem; font-weight: 600; color: var(--soft); padding: 12px 0 8px; }
section ol { display: flex; flex-wrap: wrap; align-items: start; gap: 12px GAPpx; }
section li { width: var(--s); }
@container (min-width: 560px) { section li { width: var(--m); } }
@container (min-width: 880px) { section li { width: var(--l); } }
@container (min-width: 1400px) { section li { width: var(--xl); } }
section li a { display: block; }
.tile { display: block; width: 100%; height: auto; aspect-ratio: var(--ratio); object-fit: contain; border-radius: 6px;
  background: var(--tile); }
img.tile { outline: 1px solid rgb(128 128 128 / .16); outline-offset: -1px; }
div.tile { display: flex; flex-direction: column; align-items: center; justify-content: center; gap: 6px; padding: 8px;
  overflow: hidden; color: var(--soft); font-size: .75rem; line-height: 1.3; text-align: center; }
div.tile svg { flex: none; }
.right .tile { box-shadow: 0 0 0 2px var(--paper), 0 0 0 4px var(--right); }
figcaption { padding: 5px 1px 0; font-size: .75rem; line-height: 1.4; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.line { display: flex; flex-wrap: wrap; gap: 0 6px; height: 1.4em; overflow: hidden; }
.line b { color: var(--ink); }
.yes { color: var(--right); font-weight: 650; }
i { font-style: normal; }
.label { display: block; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
@media print { nav, .skip { display: none; } section { content-visibility: visible; break-inside: avoid; } }
""".replace("GAPpx", f"{GAP}px")
