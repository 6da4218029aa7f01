"""Drawing in a box of one's own: coordinates from 0 to 1, y upwards, on a canvas of twice the final size."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageDraw

__all__ = ["Brush", "Color", "Point", "mix", "shade"]

Color = tuple[int, int, int]
Point = tuple[float, float]


def mix(a: Color, b: Color, share: float) -> Color:
    """`a` with `share` of `b` in it."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def shade(color: Color, amount: float) -> Color:
    """Lighter for amount > 0, darker below."""
    return mix(color, (255, 255, 255), amount) if amount >= 0 else mix(color, (0, 0, 0), -amount)


@dataclass(frozen=True)
class Brush:
    """Draws in the box that stands with its lower left corner on (left, ground), in pixels of the canvas."""

    canvas: ImageDraw.ImageDraw
    left: float
    ground: float
    width: float
    height: float
    mirrored: bool = False

    def at(self, point: Point) -> Point:
        x = 1 - point[0] if self.mirrored else point[0]
        return self.left + x * self.width, self.ground - point[1] * self.height

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        self.canvas.polygon([self.at(point) for point in points], fill=color)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color, round_by: float = 0.0) -> None:
        """A rectangle; `round_by` is the corners' radius as a share of the box's height."""
        (a, b), (c, d) = self.at((x0, y0)), self.at((x1, y1))
        edges = (min(a, c), min(b, d), max(a, c), max(b, d))
        radius = min(round_by * self.height, (edges[2] - edges[0]) / 2, (edges[3] - edges[1]) / 2)
        self.canvas.rounded_rectangle(edges, radius, fill=color)

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        """`radius` as a share of the box's height."""
        (cx, cy), r = self.at((x, y)), radius * self.height
        self.canvas.ellipse((cx - r, cy - r, cx + r, cy + r), fill=color)

    def line(self, points: Sequence[Point], color: Color, thickness: float) -> None:
        """`thickness` as a share of the box's height."""
        width = max(1, round(thickness * self.height))
        self.canvas.line([self.at(point) for point in points], fill=color, width=width, joint="curve")
