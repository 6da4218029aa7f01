"""Model soups: the averaged weights of several trained models as a run folder (`clipret-train soup`)."""

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

__all__ = ["Measure", "SoupResult", "make_soup"]

_SOUP = "the soup"


@dataclass(frozen=True)
class SoupResult:
    """A soup and its metrics.

    Args:
        soup: The averaged weights and their ingredients.
        metrics: The metrics of `clipret_training.validation.recall` for each measured model, by its name; empty if
            nothing was measured.
    """

    soup: Soup
    metrics: dict[str, dict[str, Any]]

    def table(self) -> list[tuple[str, list[str]]]:
        """Return for each model recall@10, mean recall, and whether it is an ingredient."""
        rows = []
        for name, metrics in self.metrics.items():
            recall_at_10, mean_recall = metrics["text_to_image"]["recall_at_10"], metrics["mean_recall"]
            used = "" if name == _SOUP else "yes" if name in self.soup.ingredients else "no"
            rows.append((name, [f"{100 * recall_at_10:.1f}%", f"{100 * mean_recall:.1f}%", used]))
        return rows


class Measure:
    """Measures models on an annotations file, as a training does after its epochs. Reads the file at first use.

    Args:
        val: The annotations file.
        device: cpu, cuda or cuda:N.
        threads: Decoding threads; None for all processors.
        val_where: SQL expression; only rows for which it holds are used.
        columns: `image_column`, `caption_column` and `image_root`, as in `FitConfig`.
    """

    def __init__(self, val: str, *, device: str, threads: int | None, val_where: str | None, **columns: Any) -> None:
        self._val, self._where, self._columns = val, val_where, columns
        self._device, self._threads = open_device(device), threads or torch.get_num_threads()
        self._prepared: tuple[Any, ImageReader, Texts] | None = None

    def __call__(self, loaded: LoadedModel) -> dict[str, Any]:
        """Return the metrics of `clipret_training.validation.recall`.

        Raises:
            ClipretError: The annotations file or all of its images cannot be read.
        """
        if self._prepared is None:
            config = FitConfig(data=self._val, model=loaded.source, **self._columns)
            annotations = read_annotations(config, self._val, self._where)
            images = ImageReader(annotations, loaded.image, threads=self._threads, cache_limit=4 << 30)
            self._prepared = annotations.pairs, images, Texts(loaded, annotations)
        pairs, images, texts = self._prepared
        loaded.model.to(self._device)
        return recall(loaded, pairs, images, texts, self._device)


def make_soup(
    sources: Sequence[str],
    out: Path,
    how: SoupMethod,
    alpha: float,
    original: str | None,
    measure: Measure | None,
    report: Callable[[str], None],
) -> SoupResult:
    """Average the weights of several models and write them as a run folder, atomically.

    Args:
        sources: Run folders or other models; one for `wise`.
        out: The run folder to create.
        how: `uniform` is the mean of all, `greedy` the mean of those that improve the metrics (Wortsman et al., Model
            soups, 2022), `wise` a mixture of a model and its original (Wortsman et al., Robust fine-tuning of zero-shot
            models, 2022).
        alpha: Share of the trained model in `wise`, 0 to 1.
        original: The model that the run started from, for `wise`; None for the one in its params.toml.
        measure: Measures the models and the soup; `greedy` needs it.
        report: Called with a line for each step of `greedy`.

    Returns:
        The soup and its metrics.

    Raises:
        ClipretError: A model cannot be loaded, the models or their preprocessing differ, or `out` is not empty.
    """
    RunFolder.refuse_taken(out)
    origin = (original or _original_of(sources[0])) if how == "wise" else None
    first = load_model(origin or sources[0])

    def weights_of(source: str) -> Mapping[str, Tensor]:
        loaded = load_model(source)
        _check_alike(first, origin or sources[0], loaded, source)
        return loaded.model.state_dict()

    metrics: dict[str, dict[str, Any]] = {}

    def measured(name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        assert measure is not None
        first.model.load_state_dict(weights)
        metrics[name] = measure(first)
        return metrics[name]

    if origin is not None:
        mixed = interpolate(first.model.state_dict(), weights_of(sources[0]), alpha)
        soup = Soup(mixed, (origin, sources[0]), {})
    elif how == "uniform":
        soup = uniform_soup(sources, weights_of)
    else:
        names = iter(sources)  # greedy_soup first measures each source alone, in this order

        def quality_of(weights: Mapping[str, Tensor]) -> tuple[float, float]:
            return quality(measured(next(names, _SOUP), weights))

        soup = greedy_soup(sources, weights_of, quality_of, report)
    if measure is not None:
        measured(_SOUP, soup.weights)
    first.model.load_state_dict(soup.weights)
    first.model.cpu().eval()
    _write(out, first, soup, how, alpha, metrics)
    return SoupResult(soup, metrics)


def _write(
    out: Path, loaded: LoadedModel, soup: Soup, how: SoupMethod, alpha: float, metrics: dict[str, dict[str, Any]]
) -> None:
    params: dict[str, Any] = {"soup": how, "ingredients": list(soup.ingredients)}
    if how == "wise":
        params["alpha"] = alpha
    with new_folder(out) as folder:
        run = RunFolder.create(folder, params, loaded)
        run.save(loaded, "best")
        run.record([{"weights": name, **values} for name, values in metrics.items()])
        run.log(f"{how} soup of {', '.join(soup.ingredients)}")


def _original_of(run: str) -> str:
    """The model that a run started from, according to its params.toml."""
    file = Path(run) / PARAMS
    if not file.is_file():
        raise ClipretError(f"{run} is no run folder, so its original model is unknown: pass it with --original")
    try:
        original = tomllib.loads(file.read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError) as error:
        raise ClipretError(f"{file} cannot be read ({error}): pass the original model with --original") from error
    if not isinstance(original, str) or original == SMALL:
        raise ClipretError(
            f"{run} started from random weights, so there is no original model to mix it with: pass one with --original"
        )
    return original


def _check_alike(first: LoadedModel, first_name: str, loaded: LoadedModel, name: str) -> None:
    """Raise ClipretError if two models preprocess images or texts differently."""
    for field in ("image", "mean", "std", "text", "tokenizer_json"):
        if getattr(first, field) != getattr(loaded, field):
            part = "tokenizers" if field in ("text", "tokenizer_json") else "preprocessing of images"
            raise ClipretError(f"{first_name} and {name} differ in their {part}: average runs that do not")
