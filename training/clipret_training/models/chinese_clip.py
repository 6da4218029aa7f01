"""Chinese-CLIP (Yang et al., 2022, https://arxiv.org/abs/2211.01335) from both of its published layouts.

OFA-Sys publishes checkpoints named clip_cn_*.pt and folders with a ChineseCLIPModel of Hugging Face. Both become the
state dict of the former: a vision transformer or ResNet as in OpenAI's CLIP, a BERT, and a projection of one token.
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

_CONTEXT = 52  # tokens; the context length of all published models
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HUB = "OFA-Sys/chinese-clip-vit-base-patch16"  # all sizes have the same vocabulary
_FILES = ["config.json", "preprocessor_config.json", "vocab.txt"]
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # names of Hugging Face, the preferred format first

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
    """The model type in the config.json of a Hugging Face folder.

    Args:
        path: The folder.

    Returns:
        The type, such as "chinese_clip"; None without such a file.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def is_folder(path: Path) -> bool:
    """Whether a folder has a ChineseCLIPModel of Hugging Face."""
    return model_type(path) == "chinese_clip"


def is_checkpoint(path: Path) -> bool:
    """Whether a file has the state dict of a Chinese-CLIP.

    Args:
        path: The file.

    Returns:
        True for either layout.

    Raises:
        ClipretError: The file is broken.
    """
    if not path.is_file():
        return False
    names = {str(name).removeprefix("module.") for name in _state_dict(path, keys_only=True)}
    return any(f"{tower}.embeddings.word_embeddings.weight" in names for tower in ("bert", "text_model"))


def hub_folder(repo: str) -> Path | None:
    """Download a ChineseCLIPModel from the Hugging Face hub.

    Args:
        repo: ORG/REPO.

    Returns:
        The folder of its files; None if the repository has another model or cannot be found.

    Raises:
        ClipretError: The repository has such a model, but it cannot be downloaded.
    """
    try:
        with _quiet():
            folder = Path(snapshot_download(repo, allow_patterns=["config.json", CONFIG]))
    except Exception:  # no such repository, no network: the caller tries open_clip, which reports the error
        return None
    if (folder / CONFIG).is_file() or not is_folder(folder):
        return None
    with _readable(f"hf-hub:{repo}"):
        for name in _WEIGHTS:  # many repositories have the weights in both formats: one is enough
            kind = "*" + Path(name).suffix
            snapshot_download(repo, allow_patterns=[*_FILES, kind, f"{kind}.index.json"])
            if any(folder.glob(kind)):
                break
    return folder


