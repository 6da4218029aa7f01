"""Models of open_clip: built-in architectures, checkpoint files, local folders and the Hugging Face hub."""

import contextlib
import difflib
import json
import logging
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import open_clip
import torch
from huggingface_hub import hf_hub_download
from msgspec.structs import replace
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from clipret.bundle import ImageSpec, Resize, TextSpec
from clipret.errors import ClipretError, one_line
from clipret.inference.tokenizer import Tokenizer
from clipret_training.models.hub_tokenizer import tokenizer_file
from clipret_training.models.loaded import LoadedModel, file_sha256, weights_sha256

__all__ = ["CONFIG", "ShortTextCLIP", "load_open_clip", "model_names", "rebuild_open_clip"]

CONFIG = "open_clip_config.json"  # open_clip's name for the file that rebuilds a model
_TEXT_MODEL = "text_model"  # a key that we add to it: the configuration of a text tower of transformers
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def model_names() -> list[str]:
    """The names of the built-in architectures of open_clip."""
    names: list[str] = open_clip.list_models()
    return names


def load_open_clip(name: str, pretrained: str | None, *, seed: int) -> LoadedModel:
    """Load a model of open_clip.

    The configuration of a text tower of transformers comes from the hub, or from the folder `hf_model_name` relative to
    FOLDER. A tokenizer other than CLIP's comes from the hub or, as in open_clip, from FOLDER.

    Args:
        name: A built-in architecture, `local-dir:FOLDER` or `hf-hub:ORG/REPO`.
        pretrained: A tag of open_clip or a checkpoint file; None for the weights of the folder or repository, or for
            random weights of a built-in architecture.
        seed: Seed of random weights.

    Returns:
        The model.

    Raises:
        ClipretError: The name or tag is unknown, the hub cannot be reached, the checkpoint is broken, contains code or
            does not fit, or a bundle cannot describe the preprocessing or the tokenizer.
    """
    config = _read_config(name)
    if pretrained is not None:
        _check_pretrained(name, pretrained)
    tokenizer_json, text = _tokenizer(name, config["model_cfg"]["text_cfg"])
    model = _build(name, pretrained, config, seed)
    preprocess = model.visual.preprocess_cfg
    kept = {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess}
    if isinstance(getattr(model, "text", None), HFTextEncoder):
        kept[_TEXT_MODEL] = json.loads(model.text.config.to_json_string())
    file = Path(pretrained) if pretrained is not None and Path(pretrained).is_file() else None
    return LoadedModel(
        model=model,
        name=Path(name.removeprefix("local-dir:")).name if name.startswith("local-dir:") else name,
        config=kept,
        image=_image_spec(name, preprocess),
        mean=_per_channel(preprocess["mean"]),
        std=_per_channel(preprocess["std"]),
        text=replace(text, pad_to="longest") if _takes_short_texts(model, tokenizer_json, text) else text,
        tokenizer_json=tokenizer_json,
        source=name if pretrained is None else f"{name}:{pretrained}",
        source_sha256=file_sha256(file) if file is not None else weights_sha256(model),
    )


def rebuild_open_clip(folder: Path, weights: Path) -> Any:
    """Rebuild a model of a run, without access to the hub.

    Args:
        folder: The folder with the `CONFIG` file.
        weights: The checkpoint.

    Returns:
        The module in eval mode.

    Raises:
        ClipretError: A file cannot be read, or the two do not fit each other.
    """
    name = f"local-dir:{folder}"
    return _build(name, None, _read_config(name), seed=0, weights=weights)


def _build(name: str, pretrained: str | None, config: dict[str, Any], seed: int, weights: Path | None = None) -> Any:
    """The model of open_clip in eval mode, with a class that supports short texts if there is one."""
    with (
        torch.random.fork_rng(devices=[]),
        _readable_errors(f"model {name}" if pretrained is None else f"model {name}:{pretrained}"),
        _readable_text_cfg(name, config) as text_cfg,
    ):
        torch.manual_seed(seed)
        created = open_clip.create_model(name, pretrained=pretrained, load_weights=weights is None, text_cfg=text_cfg)
        model = cast(Any, created)  # a CLIP, a CustomTextCLIP or a CoCa
        if weights is not None:
            open_clip.load_checkpoint(model, str(weights))
    _adapt(model)
    return model.eval()


