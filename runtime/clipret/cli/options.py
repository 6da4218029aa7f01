"""Options that several subcommands of clipret-search have, and what they print in the same way."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from clipret.cli.completion import MarkedFolder, gallery_columns, list_columns
from clipret.inference.config import EncoderConfig, EngineChoice
from clipret.milvus.collection import is_milvus
from clipret.sources.remote import is_remote

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
PAGE = click.Path(path_type=Path, dir_okay=False)
GALLERY = MarkedFolder("gallery.json")
BUNDLE = MarkedFolder("bundle.json")


class _Location(click.Path):
    """A path of this machine, or an address such as s3://bucket/key as it was given: a Path would lose a slash."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and is_remote(value) else super().convert(value, param, ctx)


class _Searched(MarkedFolder):
    """A gallery, or milvus+URI as it was given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_milvus(value) else super().convert(value, param, ctx)


LOCATION = _Location(path_type=Path)
SEARCHED = _Searched("gallery.json")
SHOWN = 10  # skipped pictures that are named on the terminal


class Number(click.FloatRange):
    """A number in a range; click's own lets inf and nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value} is not a finite number.", param, ctx)


device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N; with commas: several that share."
)
engine_option = click.option(
    "--engine",
    "backend",
    type=click.Choice(get_args(EngineChoice)),
    default="auto",
    show_default=True,
    help="What runs the towers; auto: a plan that fits the GPU, else onnxruntime; on CPUs OpenVINO for bf16 and int8.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Processor threads; default: all there are."
)
bundle_option = click.option(
    "--bundle", type=BUNDLE, help="The bundle, where it is no longer where it was at indexing."
)
_ENCODING = (
    click.option("--fast-decode", is_flag=True, help="Let JPEGs be shrunk while they are decoded; see above."),
    click.option(
        "--decode",
        type=click.Choice(("pillow", "gpu")),
        default="pillow",
        show_default=True,
        help="gpu: JPEGs by nvImageCodec; see docs/gpu.md.",
    ),
    click.option("--cuda-graphs", is_flag=True, help="Record the engine's work on a GPU; see docs/gpu.md."),
    click.option(
        "--batch-size", type=click.IntRange(1, 65536), default=32, show_default=True, help="Pictures an engine call."
    ),
    click.option(
        "--picture-timeout",
        type=Number(0.1, 86400),
        default=60.0,
        show_default=True,
        help="Seconds a picture may take.",
    ),
)
_RUNNING = (device_option, engine_option, threads_option)


@dataclass(frozen=True)
class Runtime:
    """Where a search runs: the settings of its encoder, and the bundle where it is not where it was at indexing."""

    config: EncoderConfig
    bundle: Path | None = None


def encoder_options(function: F) -> F:
    """Adds all options of an encoder; the command gets them as `config`, an EncoderConfig."""
    names = [field.name for field in fields(EncoderConfig)]
    return _with_options(function, (*_ENCODING, *_RUNNING), names, lambda given: {"config": EncoderConfig(**given)})


def config_options(function: F) -> F:
    """Adds --device, --engine and --threads; the command gets them as `config`, an EncoderConfig."""
    names = ("device", "backend", "threads")
    return _with_options(function, _RUNNING, names, lambda given: {"config": EncoderConfig(**given)})


def runtime_options(function: F) -> F:
    """Adds --bundle, --device, --engine and --threads; the command gets them as `runtime`, a Runtime."""

    def made(given: dict[str, Any]) -> dict[str, Any]:
        bundle = given.pop("bundle")
        return {"runtime": Runtime(EncoderConfig(**given), bundle)}

    return _with_options(function, (bundle_option, *_RUNNING), ("bundle", "device", "backend", "threads"), made)


def _with_options(
    function: F,
    options: Sequence[Callable[[F], F]],
    names: Sequence[str],
    made: Callable[[dict[str, Any]], dict[str, Any]],
) -> F:
    """A command with further options, whose values it gets as one object."""

    @functools.wraps(function)
    def call(*arguments: Any, **given: Any) -> Any:
        own = {name: given.pop(name) for name in names}
        return function(*arguments, **made(own), **given)

    for option in reversed(options):
        call = option(call)
    return call  # type: ignore[return-value]


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
where_list_option = click.option(
    "--where",
    metavar="SQL",
    shell_complete=list_columns,
    help="Only rows of the list for which this holds, e.g. \"split = 'val'\".",
)
where_option = click.option(
    "--where",
    metavar="SQL",
    shell_complete=gallery_columns,
    help="Only pictures for which this holds; columns: clipret-search info GALLERY.",
)
image_column_option = click.option(
    "--image-column",
    metavar="NAME",
    shell_complete=list_columns,
    help="Column of the pictures' paths; default: detected.",
)
title_column_option = click.option(
    "--title-column", metavar="NAME", shell_complete=list_columns, help="Column of the texts; default: detected."
)
image_root_option = click.option(
    "--image-root", type=FILE, help="What paths in a list are relative to; default: its folder."
)


def print_json(value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # File names that are not UTF-8 come as lone surrogates, for which JSON has an escape and UTF-8 nothing.
    click.echo(text.encode("utf-8", "backslashreplace").decode())