def load_chinese_clip(path: Path, source: str) -> LoadedModel:
    """Load a Chinese-CLIP model.

    The vocabulary is vocab.txt next to the weights, or that of an installed cn_clip, or that of the hub, in this order.

    Args:
        path: A folder with a ChineseCLIPModel, or a single file of weights in either layout (clip_cn_*.pt).
        source: Name of the model for `LoadedModel.source` and for errors.

    Returns:
        The model.

    Raises:
        ClipretError: Files are missing, broken, contain code or do not fit each other.
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
    """Load a published size by its name.

    Args:
        name: One of `SIZES`, such as chinese-clip-vit-b-16.
        weights: A file of weights; None for random weights.
        seed: Seed of random weights.

    Returns:
        The model.

    Raises:
        ClipretError: The name is unknown, the weights have another size, or there is no vocabulary.
    """
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=3, cutoff=0)
        raise ClipretError(f"model {name!r} is unknown: did you mean {', '.join(near)}?")
    config, source = published(name), name if weights is None else f"{name}:{weights}"
    if weights is not None:
        if not Path(weights).is_file():
            raise ClipretError(f"checkpoint {weights} does not exist: check the path")
        if not is_checkpoint(Path(weights)):
            raise ClipretError(f"{weights} is not a Chinese-CLIP checkpoint: name a file such as clip_cn_vit-b-16.pt")
        loaded = load_chinese_clip(Path(weights), source)
        if loaded.config != config:
            raise ClipretError(f"{weights} is a {loaded.name}, not {name} as published: name only the file")
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
        source_sha256=weights_sha256(model),  # not of the file: the same weights have one digest in both layouts
    )


def rebuild(config: dict[str, Any], weights: Path) -> ChineseClip:
    """Rebuild a model of a run.

    Args:
        config: `LoadedModel.config` of the model.
        weights: The checkpoint, a .safetensors file.

    Returns:
        The module in eval mode.
    """
    return _build(config, _plain(load_file(weights)))


def _build(config: dict[str, Any], state: dict[str, Tensor]) -> ChineseClip:
    with torch.device("meta"):  # saves the random initialization of a ViT-H-14
        model = ChineseClip(config)
    names, expected = set(state), {name for name in model.state_dict() if not _NO_WEIGHT.search(name)}
    for what, wrong in (("are missing", sorted(expected - names)), ("are unknown", sorted(names - expected))):
        if wrong:
            examples = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
            raise ValueError(
                f"{len(wrong)} weights {what}: {examples}; check that the file is complete and belongs to this model"
            )
    model.load_state_dict(state, strict=False, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # counts and positions, which checkpoints need not have
            parent, _, leaf = name.rpartition(".")
            ids = torch.arange(buffer.shape[-1])[None] if leaf == "position_ids" else torch.zeros(buffer.shape).long()
            model.get_submodule(parent)._buffers[leaf] = ids
    return model.eval().requires_grad_(True)


def _state_dict(path: Path, keys_only: bool = False) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        if keys_only:
            with _readable(str(path)), safe_open(path, "pt") as file:
                return dict.fromkeys(file.keys())
        return load_file(path)
    with _readable(str(path)):
        # Memory-mapped, so that reading the names does not read gigabytes; old files do not support it.
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            stored = torch.load(path, map_location="cpu", weights_only=True)
    inner = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32, without other buffers. Empties `state`, to keep a large model in memory only once.

    Copies even float32 weights: otherwise a later write to a mapped file would change the model.
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
    raise ValueError(f"it has no weights: put {' or '.join(_WEIGHTS)} into the folder")


def _from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to the names and shapes of OFA-Sys: transposed projections, packed attention. Empties `state`."""
    converted: dict[str, Tensor] = {}
    for name in list(state):
        if re.search(r"vision_model\..*self_attn\.[kv]_proj\.", name):
            continue  # packed with its query
        value = state.pop(name)
        if name in ("visual_projection.weight", "text_projection.weight"):
            converted[{"v": "visual.proj", "t": "text_projection"}[name[0]]] = value.t()
        elif packed := re.match(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [value, *(state.pop(name.replace("q_proj", f"{part}_proj")) for part in "kv")]
            converted[f"visual.transformer.resblocks.{packed[1]}.attn.in_proj_{packed[2]}"] = torch.cat(parts)
        else:
            for pattern, new in _HF_NAMES:
                name = re.sub(pattern, new, name)
            converted[name] = value
    return converted


_Images = tuple[ImageSpec, tuple[float, float, float], tuple[float, float, float]]  # with mean and std


def _preprocessing(folder: Path | None, image_size: int) -> _Images:
    """The preprocessing of preprocessor_config.json; without one, that of all published models."""
    file = folder / "preprocessor_config.json" if folder is not None else None
    value = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    size = value.get("size", image_size)
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if off := [key for key in ("do_resize", "do_rescale", "do_normalize") if not value.get(key, True)]:
        raise ValueError(f"its preprocessing has {off[0]} switched off, which is not supported")
    if abs(value.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"its preprocessing has rescale_factor {value['rescale_factor']}: only 1/255 is supported")
    if height != width or height != image_size or value.get("do_center_crop"):
        raise ValueError(
            f"its preprocessing has size {size} (crop: {value.get('do_center_crop')}): "
            f"only {image_size} without crop is supported"
        )
    filters = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
    resample = value.get("resample", 3)
    if resample not in filters:
        raise ValueError(f"its preprocessing has resample {resample}: supported are {filters}")
    spec = ImageSpec(image_size, "squash", filters[resample])  # type: ignore[arg-type]
    return spec, _three(value.get("image_mean", _MEAN)), _three(value.get("image_std", _STD))


def _three(values: Any) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"its preprocessing has the colour {values}: it must have three numbers")
    return tuple(map(float, values))  # type: ignore[return-value]


def _vocabulary(folder: Path | None, size: int) -> list[str]:
    """The vocabulary of `folder`, of an installed cn_clip, or of the hub: one token per line."""
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
                "install cn_clip, or name a checkpoint that has vocab.txt next to it"
                if folder is None
                else "put that of Chinese RoBERTa, with 21,128 lines, next to the weights"
            )
            where = "" if folder is None else f"in {folder} "
            raise ValueError(f"there is no vocab.txt {where}and {_HUB} cannot be downloaded: {advice}") from error
    vocabulary = [line.strip() for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    if len(vocabulary) != size:
        raise ValueError(
            f"its vocabulary {file} has {len(vocabulary)} entries, but its embedding table has {size}: "
            "put the vocab.txt of this model next to the weights"
        )
    return vocabulary


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mute the log of the hub's client, which reports every attempt."""
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
            f"{source} contains more than weights and could run code when loaded: save only its state dict"
        ) from error
    except KeyError as error:
        raise ClipretError(f"Chinese-CLIP model {source} cannot be loaded: it lacks {error}") from error
    except Exception as error:  # torch's, safetensors' and the hub's errors have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        raise ClipretError(f"Chinese-CLIP model {source} cannot be loaded: {text[:300]}") from error
