"""From a model to a bundle, which is written only after its towers agreed with torch."""

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
_CALIBRATION = 64  # images and captions: with more, the ranges hardly change
_COSTS = 12  # pairs of inputs that the layers' costs are measured with, spread over all of them
_HALF_CHECK = 4  # inputs that run in torch's own half precision


@dataclass
class _Plan:
    """What has been found out about a model's layers so far, over all attempts."""

    keep: dict[Tower, list[str]] = field(default_factory=lambda: {"image": [], "text": []})
    report: Report | None = None
    nodes: dict[Tower, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)  # of the last attempt, by tower
    skipped: dict[Path, str] = field(default_factory=dict)  # calibration images that cannot be read, and why
    losses: dict[str, float] = field(default_factory=dict)  # 1 - cosine of a tower that missed its limits


def export_bundle(
    source: str,
    out: Path,
    *,
    precision: Precision = "fp32",
    overwrite: bool = False,
    limits: Limits | None = None,
    verify_data: Sample | None = None,
    calibration_data: Sample | None = None,
    plans: Sequence[EngineRequest] = (),
    fused: bool = False,
) -> Bundle:
    """Export `source` (see `load_model`) to the bundle folder `out`.

    `verify_data`: images, with captions for a recall, that the towers are checked with in addition to the built-in
    ones. `calibration_data`: what int8 takes its ranges from; half of `verify_data` unless given, which then is not
    checked with. `plans`: TensorRT engines to build, which are checked as well where a GPU here can run them. `fused`:
    the towers in onnxruntime's own operators (see `clipret_export.fusion`), which no other backend reads; fp32 and fp16
    only.

    Raises ClipretError when the source cannot be loaded, `out` is not empty (unless `overwrite`), the disk is too
    full, int8 has nothing to calibrate with, or a tower disagrees with torch even with its worst layers in float32;
    then nothing is written.
    """
    limits = limits or LIMITS[precision]
    for request in plans:
        request.check(precision)
    if fused and (plans or precision not in ("fp32", "fp16")):
        raise ClipretError(
            "fused operators are onnxruntime's own and for fp32 and fp16: not for TensorRT engines, bf16 or int8"
        )
    checked = verify_data.read() if verify_data is not None else None
    calibration = calibration_data.read() if calibration_data is not None else None
    if precision == "int8" and calibration is None:
        if checked is None:
            raise ClipretError("int8 takes its ranges from images and captions like yours: give --calibration FILE")
        count = len(checked.paths)
        if count < 2:
            raise ClipretError("one image cannot both calibrate int8 and check it: give more, or --calibration FILE")
        calibration, checked = checked.subset(range(0, count, 2)), checked.subset(range(1, count, 2))
    if calibration is not None and not calibration.captions:
        told = "the calibration data have no captions: int8 takes the text tower's ranges from built-in texts"
        warnings.warn(told, stacklevel=2)
    # The folder first: a wrong place should not cost a model's loading.
    out = out.absolute()
    _refuse_place(out, overwrite)
    with new_folder(out, overwrite=overwrite) as folder, stages() as stage:
        stage("loading")
        loaded = load_model(source)
        _refuse_full_disk(loaded.model, precision, folder)
        stage("running torch on the check's inputs")
        expected, skipped = reference(loaded, checked)
        (folder / "tokenizer.json").write_text(loaded.tokenizer_json, encoding="utf-8")
        (folder / "reference.npz").write_bytes(expected.to_bytes())
        plan = _Plan()
        for attempt in range(_ATTEMPTS if precision != "fp32" else 1):
            if attempt:
                stage(f"attempt {attempt + 1}: loading")
                loaded = load_model(source)
            missed = tuple(plan.problems) if attempt else ("image", "text")
            plan.problems = {}
            _write_towers(loaded, precision, folder, plan, limits, expected, calibration, missed, stage, fused)
            manifest = _manifest(loaded, precision, expected, plan)
            del loaded  # the engine needs the memory
            gc.collect()
            bundle = _write_manifest(folder, manifest)
            if not plan.problems:
                stage("checking the bundle")
                plan.report = parity_check(bundle, expected, limits)
                plan.problems = plan.report.problems
                plan.losses.update({kind: 1 - getattr(plan.report, kind).min_cosine for kind in plan.problems})
            if not plan.problems:
                break
        else:
            told = "; ".join(f"{kind} tower: {', '.join(found)}" for kind, found in plan.problems.items())
            raise ClipretError(
                f"the exported towers differ from torch ({told}): nothing was written; {_advice(precision)}"
            )
        for request in plans:
            manifest.engines.update(request.build(folder, manifest))
        assert plan.report is not None
        report = plan.report.to_dict() | {
            "nodes": plan.nodes,
            "data_sha256": None if expected.pairs is None else data_sha256(expected.pairs),
            "float32_layers": manifest.float32_layers,
            "skipped": [[str(path), reason] for path, reason in [*skipped, *plan.skipped.items()]],
            "plans": check_engines(_write_manifest(folder, manifest), expected, limits) if plans else {},
        }
        (folder / "verify.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _write_manifest(folder, manifest)
    return Bundle.open(out)


def _advice(precision: Precision) -> str:
    if precision == "fp32":
        return "report this model"
    return "export in a higher precision, or allow more with --verify min_cosine=… and max_recall_loss=…"


def _refuse_place(out: Path, overwrite: bool) -> None:
    """What lies in `out` is deleted: it must be a bundle and nothing else."""
    held = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in held if not any(fnmatch(name, pattern) for pattern in _PARTS)]
    if held and "bundle.json" not in held:
        foreign = held
    if held and not overwrite:
        raise ClipretError(f"{out} is not empty: choose another folder{'' if foreign else ', or pass --overwrite'}")
    if foreign:
        raise ClipretError(f"{out} holds {foreign[0]}, and --overwrite replaces bundles alone: choose another folder")


