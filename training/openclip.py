"""Models of open_clip: built-in architectures, checkpoint files, local folders and the Hugging Face hub."""

import contextlib
import difflib
import json
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from clipret.bundle import ImageSpec, TextSpec
from clipret.errors import ClipretError
from clipret.training.loaded import LoadedModel, file_sha256, weights_sha256
from clipret.training.tokenizer import clip_tokenizer_json

__all__ = ["CONFIG", "load_open_clip", "model_names"]

CONFIG = "open_clip_config.json"  # open_clip's own name for the file that rebuilds a model
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def model_names() -> list[str]:
    names: list[str] = open_clip.list_models()
    return names


def load_open_clip(name: str, pretrained: str | None, *, seed: int, weights: Path | None = None) -> LoadedModel:
    """An open_clip model with the weights of `pretrained` (a tag or a file), of its folder or hub, or random ones.

    `name`: a built-in architecture, `local-dir:FOLDER` or `hf-hub:ORG/REPO`. `weights`: a state dict that replaces
    the model's own, as a run folder has.

    Raises ClipretError for an unknown name or tag, a hub that cannot be reached, a checkpoint that is broken, holds
    code, or does not fit, and for preprocessing or a tokenizer that a bundle cannot describe.
    """
    config = _read_config(name)
    _refuse_other_tokenizers(name, config["model_cfg"])
    if pretrained is not None:
        _check_pretrained(name, pretrained)
    with torch.random.fork_rng(devices=[]), _readable_errors(name, pretrained):
        torch.manual_seed(seed)
        model = open_clip.create_model(name, pretrained=pretrained, load_weights=weights is None)
        if weights is not None:
            open_clip.load_checkpoint(model, str(weights))
    preprocess = model.visual.preprocess_cfg
    file = weights or (Path(pretrained) if pretrained is not None and Path(pretrained).is_file() else None)
    return LoadedModel(
        model=model.eval(),
        name=Path(name.removeprefix("local-dir:")).name if name.startswith("local-dir:") else name,
        config={"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess},
        image=_image_spec(name, preprocess),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        text=_accept_short_texts(model, config["model_cfg"]["text_cfg"].get("context_length", 77)),
        tokenizer_json=clip_tokenizer_json(),
        source=name if pretrained is None else f"{name}:{pretrained}",
        source_sha256=file_sha256(file) if file is not None else weights_sha256(model),
    )


def _read_config(name: str) -> dict[str, Any]:
    """The content of an open_clip_config.json; for a built-in architecture only its `model_cfg`."""
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
        raise ClipretError(
            f"model {name} cannot be read: {_first_line(error)}; check the name and the network"
        ) from None
    return config


_LIST_MODELS = 'see  python -c "import open_clip; print(open_clip.list_models())"'


def _refuse_other_tokenizers(name: str, model_cfg: dict[str, Any]) -> None:
    text_cfg = model_cfg["text_cfg"]
    other = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name") or text_cfg.get("tokenizer_kwargs")
    # open_clip itself falls back on the name where a SigLIP configuration names no tokenizer.
    if other or "siglip" in name.lower():
        raise ClipretError(
            f"model {name} has a tokenizer of its own ({other or 'SigLIP'}), which this version does not support: "
            "choose a model with CLIP's tokenizer, such as ViT-B-32"
        )


def _check_pretrained(name: str, pretrained: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        return
    file = Path(pretrained)
    if file.suffix not in _WEIGHTS:
        near = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0) or ["none"]
        raise ClipretError(
            f"{name} has no pretrained weights {pretrained!r} (nearest: {', '.join(near)}): name one of its tags "
            f"or a file ({', '.join(_WEIGHTS)})"
        )
    if not file.is_file():
        raise ClipretError(f"checkpoint {file} does not exist: check the path")


@contextlib.contextmanager
def _readable_errors(name: str, pretrained: str | None) -> Iterator[None]:
    """What open_clip raises, in any of a dozen types, or merely warns of, as one line; its log lines are muted."""
    what = name if pretrained is None else f"{name}:{pretrained}"
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # Weights trained with QuickGELU give plausible, wrong embeddings with GELU; open_clip only warns.
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            yield
    except UserWarning:
        raise ClipretError(
            f"{what}: these weights were trained with QuickGELU and {name} has GELU: use {name}-quickgelu:{pretrained}"
        ) from None
    except pickle.UnpicklingError:
        raise ClipretError(
            f"checkpoint {what} holds more than weights and could run code when it is loaded: "
            "save its state dict alone, best as .safetensors"
        ) from None
    except Exception as error:  # the hub's, torch's and safetensors' errors have no common base
        raise ClipretError(f"model {what} cannot be loaded: {_first_line(error)}") from None
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] + "…" if len(text) > 300 else text or type(error).__name__


def _image_spec(name: str, preprocess: dict[str, Any]) -> ImageSpec:
    """open_clip's preprocessing as an ImageSpec. Raises ClipretError for what it cannot say."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    known = {"interpolation": ("bilinear", "bicubic"), "resize_mode": ("shortest", "longest", "squash")}
    for key, values in known.items():
        if preprocess[key] not in values:
            raise ClipretError(f"model {name} wants {key} {preprocess[key]!r}: supported are {', '.join(values)}")
    if height != width or preprocess["mode"] != "RGB":
        raise ClipretError(f"model {name} wants {preprocess['mode']} pictures of {size}: supported are RGB squares")
    return ImageSpec(
        size=height,
        resize=preprocess["resize_mode"],
        interpolation=preprocess["interpolation"],
        fill=preprocess["fill_color"],
    )


class _ShortTextCLIP(open_clip.CLIP):  # type: ignore[misc]
    """open_clip.CLIP whose encode_text also takes texts shorter than the context.

    The original adds its whole positional embedding and so computes all 77 positions of "a red car". A causal tower
    reads its result at the end-of-text token, which no later position reaches: cutting them changes nothing.
    """

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        L = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:L]  # [B,L,W]
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:L, :L]))
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=self.text_eos_id)  # [B,W]
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return nn.functional.normalize(x, dim=-1) if normalize else x


def _accept_short_texts(model: nn.Module, context_length: int) -> TextSpec:
    """The text side of `model`, which from here on takes short texts where its result allows it."""
    trimmed = (
        type(model) is open_clip.CLIP and model.attn_mask is not None and model.text_pool_type in ("argmax", "eos")
    )
    if trimmed:
        model.__class__ = _ShortTextCLIP  # open_clip's factory decides the class; weights and names stay
    return TextSpec(context_length=context_length, clean="clip", pad_to="longest" if trimmed else "context")
