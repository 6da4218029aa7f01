"""The module and the published sizes of Chinese-CLIP (Yang et al., 2022, https://arxiv.org/abs/2211.01335).

`chinese_clip` reads its files.
"""

import math
import re
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

__all__ = ["FAMILY", "SIZES", "ChineseClip", "describe_weights", "published", "size_name"]

FAMILY = "chinese-clip"  # the value of `LoadedModel.config["family"]`

# From cn_clip/clip/model_configs of OFA-Sys/Chinese-CLIP: embed_dim; image size, patch size, width and layers of the
# vision tower; width and layers of the text tower
SIZES: dict[str, tuple[int, int, int | None, int, int | list[int], int, int]] = {
    "chinese-clip-rn50": (1024, 224, None, 64, [3, 4, 6, 3], 768, 3),
    "chinese-clip-vit-b-16": (512, 224, 16, 768, 12, 768, 12),
    "chinese-clip-vit-l-14": (768, 224, 14, 1024, 24, 768, 12),
    "chinese-clip-vit-l-14-336": (768, 336, 14, 1024, 24, 768, 12),
    "chinese-clip-vit-h-14": (1024, 224, 14, 1280, 32, 1024, 24),
}


class ChineseClip(nn.Module):
    """A Chinese-CLIP model with the interface of `LoadedModel.model`.

    Args:
        config: The architecture, as `describe_weights` or `published` returns it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vision, text, dim = config["vision"], config["text"], config["embed_dim"]
        if isinstance(vision["layers"], list):
            self.visual: nn.Module = ModifiedResNet(
                vision["layers"], dim, vision["heads"], vision["image_size"], vision["width"]
            )
        else:
            self.visual = VisionTransformer(**vision, output_dim=dim, act_layer=QuickGELU)
        self.bert = BertModel(BertConfig(**text), add_pooling_layer=False)
        self.text_projection = nn.Parameter(torch.randn(text["hidden_size"], dim) * text["hidden_size"] ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Encode images.

        Args:
            image: float32 [B,3,S,S], normalized with the model's mean and standard deviation.
            normalize: Scale the embeddings to unit length.

        Returns:
            Embeddings float32 [B,D].
        """
        x: Tensor = self.visual(image)
        return nn.functional.normalize(x, dim=-1) if normalize else x

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode texts.

        Args:
            text: Token ids int64 [B,L]; 0 is padding.
            normalize: Scale the embeddings to unit length.

        Returns:
            Embeddings float32 [B,D].
        """
        # Our own mask: that of transformers differs between versions, and not every version can be exported.
        pads = (text == 0)[:, None, None]  # [B,1,1,L]
        mask = torch.zeros_like(pads, dtype=torch.float32).masked_fill(pads, float("-inf"))
        x = self.bert.embeddings(input_ids=text)  # [B,L,W]
        x = self.bert.encoder(x, attention_mask=mask).last_hidden_state[:, 0] @ self.text_projection
        return nn.functional.normalize(x, dim=-1) if normalize else x


def describe_weights(state: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """Derive the architecture from the shapes of the weights.

    Args:
        state: The state dict in the layout of OFA-Sys.
        settings: The config.json of Hugging Face, or {}. Only the number of heads comes from it, because no shape shows
            it.

    Returns:
        The `config` of `ChineseClip`.

    Raises:
        ValueError: `settings` has an activation or epsilon that is not supported.
        KeyError: A weight is missing.
    """
    vision_settings, text_settings = settings.get("vision_config", {}), settings.get("text_config", {})
    for part, key, value in (
        (vision_settings, "hidden_act", "quick_gelu"),
        (vision_settings, "layer_norm_eps", 1e-5),
        (text_settings, "hidden_act", "gelu"),
    ):
        if part.get(key, value) != value:
            raise ValueError(f"it has {key} {part[key]!r}: only {value!r} is supported")
    table = state["bert.embeddings.word_embeddings.weight"]
    hidden = table.shape[1]
    text = {
        "vocab_size": table.shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": _count(state, r"bert\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": text_settings.get("num_attention_heads", hidden // 64),
        "intermediate_size": state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state["bert.embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": state["bert.embeddings.token_type_embeddings.weight"].shape[0],
        "layer_norm_eps": text_settings.get("layer_norm_eps", 1e-12),
    }
    if "visual.attnpool.positional_embedding" in state:
        width = state["visual.layer1.0.conv1.weight"].shape[0]
        vision: dict[str, Any] = {
            "image_size": 32 * math.isqrt(state["visual.attnpool.positional_embedding"].shape[0] - 1),
            "width": width,
            "layers": [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
            "heads": width * 32 // 64,
        }
    else:
        width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
        vision = {
            "image_size": patch * math.isqrt(state["visual.positional_embedding"].shape[0] - 1),
            "patch_size": patch,
            "width": width,
            "layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            "heads": vision_settings.get("num_attention_heads", _heads(width)),
            "mlp_ratio": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        }
    return {"family": FAMILY, "embed_dim": state["text_projection"].shape[1], "vision": vision, "text": text}


def published(name: str) -> dict[str, Any]:
    """The architecture of a published size.

    Args:
        name: One of `SIZES`.

    Returns:
        The `config` of `ChineseClip`.
    """
    dim, size, patch, width, layers, hidden, text_layers = SIZES[name]
    vision: dict[str, Any] = {"image_size": size, "width": width, "layers": layers, "heads": width * 32 // 64}
    if patch is not None:
        vision |= {"patch_size": patch, "heads": _heads(width), "mlp_ratio": 4.0}
    text = {
        "vocab_size": 21128,
        "hidden_size": hidden,
        "num_hidden_layers": text_layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    return {"family": FAMILY, "embed_dim": dim, "vision": vision, "text": text}


def _heads(width: int) -> int:
    """The number of heads: OFA-Sys's heads have width 64, or 80 in the vision tower of ViT-H-14."""
    return width // (80 if width == 1280 else 64)


def _count(state: dict[str, Tensor], pattern: str) -> int:
    numbers = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    if not numbers:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    return 1 + max(numbers)


def size_name(config: dict[str, Any]) -> str:
    """Name an architecture.

    Args:
        config: The `config` of `ChineseClip`.

    Returns:
        A name such as "Chinese-CLIP ViT-B-16".
    """
    vision = config["vision"]
    if isinstance(vision["layers"], list):
        return f"Chinese-CLIP RN{3 * sum(vision['layers']) + 2}"
    size = {768: "B", 1024: "L", 1280: "H"}.get(vision["width"], str(vision["width"]))
    larger = "" if vision["image_size"] == 224 else f"-{vision['image_size']}"
    return f"Chinese-CLIP ViT-{size}-{vision['patch_size']}{larger}"
