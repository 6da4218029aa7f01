"""Images in a terminal: kitty's graphics protocol, sixel, or links to the files.

The choice depends on environment variables alone: a terminal might not answer a request, and a late answer would end
up in the shell.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["Show", "detect", "kitty", "link", "pixels_across", "sixel", "strip"]

Show = Literal["auto", "kitty", "sixel", "links", "none"]

_CHUNK = 4096  # bytes of base64 in one command of kitty's protocol
_COLOURS = 256  # what every terminal with sixels has
_CELL = 9  # pixels of a character's width, where the terminal does not tell
_GAP = 6
_GREY = (128, 128, 128)  # of an image that cannot be read; neither light nor dark


def detect(environment: Mapping[str, str]) -> Literal["kitty", "sixel", "links", "none"]:
    """What the terminal that the variables describe can show.

    A terminal in tmux or screen gets links: what they pass on to the outer terminal is unknown.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term in ("", "dumb", "linux"):
        return "none"
    if term.startswith(("tmux", "screen")) or "TMUX" in environment or "STY" in environment:
        return "links"
    if "KITTY_WINDOW_ID" in environment or "kitty" in term or "ghostty" in term or program == "ghostty":
        return "kitty"
    if program in ("WezTerm", "iTerm.app", "mintty") or term.startswith(("foot", "mlterm", "contour", "yaft")):
        return "sixel"
    return "sixel" if "sixel" in term else "links"


def pixels_across(stream: int = 1) -> int:
    """The width in pixels of the terminal on a file descriptor: as it reports it, or estimated from its columns."""
    try:
        import fcntl
        import struct
        import termios

        _, columns, width, _ = struct.unpack("HHHH", fcntl.ioctl(stream, termios.TIOCGWINSZ, bytes(8)))
    except (ImportError, OSError):  # no such system, or no terminal
        columns = width = 0
    return width or _CELL * (columns or 80)


def strip(images: Sequence[Image.Image | None], width: int, height: int) -> Image.Image:
    """Images side by side with their numbers from 1, in rows as wide as `width` pixels and `height` high; None is a
    grey square."""
    tiles = []
    for number, image in enumerate(images, 1):
        tile = Image.new("RGB", (height, height), _GREY) if image is None else image.convert("RGB")
        ratio = min(height / tile.height, width / tile.width)
        tile = tile.resize((max(round(tile.width * ratio), 1), max(round(tile.height * ratio), 1)))
        draw = ImageDraw.Draw(tile)
        box = draw.textbbox((5, 3), str(number))
        draw.rectangle((0, 0, box[2] + 5, box[3] + 3), fill="black")
        draw.text((5, 3), str(number), fill="white")
        tiles.append(tile)
    corners, x, y = [], 0, 0
    for tile in tiles:
        if x and x + tile.width > width:
            x, y = 0, y + height + _GAP
        corners.append((x, y))
        x += tile.width + _GAP
    across = max((left + tile.width for (left, _), tile in zip(corners, tiles, strict=True)), default=1)
    # Transparent between the images, where the terminal can: there its own background shows.
    whole = Image.new("RGBA", (across, y + height), (0, 0, 0, 0))
    for corner, tile in zip(corners, tiles, strict=True):
        whole.paste(tile, corner)
    return whole


def kitty(image: Image.Image) -> str:
    """The image in kitty's graphics protocol: a PNG in chunks, shown at the cursor; the terminal answers nothing."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    content = base64.standard_b64encode(buffer.getvalue()).decode()
    chunks = [content[at : at + _CHUNK] for at in range(0, len(content), _CHUNK)]
    out = []
    for number, chunk in enumerate(chunks):
        first = "a=T,f=100,q=2," if number == 0 else ""
        out.append(f"\033_G{first}m={int(number < len(chunks) - 1)};{chunk}\033\\")
    return "".join(out)


def sixel(image: Image.Image) -> str:
    """The image as sixels (DEC, VT330/VT340 Programmer Reference Manual, volume 2, chapter 14), in up to 255 colours;
    transparent pixels keep the background."""
    clear = np.asarray(image.convert("RGBA"))[..., 3] < 128
    paletted = image.convert("RGB").quantize(_COLOURS - 1)
    indices = np.asarray(paletted).astype(np.int16)
    indices[clear] = -1
    levels = np.array(paletted.getpalette(), dtype=np.int64).reshape(-1, 3)
    used = sorted(set(np.unique(indices).tolist()) - {-1})
    out = [f'\033P0;1;0q"1;1;{image.width};{image.height}']  # P2 = 1: pixels without a colour stay as they are
    for index in used:
        red, green, blue = ((100 * int(level) + 127) // 255 for level in levels[index])
        out.append(f"#{index};2;{red};{green};{blue}")
    out += ["$".join(_band(indices[top : top + 6])) + "-" for top in range(0, image.height, 6)]
    return "".join(out) + "\033\\"


def _band(indices: np.ndarray) -> Iterator[str]:
    """Each colour of up to six rows: a character says which of the six pixels of a column have it."""
    bits = 1 << np.arange(len(indices))
    for index in np.unique(indices).tolist():
        if index >= 0:
            values = ((indices == index) * bits[:, None]).sum(axis=0) + 63
            used = np.flatnonzero(values != 63)
            yield f"#{index}" + "".join(_runs(values[: used[-1] + 1]))


def _runs(values: np.ndarray) -> Iterator[str]:
    ends = np.flatnonzero(np.diff(values, append=-1))
    start = 0
    for end in ends.tolist():
        character, count = chr(int(values[end])), end + 1 - start
        yield f"!{count}{character}" if count > 3 else character * count
        start = end + 1


def link(path: Path, text: str) -> str:
    """`text` as a link to a file (OSC 8); terminals that know no links show the text alone."""
    return f"\033]8;;{path.absolute().as_uri()}\033\\{text}\033]8;;\033\\"
