"""clipret-search serve: galleries over HTTP, with a page and an API."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from clipret.cli.options import BUNDLE, FILE, SEARCHED, encoder_options
from clipret.cli.rerank_options import prompts_option, read_texts, rerank_options
from clipret.cli.settings import Settings, merged
from clipret.errors import ClipretError, require
from clipret.inference.config import EncoderConfig
from clipret.inference.encoder import Encoder
from clipret.openers import open_searchable
from clipret.search.prompts import Prompts
from clipret.search.rerank import Rerank
from clipret.server.limits import MIB, Limits

__all__ = ["serve_command"]


@dataclass(frozen=True)
class ServeLimits:
    """The settings of --limit. Raises click.UsageError for a value out of range."""

    max_upload: int = 32
    timeout: float = 30.0
    batch: int = 64

    def __post_init__(self) -> None:
        for name, low, high in (("max_upload", 1, 1 << 20), ("timeout", 1, 86400), ("batch", 1, 1 << 20)):
            if not low <= getattr(self, name) <= high:
                raise click.UsageError(f"--limit {name} is {getattr(self, name)}: use {low} to {high}.")


_LOCAL = ("localhost", "127.0.0.1", "[::1]")


@click.command("serve", epilog="Example:  clipret-search serve gallery/ --port 8000")
@click.argument("galleries", type=SEARCHED, nargs=-1, required=True, metavar="GALLERY...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--allow-host", "hosts", metavar="NAME", multiple=True, help="A host name that requests may use for this machine."
)
@click.option(
    "--token-file", type=FILE, help="File with the token for adding and deleting images; without it they are off."
)
@prompts_option
@rerank_options
@click.option(
    "--limit",
    "limits",
    type=Settings(ServeLimits),
    multiple=True,
    help="Limits of a request: max_upload=32 (MiB), timeout=30 (seconds); batch=64: queries ranked together.",
)
@click.option("--bundle", "bundles", type=BUNDLE, multiple=True, help="The bundle of each GALLERY, if they have moved.")
@encoder_options
def serve_command(
    galleries: tuple[Path | str, ...],
    host: str,
    port: int,
    hosts: tuple[str, ...],
    token_file: Path | None,
    prompts: Prompts,
    rerank: Rerank,
    reference: Path | None,
    limits: tuple[dict[str, Any], ...],
    bundles: tuple[Path, ...],
    config: EncoderConfig,
) -> None:
    """Serve one or more galleries over HTTP: a search page and a JSON API.

    \b
    The page is at the printed address; /docs there describes the API:
        curl 'http://127.0.0.1:8000/search?q=a+red+truck&k=5&where=hour<6'
        curl -F image=@car.jpg http://127.0.0.1:8000/search

    Changes that other processes make to a gallery are picked up within a second, without interrupting searches. With
    several galleries the page compares their results side by side. Anyone who can reach the address can search; by
    default that is this machine only. With --token-file (or the token in CLIPRET_TOKEN) the API can add and delete
    images.

    --prompts and --rerank apply to every search, with the results of  clipret-search query.  Queries arrive one at a
    time: adapt and k_reciprocal look at the one query, and hubness needs a reference.
    """
    require("fastapi", "serve")
    require("uvicorn", "serve")
    require("python_multipart", "serve")
    from clipret.server.run import open_service, serve
    from clipret.server.snapshot import SearchSettings

    texts = () if reference is None else tuple(read_texts(reference))
    settings = SearchSettings(prompts.forms, rerank, texts)
    if bundles and len(bundles) != len(galleries):
        raise click.UsageError(
            f"{len(bundles)} --bundle for {len(galleries)} galleries: give one for each, in their order"
        )
    encoders = dict[str, Encoder]()
    places = list[tuple[Path | str, Encoder]]()
    for number, path in enumerate(galleries):
        with open_searchable(path) as opened:
            bundle = opened.bundle(bundles[number] if bundles else None)
        encoder = encoders.setdefault(bundle.fingerprint, Encoder(bundle, config))
        places.append((path, encoder))
    known = None if host in ("0.0.0.0", "::") and not hosts else {*_LOCAL, host, *hosts}
    chosen = ServeLimits(**merged(limits, "--limit"))
    bounds = replace(Limits(), body=chosen.max_upload * MIB, seconds=chosen.timeout, batch=chosen.batch)
    with open_service(places, limits=bounds, token=_token(token_file), hosts=known, settings=settings) as it:
        serve(it, host, port, lambda address: click.echo(f"serving {', '.join(it.galleries)} at {address}"))


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("CLIPRET_TOKEN") or None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ClipretError(f"{file} cannot be read ({error}): put the token into it") from error
    if not token:
        raise ClipretError(f"{file} is empty: put the token into it")
    return token
