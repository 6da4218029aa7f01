"""Chinese-CLIP (Yang et al., 2022, https://arxiv.org/abs/2211.01335) from both layouts that its weights come in.

OFA-Sys publishes checkpoints named clip_cn_*.pt and folders of Hugging Face's ChineseCLIPModel. Both become one state
dict, that of the former: a vision transformer or ResNet as in OpenAI's CLIP, a BERT, a projection of its first token.
"""

import contextlib
import importlib.util
import json
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from clipret.bundle import ImageSpec, TextSpec
from clipret.errors import ClipretError
from clipret.training.loaded import LoadedModel, weights_sha256
from clipret.training.tokenizer import wordpiece_tokenizer_json

__all__ = ["FAMILY", "ChineseClip", "hub_folder", "is_checkpoint", "is_folder", "load_chinese_clip", "rebuild"]

FAMILY = "chinese-clip"  # what `LoadedModel.config["family"]` says
_CONTEXT = 52  # tokens of a text, as all published models were trained
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HUB = "OFA-Sys/chinese-clip-vit-base-patch16"  # one vocabulary serves all sizes
_FILES = ["config.json", "preprocessor_config.json", "vocab.txt", "*.safetensors", "*.safetensors.index.json", "*.bin"]

_HF_NAMES = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.weight$", "visual.conv1.weight"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.",
        r"visual.transformer.resblocks.\1.attn.out_proj.",
    ),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"visual.transformer.resblocks.\1.mlp.c_fc."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"visual.transformer.resblocks.\1.mlp.c_proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"visual.transformer.resblocks.\1.ln_\2."),
    (r"^text_model\.", "bert."),
)
_NO_WEIGHT = re.compile(r"position_ids$|token_type_ids$|bert\.pooler\.|num_batches_tracked$")


class ChineseClip(nn.Module):
    """encode_image(float32 [B,3,S,S]) and encode_text(int64 [B,L]) -> float32 [B,D]; see `LoadedModel`.

    `config`: a dictionary as `_describe` makes it.
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
        x: Tensor = self.visual(image)
        return nn.functional.normalize(x, dim=-1) if normalize else x

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        # The mask by hand: that of transformers differs from version to version and not each can be exported.
        pads = (text == 0)[:, None, None]  # [B,1,1,L]
        mask = torch.zeros_like(pads, dtype=torch.float32).masked_fill(pads, float("-inf"))
        x = self.bert.embeddings(input_ids=text)  # [B,L,W]
        x = self.bert.encoder(x, attention_mask=mask).last_hidden_state[:, 0] @ self.text_projection
        return nn.functional.normalize(x, dim=-1) if normalize else x


def is_folder(path: Path) -> bool:
    """Whether a folder holds a ChineseCLIPModel of Hugging Face."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "chinese_clip"


def is_checkpoint(path: Path) -> bool:
    """Whether a file holds a state dict in OFA-Sys's layout. Raises ClipretError when it cannot be read at all."""
    return path.is_file() and any(
        "bert.embeddings.word_embeddings" in name for name in _state_dict(path, keys_only=True)
    )


def hub_folder(repo: str) -> Path | None:
    """The files of a ChineseCLIPModel of the Hugging Face hub on this disk; None when `repo` is something else."""
    try:
        if not is_folder(Path(hf_hub_download(repo, "config.json")).parent):
            return None
        return Path(snapshot_download(repo, allow_patterns=_FILES))
    except Exception:  # no such file or repository, no network: whoever asks tries another way and tells
        return None


def load_chinese_clip(path: Path, source: str) -> LoadedModel:
    """A Chinese-CLIP model from a ChineseCLIPModel folder or a checkpoint in OFA-Sys's layout (clip_cn_*.pt).

    The vocabulary is vocab.txt beside the weights or, for a checkpoint, that of an installed cn_clip, or the hub's.
    Raises ClipretError for files that are missing, broken, hold code or do not fit each other.
    """
    with _readable(source):
        if path.is_dir():
            settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
            state = _from_hugging_face(_folder_weights(path))
            config = _describe(state, settings)
            image, mean, std = _preprocessing(path, config["vision"]["image_size"])
        else:
            state = _plain(_state_dict(path))
            config = _describe(state, {})
            image, mean, std = ImageSpec(config["vision"]["image_size"], "squash", "bicubic"), _MEAN, _STD
        vocabulary = _vocabulary(path if path.is_dir() else path.parent)
        if len(vocabulary) != config["text"]["vocab_size"]:
            raise ValueError(
                f"its vocabulary has {len(vocabulary)} entries and its table {config['text']['vocab_size']}: "
                "put the model's own vocab.txt beside it"
            )
        model = _build(config, state)
    return LoadedModel(
        model=model,
        name=_name(config),
        config=config,
        image=image,
        mean=mean,
        std=std,
        text=TextSpec(_CONTEXT, clean="none", pad_to="longest"),
        tokenizer_json=wordpiece_tokenizer_json(vocabulary),
        source=source,
        source_sha256=weights_sha256(model),  # not the file's: the same weights have one hash in both layouts
    )


def rebuild(config: dict[str, Any], weights: Path) -> ChineseClip:
    """The module of a `LoadedModel.config` with the weights of a run."""
    return _build(config, load_file(weights))


