"""clipret-export: a model in, a bundle out; and the check of a bundle, again, wherever it is."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from clipret.backends import BackendChoice
from clipret.bundle import Bundle, Precision
from clipret.cli.settings import Settings, merged
from clipret.console import DefaultGroup, show_table
from clipret.errors import ClipretError, require
from clipret.hardware import peak_memory

if TYPE_CHECKING:
    from clipret_export.engines import EngineRequest
    from clipret_export.parity import Limits
    from clipret_export.samples import Sample

FILE = click.Path(path_type=Path)

EXPORT_EPILOG = """
\b
Examples
  A run of clipret-train, matrix products in half precision:
    clipret-export runs/cars bundles/cars --fp16
  Checked with your own images and captions, recall@1 included:
    clipret-export runs/cars bundles/cars --fp16 --verify captions.csv,where="split = 'val'"
  int8 for CPUs, its ranges taken from the training images:
    clipret-export runs/cars bundles/cars-int8 --int8 --calibration captions.csv
  TensorRT for RTX engines for two architectures, built without a GPU:
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
    clipret-export engines BUNDLE --tensorrt   build TensorRT engines for this machine into a bundle
    """


@dataclass(frozen=True)
class ImageSet:
    """Images of the user's: the settings that --verify and --calibration have in common."""

    data: Path | None = None
    where: str | None = None
    image_root: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    limit: int = 1000

    def sample(self, option: str) -> "Sample | None":
        """The images; None without a file. Raises click.UsageError where there are settings but no file."""
        from clipret_export.samples import Sample

        if self.data is None:
            for name in ("where", "image_root", "image_column", "caption_column"):
                if getattr(self, name) is not None:
                    raise click.UsageError(f"{option} {name} needs a file: add data=FILE.")
            return None
        if self.limit < 1:
            raise click.UsageError(f"{option} limit is {self.limit}: use 1 or more.")
        return Sample(self.data, self.image_root, self.where, self.limit, self.image_column, self.caption_column)


@dataclass(frozen=True)
class Verification(ImageSet):
    """The settings of --verify: images to check with, and how far the towers may differ from torch."""

    min_cosine: float | None = None
    max_recall_loss: float | None = None

    def limits(self, precision: Precision) -> "Limits":
        """The limits of this precision, with those of the user."""
        from clipret_export.parity import LIMITS

        limits = LIMITS[precision]
        if self.min_cosine is not None:
            limits = dataclasses.replace(limits, cosine=self.min_cosine)
        if self.max_recall_loss is not None:
            limits = dataclasses.replace(limits, recall_points=self.max_recall_loss)
        return limits


@dataclass(frozen=True)
class EngineSettings:
    """The settings of --engine."""

    batch: str = "1,64"
    timing_cache: Path | None = None


_verify_option = click.option(
    "--verify",
    type=Settings(Verification, first="data"),
    multiple=True,
    help="Check with your own images, too: a folder or an annotations file, where=SQL, limit=1000, image_root=FOLDER, "
    "image_column=NAME, caption_column=NAME; min_cosine=… and max_recall_loss=POINTS change what is accepted.",
)


