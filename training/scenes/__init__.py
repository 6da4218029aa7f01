"""Drawn traffic scenes: data to try the whole line on, with nothing to download."""

from clipret.training.scenes.draw import draw
from clipret.training.scenes.scene import Scene, Style
from clipret.training.scenes.words import captions
from clipret.training.scenes.write import write_set

__all__ = ["Scene", "Style", "captions", "draw", "write_set"]