def _build(config: dict[str, Any], state: dict[str, Tensor]) -> ChineseClip:
    with torch.device("meta"):  # a ViT-H-14 is drawn for nothing otherwise
        model = ChineseClip(config)
    found, expected = set(state), {name for name in model.state_dict() if not _NO_WEIGHT.search(name)}
    if wrong := sorted(found - expected) + sorted(expected - found):
        raise ValueError(f"{len(wrong)} weights are left over or missing, the first is {wrong[0]}")
    model.load_state_dict(state, strict=False, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # counts and positions, which no checkpoint needs to hold
            parent, _, leaf = name.rpartition(".")
            made = torch.arange(buffer.shape[-1])[None] if leaf == "position_ids" else torch.zeros(buffer.shape).long()
            model.get_submodule(parent)._buffers[leaf] = made
    return model.eval().requires_grad_(True)


def _state_dict(path: Path, keys_only: bool = False) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        if keys_only:
            with _readable(str(path)), safe_open(path, "pt") as file:
                return dict.fromkeys(file.keys())
        return load_file(path)
    with _readable(str(path)):
        # Mapped, so that asking for the names does not read gigabytes; old files cannot be.
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            stored = torch.load(path, map_location="cpu", weights_only=True)
    inner = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without DataParallel's prefix, in float32, without what is no weight."""
    named = {name.removeprefix("module."): value for name, value in state.items()}
    return {name: value.float().contiguous() for name, value in named.items() if not _NO_WEIGHT.search(name)}


def _folder_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return {name: value for file in names for name, value in load_file(folder / file).items()}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _state_dict(folder / name)
    raise ValueError("it has no weights: expected model.safetensors or pytorch_model.bin in it")


def _from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OFA-Sys's names and shapes: projections transposed, queries, keys and values in one matrix."""
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            made[{"v": "visual.proj", "t": "text_projection"}[name[0]]] = value.t()
        elif packed := re.match(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            made[f"visual.transformer.resblocks.{packed[1]}.attn.in_proj_{packed[2]}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj\.", name):
            for pattern, new in _HF_NAMES:
                name = re.sub(pattern, new, name)
            made[name] = value
    return _plain(made)


def _describe(state: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """What rebuilds the model, from the shapes of its weights; `settings` are Hugging Face's config.json, if any.

    Only the number of heads is in no shape. OFA-Sys's heads are 64 wide but in the vision tower of ViT-H-14, 80.
    """
    vision_settings, text_settings = settings.get("vision_config", {}), settings.get("text_config", {})
    for part, key, value in (
        (vision_settings, "hidden_act", "quick_gelu"),
        (vision_settings, "layer_norm_eps", 1e-5),
        (text_settings, "hidden_act", "gelu"),
    ):
        if part.get(key, value) != value:
            raise ValueError(f"it has {key} {part[key]!r}: supported is {value!r}")
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
            "heads": vision_settings.get("num_attention_heads", width // (80 if width == 1280 else 64)),
            "mlp_ratio": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        }
    return {"family": FAMILY, "embed_dim": state["text_projection"].shape[1], "vision": vision, "text": text}


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))


def _name(config: dict[str, Any]) -> str:
    vision = config["vision"]
    if isinstance(vision["layers"], list):
        return f"Chinese-CLIP RN{3 * sum(vision['layers']) + 2}"
    size = {768: "B", 1024: "L", 1280: "H"}.get(vision["width"], str(vision["width"]))
    larger = "" if vision["image_size"] == 224 else f"-{vision['image_size']}"
    return f"Chinese-CLIP ViT-{size}-{vision['patch_size']}{larger}"


def _preprocessing(folder: Path, image_size: int) -> tuple[ImageSpec, Any, Any]:
    """Of preprocessor_config.json, or what all published models have where there is none."""
    file = folder / "preprocessor_config.json"
    value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    size = value.get("size", image_size)
    height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
    if height != width or height != image_size or value.get("do_center_crop"):
        raise ValueError(f"its preprocessing wants size {size} (crop: {value.get('do_center_crop')}), not {image_size}")
    filters = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
    resample = value.get("resample", 3)
    if resample not in filters:
        raise ValueError(f"its preprocessing wants resample {resample}: supported are {filters}")
    spec = ImageSpec(image_size, "squash", filters[resample])  # type: ignore[arg-type]
    return spec, tuple(value.get("image_mean", _MEAN)), tuple(value.get("image_std", _STD))


def _vocabulary(folder: Path) -> list[str]:
    file = folder / "vocab.txt"
    if not file.is_file():
        package = importlib.util.find_spec("cn_clip")
        for place in package.submodule_search_locations or [] if package is not None else []:
            file = Path(place) / "clip" / "vocab.txt"
    if not file.is_file():
        try:
            file = Path(hf_hub_download(_HUB, "vocab.txt"))
        except Exception:  # the hub's errors have no common base
            raise ValueError(
                f"there is no vocab.txt in {folder} and none to be had from {_HUB}: put Chinese RoBERTa's, 21,128 "
                "lines, beside the weights"
            ) from None
    return [line.strip() for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]


@contextlib.contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except ClipretError:
        raise
    except pickle.UnpicklingError:
        raise ClipretError(
            f"{source} holds more than weights and could run code when it is loaded: save its state dict alone"
        ) from None
    except KeyError as error:
        raise ClipretError(f"Chinese-CLIP model {source} cannot be loaded: it lacks {error}") from None
    except Exception as error:  # torch's, safetensors' and the hub's errors have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        raise ClipretError(f"Chinese-CLIP model {source} cannot be loaded: {text[:300]}") from None