def _engine_options(command: Any) -> Any:
    for option in (
        click.option(
            "--engine",
            type=Settings(EngineSettings),
            multiple=True,
            help="Of TensorRT engines: batch=1,64, the batch sizes that they are tuned for; timing_cache=FILE, which "
            "makes the next --tensorrt build faster.",
        ),
        click.option(
            "--tensorrt-rtx",
            is_flag=False,
            flag_value="sm_80+",
            metavar="[ARCH,...]",
            help="TensorRT for RTX engines, built without a GPU; alone: for every GPU from Ampere on.",
        ),
        click.option("--tensorrt", is_flag=True, help="TensorRT engines for the GPU of this machine."),
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
@click.option(
    "--calibration",
    type=Settings(ImageSet, leave_out=("limit",), first="data"),
    multiple=True,
    help="Images from which int8 takes its ranges, with the settings of --verify; default: half of those of --verify.",
)
@_verify_option
@_engine_options
@click.option("--overwrite", is_flag=True, help="Replace BUNDLE; the old one stays until the new is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def export(
    source: str,
    bundle: Path,
    calibration: tuple[dict[str, Any], ...],
    verify: tuple[dict[str, Any], ...],
    tensorrt: bool,
    tensorrt_rtx: str | None,
    engine: tuple[dict[str, Any], ...],
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

    The towers take uint8 images and token ids in batches of any size and return embeddings of unit length. The parity
    check runs them in the code that searches and compares them with torch. A tower that differs gets its worst
    layers back in float32; one that still differs is not written.
    """
    for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
        require(package, "export")
    from clipret_export.pipeline import export_bundle

    chosen = [name for name in get_args(Precision)[1:] if given[name]]  # fp32 has no flag
    if len(chosen) > 1:
        raise click.UsageError(f"a bundle has one precision, not {' and '.join(chosen)}: export twice")
    precision: Any = chosen[0] if chosen else "fp32"
    began = time.monotonic()
    verification = Verification(**merged(verify, "--verify"))
    made = export_bundle(
        source,
        bundle,
        precision=precision,
        overwrite=overwrite,
        limits=verification.limits(precision),
        verify_data=verification.sample("--verify"),
        calibration_data=ImageSet(**merged(calibration, "--calibration")).sample("--calibration"),
        engines=_engine_requests(tensorrt, tensorrt_rtx, engine),
        fused=fused,
    )
    manifest, report = made.manifest, json.loads(made.file("verify.json").read_text(encoding="utf-8"))
    seconds = time.monotonic() - began
    size = sum(entry.bytes for entry in manifest.files.values())
    peak = peak_memory()
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
        ("peak memory", "unknown" if peak is None else f"{peak / 2**30:.1f} GiB"),
    ]
    click.echo(f"{made.path}\n{show_table(('what', 'value'), rows)}\n\n{_report_table(report)}")
    if manifest.float32_layers:
        click.echo(f"\nkept in float32: {', '.join(manifest.float32_layers)}")
    _show_plans(list(manifest.engines), report["engine_checks"])
    if report["skipped"]:
        click.echo(f"unreadable images: {len(report['skipped'])}, named in {made.path / 'verify.json'}", err=True)


@main.command()
@click.argument("bundle", type=FILE)
@_verify_option
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--backend", type=click.Choice(get_args(BackendChoice)), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def check(bundle: Path, verify: tuple[dict[str, Any], ...], device: str, backend: Any, as_json: bool) -> None:
    """Repeat BUNDLE's parity check on this machine and backend. It carries torch's embeddings: torch is not needed.

    With --verify and the images of the export, recall@1 is compared with torch's at export time.

    \b
    clipret-export check bundles/cars
    clipret-export check bundles/cars --device cuda
    """
    from clipret_export.parity import check_bundle

    opened = Bundle.open(bundle)
    verification = Verification(**merged(verify, "--verify"))
    report = check_bundle(
        opened,
        verification.limits(opened.manifest.precision),
        data=verification.sample("--verify"),
        device=device,
        backend=backend,
    )
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else _report_table(report.to_dict()))
    if report.problems:
        raise ClipretError(
            f"bundle {opened.path} differs from torch on this machine ({report.problem_text()}): do not search with it"
        )


@main.command()
@click.argument("bundle", type=FILE)
@_engine_options
def engines(bundle: Path, *, tensorrt: bool, tensorrt_rtx: str | None, engine: tuple[dict[str, Any], ...]) -> None:
    """Build TensorRT engines into BUNDLE; torch is not needed.

    A search uses an engine that fits its GPU and its TensorRT; without one it says so and uses onnxruntime.

    \b
    clipret-export engines bundles/cars --tensorrt --engine batch=1,64,256   for the GPU of this machine
    clipret-export engines bundles/cars --tensorrt-rtx                       for every GPU from Ampere on, without one
    clipret-export engines bundles/cars --tensorrt-rtx sm_89,sm_120          for these two
    """
    from clipret_export.engines import add_engines

    requests = _engine_requests(tensorrt, tensorrt_rtx, engine)
    if not requests:
        raise click.UsageError("name what to build: --tensorrt or --tensorrt-rtx")
    for request in requests:
        made, told = add_engines(bundle, request)
        _show_plans(list(made.manifest.engines), told)


def _engine_requests(
    tensorrt: bool, tensorrt_rtx: str | None, settings: tuple[dict[str, Any], ...]
) -> list["EngineRequest"]:
    from clipret_export.engines import EngineRequest

    chosen = EngineSettings(**merged(settings, "--engine"))
    try:
        batch = [int(size) for size in chosen.batch.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"batch={chosen.batch} is not a list of numbers such as 1,64,256", param_hint="--engine"
        ) from error
    requests = []
    if tensorrt:
        requests.append(EngineRequest("tensorrt", batch=batch, timing_cache=chosen.timing_cache))
    if tensorrt_rtx is not None:
        cache = None if tensorrt else chosen.timing_cache  # of the two only TensorRT has one
        requests.append(EngineRequest("tensorrt_rtx", tensorrt_rtx.split(","), batch, cache))
    return requests


def _show_plans(keys: list[str], told: dict[str, Any]) -> None:
    """The plans of a bundle, and why those that were just built could not be run."""
    if keys:
        click.echo(f"\nTensorRT engines: {', '.join(keys)}")
    for library, report in told.items():
        click.echo(f"{library}: {report if isinstance(report, str) else 'checked on this GPU'}")


def _report_table(report: dict[str, Any]) -> str:
    """A report of the parity check as text."""
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
    text += f"\nbatches of {', '.join(map(str, report['batches']))} on {report['backend']}"
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
