"""clipret-export: a model in, a bundle out; and the check of a bundle, again, wherever it is."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, get_args

import click

from clipret.backends import BackendChoice
from clipret.bundle import Bundle, Precision
from clipret.console import DefaultGroup, show_table
from clipret.errors import ClipretError, require

FILE = click.Path(path_type=Path)

EXPORT_EPILOG = """
\b
Examples
  A run of clipret-train, matrix products in half precision:
    clipret-export runs/cars bundles/cars --fp16
  Checked with your own images and captions, recall@1 included:
    clipret-export runs/cars bundles/cars --fp16 --verify-data captions.csv --verify-where "split = 'val'"
  int8 for CPUs, its ranges taken from the training images:
    clipret-export runs/cars bundles/cars-int8 --int8 --calibration-data captions.csv
  TensorRT for RTX plans for two architectures, built without a GPU:
    clipret-export runs/cars bundles/cars --fp16 --tensorrt-rtx sm_89,sm_120
"""


@click.group(
    "clipret-export",
    cls=DefaultGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="clipret")
def main() -> None:
    """Export CLIP models to bundles that search without torch.

    \b
    clipret-export SOURCE BUNDLE [--fp16]      export (see  clipret-export export --help)
    clipret-export check BUNDLE                repeat the check that the export ended with, here
    clipret-export engines BUNDLE --tensorrt   build TensorRT plans for this machine into a bundle
    """


def _limits(command: Any) -> Any:
    for option in (
        click.option("--min-cosine", type=click.FloatRange(-1, 1.5), help="Smallest cosine of any row to torch's."),
        click.option(
            "--max-recall-loss", type=click.FloatRange(0), metavar="POINTS", help="Of recall@1 with captions."
        ),
    ):
        command = option(command)
    return command


def _data(command: Any) -> Any:
    for option in (
        click.option("--caption-column", metavar="NAME", help="Column of the captions; default: detected."),
        click.option("--image-column", metavar="NAME", help="Column of the images' paths; default: detected."),
        click.option("--image-root", type=FILE, help="What paths in a list are relative to; default: its folder."),
        click.option(
            "--verify-limit", type=click.IntRange(1), default=1000, show_default=True, help="At most so many."
        ),
        click.option("--verify-where", metavar="SQL", help="Only rows of the list for which this holds."),
        click.option("--verify-data", type=FILE, help="Images to check with: a folder, or a list with captions."),
    ):
        command = option(command)
    return command


def _plans(command: Any) -> Any:
    for option in (
        click.option("--timing-cache", type=FILE, help="Makes the next --tensorrt build faster; made where missing."),
        click.option("--batch", default="1,64", show_default=True, help="Batch sizes that plans are tuned for."),
        click.option(
            "--tensorrt-rtx",
            is_flag=False,
            flag_value="sm_80+",
            metavar="[ARCH,...]",
            help="TensorRT for RTX plans, built without a GPU; alone: for every GPU from Ampere on.",
        ),
        click.option("--tensorrt", is_flag=True, help="TensorRT plans for the GPU of this machine."),
    ):
        command = option(command)
    return command


@main.command(epilog=EXPORT_EPILOG)
@click.argument("source")
@click.argument("bundle", type=FILE)
@click.option("--fp16", is_flag=True, help="Matrix products in half, the residual stream in float32.")
@click.option("--bf16", is_flag=True, help="The same in bfloat16: OpenVINO, CUDA and TensorRT.")
@click.option("--int8", is_flag=True, help="int8 weights and fixed input ranges, for CPUs.")
@click.option("--fused", is_flag=True, help="onnxruntime's own fused operators; runs in onnxruntime alone.")
@click.option("--calibration-data", type=FILE, help="Where int8 takes its ranges; default: half of --verify-data.")
@click.option("--calibration-where", metavar="SQL", help="Only rows of the list for which this holds.")
@_data
@_limits
@_plans
@click.option("--overwrite", is_flag=True, help="Replace BUNDLE; the old one stays until the new is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def export(
    source: str,
    bundle: Path,
    calibration_data: Path | None,
    calibration_where: str | None,
    image_root: Path | None,
    fused: bool,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Export SOURCE to the folder BUNDLE: both towers as ONNX, the tokenizer, a manifest.

    SOURCE is one of

    \b
    runs/cars                    a run folder of clipret-train (its best checkpoint)
    runs/cars/checkpoints/last.safetensors
    ViT-B-32:laion2b_s34b_b79k   an OpenCLIP model with a pretrained tag
    ViT-B-32:weights.pt          the same architecture with local weights
    hf-hub:ORG/REPO              a model of the Hugging Face hub, OpenCLIP or Chinese-CLIP
    clip_cn_vit-b-16.pt          a Chinese-CLIP checkpoint, or a folder of one
    adapters/cars                a LoRA adapter, merged into its base

    The towers take uint8 images and token ids in batches of any size and give rows of unit length. They run in the
    code that searches and are compared with torch; a tower that differs gets its worst layers back in float32, and
    one that still differs is never written.
    """
    for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
        require(package, "export")
    from clipret_export.pipeline import export_bundle
    from clipret_export.samples import Sample

    chosen = [name for name in get_args(Precision)[1:] if given[name]]  # fp32 has no flag
    if len(chosen) > 1:
        raise click.UsageError(f"a bundle has one precision, not {' and '.join(chosen)}: export twice")
    precision: Any = chosen[0] if chosen else "fp32"
    began = time.monotonic()
    columns = {name: given[name] for name in ("image_column", "caption_column")}
    calibration = None
    if calibration_data is not None:
        calibration = Sample(calibration_data, image_root, calibration_where, **columns)
    made = export_bundle(
        source,
        bundle,
        precision=precision,
        overwrite=overwrite,
        limits=_limits_for(precision, given),
        verify_data=_sample(image_root, given),
        calibration_data=calibration,
        plans=_plan_requests(given),
        fused=fused,
    )
    manifest, report = made.manifest, json.loads(made.file("verify.json").read_text(encoding="utf-8"))
    seconds = time.monotonic() - began
    size = sum(entry.bytes for entry in manifest.files.values())
    # ru_maxrss is in KiB, on macOS in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if as_json:
        facts = {"model": manifest.model, "fingerprint": made.fingerprint, "bytes": size, "seconds": round(seconds, 1)}
        told = {"path": str(made.path), **facts, "peak_memory_bytes": peak, "engines": list(manifest.engines)}
        click.echo(json.dumps(told | report, indent=2))
        return
    rows = [
        ("model", manifest.model),
        ("precision", manifest.precision),
        ("image", f"{manifest.image.size} px, {manifest.image.resize}"),
        ("text", f"up to {manifest.text.context_length} tokens"),
        ("embedding", str(manifest.embedding_dim)),
        ("size", f"{size / 1e6:.1f} MB"),
        ("fingerprint", made.fingerprint[:16]),
        ("time", f"{seconds:.0f} s"),
        ("peak memory", f"{peak / 2**30:.1f} GiB"),
    ]
    click.echo(f"{made.path}\n{show_table(('what', 'value'), rows)}\n\n{_report_table(report)}")
    if manifest.float32_layers:
        click.echo(f"\nkept in float32: {', '.join(manifest.float32_layers)}")
    _show_plans(list(manifest.engines), report["plans"])
    if report["skipped"]:
        click.echo(f"unreadable images: {len(report['skipped'])}, named in {made.path / 'verify.json'}", err=True)


