"""The export: from a model to a bundle, which is written only if its towers agree with torch."""

import gc
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipret.bundle import FORMAT, Bundle, Manifest, Precision, file_entry
from clipret.console import stages
from clipret.errors import ClipretError
from clipret.files import new_folder
from clipret.pairs import PairSet
from clipret_export.calibration import observe, overflows
from clipret_export.engines import EngineRequest, check_engines
from clipret_export.fusion import fuse
from clipret_export.graph import write_onnx
from clipret_export.parity import LIMITS, Limits, Reference, Report, data_sha256, parity_check
from clipret_export.precision import convert
from clipret_export.reference import inputs, reference, texts
from clipret_export.samples import TEXTS, Sample, sample_images
from clipret_export.sensitivity import costs, worst
from clipret_export.towers import ImageTower, TextTower, rewrite
from clipret_training.choices import Tower
from clipret_training.models import LoadedModel, load_model

__all__ = ["export_bundle"]

_PARTS = ("bundle.json", "*.onnx", "*.onnx.data", "tokenizer.json", "reference.npz", "verify.json", "engines")
_ATTEMPTS = 3
_CALIBRATION = 64  # images and captions; more of them hardly change the ranges
_COSTS = 12  # pairs of inputs that measure the costs of the layers, evenly spaced
_HALF_CHECK = 4  # inputs that run in half precision in torch


@dataclass
class _Progress:
    """What the attempts so far have shown about the layers of a model."""

    keep: dict[Tower, list[str]] = field(default_factory=lambda: {"image": [], "text": []})  # layers in float32
    report: Report | None = None
    nodes: dict[Tower, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)  # of the last attempt, by tower
    skipped: dict[Path, str] = field(default_factory=dict)  # unreadable calibration images, and why
    losses: dict[str, float] = field(default_factory=dict)  # 1 - cosine of a tower that exceeded its limits