@contextlib.contextmanager
def _readable_text_cfg(name: str, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The `text_cfg` with an `hf_model_name` that transformers finds, without loading its weights."""
    text_cfg = config["model_cfg"]["text_cfg"]
    text_model = text_cfg.get("hf_model_name")
    if not text_model:
        yield text_cfg
    elif _TEXT_MODEL in config:
        with tempfile.TemporaryDirectory(prefix="clipret-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config[_TEXT_MODEL]), encoding="utf-8")
            yield {**text_cfg, "hf_model_name": folder, "hf_model_pretrained": False}
    else:
        local = Path(name.removeprefix("local-dir:")) / text_model
        text_model = str(local) if name.startswith("local-dir:") and local.is_dir() else text_model
        yield {**text_cfg, "hf_model_name": text_model, "hf_model_pretrained": False}


def _read_config(name: str) -> dict[str, Any]:
    """The content of an open_clip_config.json; only the `model_cfg` for a built-in architecture."""
    scheme, _, place = name.partition(":")
    try:
        if scheme == "local-dir":
            file = Path(place) / CONFIG
        elif scheme == "hf-hub":
            file = Path(hf_hub_download(place, CONFIG))
        elif (model_cfg := open_clip.get_model_config(name)) is not None:
            return {"model_cfg": model_cfg}
        else:
            near = difflib.get_close_matches(name, ["clipret-small", *model_names()], n=3, cutoff=0.4)
            raise ClipretError(
                f"model {name!r} is unknown: " + (f"did you mean {', '.join(near)}?" if near else _LIST_MODELS)
            )
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config["model_cfg"]["text_cfg"]  # a KeyError here is clearer than one in open_clip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClipretError(f"model {name} cannot be read: {one_line(error)}; check the name and the network") from error
    return config


_LIST_MODELS = "see  clipret-train models"


def _tokenizer(name: str, text_cfg: dict[str, Any]) -> tuple[str, TextSpec]:
    """The tokenizer's file, and a TextSpec that pads to the context length."""
    source = text_cfg.get("hf_tokenizer_name")
    # A downloaded configuration must not enable code from the hub.
    options: dict[str, Any] = {"trust_remote_code": False} if source else {}
    with _readable_errors(f"the tokenizer {source or ''} of {name}".replace("  ", " ")):
        return tokenizer_file(open_clip.get_tokenizer(name, **options))


def _check_pretrained(name: str, pretrained: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        return
    file = Path(pretrained)
    if file.suffix not in _WEIGHTS:
        near = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0) or ["none"]
        raise ClipretError(
            f"{name} has no pretrained weights {pretrained!r} (similar: {', '.join(near)}): name one of its tags "
            f"or a file ({', '.join(_WEIGHTS)})"
        )
    if not file.is_file():
        raise ClipretError(f"checkpoint {file} does not exist: check the path")


@contextlib.contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """Turn the errors of open_clip, of a dozen types, and one of its warnings into a ClipretError; mute its log."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # Weights trained with QuickGELU give plausible but wrong embeddings with GELU; open_clip only warns.
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            yield
    except UserWarning as error:
        name, _, tag = what.removeprefix("model ").partition(":")
        raise ClipretError(
            f"{what}: these weights were trained with QuickGELU, but {name} has GELU: use {name}-quickgelu:{tag}"
        ) from error
    except pickle.UnpicklingError as error:
        raise ClipretError(
            f"{what}: the checkpoint contains more than weights and could run code when loaded: "
            "save only its state dict, preferably as .safetensors"
        ) from error
    except Exception as error:  # the hub's, torch's and safetensors' errors have no common base
        raise ClipretError(f"{what} cannot be loaded: {one_line(error)}") from error
    finally:
        logging.disable(disabled)


def _image_spec(name: str, preprocess: dict[str, Any]) -> ImageSpec:
    """The preprocessing of open_clip as an ImageSpec. Raises ClipretError if it is not supported."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    supported = {
        "interpolation": ("bilinear", "bicubic", "random"),
        "resize_mode": get_args(Resize),
        "mode": ("RGB",),
    }
    for key, values in supported.items():
        if preprocess[key] not in values:
            raise ClipretError(f"model {name} needs {key} {preprocess[key]!r}: supported are {', '.join(values)}")
    if height != width:
        raise ClipretError(f"model {name} needs images of {height} x {width} pixels: only squares are supported")
    return ImageSpec(
        size=height,
        resize=preprocess["resize_mode"],
        # `random` is for training; in inference, open_clip uses bicubic
        interpolation="bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic",
        fill=preprocess["fill_color"],
    )


