"""Drawn traffic scenes: training data to try everything without a download."""

from clipret_training.choices import Style
from clipret_training.synthetic.draw import draw
from clipret_training.synthetic.scene import Scene
from clipret_training.synthetic.words import captions
from clipret_training.synthetic.write import write_set

__all__ = ["Scene", "Style", "captions", "draw", "write_set"]
