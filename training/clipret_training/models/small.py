"""clipret-small: a CLIP model for training from scratch on a CPU, in minutes, with thousands of images.

The image tower is a small residual network (He et al., Deep Residual Learning, 2015) that ends in global average
pooling, so it trains on small crops and is used on larger images. The text tower is a weighted bag of tokens: with
a few thousand captions every layer more made it remember the captions instead (measured on Flickr8k).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipret.bundle import ImageSpec, TextSpec

__all__ = ["IMAGE", "MEAN", "STD", "TEXT", "SmallClip", "SmallConfig"]

# The whole image: traffic is wide and people are tall. The bars at its sides have about CLIP's mean brightness.
IMAGE = ImageSpec(size=80, resize="longest", fill=116)
TEXT = TextSpec(context_length=64, clean="lower", pad_to="longest", pad_id=0)
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, the means and deviations of photographs from the web
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SmallConfig:
    """The shape of the model. `vocab_size` is the tokenizer's; id 0 is padding."""

    vocab_size: int
    dim: int = 256
    stem: int = 4  # pixels a side that become one position of the first stage
    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (2, 1, 1)
    dropout: float = 0.2  # of the pooled features and of whole tokens


class SmallClip(nn.Module):
    """Two towers into one space; the interface of open_clip's models."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.visual = _ImageTower(config)
        self.text = _TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """float32 [B,3,H,W], mean and deviation taken out -> [B,D]; H and W are free."""
        rows: Tensor = self.visual(image)
        return F.normalize(rows, dim=-1) if normalize else rows

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """int64 [B,L] -> [B,D]; padding changes nothing."""
        rows: Tensor = self.text(text)
        return F.normalize(rows, dim=-1) if normalize else rows


class _Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; the last normalisation starts at zero, so the block starts as one."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
                nn.Conv2d(width_in, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class _ImageTower(nn.Module):
    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        width = config.widths[0]
        # Patches first: at full resolution, normalisation and ReLU would cost more than all convolutions.
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, config.stem, config.stem, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        for stage, (new, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            for number in range(depth):
                blocks.append(_Block(width, new, stride=2 if stage > 0 and number == 0 else 1))
                width = new
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(width, config.dim, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.stem(image))  # [B,3,H,W] -> [B,W,H/16,W/16]
        rows: Tensor = self.projection(self.dropout(x.mean(dim=(2, 3))))
        return rows


class _TextTower(nn.Module):
    """The tokens' embeddings, averaged with learned weights that make "red" count and "a" not."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.weight = nn.Embedding(config.vocab_size, 1)
        nn.init.zeros_(self.weight.weight)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        absent = text == TEXT.pad_id  # [B,L]
        if self.training:
            dropped = absent | (torch.rand(text.shape, device=text.device) < self.dropout.p)
            absent = torch.where(dropped.all(dim=1, keepdim=True), absent, dropped)  # never a whole text
        share = self.weight(text).squeeze(-1).masked_fill(absent, -1e4).softmax(dim=1)  # [B,L]
        mixed = (share[:, None] @ self.embedding(text)).squeeze(1)  # [B,D]
        rows: Tensor = self.projection(self.dropout(self.norm(mixed)))
        return rows
