"""`clipret-train soup`: several trained models become a run folder."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipret.errors import ClipretError
from clipret.files import new_folder
from clipret_training.annotations import read_annotations
from clipret_training.choices import SoupMethod
from clipret_training.config import FitConfig
from clipret_training.data import ImageReader, Texts
from clipret_training.filenames import PARAMS
from clipret_training.models import SMALL, LoadedModel, load_model
from clipret_training.optim import Soup, greedy_soup, interpolate, uniform_soup
from clipret_training.run import RunFolder
from clipret_training.tuning import open_device
from clipret_training.validation import quality, recall

__all__ = ["Measure", "Result", "cook"]

_SOUP = "the soup"


@dataclass(frozen=True)
class Result:
    """metrics: what `recall` measured, by the name of the weights; empty without a list to measure on."""

    soup: Soup
    metrics: dict[str, dict[str, Any]]

    def table(self) -> list[tuple[str, list[str]]]:
        rows = []
        for name, found in self.metrics.items():
            recall_at_10, mean = found["text_to_image"]["recall_at_10"], found["mean_recall"]
            taken = "" if name == _SOUP else "yes" if name in self.soup.ingredients else "no"
            rows.append((name, [f"{100 * recall_at_10:.1f}%", f"{100 * mean:.1f}%", taken]))
        return rows


class Measure:
    """The quality of weights on a list, as a training measures its epochs. Reads the list at its first use."""

    def __init__(self, val: str, *, device: str, threads: int | None, val_where: str | None, **columns: Any) -> None:
        self._val, self._where, self._columns = val, val_where, columns
        self._device, self._threads = open_device(device), threads or torch.get_num_threads()
        self._prepared: tuple[Any, ImageReader, Texts] | None = None

    def __call__(self, loaded: LoadedModel) -> dict[str, Any]:
        """What `clipret_training.validation.recall` finds. Raises ClipretError for a list that cannot be read."""
        if self._prepared is None:
            config = FitConfig(data=self._val, model=loaded.source, **self._columns)
            annotations = read_annotations(config, self._val, self._where)
            images = ImageReader(annotations, loaded.image, threads=self._threads, cache_limit=4 << 30)
            self._prepared = annotations.pairs, images, Texts(loaded, annotations)
        pairs, images, texts = self._prepared
        loaded.model.to(self._device)
        return recall(loaded, pairs, images, texts, self._device)


def cook(
    sources: Sequence[str],
    out: Path,
    how: SoupMethod,
    alpha: float,
    original: str | None,
    measure: Measure | None,
    report: Callable[[str], None],
) -> Result:
    """Average the models of `sources` and write a run folder at `out`.

    Raises ClipretError when a source cannot be loaded, when they are of different models or preprocess differently,
    and when `out` is taken. What is written is whole or not there.
    """
    RunFolder.refuse_taken(out)
    started = (original or _original_of(sources[0])) if how == "wise" else None
    first = load_model(started or sources[0])

    def weights_of(source: str) -> Mapping[str, Tensor]:
        loaded = load_model(source)
        _check_alike(first, sources[0] if started is None else started, loaded, source)
        return loaded.model.state_dict()

    metrics: dict[str, dict[str, Any]] = {}

    def measured(name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        assert measure is not None
        first.model.load_state_dict(weights)
        metrics[name] = measure(first)
        return metrics[name]

    if started is not None:
        mixed = interpolate(first.model.state_dict(), weights_of(sources[0]), alpha)
        soup = Soup(mixed, (started, sources[0]), {})
    elif how == "uniform":
        soup = uniform_soup(sources, weights_of)
    else:
        names = iter(sources)  # the first n are measured alone, in their order

        def its_quality(weights: Mapping[str, Tensor]) -> tuple[float, float]:
            return quality(measured(next(names, _SOUP), weights))

        soup = greedy_soup(sources, weights_of, its_quality, report)
    if measure is not None:
        measured(_SOUP, soup.weights)
    first.model.load_state_dict(soup.weights)
    first.model.cpu().eval()
    _write(out, first, soup, how, alpha, metrics)
    return Result(soup, metrics)


def _write(
    out: Path, loaded: LoadedModel, soup: Soup, how: SoupMethod, alpha: float, metrics: dict[str, dict[str, Any]]
) -> None:
    made: dict[str, Any] = {"soup": how, "ingredients": list(soup.ingredients)}
    if how == "wise":
        made["alpha"] = alpha
    with new_folder(out) as folder:
        run = RunFolder.create(folder, made, loaded)
        run.save(loaded, "best")
        run.record([{"weights": name, **found} for name, found in metrics.items()])
        run.log(f"{how} soup of {', '.join(soup.ingredients)}")


def _original_of(run: str) -> str:
    """What a run says that it started from."""
    file = Path(run) / PARAMS
    if not file.is_file():
        raise ClipretError(f"{run} is no run folder and does not say what it started from: name it with --original")
    try:
        started = tomllib.loads(file.read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError) as error:
        raise ClipretError(f"{file} cannot be read ({error}): name what the run started from with --original") from None
    if not isinstance(started, str) or started == SMALL:
        raise ClipretError(
            f"{run} started from random weights: there is nothing to mix it with; name it with --original"
        )
    return started


def _check_alike(first: LoadedModel, first_name: str, loaded: LoadedModel, name: str) -> None:
    for what in ("image", "mean", "std", "text", "tokenizer_json"):
        if getattr(first, what) != getattr(loaded, what):
            part = {"text": "tokenizer", "tokenizer_json": "tokenizer"}.get(what, "preprocessing of images")
            raise ClipretError(f"{first_name} and {name} have a different {part}: average runs that see data alike")
