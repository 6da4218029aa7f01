"""Drawing in a box with coordinates from 0 to 1 and y upwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["Brush", "Color", "Point", "mix", "shade"]

Color = tuple[int, int, int]
Point = tuple[float, float]


def mix(a: Color, b: Color, share: float) -> Color:
    """Mix `a` with a share of `b`."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def shade(color: Color, amount: float) -> Color:
    """Make a colour lighter (amount above 0) or darker."""
    return mix(color, (255, 255, 255), amount) if amount >= 0 else mix(color, (0, 0, 0), -amount)


@dataclass(frozen=True)
class Brush:
    """Draws in a box of an image.

    Lengths without a direction (radius, thickness, rounding of corners) are shares of the height of the box.

    Args:
        image: The canvas, twice as large as the final image.
        left: The left side of the box in pixels of the canvas.
        ground: Its lower side.
        width: Its width.
        height: Its height.
        flipped: Whether to flip everything horizontally in the box.
    """

    image: Image.Image
    left: float
    ground: float
    width: float
    height: float
    flipped: bool = False

    @cached_property
    def _canvas(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def at(self, point: Point) -> Point:
        """Convert a point from the box to pixels of the canvas."""
        x = 1 - point[0] if self.flipped else point[0]
        return self.left + x * self.width, self.ground - point[1] * self.height

    def polygon(self, points: Sequence[Point], color: Color, round_by: float = 0.0) -> None:
        """Draw a polygon."""
        self._canvas.polygon(self._outline(points, round_by), fill=color)

    def gradient(self, points: Sequence[Point], stops: Sequence[tuple[float, Color]], round_by: float = 0.0) -> None:
        """Draw a polygon with a vertical gradient. `stops` are heights and colours from bottom to top."""
        outline = self._outline(points, round_by)
        left, top = (int(min(axis)) for axis in zip(*outline, strict=True))
        right, bottom = (int(max(axis)) + 1 for axis in zip(*outline, strict=True))
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in outline], fill=255)
        heights = (self.ground - np.arange(top, bottom)) / self.height
        levels = np.array([color for _, color in stops], float)
        column = np.stack([np.interp(heights, [y for y, _ in stops], channel) for channel in levels.T], axis=1)
        fill = Image.fromarray(column[:, None, :].astype(np.uint8))  # [height,1,3]
        self.image.paste(fill.resize(mask.size, Image.Resampling.NEAREST), (left, top), mask)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color, round_by: float = 0.0) -> None:
        """Draw a rectangle."""
        (a, b), (c, d) = self.at((x0, y0)), self.at((x1, y1))
        edges = (min(a, c), min(b, d), max(a, c), max(b, d))
        radius = min(round_by * self.height, (edges[2] - edges[0]) / 2, (edges[3] - edges[1]) / 2)
        self._canvas.rounded_rectangle(edges, radius, fill=color)

    def disc(self, x: float, y: float, radius: float, color: Color, tall: float = 1.0) -> None:
        """Draw a disc, or an ellipse that is `tall` times as high as wide."""
        (cx, cy), r = self.at((x, y)), radius * self.height
        self._canvas.ellipse((cx - r, cy - r * tall, cx + r, cy + r * tall), fill=color)

    def line(self, points: Sequence[Point], color: Color, thickness: float) -> None:
        """Draw a line."""
        width = max(1, round(thickness * self.height))
        self._canvas.line([self.at(point) for point in points], fill=color, width=width, joint="curve")

    def limb(self, points: Sequence[Point], color: Color, thickness: float) -> None:
        """Draw a line with round ends."""
        self.line(points, color, thickness)
        for x, y in (points[0], points[-1]):
            self.disc(x, y, thickness / 2, color)

    def glow(self, x: float, y: float, radius: Point, color: Color, strength: float) -> None:
        """Draw light, or shadow with a dark colour, that fades out. `radius` is (share of width, share of height)."""
        (cx, cy), rx, ry = self.at((x, y)), radius[0] * self.width, radius[1] * self.height
        size = max(2, round(2 * rx)), max(2, round(2 * ry))
        mask = _spot().resize(size, Image.Resampling.BILINEAR).point([round(n * strength) for n in range(256)])
        self.image.paste(color, (round(cx - rx), round(cy - ry)), mask)

    def _outline(self, points: Sequence[Point], round_by: float) -> list[Point]:
        """The polygon in pixels, with corners rounded by parabolas that start `round_by` away from them."""
        corners = np.array([self.at(point) for point in points])
        if not round_by:
            return [(float(x), float(y)) for x, y in corners]
        reach = round_by * self.height
        back, on = np.roll(corners, 1, axis=0) - corners, np.roll(corners, -1, axis=0) - corners
        start, end = (
            corners + edge * np.minimum(0.5, reach / np.maximum(np.hypot(*edge.T), 1e-6))[:, None]
            for edge in (back, on)
        )
        t = np.linspace(0, 1, 5)[:, None, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * corners + t**2 * end  # [5,corners,2]
        return [(float(x), float(y)) for x, y in curve.transpose(1, 0, 2).reshape(-1, 2)]


@cache
def _spot() -> Image.Image:
    x, y = np.mgrid[-1:1:96j, -1:1:96j]
    return Image.fromarray((255 * (1 - x**2 - y**2).clip(0) ** 2).astype(np.uint8))