@main.command()
@click.argument("bundle", type=FILE)
@_data
@_limits
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--backend", "engine", type=click.Choice(get_args(BackendChoice)), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def check(bundle: Path, image_root: Path | None, device: str, engine: Any, as_json: bool, **given: Any) -> None:
    """Check BUNDLE on this machine and engine against torch's rows, which the bundle carries; torch is not needed.

    With --verify-data and the options of the export, recall@1 is compared with what torch had then.

    \b
    clipret-export check bundles/cars
    clipret-export check bundles/cars --device cuda
    """
    from clipret_export.parity import check_bundle

    opened = Bundle.open(bundle)
    report = check_bundle(
        opened,
        _limits_for(opened.manifest.precision, given),
        data=_sample(image_root, given),
        device=device,
        engine=engine,
    )
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else _report_table(report.to_dict()))
    if report.problems:
        raise ClipretError(
            f"bundle {opened.path} differs from torch on this machine ({report.problem_text()}): do not search with it"
        )


@main.command()
@click.argument("bundle", type=FILE)
@_plans
def engines(bundle: Path, **given: Any) -> None:
    """Build TensorRT plans into BUNDLE; torch is not needed.

    A search takes a plan that fits its GPU and its TensorRT, and otherwise says so and runs onnxruntime.

    \b
    clipret-export engines bundles/cars --tensorrt --batch 1,64,256     for the GPU of this machine
    clipret-export engines bundles/cars --tensorrt-rtx                  for every GPU from Ampere on, built without one
    clipret-export engines bundles/cars --tensorrt-rtx sm_89,sm_120     for these two
    """
    from clipret_export.engines import add_engines

    requests = _plan_requests(given)
    if not requests:
        raise click.UsageError("name what to build: --tensorrt or --tensorrt-rtx")
    for request in requests:
        made, told = add_engines(bundle, request)
        _show_plans(list(made.manifest.engines), told)


