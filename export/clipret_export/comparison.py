"""Embeddings of a bundle against those of torch: what is measured, and how much they may differ."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from clipret.arrays import Embeddings

__all__ = [
    "LIMITS",
    "Limits",
    "TowerEmbeddings",
    "TowerReport",
    "compare",
    "exceeded",
    "include_data",
    "top10_agreement",
]

_NORM = 1e-3  # in any precision: the normalization itself is always float32


@dataclass(frozen=True)
class Limits:
    """The largest differences from torch in float32 that a tower may have.

    Attributes:
        cosine: Smallest cosine similarity of any embedding to that of torch.
        relative: Largest error of a built-in embedding relative to its distance from the mean of all embeddings, or
            None. An untrained tower maps every input to nearly the same embedding, so a cosine alone proves little.
        batch: Largest difference of any component of an embedding between batch sizes.
        recall_points: Largest difference of recall@1 in percentage points.
        rounding: Length of an error that the precision itself explains, and to which `relative` does not apply.
            Embeddings of an untrained MobileCLIP-S1 lie within 0.001 of each other.
    """

    cosine: float
    relative: float | None
    batch: float
    recall_points: float
    rounding: float = 0.0


LIMITS = {
    "fp32": Limits(cosine=0.999999, relative=1e-3, batch=1e-5, recall_points=0.1, rounding=1e-5),
    "fp16": Limits(cosine=0.9999, relative=0.1, batch=1e-3, recall_points=0.1, rounding=2e-3),
    "bf16": Limits(cosine=0.999, relative=None, batch=5e-3, recall_points=0.2),
    "int8": Limits(cosine=0.995, relative=None, batch=1e-3, recall_points=0.5),
}


@dataclass(frozen=True)
class TowerReport:
    """One tower against torch, over all batch sizes and the user's data.

    Attributes:
        min_cosine: Smallest cosine similarity of an embedding to that of torch.
        mean_cosine: Mean cosine similarity.
        max_error: Largest difference of a component.
        relative_error: Largest error of a built-in embedding relative to its distance from the mean embedding.
        error_length: Length of the largest error of a built-in embedding.
        batch_difference: Largest difference of a component between batch sizes.
        norm_error: Largest difference of an embedding's length from 1, which no cosine shows.
        confused: Number of built-in inputs whose embedding is closer to torch's embedding of another input.
    """

    min_cosine: float
    mean_cosine: float
    max_error: float
    relative_error: float
    error_length: float
    batch_difference: float
    norm_error: float
    confused: int


@dataclass(frozen=True)
class TowerEmbeddings:
    """Embeddings of unit length: of images float32 [N,D] and of texts float32 [M,D]."""

    image: Embeddings
    text: Embeddings


def compare(batched: list[Embeddings], targets: Embeddings, builtin: Embeddings) -> TowerReport:
    """Compare a tower's embeddings of the built-in inputs with those of torch.

    Args:
        batched: Embeddings [n,D] for each batch size, of the first n inputs; the last has all of them.
        targets: torch's embeddings [N,D] of the same inputs, repeated as the inputs are.
        builtin: torch's embeddings [M,D], each input once.

    Returns:
        The report, in which NaN stays NaN.
    """
    pairs = [(embeddings.astype(np.float64), targets[: len(embeddings)].astype(np.float64)) for embeddings in batched]
    cosines = np.concatenate([_cosines(embeddings, target) for embeddings, target in pairs])
    centre = builtin.astype(np.float64).mean(axis=0)
    error = max(float(np.abs(embeddings - target).max()) for embeddings, target in pairs)
    lengths = np.concatenate([np.linalg.norm(a - b, axis=1) for a, b in pairs])
    spread = np.concatenate([np.linalg.norm(b - centre, axis=1) for _, b in pairs])
    largest = batched[-1]
    return TowerReport(
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        max_error=error,
        relative_error=float((lengths / spread).max()),
        error_length=float(lengths.max()),
        batch_difference=max(float(np.abs(embeddings - largest[: len(embeddings)]).max()) for embeddings in batched),
        norm_error=max(float(np.abs(np.linalg.norm(embeddings, axis=1) - 1).max()) for embeddings, _ in pairs),
        confused=_confused(largest[: len(builtin)], builtin),
    )


def include_data(report: TowerReport, embeddings: Embeddings, target: Embeddings) -> TowerReport:
    """Add the user's data to a report.

    Args:
        report: The report on the built-in inputs.
        embeddings: The tower's embeddings of the user's data, [N,D].
        target: torch's embeddings of the same data, [N,D].

    Returns:
        A report with the mean cosine of the user's data, and the worst values of both.
    """
    if not len(embeddings):
        return report
    cosines = _cosines(embeddings.astype(np.float64), target.astype(np.float64))
    return replace(
        report,
        min_cosine=min(report.min_cosine, float(cosines.min())),
        mean_cosine=float(cosines.mean()),
        max_error=max(report.max_error, float(np.abs(embeddings - target).max())),
    )


def exceeded(tower: TowerReport, limits: Limits) -> list[str]:
    """Say which limits a tower exceeds.

    Args:
        tower: The report on the tower.
        limits: The limits.

    Returns:
        One phrase for each exceeded limit.
    """
    # Every comparison is written so that NaN fails it.
    problems = []
    if not tower.min_cosine >= limits.cosine:
        problems.append(f"smallest cosine {tower.min_cosine:.7f}, limit {limits.cosine}")
    explained = tower.error_length <= limits.rounding
    if limits.relative is not None and not explained and not tower.relative_error <= limits.relative:
        problems.append(f"error {tower.relative_error:.2g} of the spread of the embeddings, limit {limits.relative}")
    if not tower.batch_difference <= limits.batch:
        problems.append(f"an embedding changes by {tower.batch_difference:.2g} with its batch, limit {limits.batch}")
    if not tower.norm_error <= _NORM:
        problems.append(f"the length of an embedding differs from 1 by {tower.norm_error:.2g}, limit {_NORM}")
    if limits.relative is not None and tower.confused and not explained:
        problems.append(f"{tower.confused} of the built-in inputs have the embedding of another input")
    return problems


def top10_agreement(ours: TowerEmbeddings, target: TowerEmbeddings) -> float:
    """Agreement of a bundle with torch on the ten best images of a text.

    Args:
        ours: The embeddings of the bundle.
        target: The embeddings of torch.

    Returns:
        The share of torch's ten best images that are among those of the bundle, mean over the texts; 1 without texts.
    """
    if not len(target.text):
        return 1.0
    k = min(10, len(target.image))
    shares = []
    for start in range(0, len(target.text), 256):
        part = slice(start, start + 256)
        best, torch_best = (
            np.argsort(-(embeddings.text[part] @ embeddings.image.T), axis=1)[:, :k] for embeddings in (ours, target)
        )
        shares += [len(set(a) & set(b)) / k for a, b in zip(best.tolist(), torch_best.tolist(), strict=True)]
    return float(np.mean(shares))


def _confused(embeddings: Embeddings, target: Embeddings) -> int:
    """How many embeddings are closer to the target of another input than to their own."""
    scores = embeddings.astype(np.float64) @ target.T.astype(np.float64)
    return int((scores.argmax(axis=1) != np.arange(len(target))).sum())


def _cosines(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    cosines: npt.NDArray[np.float64] = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosines
