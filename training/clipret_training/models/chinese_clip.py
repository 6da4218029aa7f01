"""Chinese-CLIP (Yang et al., 2022, https://arxiv.org/abs/2211.01335) from both layouts that its weights come in.

OFA-Sys publishes checkpoints named clip_cn_*.pt and folders of Hugging Face's ChineseCLIPModel. Both become one state
dict, that of the former: a vision transformer or ResNet as in OpenAI's CLIP, a BERT, a projection of its first token.
"""

import contextlib
import difflib
import importlib.util
import json
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from clipret.bundle import ImageSpec, TextSpec
from clipret.errors import ClipretError
from clipret_training.models.chinese_clip_model import (
    FAMILY,
    SIZES,
    ChineseClip,
    describe_weights,
    published,
    size_name,
)
from clipret_training.models.loaded import LoadedModel, weights_sha256
from clipret_training.models.openclip import CONFIG
from clipret_training.models.tokenizer import wordpiece_tokenizer_json

__all__ = [
    "FAMILY",
    "ChineseClip",
    "hub_folder",
    "is_checkpoint",
    "is_folder",
    "load_chinese_clip",
    "model_type",
    "new_chinese_clip",
    "rebuild",
]

_CONTEXT = 52  # tokens of a text, as all published models were trained
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HUB = "OFA-Sys/chinese-clip-vit-base-patch16"  # one vocabulary serves all sizes
_FILES = ["config.json", "preprocessor_config.json", "vocab.txt"]
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # Hugging Face's names, the better format first

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


def model_type(path: Path) -> str | None:
    """What a folder's config.json, Hugging Face's, says that it holds; None where there is no such file."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def is_folder(path: Path) -> bool:
    """Whether a folder holds a ChineseCLIPModel of Hugging Face."""
    return model_type(path) == "chinese_clip"


def is_checkpoint(path: Path) -> bool:
    """Whether a file holds a Chinese-CLIP's state dict, in either layout. Raises ClipretError for a broken file."""
    if not path.is_file():
        return False
    names = {str(name).removeprefix("module.") for name in _state_dict(path, keys_only=True)}
    return any(f"{tower}.embeddings.word_embeddings.weight" in names for tower in ("bert", "text_model"))


def hub_folder(repo: str) -> Path | None:
    """The files of a ChineseCLIPModel of the Hugging Face hub on this disk; None when `repo` is something else.

    Raises ClipretError when it is one and cannot be downloaded.
    """
    try:
        with _quiet():
            folder = Path(snapshot_download(repo, allow_patterns=["config.json", CONFIG]))
    except Exception:  # no such repository, no network: whoever asks tries open_clip's way and tells
        return None
    if (folder / CONFIG).is_file() or not is_folder(folder):
        return None
    with _readable(f"hf-hub:{repo}"):
        for name in _WEIGHTS:  # many a repository has the weights in both formats: one is enough
            kind = "*" + Path(name).suffix
            snapshot_download(repo, allow_patterns=[*_FILES, kind, f"{kind}.index.json"])
            if any(folder.glob(kind)):
                break
    return folder


def load_chinese_clip(path: Path, source: str) -> LoadedModel:
    """A Chinese-CLIP model from a ChineseCLIPModel folder or a lone file of weights in either layout (clip_cn_*.pt).

    The vocabulary is vocab.txt next to the weights, else that of an installed cn_clip, else the hub's.
    Raises ClipretError for files that are missing, broken, hold code or do not fit each other.
    """
    folder = path if path.is_dir() else path.parent
    with _readable(source):
        state = _folder_weights(path) if path.is_dir() else _state_dict(path)
        state = {name.removeprefix("module."): state.pop(name) for name in list(state)}
        settings: dict[str, Any] = {}
        if "text_model.embeddings.word_embeddings.weight" in state:
            state = _from_hugging_face(state)
            if is_folder(folder):
                settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state = _plain(state)
        config = describe_weights(state, settings)
        image, mean, std = _preprocessing(folder if settings else None, config["vision"]["image_size"])
        vocabulary = _vocabulary(folder, config["text"]["vocab_size"])
        model = _build(config, state)
    return _loaded(model, config, (image, mean, std), vocabulary, source)


def new_chinese_clip(name: str, weights: str | None, *, seed: int) -> LoadedModel:
    """A published size by its name, chinese-clip-vit-b-16 and the like, with the weights of a file or random ones.

    Raises ClipretError for an unknown name, weights of another size, and, for random ones, no vocabulary to be had.
    """
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=3, cutoff=0)
        raise ClipretError(f"model {name!r} is unknown: did you mean {', '.join(near)}?")
    config, source = published(name), name if weights is None else f"{name}:{weights}"
    if weights is not None:
        if not Path(weights).is_file():
            raise ClipretError(f"checkpoint {weights} does not exist: check the path")
        if not is_checkpoint(Path(weights)):
            raise ClipretError(f"{weights} holds no Chinese-CLIP: name a clip_cn_*.pt or its like")
        loaded = load_chinese_clip(Path(weights), source)
        if loaded.config != config:
            raise ClipretError(f"{weights} is a {loaded.name}, not {name} as published: name the file alone")
        return loaded
    with _readable(source), torch.random.fork_rng(devices=[]):
        vocabulary = _vocabulary(None, config["text"]["vocab_size"])
        torch.manual_seed(seed)
        model = ChineseClip(config).eval()
    return _loaded(model, config, _preprocessing(None, config["vision"]["image_size"]), vocabulary, source)


def _loaded(
    model: ChineseClip, config: dict[str, Any], images: "_Images", vocabulary: list[str], source: str
) -> LoadedModel:
    image, mean, std = images
    return LoadedModel(
        model=model,
        name=size_name(config),
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
    return _build(config, _plain(load_file(weights)))


def _build(config: dict[str, Any], state: dict[str, Tensor]) -> ChineseClip:
    with torch.device("meta"):  # a ViT-H-14 is drawn for nothing otherwise
        model = ChineseClip(config)
    found, expected = set(state), {name for name in model.state_dict() if not _NO_WEIGHT.search(name)}
    for what, wrong in (("are missing", sorted(expected - found)), ("belong nowhere", sorted(found - expected))):
        if wrong:
            some = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
            raise ValueError(f"{len(wrong)} weights {what}: {some}; is the file whole and of this model?")
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
    """What is a weight, in float32. Empties `state`, lest a large model lie in memory twice.

    Copies even what is float32: a mapped file that is written to later would change the model.
    """
    weights = {name: state.pop(name) for name in list(state) if not _NO_WEIGHT.search(name)}
    layout = torch.contiguous_format
    return {name: weights.pop(name).to(torch.float32, copy=True, memory_format=layout) for name in list(weights)}


def _folder_weights(folder: Path) -> dict[str, Tensor]:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {name: value for file in names for name, value in _state_dict(folder / file).items()}
        if (folder / name).is_file():
            return _state_dict(folder / name)
    raise ValueError(f"it has no weights: expected {' or '.join(_WEIGHTS)} in it")


def _from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OFA-Sys's names and shapes: projections transposed, queries, keys and values in one matrix. Empties `state`."""
    made: dict[str, Tensor] = {}
    for name in list(state):
        if re.search(r"vision_model\..*self_attn\.[kv]_proj\.", name):
            continue  # taken with its query
        value = state.pop(name)
        if name in ("visual_projection.weight", "text_projection.weight"):
            made[{"v": "visual.proj", "t": "text_projection"}[name[0]]] = value.t()
        elif packed := re.match(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [value, *(state.pop(name.replace("q_proj", f"{part}_proj")) for part in "kv")]
            made[f"visual.transformer.resblocks.{packed[1]}.attn.in_proj_{packed[2]}"] = torch.cat(parts)
        else:
            for pattern, new in _HF_NAMES:
                name = re.sub(pattern, new, name)
            made[name] = value
    return made


_Images = tuple[ImageSpec, tuple[float, float, float], tuple[float, float, float]]  # with mean and std


def _preprocessing(folder: Path | None, image_size: int) -> _Images:
    """Of preprocessor_config.json, or what all published models have where there is none."""
    file = folder / "preprocessor_config.json" if folder is not None else None
    value = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    size = value.get("size", image_size)
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if off := [key for key in ("do_resize", "do_rescale", "do_normalize") if not value.get(key, True)]:
        raise ValueError(f"its preprocessing has {off[0]} switched off, which a bundle cannot say")
    if abs(value.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"its preprocessing wants rescale_factor {value['rescale_factor']}: supported is 1/255")
    if height != width or height != image_size or value.get("do_center_crop"):
        raise ValueError(f"its preprocessing wants size {size} (crop: {value.get('do_center_crop')}), not {image_size}")
    filters = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
    resample = value.get("resample", 3)
    if resample not in filters:
        raise ValueError(f"its preprocessing wants resample {resample}: supported are {filters}")
    spec = ImageSpec(image_size, "squash", filters[resample])  # type: ignore[arg-type]
    return spec, _three(value.get("image_mean", _MEAN)), _three(value.get("image_std", _STD))


def _three(values: Any) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"its preprocessing has {values} for a colour: expected three numbers")
    return tuple(map(float, values))  # type: ignore[return-value]


def _vocabulary(folder: Path | None, size: int) -> list[str]:
    """Of `folder`, of an installed cn_clip, or of the hub; a line a token."""
    file = folder / "vocab.txt" if folder is not None else Path()
    if not file.is_file():
        package = importlib.util.find_spec("cn_clip")
        for place in package.submodule_search_locations or [] if package is not None else []:
            file = Path(place) / "clip" / "vocab.txt"
    if not file.is_file():
        try:
            file = Path(hf_hub_download(_HUB, "vocab.txt"))
        except Exception as error:  # the hub's errors have no common base
            advice = (
                "install cn_clip, or name a checkpoint with vocab.txt next to it"
                if folder is None
                else "put Chinese RoBERTa's, 21,128 lines, next to the weights"
            )
            where = "" if folder is None else f"in {folder} "
            raise ValueError(f"there is no vocab.txt {where}and none to be had from {_HUB}: {advice}") from error
    vocabulary = [line.strip() for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    if len(vocabulary) != size:
        raise ValueError(
            f"its vocabulary {file} has {len(vocabulary)} entries and its table {size}: "
            "put the model's own vocab.txt next to the weights"
        )
    return vocabulary


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines of the hub's client, which tells of every try."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except ClipretError:
        raise
    except pickle.UnpicklingError as error:
        raise ClipretError(
            f"{source} holds more than weights and could run code when it is loaded: save its state dict alone"
        ) from error
    except KeyError as error:
        raise ClipretError(f"Chinese-CLIP model {source} cannot be loaded: it lacks {error}") from error
    except Exception as error:  # torch's, safetensors' and the hub's errors have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        raise ClipretError(f"Chinese-CLIP model {source} cannot be loaded: {text[:300]}") from error
