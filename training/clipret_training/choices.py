"""The named values of settings. Imports no torch, so that `--help` does not need it."""

from typing import Literal, get_args

__all__ = [
    "TOWERS",
    "Adapter",
    "Augment",
    "Language",
    "LossKind",
    "Optimizer",
    "Precision",
    "Schedule",
    "SoupMethod",
    "Style",
    "Tower",
]

Adapter = Literal["none", "lora", "dora"]
Augment = Literal["none", "photo", "surveillance"]
Language = Literal["en", "zh"]  # of drawn captions
LossKind = Literal["infonce", "siglip", "soft"]
Optimizer = Literal["adamw", "muon"]
Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "constant"]
SoupMethod = Literal["uniform", "greedy", "wise"]
Style = Literal["web", "surveillance"]  # of drawn scenes
Tower = Literal["image", "text"]

TOWERS: tuple[Tower, ...] = get_args(Tower)