def _plan_requests(given: dict[str, Any]) -> list[Any]:
    from clipret_export.engines import EngineRequest

    try:
        batch = [int(size) for size in given["batch"].split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{given['batch']!r} is no list of numbers, as in 1,64,256", param_hint="--batch"
        ) from None
    made = []
    if given["tensorrt"]:
        made.append(EngineRequest("tensorrt", batch=batch, timing_cache=given["timing_cache"]))
    if given["tensorrt_rtx"] is not None:
        cache = None if given["tensorrt"] else given["timing_cache"]  # of the two only TensorRT has one
        made.append(EngineRequest("tensorrt_rtx", given["tensorrt_rtx"].split(","), batch, cache))
    return made


def _show_plans(keys: list[str], told: dict[str, Any]) -> None:
    """The plans of a bundle, and why those that were just built could not be run."""
    if keys:
        click.echo(f"\nTensorRT plans: {', '.join(keys)}")
    for library, report in told.items():
        click.echo(f"{library}: {report if isinstance(report, str) else 'checked on this GPU'}")


def _sample(image_root: Path | None, given: dict[str, Any]) -> Any:
    from clipret_export.samples import Sample

    if given["verify_data"] is None:
        return None
    columns = {name: given[name] for name in ("image_column", "caption_column")}
    return Sample(given["verify_data"], image_root, given["verify_where"], given["verify_limit"], **columns)


def _limits_for(precision: str, given: dict[str, Any]) -> Any:
    from dataclasses import replace

    from clipret_export.parity import LIMITS

    limits = LIMITS[precision]
    if given["min_cosine"] is not None:
        limits = replace(limits, cosine=given["min_cosine"])
    if given["max_recall_loss"] is not None:
        limits = replace(limits, recall_points=given["max_recall_loss"])
    return limits


def _report_table(report: dict[str, Any]) -> str:
    """A report of the gate as text."""
    limits, towers = report["limits"], [report["image"], report["text"]]

    def row(what: str, name: str, form: str, limit: float | None) -> list[str]:
        return [what, *(format(tower[name], form) for tower in towers), "" if limit is None else format(limit, "g")]

    rows = [
        row("smallest cosine to torch", "min_cosine", ".7f", limits["cosine"]),
        row("mean cosine", "mean_cosine", ".7f", None),
        row("largest error", "max_error", ".1e", None),
        row("error / spread of the rows", "relative_error", ".1e", limits["relative"]),
        row("difference between batches", "batch_difference", ".1e", limits["batch"]),
    ]
    text = show_table(("check", "image", "text", "limit"), rows)
    text += f"\nbatches of {', '.join(map(str, report['batches']))} on {report['engine']}"
    text += f"; {report['images']} images, {report['texts']} texts; "
    text += f"agreement of the ten best {100 * report['top10_agreement']:.2f} %"
    if report["recall"]:
        shares = [
            [name, *(f"{100 * report[key][f'recall_at_{k}']:.2f}%" for k in (1, 5, 10))]
            for name, key in (("torch", "recall_torch"), ("bundle", "recall"))
        ]
        text += "\n\n" + show_table(("recall", "@1", "@5", "@10"), shares)
    return text


if __name__ == "__main__":
    main()
