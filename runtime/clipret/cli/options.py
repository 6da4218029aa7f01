"""Options that several subcommands of clipret-search share, and how they print JSON."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from clipret.backends import BackendChoice
from clipret.cli.completion import MarkedFolder, column_names, gallery_columns, list_columns
from clipret.cli.settings import Settings, merged
from clipret.inference.config import EncoderConfig
from clipret.locations import is_milvus, is_remote

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
PAGE = click.Path(path_type=Path, dir_okay=False)
GALLERY = MarkedFolder("gallery.json")
BUNDLE = MarkedFolder("bundle.json")


class _Location(click.Path):
    """A local path, or an address such as s3://bucket/key as it is: a Path would lose a slash."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and is_remote(value) else super().convert(value, param, ctx)


class _Searched(MarkedFolder):
    """A gallery, or milvus+URI as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_milvus(value) else super().convert(value, param, ctx)


class _Place(MarkedFolder):
    """A bundle, a gallery or a source: a local path, or an address as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and is_remote(value) else super().convert(value, param, ctx)


LOCATION = _Location(path_type=Path)
PLACE = _Place("bundle.json", otherwise="file")
SEARCHED = _Searched("gallery.json")
SHOWN = 10  # skipped images that are listed on the terminal


class Number(click.FloatRange):
    """A number in a range; click's own lets inf and nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value} is not a finite number.", param, ctx)


bundle_option = click.option("--bundle", type=BUNDLE, help="The bundle, if it has moved since indexing.")
_ENCODER = (
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto, cpu, cuda or cuda:N; several with commas share the work.",
    ),
    click.option(
        "--backend",
        type=click.Choice(get_args(BackendChoice)),
        default="auto",
        show_default=True,
        help="What runs the model; auto: a TensorRT engine if one fits the GPU, else onnxruntime; on CPUs OpenVINO for "
        "bf16 and int8.",
    ),
    click.option(
        "--encoder",
        type=Settings(EncoderConfig, leave_out=("device", "backend")),
        multiple=True,
        help="Tuning: threads=4, batch_size=64, fast_decode, decode=gpu, cuda_graphs, image_timeout=10. See "
        "docs/galleries.md.",
    ),
)


@dataclass(frozen=True)
class Runtime:
    """Where a search runs: the encoder's settings, and the bundle's folder if it has moved since indexing."""

    config: EncoderConfig
    bundle: Path | None = None


def encoder_options(function: F) -> F:
    """Adds --device, --backend and --encoder; the command gets `config`, an EncoderConfig."""
    return _with_options(function, _ENCODER, ("device", "backend", "encoder"), lambda given: {"config": _config(given)})


def runtime_options(function: F) -> F:
    """Adds the same and --bundle; the command gets `runtime`, a Runtime."""

    def made(given: dict[str, Any]) -> dict[str, Any]:
        bundle = given.pop("bundle")
        return {"runtime": Runtime(_config(given), bundle)}

    return _with_options(function, (bundle_option, *_ENCODER), ("bundle", "device", "backend", "encoder"), made)


def _config(given: dict[str, Any]) -> EncoderConfig:
    return EncoderConfig(device=given["device"], backend=given["backend"], **merged(given["encoder"], "--encoder"))


def _with_options(
    function: F,
    options: Sequence[Callable[[F], F]],
    names: Sequence[str],
    made: Callable[[dict[str, Any]], dict[str, Any]],
) -> F:
    """Adds options to a command, which gets what `made` makes of their values."""

    @functools.wraps(function)
    def call(*arguments: Any, **given: Any) -> Any:
        own = {name: given.pop(name) for name in names}
        return function(*arguments, **made(own), **given)

    command: Any = call
    for option in reversed(options):
        command = option(command)
    decorated: F = command
    return decorated


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
where_list_option = click.option(
    "--where",
    metavar="SQL",
    shell_complete=list_columns,
    help="SQL condition on the rows of the file, such as \"split = 'val'\".",
)
where_option = click.option(
    "--where",
    metavar="SQL",
    shell_complete=gallery_columns,
    help="SQL condition on the metadata; columns: clipret-search info GALLERY.",
)


@dataclass(frozen=True)
class _Columns:
    """The columns of an annotations file that may have any name."""

    image: str | None = None
    caption: str | None = None
    embedding: str | None = None


def column_option(*kinds: str) -> Callable[[F], F]:
    """Adds --column for columns of these kinds ("image", "caption", "embedding"); the command gets NAME_column each."""
    hidden = [name for name in ("image", "caption", "embedding") if name not in kinds]
    option = click.option(
        "--column",
        type=Settings(_Columns, leave_out=hidden),
        multiple=True,
        metavar=f"{'|'.join(kinds)}=NAME",
        shell_complete=column_names(kinds),
        help=f"Name the column of the {'s, of the '.join(kinds)}s where it is not detected.",
    )

    def columns(given: dict[str, Any]) -> dict[str, Any]:
        names = merged(given["column"], "--column")
        return {f"{kind}_column": names.get(kind) for kind in kinds}

    return lambda function: _with_options(function, (option,), ("column",), columns)


image_root_option = click.option(
    "--image-root", type=FILE, help="What paths in an annotations file are relative to; default: its folder."
)


def print_json(value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # File names that are not UTF-8 arrive as lone surrogates, which JSON can escape and UTF-8 cannot encode.
    click.echo(text.encode("utf-8", "backslashreplace").decode())
