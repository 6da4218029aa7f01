"""clipret-small: a CLIP model that trains from scratch on a CPU in minutes, on thousands of images.

The image tower is a small residual network (He et al., Deep Residual Learning, 2015) with global average pooling, so it
can train on small crops and encode larger images. The text tower is a weighted bag of tokens: with a few thousand
captions, every additional layer made it memorize them (measured on Flickr8k).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipret.bundle import ImageSpec, TextSpec

__all__ = ["IMAGE", "MEAN", "STD", "TEXT", "SmallClip", "SmallConfig"]

# The whole image, because traffic scenes are wide and people are tall. The padding has about CLIP's mean brightness.
IMAGE = ImageSpec(size=80, resize="longest", fill=116)
TEXT = TextSpec(context_length=64, clean="lower", pad_to="longest", pad_id=0)
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP: mean and standard deviation of photographs from the web
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SmallConfig:
    """The architecture of clipret-small.

    Attributes:
        vocab_size: Size of the tokenizer's vocabulary; id 0 is padding.
        dim: D of the embeddings.
        stem: Side in pixels of the patches that become the positions of the first stage.
        widths: Channels of each stage.
        depths: Blocks of each stage.
        dropout: Share of the pooled features, and of whole tokens, that training drops.
    """

    vocab_size: int
    dim: int = 256
    stem: int = 4
    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (2, 1, 1)
    dropout: float = 0.2


class SmallClip(nn.Module):
    """The two towers, with the interface of `LoadedModel.model`.

    Args:
        config: The architecture.
    """

    def __init__(self, config: SmallConfig) -> None:
        super().__init__()
        self.visual = _ImageTower(config)
        self.text = _TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the initial value of CLIP

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Encode images.

        Args:
            image: float32 [B,3,H,W] of any size, normalized with `MEAN` and `STD`.
            normalize: Scale the embeddings to unit length.

        Returns:
            Embeddings float32 [B,D].
        """
        embeddings: Tensor = self.visual(image)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode texts.

        Args:
            text: Token ids int64 [B,L]. Padding does not change the embeddings.
            normalize: Scale the embeddings to unit length.

        Returns:
            Embeddings float32 [B,D].
        """
        embeddings: Tensor = self.text(text)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; the last normalization starts at zero, so the block starts as a shortcut."""

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
        # Patches first: at full resolution, normalization and ReLU would cost more than all convolutions.
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
        embeddings: Tensor = self.projection(self.dropout(x.mean(dim=(2, 3))))
        return embeddings


class _TextTower(nn.Module):
    """The mean of the token embeddings with learned weights, which are large for "red" and small for "a"."""

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
            absent = torch.where(dropped.all(dim=1, keepdim=True), absent, dropped)  # never all tokens of a text
        share = self.weight(text).squeeze(-1).masked_fill(absent, -1e4).softmax(dim=1)  # [B,L]
        mixed = (share[:, None] @ self.embedding(text)).squeeze(1)  # [B,D]
        embeddings: Tensor = self.projection(self.dropout(self.norm(mixed)))
        return embeddings