def _refuse_full_disk(model: nn.Module, precision: Precision, folder: Path) -> None:
    size = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[precision]
    needed = sum(value.numel() for value in model.parameters()) * size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ClipretError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and this bundle needs about {needed / 1e9:.1f} GB: "
            "free space or choose another place"
        )


def _write_towers(
    loaded: LoadedModel,
    precision: Precision,
    folder: Path,
    plan: _Plan,
    limits: Limits,
    expected: Reference,
    calibration: PairSet | None,
    missed: tuple[str, ...],
    stage: Callable[[str], None],
    fused: bool,
) -> None:
    """Write the towers among `missed`; what was kept in float32 is noted in `plan`."""
    rewrite(loaded.model)
    own = None
    if calibration is not None:
        own = calibration.subset(range(0, len(calibration.paths), max(1, len(calibration.paths) // _CALIBRATION)))
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
        if kind not in missed:
            continue
        tower.eval()
        if precision != "fp32":
            stage(f"measuring the layers of the {kind} tower")
            seen = list(samples[kind])
            if own is not None:
                unreadable: dict[int, str] = {}
                seen += inputs(loaded, own.paths, unreadable) if kind == "image" else texts(loaded, own.captions)
                plan.skipped |= {own.paths[at]: reason for at, reason in unreadable.items()}
                if len(unreadable) == len(own.paths):
                    raise ClipretError(
                        f"none of the {len(own.paths)} images for calibration can be read, for example "
                        f"{own.paths[0]}: {unreadable[0]}; check the list and --image-root"
                    )
            _lower(tower, kind, precision, seen, plan, limits)
            target = expected.image if kind == "image" else expected.text
            _run_in_torch(tower, kind, precision, samples[kind][0][:_HALF_CHECK], target, plan, limits)
        stage(f"writing {kind}.onnx")
        for old in (folder / f"{kind}.onnx", folder / f"{kind}.onnx.data"):
            old.unlink(missing_ok=True)
        plan.nodes[kind] = write_onnx(tower, examples[kind], folder / f"{kind}.onnx", input_name=name, dynamic=dynamic)
        if fused:
            plan.nodes[kind] = fuse(folder / f"{kind}.onnx").total()


def _lower(
    tower: nn.Module, kind: Tower, precision: Precision, batches: list[Tensor], plan: _Plan, limits: Limits
) -> None:
    """Decide which layers stay in float32 and convert the others."""
    ranges = observe(tower, batches, samples=precision == "int8")
    wanted: list[str] = [*plan.keep[kind], *(overflows(tower, ranges) if precision == "fp16" else [])]
    keep = list(dict.fromkeys(wanted))
    missed = plan.losses.get(kind)
    if precision == "int8" or missed is not None:
        parts = [part for batch in batches for part in torch.split(batch, 2)]
        loss = costs(tower, parts[:: -(-len(parts) // _COSTS)], ranges, precision)
        left = {name: cost for name, cost in loss.items() if name not in keep}
        # The mean over the inputs must stay well below the limit, for the worst input is several times the mean.
        budget = (1 - limits.cosine) / 4
        if missed is not None:
            # What the layers were expected to cost and what they did cost may differ by a factor: use the latter.
            budget = min(budget, sum(left.values()) * (1 - limits.cosine) / max(missed, 1e-9)) / 4
        keep += worst(left, budget)
    plan.keep[kind] = keep
    convert(tower, precision, ranges, keep)


def _run_in_torch(
    tower: nn.Module, kind: Tower, precision: Precision, batch: Tensor, target: Any, plan: _Plan, limits: Limits
) -> None:
    """Run the converted tower in torch's own half: onnxruntime's CPU provider would hide an overflow."""
    if precision == "int8":
        return
    with torch.inference_mode():
        embeddings = tower(batch)
    cosine = float((embeddings * torch.from_numpy(target[: len(embeddings)])).sum(dim=1).min())
    if not cosine >= limits.cosine:
        plan.losses[kind] = 1 - cosine
        plan.problems[kind] = [f"smallest cosine {cosine:.7f} in torch's {precision}, limit {limits.cosine}"]


def _manifest(loaded: LoadedModel, precision: Precision, expected: Reference, plan: _Plan) -> Manifest:
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
        float32_layers=[name.removeprefix("model.") for kept in plan.keep.values() for name in kept],
    )


def _write_manifest(folder: Path, manifest: Manifest) -> Bundle:
    """Write bundle.json with the size and hash of every other file of the folder."""
    manifest.files.clear()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "bundle.json":
            manifest.files[file.relative_to(folder).as_posix()] = file_entry(file)
    (folder / "bundle.json").write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(folder)
