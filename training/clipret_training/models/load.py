"""One loader for all models: clipret-small, open_clip, Chinese-CLIP, adapters, and runs with their checkpoints."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import open_clip
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from clipret.bundle import ImageSpec, TextSpec
from clipret.errors import ClipretError, one_line
from clipret.schema import checked
from clipret_training.filenames import BEST, CHECKPOINTS, LAST, MODEL, TOKENIZER
from clipret_training.models import chinese_clip as chinese
from clipret_training.models import small
from clipret_training.models.chinese_clip_model import SIZES
from clipret_training.models.loaded import LoadedModel, file_sha256, weights_sha256
from clipret_training.models.lora import ADAPTER_CONFIG, base_of, merge_adapter
from clipret_training.models.openclip import CONFIG, load_open_clip, rebuild_open_clip
from clipret_training.models.small import SmallConfig
from clipret_training.models.tokenizer import learn_tokenizer

__all__ = ["SMALL", "LoadedModel", "anchored", "architecture", "describe", "load_model", "model_names"]

_log = logging.getLogger(__name__)

SMALL = "clipret-small"
_FORMAT = 1
_VOCABULARY = 6000
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")


class _Version(msgspec.Struct):
    format: int


class _Description(msgspec.Struct):
    """model.json: a LoadedModel without weights. `small` or `chinese` is the `config` of a model of that family."""

    format: int
    name: str
    source: str
    source_sha256: str
    image: ImageSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    text: TextSpec
    small: SmallConfig | None = None
    chinese: dict[str, Any] | None = None


def model_names() -> list[str]:
    """The names of all models that `load_model` knows.

    Returns:
        clipret-small, the sizes of Chinese-CLIP, the architectures of OpenCLIP, and those with a pretrained tag.
    """
    tagged = [f"{name}:{tag}" for name, tag in open_clip.list_pretrained()]
    return [SMALL, *SIZES, *open_clip.list_models(), *tagged]


def load_model(source: str, *, seed: int = 0, captions: Sequence[str] | None = None) -> LoadedModel:
    """Load a model in eval mode.

    Args:
        source: One of

            - a run folder, for its best checkpoint, or a .safetensors file in the `checkpoints` of a run;
            - MODEL or MODEL:PRETRAINED, where MODEL is `clipret-small` or an architecture of open_clip, and PRETRAINED
              is one of its tags or a checkpoint file (.safetensors, or .pt, which is loaded as weights only);
            - `hf-hub:ORG/REPO`, `local-dir:FOLDER`, or a folder with an open_clip_config.json;
            - a folder (or hf-hub:ORG/REPO) with a ChineseCLIPModel of Hugging Face, or a clip_cn_*.pt of OFA-Sys with a
              vocab.txt next to it; chinese-clip-SIZE[:FILE], where SIZE is rn50, vit-b-16, vit-l-14, vit-l-14-336 or
              vit-h-14;
            - a folder with a LoRA adapter in the layout of PEFT, which names the model that it is merged into.
        seed: Seed of random weights, for a source without weights.
        captions: Captions from which a new clipret-small learns its vocabulary.

    Returns:
        The model.

    Raises:
        ClipretError: The source is unknown, broken or not supported.

    Examples:
        >>> loaded = load_model("clipret-small", captions=["a red car", "two dogs on a beach"])
        >>> loaded.model.encode_image(torch.zeros(2, 3, 80, 80)).shape
        torch.Size([2, 256])
    """
    _log.info("loading the model %s", source)
    path = Path(source)
    if (path / ADAPTER_CONFIG).is_file():
        return merge_adapter(path, load_model(base_of(path), seed=seed))
    if (path / MODEL).is_file():
        best = path / CHECKPOINTS / BEST
        return _load_run(path, best if best.is_file() else best.with_name(LAST), source)
    if (path / CONFIG).is_file():
        return load_open_clip(f"local-dir:{path}", None, seed=seed)
    if chinese.is_folder(path):
        return chinese.load_chinese_clip(path, source)
    if path.is_dir():
        kind = chinese.model_type(path)
        raise ClipretError(
            f"{path} is not a model: it has neither {MODEL} (a run), {CONFIG}, {ADAPTER_CONFIG} nor a Chinese-CLIP"
            + (f" (its config.json is that of a {kind!r})" if kind else "")
        )
    if path.suffix in _WEIGHTS and ":" not in source:
        if _is_chinese_checkpoint(path):
            return chinese.load_chinese_clip(path, source)
        return _load_run(_run_of(path), path, source)
    if source == SMALL:
        return _new_small(captions, seed)
    name, pretrained = _split(source)
    if name == SMALL:
        raise ClipretError(f"{SMALL} has no pretrained weights: train it, then name the run folder")
    if name.startswith(f"{chinese.FAMILY}-"):
        return chinese.new_chinese_clip(name, pretrained, seed=seed)
    if name.startswith("hf-hub:") and (folder := chinese.hub_folder(name.removeprefix("hf-hub:"))) is not None:
        return chinese.load_chinese_clip(folder, source)
    return load_open_clip(name, pretrained, seed=seed)


def architecture(source: str) -> tuple[str, bool]:
    """Identify a model without loading it.

    Args:
        source: The model; see `load_model`.

    Returns:
        The name of its architecture, and whether it has trained weights.

    Raises:
        ClipretError: As `load_model`, for files that must be read.
    """
    path = Path(source)
    if (path / ADAPTER_CONFIG).is_file():
        return architecture(base_of(path))[0], True
    run = path if (path / MODEL).is_file() else path.parent.parent
    if chinese.is_folder(path) or (path.suffix in _WEIGHTS and _is_chinese_checkpoint(path)):
        return "Chinese-CLIP", True
    if (run / MODEL).is_file() and path.exists():
        return _read_description(run).name, True
    name, pretrained = _split(source)
    return name, pretrained is not None or ":" in name or path.is_dir()


def anchored(source: str) -> str:
    """Make the name of a model independent of the working folder.

    Args:
        source: The model; see `load_model`.

    Returns:
        The same source with the path of its folder or file made absolute; other names as they are.
    """
    if Path(source).exists():
        return str(Path(source).absolute())
    scheme, colon, place = source.partition(":")
    is_file = Path(place).suffix in _WEIGHTS and Path(place).is_file()  # not a tag
    if (scheme == "local-dir" and place) or (is_file and scheme != "hf-hub"):
        return f"{scheme}{colon}{Path(place).absolute()}"
    return source


def _is_chinese_checkpoint(path: Path) -> bool:
    return not (path.parent.parent / MODEL).is_file() and chinese.is_checkpoint(path)


def describe(loaded: LoadedModel) -> dict[str, str]:
    """Describe a model for a run folder.

    Args:
        loaded: The model.

    Returns:
        The contents of the files that the run needs in addition to its checkpoints, by name.
    """
    description: dict[str, Any] = {
        "format": _FORMAT,
        "name": loaded.name,
        "source": loaded.source,
        "source_sha256": loaded.source_sha256,
        "image": loaded.image,
        "mean": loaded.mean,
        "std": loaded.std,
        "text": loaded.text,
    }
    files = {TOKENIZER: loaded.tokenizer_json}
    if loaded.name == SMALL:
        description["small"] = loaded.config
    elif loaded.config.get("family") == chinese.FAMILY:
        description["chinese"] = loaded.config
    else:
        files[CONFIG] = json.dumps(loaded.config, indent=2) + "\n"
    files[MODEL] = json.dumps(msgspec.to_builtins(description), indent=2, ensure_ascii=False) + "\n"
    return files


def _split(source: str) -> tuple[str, str | None]:
    if source.startswith(("hf-hub:", "local-dir:")):
        return source, None
    name, colon, pretrained = source.partition(":")
    if colon and not pretrained:
        raise ClipretError(f"model {source!r} ends in a colon: add a tag or a checkpoint file after it")
    return name, pretrained or None


def _new_small(captions: Sequence[str] | None, seed: int) -> LoadedModel:
    if captions is None:
        raise ClipretError(f"{SMALL} has no pretrained weights: train it with clipret-train fit, then name the run")
    tokenizer_json = learn_tokenizer(captions, _VOCABULARY)
    config = SmallConfig(vocab_size=len(json.loads(tokenizer_json)["model"]["vocab"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small.SmallClip(config).eval()
    return LoadedModel(
        model=model,
        name=SMALL,
        config=dataclasses.asdict(config),
        image=small.IMAGE,
        mean=small.MEAN,
        std=small.STD,
        text=small.TEXT,
        tokenizer_json=tokenizer_json,
        source=SMALL,
        source_sha256=weights_sha256(model),
    )


def _run_of(checkpoint: Path) -> Path:
    run = checkpoint.parent.parent
    if not checkpoint.is_file():
        raise ClipretError(f"checkpoint {checkpoint} does not exist: check the path")
    if not (run / MODEL).is_file():
        raise ClipretError(
            f"{checkpoint} does not name its model: put the architecture before it, as in ViT-B-32:{checkpoint}"
        )
    return run


def _load_run(run: Path, checkpoint: Path, source: str) -> LoadedModel:
    description = _read_description(run)
    with _readable_run(run):
        if description.small is not None:
            config = dataclasses.asdict(description.small)
            model: nn.Module = small.SmallClip(description.small).eval()
            model.load_state_dict(load_file(checkpoint))
        elif description.chinese is not None:
            config = description.chinese
            model = chinese.rebuild(config, checkpoint)
        else:
            config = json.loads((run / CONFIG).read_text(encoding="utf-8"))
            model = rebuild_open_clip(run, checkpoint)
        return LoadedModel(
            model=model,
            name=description.name,
            config=config,
            image=description.image,
            mean=description.mean,
            std=description.std,
            text=description.text,
            tokenizer_json=(run / TOKENIZER).read_text(encoding="utf-8"),
            source=source,
            source_sha256=file_sha256(checkpoint),
        )


def _read_description(run: Path) -> _Description:
    with _readable_run(run):
        content = (run / MODEL).read_bytes()
        if (version := msgspec.json.decode(content, type=_Version).format) != _FORMAT:
            raise ValueError(f"it has format {version}, but this version of clipret reads format {_FORMAT}")
        return checked(msgspec.json.decode(content), _Description)


@contextlib.contextmanager
def _readable_run(run: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = one_line(error)
        raise ClipretError(f"run {run} cannot be loaded: {reason}; train it again or name another") from error
