"""Makes tests/data/tiny-bundle: a model of a few hundred bytes that knows nine colours.

The runtime's tests run where neither torch nor onnx is installed, so their bundle is kept in the repository. Its towers
are written down rather than trained: an image's row is made of its mean colour, a text's of the colours it
names, so "red" finds red images and every test can say what must come first. Run it again (in a venv with the
export extra) when the bundle format changes:  python tests/make_tiny_bundle.py
"""

from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipret.bundle import FORMAT, ImageSpec, Manifest, TextSpec, file_entry
from clipret.files import new_folder, write_file
from clipret_export.graph import write_onnx

OUT = Path(__file__).parent / "data" / "tiny-bundle"
SIZE, CONTEXT, DIM = 16, 8, 8
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "红色": (255, 0, 0),
}


def features(colour: Tensor) -> Tensor:
    """[...,3] in 0..1 -> [...,8]: a map under which the nine colours point in clearly different directions."""
    r, g, b = (2 * colour - 1).unbind(-1)
    light = (r + g + b) / 3
    return torch.stack([r, g, b, r - g, g - b, b - r, light * 2, 1 - light.abs()], dim=-1)


class Image(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        mean = pixels.to(torch.float32).mean(dim=(1, 2)) / 255  # [B,S,S,3] -> [B,3]
        return F.normalize(features(mean), dim=-1)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Padding and unknown words add nothing; a little of everything keeps an unknown text's row defined.
        named = features(torch.tensor(list(COLOURS.values())) / 255)
        self.register_buffer("table", torch.cat([torch.zeros(1, DIM), torch.full((1, DIM), 0.01), named]))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(F.embedding(tokens, self.table).sum(dim=1), dim=-1)  # [B,L] -> [B,D]


def main() -> None:
    words = {"[PAD]": 0, "[UNK]": 1} | {word: number for number, word in enumerate(COLOURS, 2)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with new_folder(OUT, overwrite=True) as folder:
        pixels = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
        write_onnx(Image(), pixels, folder / "image.onnx", input_name="pixels", dynamic={0: "batch"})
        tokens = torch.ones(2, CONTEXT, dtype=torch.int64)
        write_onnx(Text(), tokens, folder / "text.onnx", input_name="tokens", dynamic={0: "batch", 1: "length"})
        write_file(folder / "tokenizer.json", tokenizer.to_str())
        manifest = Manifest(
            format=FORMAT,
            model="nine-colours",
            source="tests/make_tiny_bundle.py",
            source_sha256=file_entry(Path(__file__)).sha256,
            precision="fp32",
            embedding_dim=DIM,
            logit_scale=10.0,
            image=ImageSpec(SIZE),
            text=TextSpec(CONTEXT, clean="lower"),
            files={file.name: file_entry(file) for file in sorted(folder.iterdir())},
        )
        write_file(folder / "bundle.json", manifest.to_json())


if __name__ == "__main__":
    main()
