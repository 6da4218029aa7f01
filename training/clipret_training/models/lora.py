"""LoRA adapters in the layout of PEFT, merged into their base model (Hu et al., 2021, arXiv:2106.09685).

A merged model has the same classes and parameter names as its base, so it trains and exports like any other.
"""

import contextlib
import hashlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clipret.errors import ClipretError
from clipret_training.models.attention import PARTS, pack_attention, split_attention, splittable
from clipret_training.models.loaded import LoadedModel, file_sha256

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "base_of", "merge_adapter"]

ADAPTER_CONFIG = "adapter_config.json"  # the names of PEFT
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def base_of(folder: Path) -> str:
    """The base model of an adapter.

    Args:
        folder: The adapter. A path in its `base_model_name_or_path` may be relative to this folder.

    Returns:
        The base model as `load_model` takes it.

    Raises:
        ClipretError: The adapter names no base model.
    """
    with _readable(folder):
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ValueError(f"its {ADAPTER_CONFIG} does not name its model: add it as base_model_name_or_path")
    scheme, colon, place = base.rpartition(":")  # local-dir:FOLDER and MODEL:FILE too
    local = folder / place
    if place and local.resolve() == folder.resolve():
        raise ClipretError(f"adapter {folder} names itself as its base: move it to a folder of its own")
    return f"{scheme}{colon}{local}" if place and local.exists() else base


def merge_adapter(folder: Path, base: LoadedModel) -> LoadedModel:
    """Merge an adapter into its base model.

    PEFT ignores most mismatches between an adapter and its model silently, and leaves a tower unchanged. Here they are
    errors.

    Args:
        folder: The adapter, with its weights in adapter_model.safetensors or adapter_model.bin.
        base: The base model, whose module is changed in place.

    Returns:
        The merged model, with the module of `base`.

    Raises:
        ClipretError: A file is missing, broken or contains code, a target matches no module, or weights and modules do
            not match one to one.
    """
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ClipretError(f"adapter {folder} has no weights: put {' or '.join(ADAPTER_WEIGHTS)} into the folder")
    with _readable(folder):
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        model = _merged(base.model, folder, weights)
    digest = hashlib.sha256(base.source_sha256.encode())
    for part in (folder / ADAPTER_CONFIG, file):
        digest.update(file_sha256(part).encode())
    return replace(base, model=model, source=str(folder), source_sha256=digest.hexdigest())


def _merged(base: Any, folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict  # takes seconds

    config = PeftConfig.from_pretrained(str(folder))
    trainable = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    targets = getattr(config, "target_modules", None)  # not every type of adapter has targets
    # An adapter of ours may target only queries, keys or values, for which the model has no layers before the split.
    named = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in weights}
    split_attention(base, [name for name in splittable(base) if any(f"{name}.{part}" in named for part in PARTS)])
    adapted: Any = PeftModel(base, config)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(f"its type {config.peft_type} cannot be merged into a model")
    if isinstance(targets, set | list):
        matched: list[str] = adapted.base_model.targeted_module_names
        unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in matched)]
        if unmatched:
            raise ValueError(
                f"its target {sorted(unmatched)[0]!r} matches no module of the model; check the base model"
            )
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if extra := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"its weight {extra[0]} matches no module of the model ({len(extra)} such weights)")
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"it lacks the weight {missing[0]} ({len(missing)} such weights)")
    set_peft_model_state_dict(adapted, weights)
    model = adapted.merge_and_unload()
    pack_attention(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])  # PEFT froze them
    return model


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ClipretError(
            f"adapter {folder} contains more than weights and could run code when loaded: save it as .safetensors"
        ) from error
    except Exception as error:  # PEFT's, torch's and safetensors' errors have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        raise ClipretError(f"adapter {folder} cannot be merged: {text[:300]}") from error
