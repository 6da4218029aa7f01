"""Augmentation of whole batches on tensors: a few matrix products instead of a Python call for every picture."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["AUGMENTS", "Augment", "Augmenter"]

Augment = Literal["none", "photo", "surveillance"]
AUGMENTS: tuple[Augment, ...] = get_args(Augment)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Augmenter:
    """Turns uint8 [B,S,S,3] into float32 [B,3,size,size] with values in 0..1.

    `none` only resizes. `photo` crops (`area`: the least share of the picture that is kept), mirrors, and varies
    brightness, contrast and saturation by up to `jitter`. Hue stays: colours are what people search for.
    `surveillance` adds what cameras on poles add: darkness, defocus, low resolution, sensor noise.
    """

    kind: Augment
    size: int
    area: float
    jitter: float

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """`generator` is a CPU generator and the only source of randomness."""
        B, S = pixels.shape[:2]
        x = pixels.float().div_(255)  # [B,S,S,3]
        if self.kind == "none":
            if self.size == S:
                return x.permute(0, 3, 1, 2)
            start, length = torch.zeros(B), torch.full((B,), float(S))
            return self._resize(x, start, start, length, length, mirror=torch.zeros(B, dtype=torch.bool))
        x = self._crop(x, generator)  # [B,3,size,size]
        x = _vary_colours(x, self.jitter, generator)
        if self.kind == "surveillance":
            x = _degrade(x, generator)
        return x.clamp_(0, 1)

    def _crop(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random crop of a random aspect ratio between 3:4 and 4:3, mirrored half of the time, resized."""
        B, S = x.shape[:2]
        area = _uniform(B, self.area, 1, generator)
        aspect = torch.exp(_uniform(B, -math.log(4 / 3), math.log(4 / 3), generator))
        width, height = (area * aspect).sqrt().clamp(max=1) * S, (area / aspect).sqrt().clamp(max=1) * S
        left, top = (S - width) * _uniform(B, 0, 1, generator), (S - height) * _uniform(B, 0, 1, generator)
        mirror = _uniform(B, 0, 1, generator) < 0.5
        return self._resize(x, left, top, width, height, mirror)

    def _resize(self, x: Tensor, left: Tensor, top: Tensor, width: Tensor, height: Tensor, mirror: Tensor) -> Tensor:
        """Crop, mirror and resize with antialiasing as two matrix products, one for each axis."""
        B, S = x.shape[:2]
        rows = _interpolation(top, height, S, self.size, torch.zeros_like(mirror)).to(x.device)  # [B,size,S]
        columns = _interpolation(left, width, S, self.size, mirror).to(x.device)
        x = torch.bmm(rows, x.reshape(B, S, S * 3)).reshape(B, self.size, S, 3)
        x = x.permute(0, 2, 1, 3).reshape(B, S, self.size * 3)
        x = torch.bmm(columns, x).reshape(B, self.size, self.size, 3)  # [B,columns,rows,3]
        return x.permute(0, 3, 2, 1)


def _interpolation(start: Tensor, length: Tensor, S: int, size: int, mirror: Tensor) -> Tensor:
    """Triangle-filter weights [B,size,S] that map S pixels to `size` samples of [start, start + length)."""
    centres = start[:, None] + (torch.arange(size) + 0.5) / size * length[:, None]  # [B,size]
    centres = torch.where(mirror[:, None], centres.flip(1), centres)
    radius = (length / size).clamp(min=1)[:, None, None]  # wider than a pixel when it shrinks: antialiasing
    weights = (1 - ((torch.arange(S) + 0.5) - centres[..., None]).abs() / radius).clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


def _vary_colours(x: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    B = len(x)
    brightness, contrast, saturation = (
        _uniform(B, 1 - jitter, 1 + jitter, generator).to(x.device)[:, None, None, None] for _ in range(3)
    )
    grey = _grey(x)
    x = grey + (x - grey) * saturation
    mean = grey.mean(dim=(2, 3), keepdim=True)
    return ((x - mean) * contrast + mean) * brightness


def _degrade(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures get darker, half lose resolution, half get noise, each independently."""
    B, _, size, _ = x.shape

    def half() -> Tensor:
        return (_uniform(B, 0, 1, generator) < 0.5).to(x.device)[:, None, None, None]

    # Losing resolution: shrink to a share of the size and grow again, the same share for the whole batch.
    small = max(8, int(size * float(_uniform(1, 0.3, 0.8, generator))))
    blurred = torch.nn.functional.interpolate(x, size=(small, small), mode="bilinear", antialias=True)
    blurred = torch.nn.functional.interpolate(blurred, size=(size, size), mode="bilinear")
    x = torch.where(half(), blurred, x)

    dark = _uniform(B, 0.25, 0.9, generator).to(x.device)[:, None, None, None]
    x = torch.where(half(), x.clamp(min=0) ** (1 / dark.sqrt()) * dark, x)

    strength = _uniform(B, 0.01, 0.08, generator).to(x.device)[:, None, None, None]
    noise = torch.randn(x.shape, generator=generator).to(x.device) * strength
    return torch.where(half(), x + noise, x)


def _grey(x: Tensor) -> Tensor:
    """Luma [B,1,H,W] of RGB [B,3,H,W]."""
    return (x * x.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def _uniform(B: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(B, generator=generator)
