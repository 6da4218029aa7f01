"""The parity check: a bundle, run by the code that searches, against what torch made of the same images and texts.

Nothing here needs torch. A bundle carries torch's embeddings for the built-in inputs (reference.npz), so that the check
can be repeated on any machine and engine.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipret.arrays import Embeddings
from clipret.backends import BackendChoice
from clipret.bundle import Bundle
from clipret.errors import ClipretError, one_line
from clipret.evaluation.metrics import evaluate
from clipret.inference.config import EncoderConfig
from clipret.inference.encoder import Encoder
from clipret.pairs import PairSet
from clipret.ranking.ranker import Ranker
from clipret_export.samples import TEXTS, Sample, sample_images

__all__ = [
    "LIMITS",
    "Limits",
    "Reference",
    "Report",
    "TowerReport",
    "check_bundle",
    "data_sha256",
    "load_reference",
    "parity_check",
    "recalls",
]


_NORM = 1e-3  # in any precision: the normalisation itself is always float32


@dataclass(frozen=True)
class Limits:
    """What a tower may lose against torch in float32.

    cosine: the smallest allowed of any embedding. relative: the largest allowed error of a built-in embedding as a
        share of how far
    it lies from the mean of all embeddings: an untrained tower maps everything to nearly the same embedding, and then a
    cosine alone proves little; None where there is no such limit. rounding: the length of an error that the precision
    itself explains, to which `relative` does not apply (embeddings of an untrained MobileCLIP-S1 lie within 0.001 of
    each other).
    batch: the largest allowed difference of any component of an embedding between batch sizes. recall_points: the
    largest allowed difference of recall@1, in percentage points.
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
class Reference:
    """torch's unit embeddings, float32: of the built-in images and texts, and of the user's where there are any.

    `pairs`: the user's images that could be decoded, and their captions, in the order of the embeddings.
    """

    image: Embeddings
    text: Embeddings
    pairs: PairSet | None = None
    data_image: Embeddings | None = None
    data_text: Embeddings | None = None

    def to_bytes(self) -> bytes:
        """The built-in embeddings as an .npz file; the user's images and captions are not put into a bundle."""
        buffer = io.BytesIO()
        np.savez(buffer, image=self.image, text=self.text, inputs=np.array(_inputs_sha256()))
        return buffer.getvalue()


@dataclass(frozen=True)
class TowerReport:
    """One tower against torch: its worst embedding over all batch sizes, and over the user's data."""

    min_cosine: float
    mean_cosine: float
    max_error: float
    relative_error: float
    error_length: float  # of the largest error of a built-in embedding
    batch_difference: float
    norm_error: float  # largest difference of an embedding's length from 1, which no cosine shows
    confused: int  # built-in inputs whose embedding is nearer to another's embedding of torch than to their own


@dataclass
class Report:
    """verify.json. `top10_agreement`: the share of torch's ten best images of a text that the bundle has among its
    ten. Recalls are shares of the user's captions."""

    precision: str
    engine: str
    limits: Limits
    batches: tuple[int, ...]
    image: TowerReport
    text: TowerReport
    top10_agreement: float
    images: int
    texts: int
    recall_torch: dict[str, float] | None = None
    recall: dict[str, float] | None = None
    problems: dict[str, list[str]] = field(default_factory=dict)  # by tower

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def problem_text(self) -> str:
        return "; ".join(f"{tower} tower: {', '.join(found)}" for tower, found in self.problems.items())


def _inputs_sha256() -> str:
    """Which built-in inputs a reference belongs to: another clipret may bring others."""
    digest = hashlib.sha256(repr(TEXTS).encode())
    for image in sample_images():
        digest.update(image.tobytes())
    return digest.hexdigest()


def load_reference(bundle: Bundle) -> Reference:
    """The reference of a bundle. Raises ClipretError when it has none or one for other inputs."""
    with np.load(bundle.file("reference.npz"), allow_pickle=False) as stored:
        if str(stored["inputs"]) != _inputs_sha256():
            raise ClipretError(
                f"bundle {bundle.path} was checked with the images of another version of clipret: export it again"
            )
        return Reference(stored["image"], stored["text"])