def export_bundle(
    source: str,
    out: Path,
    *,
    precision: Precision = "fp32",
    overwrite: bool = False,
    limits: Limits | None = None,
    verify_data: Sample | None = None,
    calibration_data: Sample | None = None,
    engines: Sequence[EngineRequest] = (),
    fused: bool = False,
) -> Bundle:
    """Export a model to a bundle folder.

    Args:
        source: The model; see `load_model`.
        out: The bundle folder.
        precision: Precision of the matrix products.
        overwrite: Replace the bundle in `out`.
        limits: The largest differences from torch allowed; by default those of the precision.
        verify_data: Images to check in addition to the built-in ones. With captions, recall@1 is compared, too.
        calibration_data: Images and captions from which int8 takes its ranges. By default one half of `verify_data`;
            the other half then checks the bundle.
        engines: TensorRT engines to build. They are checked as well if this machine has a GPU that runs them.
        fused: Use fused operators of onnxruntime, which no other backend reads; for fp32 and fp16 (see
            `clipret_export.fusion`).

    Returns:
        The bundle.

    Raises:
        ClipretError: The model cannot be loaded, `out` is not empty, the disk is too full, int8 has no calibration
            data, or a tower differs from torch even with its worst layers in float32. Nothing is written then.
    """
    limits = limits or LIMITS[precision]
    for request in engines:
        request.check(precision)
    if fused and (engines or precision not in ("fp32", "fp16")):
        raise ClipretError(
            "fused operators run only in onnxruntime and only in fp32 or fp16: leave them out, or choose fp32 or fp16 "
            "without TensorRT engines"
        )
    checked = verify_data.read() if verify_data is not None else None
    calibration = calibration_data.read() if calibration_data is not None else None
    if precision == "int8" and calibration is None:
        if checked is None:
            raise ClipretError("int8 takes its ranges from images and captions of yours: give --calibration FILE")
        count = len(checked.paths)
        if count < 2:
            raise ClipretError(
                "one image cannot both calibrate int8 and check it: give more images, or --calibration FILE"
            )
        calibration, checked = checked.subset(range(0, count, 2)), checked.subset(range(1, count, 2))
    if calibration is not None and not calibration.captions:
        message = "the calibration data have no captions: int8 takes the text tower's ranges from built-in texts"
        warnings.warn(message, stacklevel=2)
    # The folder first: a wrong folder should be reported before the model is loaded.
    out = out.absolute()
    _refuse_place(out, overwrite)
    with new_folder(out, overwrite=overwrite) as folder, stages() as stage:
        stage("loading")
        loaded = load_model(source)
        _refuse_full_disk(loaded.model, precision, folder)
        stage("computing the reference in torch")
        expected, skipped = reference(loaded, checked)
        (folder / "tokenizer.json").write_text(loaded.tokenizer_json, encoding="utf-8")
        (folder / "reference.npz").write_bytes(expected.to_bytes())
        progress = _Progress()
        for attempt in range(_ATTEMPTS if precision != "fp32" else 1):
            if attempt:
                stage(f"attempt {attempt + 1}: loading")
                loaded = load_model(source)
            failed = tuple(progress.problems) if attempt else ("image", "text")
            progress.problems = {}
            _write_towers(loaded, precision, folder, progress, limits, expected, calibration, failed, stage, fused)
            manifest = _manifest(loaded, precision, expected, progress)
            del loaded  # the backend needs the memory
            gc.collect()
            bundle = _write_manifest(folder, manifest)
            if not progress.problems:
                stage("checking the bundle")
                progress.report = parity_check(bundle, expected, limits)
                progress.problems = progress.report.problems
                progress.losses |= {kind: 1 - getattr(progress.report, kind).min_cosine for kind in progress.problems}
            if not progress.problems:
                break
        else:
            reasons = "; ".join(f"{kind} tower: {', '.join(problems)}" for kind, problems in progress.problems.items())
            raise ClipretError(
                f"the exported towers differ from torch ({reasons}): nothing was written; {_advice(precision)}"
            )
        for request in engines:
            manifest.engines.update(request.build(folder, manifest))
        assert progress.report is not None
        report = progress.report.to_dict() | {
            "nodes": progress.nodes,
            "data_sha256": None if expected.pairs is None else data_sha256(expected.pairs),
            "float32_layers": manifest.float32_layers,
            "skipped": [[str(path), reason] for path, reason in [*skipped, *progress.skipped.items()]],
            "engine_checks": check_engines(_write_manifest(folder, manifest), expected, limits) if engines else {},
        }
        (folder / "verify.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _write_manifest(folder, manifest)
    return Bundle.open(out)


def _advice(precision: Precision) -> str:
    if precision == "fp32":
        return "please report this model as an issue"
    return "export in a higher precision, or allow more with --verify min_cosine=… and max_recall_loss=…"


def _refuse_place(out: Path, overwrite: bool) -> None:
    """Refuse a folder whose files must not be deleted: anything but a bundle."""
    names = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in _PARTS)]
    if names and "bundle.json" not in names:
        foreign = names
    if names and not overwrite:
        raise ClipretError(f"{out} is not empty: choose another folder{'' if foreign else ', or pass --overwrite'}")
    if foreign:
        raise ClipretError(
            f"{out} has {foreign[0]} in it, and --overwrite replaces only bundles: choose another folder"
        )


def _refuse_full_disk(model: nn.Module, precision: Precision, folder: Path) -> None:
    size = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[precision]
    needed = sum(value.numel() for value in model.parameters()) * size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ClipretError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and this bundle needs about {needed / 1e9:.1f} GB: "
            "free some space or choose a folder on another disk"
        )


def _write_towers(
    loaded: LoadedModel,
    precision: Precision,
    folder: Path,
    progress: _Progress,
    limits: Limits,
    expected: Reference,
    calibration: PairSet | None,
    failed: tuple[str, ...],
    stage: Callable[[str], None],
    fused: bool,
) -> None:
    """Write the towers named in `failed`, and record in `progress` what stays in float32."""
    rewrite(loaded.model)
    data = None
    if calibration is not None:
        data = calibration.subset(range(0, len(calibration.paths), max(1, len(calibration.paths) // _CALIBRATION)))
    samples = {"image": inputs(loaded, sample_images()), "text": texts(loaded, TEXTS)}
    size, length = loaded.image.size, loaded.text.context_length
    examples = {
        "image": torch.zeros(2, size, size, 3, dtype=torch.uint8),
        "text": torch.ones(2, length, dtype=torch.int64),
    }
    free = {0: "batch", 1: "length"} if loaded.text.pad_to == "longest" else {0: "batch"}
    towers: tuple[tuple[Tower, nn.Module, dict[int, str], str], ...] = (
        ("image", ImageTower(loaded), {0: "batch"}, "pixels"),
        ("text", TextTower(loaded), free, "tokens"),
    )
    for kind, tower, dynamic, name in towers:
        if kind not in failed:
            continue
        tower.eval()
        if precision != "fp32":
            stage(f"measuring the layers of the {kind} tower")
            batches = list(samples[kind])
            if data is not None:
                unreadable: dict[int, str] = {}
                batches += inputs(loaded, data.paths, unreadable) if kind == "image" else texts(loaded, data.captions)
                progress.skipped |= {data.paths[at]: reason for at, reason in unreadable.items()}
                if len(unreadable) == len(data.paths):
                    raise ClipretError(
                        f"none of the {len(data.paths)} images for calibration can be read, for example "
                        f"{data.paths[0]}: {unreadable[0]}; check the paths and --calibration image_root=…"
                    )
            _lower(tower, kind, precision, batches, progress, limits)
            target = expected.image if kind == "image" else expected.text
            _run_in_torch(tower, kind, precision, samples[kind][0][:_HALF_CHECK], target, progress, limits)
        stage(f"writing {kind}.onnx")
        for old in (folder / f"{kind}.onnx", folder / f"{kind}.onnx.data"):
            old.unlink(missing_ok=True)
        file = folder / f"{kind}.onnx"
        progress.nodes[kind] = write_onnx(tower, examples[kind], file, input_name=name, dynamic=dynamic)
        if fused:
            progress.nodes[kind] = fuse(file).total()


def _lower(
    tower: nn.Module, kind: Tower, precision: Precision, batches: list[Tensor], progress: _Progress, limits: Limits
) -> None:
    """Decide which layers stay in float32, and convert the others."""
    ranges = observe(tower, batches, samples=precision == "int8")
    required: list[str] = [*progress.keep[kind], *(overflows(tower, ranges) if precision == "fp16" else [])]
    keep = list(dict.fromkeys(required))
    measured = progress.losses.get(kind)
    if precision == "int8" or measured is not None:
        parts = [part for batch in batches for part in torch.split(batch, 2)]
        loss = costs(tower, parts[:: -(-len(parts) // _COSTS)], ranges, precision)
        left = {name: cost for name, cost in loss.items() if name not in keep}
        # The mean over the inputs must stay well below the limit: the worst input loses several times the mean.
        budget = (1 - limits.cosine) / 4
        if measured is not None:
            # The measured loss may differ from the predicted one by a factor: scale the budget with the measurement.
            budget = min(budget, sum(left.values()) * (1 - limits.cosine) / max(measured, 1e-9)) / 4
        keep += worst(left, budget)
    progress.keep[kind] = keep
    convert(tower, precision, ranges, keep)


def _run_in_torch(
    tower: nn.Module, kind: Tower, precision: Precision, batch: Tensor, target: Any, progress: _Progress, limits: Limits
) -> None:
    """Run the converted tower in half precision in torch: onnxruntime's CPU provider would hide an overflow."""
    if precision == "int8":
        return
    with torch.inference_mode():
        embeddings = tower(batch)
    cosine = float((embeddings * torch.from_numpy(target[: len(embeddings)])).sum(dim=1).min())
    if not cosine >= limits.cosine:
        progress.losses[kind] = 1 - cosine
        progress.problems[kind] = [f"smallest cosine {cosine:.7f} in torch's {precision}, limit {limits.cosine}"]


def _manifest(loaded: LoadedModel, precision: Precision, expected: Reference, progress: _Progress) -> Manifest:
    return Manifest(
        format=FORMAT,
        model=loaded.name,
        source=loaded.source,
        source_sha256=loaded.source_sha256,
        precision=precision,
        embedding_dim=expected.image.shape[1],
        logit_scale=float(loaded.model.logit_scale.detach().exp()),  # type: ignore[operator]
        image=loaded.image,
        text=loaded.text,
        files={},
        float32_layers=[name.removeprefix("model.") for kept in progress.keep.values() for name in kept],
    )


def _write_manifest(folder: Path, manifest: Manifest) -> Bundle:
    """Write bundle.json with the size and digest of every other file in the folder."""
    manifest.files.clear()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "bundle.json":
            manifest.files[file.relative_to(folder).as_posix()] = file_entry(file)
    (folder / "bundle.json").write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(folder)