def _per_channel(value: float | Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return red, green, blue


class ShortTextCLIP(open_clip.CLIP):  # type: ignore[misc]
    """open_clip.CLIP with an encode_text that also takes texts shorter than the context length.

    The original adds its whole positional embedding, so "a red car" takes 77 positions. A causal tower pools at the
    end-of-text token, which no later position influences: leaving them out changes nothing.
    """

    # Attributes that open_clip.CLIP takes from its text tower without declaring their types.
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Any
    attn_mask: Tensor
    ln_final: nn.LayerNorm
    text_projection: nn.Linear | nn.Parameter | None
    text_pool_type: str
    text_eos_id: int

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode texts.

        Args:
            text: Token ids int64 [B,L], with L at most the context length.
            normalize: Scale the embeddings to unit length.

        Returns:
            Embeddings float32 [B,D].
        """
        L = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:L]  # [B,L,W]
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:L, :L]))
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=self.text_eos_id)  # [B,W]
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return nn.functional.normalize(x, dim=-1) if normalize else x


class _ShortTextTransformer(TextTransformer):  # type: ignore[misc]
    """The same for the text tower of open_clip.CustomTextCLIP, where only the mask has to be cut."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor]:
        L = text.shape[1]
        x, attn_mask = super()._embeds(text)
        assert attn_mask is not None  # the tower is causal
        return x, attn_mask[:L, :L]


class _RawCoCa(open_clip.CoCa):  # type: ignore[misc]
    """open_clip.CoCa that does not normalize by default, like the other models."""

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        embeddings: Tensor = super().encode_image(images, normalize)
        return embeddings

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        embeddings: Tensor = super().encode_text(text, normalize)
        return embeddings


def _adapt(model: Any) -> None:
    """Give a model the interface of `LoadedModel.model`. Only classes change: weights and names stay."""
    text: Any = getattr(model, "text", None)
    if isinstance(model, open_clip.CoCa):
        model.__class__ = _RawCoCa
        return
    for tower in (model.visual, text):
        if hasattr(tower, "output_tokens"):
            tower.output_tokens = False  # otherwise encode_image and encode_text return a tuple
    if text is None and model.attn_mask is not None and model.text_pool_type in ("argmax", "eos"):
        model.__class__ = ShortTextCLIP
    if type(text) is TextTransformer and _reads_one_token_causally(text):
        text.__class__ = _ShortTextTransformer


def _reads_one_token_causally(text: TextTransformer) -> bool:
    return text.attn_mask is not None and text.cls_emb is None and text.pool_type in ("argmax", "eos")


@torch.inference_mode()
def _takes_short_texts(model: Any, tokenizer_json: str, spec: TextSpec) -> bool:
    """Whether texts may be cut to the longest of their batch: decided by the architecture, then measured."""
    text = getattr(model, "text", None)
    if isinstance(text, HFTextEncoder):
        safe = (
            getattr(text.config, "pad_token_id", None) == spec.pad_id
        )  # otherwise its attention mask includes padding
    elif isinstance(model, ShortTextCLIP) or isinstance(text, _ShortTextTransformer):
        # With argmax pooling, padding other than 0 may be the largest id of a text.
        safe = spec.pad_id == 0 or (model.text_pool_type if text is None else text.pool_type) == "eos"
    else:
        safe = False
    if not safe:
        return False
    padded, short = (
        model.encode_text(torch.from_numpy(Tokenizer(tokenizer_json, replace(spec, pad_to=pad_to))(_SHORT)), True)
        for pad_to in ("context", "longest")
    )
    return bool((padded - short).abs().max() <= 1e-5)


_SHORT = ("a red car", "two dogs on a beach")
