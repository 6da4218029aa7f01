"""The values that a setting may have, by name; without torch, so that `--help` needs none."""

from typing import Literal

__all__ = ["Augment"]

Augment = Literal["none", "photo", "surveillance"]
