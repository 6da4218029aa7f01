"""The page of results: one file with queries and the pictures they found, readable anywhere, without a network."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from PIL import Image

from clipret.files import write_file
from clipret.images import PictureError, decode, read_picture

__all__ = ["Card", "Section", "write_page"]

_THUMBNAIL = 240  # pixels of the longer side; the page shows them at half of that, sharp on dense screens


@dataclass(frozen=True)
class Card:
    """One picture found. `relevant`: whether it is a right answer, None where nobody knows."""

    path: Path
    label: str
    score: float
    relevant: bool | None = None


@dataclass(frozen=True)
class Section:
    """One query and its pictures, best first."""

    query: str
    cards: Sequence[Card]
    note: str = ""


def write_page(out: Path, *, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> None:
    """Write the page with the pictures inside it. `facts` are headline figures as name and value.

    A picture that cannot be read becomes a tile that says why. Raises ClipretError when `out` cannot be written.
    """
    thumbnails: dict[Path, str] = {}
    page = _PAGE.substitute(
        title=html.escape(title),
        facts="".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts),
        contents=_contents(sections) if len(sections) > 8 else "",
        sections="\n".join(_section(number, section, thumbnails) for number, section in enumerate(sections, 1)),
    )
    write_file(out, page)


def _contents(sections: Sequence[Section]) -> str:
    links = (f'<a href="#q{number}">{html.escape(section.query)}</a>' for number, section in enumerate(sections, 1))
    return f'<nav aria-label="Queries">{" ".join(links)}</nav>'


def _section(number: int, section: Section, thumbnails: dict[Path, str]) -> str:
    cards = "".join(_card(rank, card, thumbnails) for rank, card in enumerate(section.cards, 1))
    note = f"<p>{html.escape(section.note)}</p>" if section.note else ""
    return f'<section id="q{number}"><h2>{html.escape(section.query)}</h2>{note}<ol>{cards}</ol></section>'


def _card(rank: int, card: Card, thumbnails: dict[Path, str]) -> str:
    if card.path not in thumbnails:
        thumbnails[card.path] = _thumbnail(card.path)
    label = html.escape(card.label)
    kind, mark = {None: ("", ""), True: ("right", "right"), False: ("wrong", "wrong")}[card.relevant]
    verdict = f'<b class="mark">{mark}</b>' if mark else ""
    return (
        f'<li class="{kind}"><figure>{thumbnails[card.path]}<figcaption><span class="rank">{rank}</span>{verdict}'
        f'<span class="score">{card.score:.3f}</span><span class="label" title="{label}">{label}</span>'
        "</figcaption></figure></li>"
    )


def _thumbnail(path: Path) -> str:
    """An <img> with the picture as a data URI, or a tile with the reason why there is none."""
    try:
        image = decode(read_picture(path).content)
    except PictureError as error:
        return f'<div class="none">{html.escape(path.name)}<br>{html.escape(str(error))}</div>'
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = image.size
    alt = html.escape(path.name)
    return f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" alt="{alt}" loading="lazy">'


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --ground: #f6f6f3; --paper: #fff; --ink: #1c1f22; --soft: #5c6369; --line: #dfe0dc;
  --right: #17753a; --wrong: #a3333d; --link: #1a56a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #141618; --paper: #1e2124; --ink: #e9eaeb; --soft: #a0a7ad; --line: #33383c; --right: #5fcf88;
    --wrong: #ef8e96; --link: #8ab8f5;
  }
}
* { box-sizing: border-box; margin: 0; padding: 0 }
body {
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
    sans-serif;
  background: var(--ground); color: var(--ink); max-width: 1640px; margin: 0 auto; padding: 28px clamp(14px, 3vw, 48px);
}
h1 { font-size: 21px; font-weight: 650; letter-spacing: -.01em }
dl { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 14px 0 18px }
dt { color: var(--soft); font-size: 12.5px }
dd { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums }
nav { display: flex; flex-wrap: wrap; gap: 6px 8px; margin-bottom: 10px }
nav a {
  color: var(--link); text-decoration: none; font-size: 13px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 99px; padding: 2px 11px;
}
nav a:hover { border-color: currentColor }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
section {
  border-top: 1px solid var(--line); padding: 18px 0 20px; content-visibility: auto; contain-intrinsic-size: auto 240px;
}
h2 { font-size: 17px; font-weight: 600; display: inline; overflow-wrap: anywhere }
section p { display: inline; color: var(--soft); font-size: 13px; margin-left: 10px }
ol { list-style: none; display: flex; flex-wrap: wrap; gap: 12px; margin-top: 12px }
li { flex: 0 1 auto; max-width: 100% }
figure {
  background: var(--paper); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; min-width: 104px;
  width: min-content;
}
img { display: block; height: 132px; width: auto; max-width: min(300px, 86vw); object-fit: cover; margin: 0 auto }
.none {
  height: 132px; width: 132px; display: grid; place-content: center; text-align: center; color: var(--soft);
  font-size: 12px; padding: 8px; overflow: hidden; overflow-wrap: anywhere;
}
figcaption { display: flex; flex-wrap: wrap; gap: 0 7px; padding: 5px 8px 6px; font-size: 12px; line-height: 1.5 }
.rank { font-weight: 650 }
.score { color: var(--soft); margin-left: auto; font-variant-numeric: tabular-nums }
.label {
  flex: 1 0 100%; width: 0; color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  direction: rtl; text-align: left; unicode-bidi: plaintext;
}
.mark { font-weight: 600 }
.right figure { border-color: var(--right); box-shadow: 0 0 0 1px var(--right) }
.right .mark { color: var(--right) } .right .mark::before { content: "✓ " / "" }
.wrong .mark { color: var(--wrong) } .wrong .mark::before { content: "✕ " / "" }
.wrong img { opacity: .72 }
footer { border-top: 1px solid var(--line); padding-top: 12px; color: var(--soft); font-size: 12.5px }
@media (max-width: 640px) { ol { gap: 8px } img, .none { height: 104px } }
@media print { section { break-inside: avoid } }
</style>
<h1>$title</h1>
<dl>$facts</dl>
$contents
<main>
$sections
</main>
<footer>Best first; the number at the right of each picture is the cosine of picture and text.</footer>
</html>
""")