def parity_check(
    bundle: Bundle,
    expected: Reference,
    limits: Limits,
    *,
    device: str = "cpu",
    engine: BackendChoice = "auto",
    largest: int = 12,
) -> Report:
    """Run both towers as a search would, at batch 1, 5 and `largest` (at least 12), and compare with torch's
    embeddings.

    A wrong embedding is no exception: `report.problems` is empty where the bundle may be used. Raises ClipretError when
    an engine cannot be opened, or cannot run a batch at all.
    """
    batches = (1, 5, max(12, largest))
    repeat = -(-batches[-1] // len(expected.image))
    made = (sample_images() * repeat)[: batches[-1]]
    data: dict[str, Sequence[Path | str]] = {"image": (), "text": ()}
    if expected.pairs is not None:
        data = {"image": expected.pairs.paths, "text": expected.pairs.captions}
    reports: dict[str, TowerReport] = {}
    last: dict[str, Embeddings] = {}
    for name, builtin, items, user in (
        ("image", expected.image, made, expected.data_image),
        ("text", expected.text, TEXTS, expected.data_text),
    ):
        # One tower at a time: two large ones fill a memory.
        encoder = Encoder(bundle, EncoderConfig(device=device, backend=engine))
        found = []
        for size in batches:
            encoder.config = replace(encoder.config, batch_size=size)
            # Three images one by one are enough: an embedding either depends on its batch or does not.
            part = items if name == "text" else items[: max(size, 3)]
            found.append(_encode(encoder, name, part))
        targets = np.concatenate([builtin] * repeat)[: len(items)]
        reports[name], last[name] = _compare(found, targets, builtin), found[-1][: len(builtin)]
        if user is not None and len(user):
            last[name] = _encode(encoder, name, data[name])
            reports[name] = _widen(reports[name], last[name], user)
        ran_on = encoder.backend_name(name)
    ours, target = TowerEmbeddings(last["image"], last["text"]), TowerEmbeddings(expected.image, expected.text)
    if expected.pairs is not None and expected.data_image is not None and expected.data_text is not None:
        target = TowerEmbeddings(expected.data_image, expected.data_text if expected.pairs.captions else expected.text)
    labelled = expected.pairs is not None and expected.pairs.captions
    report = Report(
        precision=bundle.manifest.precision,
        engine=ran_on,
        limits=limits,
        batches=batches,
        image=reports["image"],
        text=reports["text"],
        top10_agreement=_agreement(ours, target),
        images=len(ours.image),
        texts=len(ours.text),
        recall_torch=recalls(target, expected.pairs) if labelled and expected.pairs is not None else None,
        recall=recalls(ours, expected.pairs) if labelled and expected.pairs is not None else None,
        problems={name: told for name, tower in reports.items() if (told := _problems(tower, limits))},
    )
    _judge_recall(report)
    return report


def check_bundle(
    bundle: Bundle, limits: Limits, *, data: Sample | None = None, device: str = "cpu", engine: BackendChoice = "auto"
) -> Report:
    """Repeat the parity check on this machine, with the embeddings and the recall of torch that the bundle carries.

    `data`: the images and captions that the export was checked with. Raises ClipretError for others, and as
    `parity_check`.
    """
    largest = max((size for plan in bundle.manifest.engines.values() for size in plan.batch), default=0)
    report = parity_check(
        bundle, load_reference(bundle), limits, device=device, engine=engine, largest=largest if device != "cpu" else 0
    )
    if data is None:
        return report
    pairs = data.read()
    encoder = Encoder(bundle, EncoderConfig(device=device, backend=engine))
    batches = list(encoder.encode_images(range(len(pairs.paths)), lambda at: pairs.paths[at]))
    kept = pairs.subset([at for batch in batches for at in batch.items])
    before = json.loads(bundle.file("verify.json").read_text(encoding="utf-8"))
    if before["data_sha256"] != data_sha256(kept):
        raise ClipretError(
            f"bundle {bundle.path} was not exported with these {len(kept.paths)} images and {len(kept.captions)} "
            f"captions ({before['images']} and {before['texts']} then): give the same --verify data=…, where=… "
            "and limit=…"
        )
    report.images, report.texts = len(kept.paths), len(kept.captions)
    if kept.captions:
        image = np.concatenate([batch.embeddings for batch in batches])
        report.recall_torch = before["recall_torch"]
        report.recall = recalls(TowerEmbeddings(image, encoder.encode_texts(kept.captions)), kept)
        _judge_recall(report)
    return report


def data_sha256(pairs: PairSet) -> str:
    """Which images, by name, and captions a recall was measured with."""
    named = [[path.name for path in pairs.paths], pairs.captions, pairs.of_image]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _judge_recall(report: Report) -> None:
    if report.recall is None or report.recall_torch is None:
        return
    lost = 100 * (report.recall_torch["recall_at_1"] - report.recall["recall_at_1"])
    if abs(lost) > report.limits.recall_points + 1e-9:
        # The tower that lost more is the one to fix.
        tower = "image" if report.image.mean_cosine < report.text.mean_cosine else "text"
        told = f"recall@1 differs by {lost:+.2f} points, limit {report.limits.recall_points}"
        report.problems.setdefault(tower, []).append(told)


@dataclass(frozen=True)
class TowerEmbeddings:
    """Unit embeddings of images [N,D] and of texts [M,D]."""

    image: Embeddings
    text: Embeddings


def recalls(embeddings: TowerEmbeddings, pairs: PairSet) -> dict[str, float]:
    """recall@1/5/10 of the captions, ranked exactly over float16 embeddings, as a gallery holds them."""
    metrics = evaluate(Ranker(embeddings.image.astype(np.float16)), embeddings.text, pairs.of_caption())
    return {f"recall_at_{k}": getattr(metrics, f"recall_at_{k}") for k in (1, 5, 10)}


def _encode(encoder: Encoder, name: str, items: Sequence[Image.Image | Path | str]) -> Embeddings:
    """All embeddings of a tower; an engine that cannot run the batch at all is a ClipretError like any other."""
    try:
        if name == "text":
            return encoder.encode_texts([str(item) for item in items])
        embeddings = np.empty((0, encoder.bundle.manifest.embedding_dim), dtype=np.float32)
        for batch in encoder.encode_images(items, lambda item: item):  # type: ignore[arg-type, return-value]
            if batch.skipped:
                raise ClipretError(f"{batch.skipped[0][0]} could be read before and not any more: check it again")
            embeddings = np.concatenate([embeddings, batch.embeddings])
        return embeddings
    except ClipretError:
        raise
    except Exception as error:  # engines raise a dozen types of their own
        reason = one_line(error)
        raise ClipretError(
            f"the {name} tower does not run in batches of {encoder.config.batch_size}: {reason}"
        ) from None


def _compare(found: list[Embeddings], targets: Embeddings, builtin: Embeddings) -> TowerReport:
    pairs = [(embeddings.astype(np.float64), targets[: len(embeddings)].astype(np.float64)) for embeddings in found]
    cosines = np.concatenate([_cosines(embeddings, target) for embeddings, target in pairs])
    centre = builtin.astype(np.float64).mean(axis=0)
    error = max(float(np.abs(embeddings - target).max()) for embeddings, target in pairs)
    lengths = np.concatenate([np.linalg.norm(a - b, axis=1) for a, b in pairs])
    spread = np.concatenate([np.linalg.norm(b - centre, axis=1) for _, b in pairs])
    largest = found[-1]
    return TowerReport(
        min_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        max_error=error,
        relative_error=float((lengths / spread).max()),
        error_length=float(lengths.max()),
        batch_difference=max(float(np.abs(embeddings - largest[: len(embeddings)]).max()) for embeddings in found),
        norm_error=max(float(np.abs(np.linalg.norm(embeddings, axis=1) - 1).max()) for embeddings, _ in pairs),
        confused=_confused(largest[: len(builtin)], builtin),
    )


def _confused(embeddings: Embeddings, target: Embeddings) -> int:
    """Embeddings that are nearer to another input's target than to their own by more than two targets can be alike."""
    scores = embeddings.astype(np.float64) @ target.T.astype(np.float64)
    return int((scores.argmax(axis=1) != np.arange(len(target))).sum())


def _widen(report: TowerReport, embeddings: Embeddings, target: Embeddings) -> TowerReport:
    """The report with the user's embeddings counted in."""
    if not len(embeddings):
        return report
    cosines = _cosines(embeddings.astype(np.float64), target.astype(np.float64))
    return replace(
        report,
        min_cosine=min(report.min_cosine, float(cosines.min())),
        mean_cosine=float(cosines.mean()),
        max_error=max(report.max_error, float(np.abs(embeddings - target).max())),
    )


def _problems(tower: TowerReport, limits: Limits) -> list[str]:
    """Every comparison is written so that NaN fails it."""
    found = []
    if not tower.min_cosine >= limits.cosine:
        found.append(f"smallest cosine {tower.min_cosine:.7f}, limit {limits.cosine}")
    explained = tower.error_length <= limits.rounding
    if limits.relative is not None and not explained and not tower.relative_error <= limits.relative:
        found.append(f"error {tower.relative_error:.2g} of the spread of the embeddings, limit {limits.relative}")
    if not tower.batch_difference <= limits.batch:
        found.append(f"an embedding changes by {tower.batch_difference:.2g} with its batch, limit {limits.batch}")
    if not tower.norm_error <= _NORM:
        found.append(f"an embedding's length differs from 1 by {tower.norm_error:.2g}, limit {_NORM}")
    if limits.relative is not None and tower.confused and not explained:
        found.append(f"{tower.confused} of the check's inputs are taken for another")
    return found


def _agreement(found: TowerEmbeddings, target: TowerEmbeddings) -> float:
    """Share of torch's ten best images of a text that are among the ten best of the bundle, mean over the texts."""
    if not len(target.text):
        return 1.0
    k = min(10, len(target.image))
    shares = []
    for start in range(0, len(target.text), 256):
        part = slice(start, start + 256)
        ours, theirs = (
            np.argsort(-(embeddings.text[part] @ embeddings.image.T), axis=1)[:, :k] for embeddings in (found, target)
        )
        shares += [len(set(a) & set(b)) / k for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    return float(np.mean(shares))


def _cosines(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    cosines: npt.NDArray[np.float64] = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosines
