"""The parity check: a bundle, run by the code that searches, against torch on the same images and texts.

Nothing here needs torch. A bundle has torch's embeddings of the built-in inputs (reference.npz), so any machine and
backend can repeat the check.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
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
from clipret_export.comparison import (
    LIMITS,
    Limits,
    TowerEmbeddings,
    TowerReport,
    compare,
    exceeded,
    include_data,
    top10_agreement,
)
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


@dataclass(frozen=True)
class Reference:
    """Embeddings of unit length that torch computed, float32 [N,D].

    Attributes:
        image: Of the built-in images.
        text: Of the built-in texts.
        pairs: The user's images that could be decoded, with their captions, in the order of their embeddings.
        data_image: Of the user's images.
        data_text: Of the user's captions.
    """

    image: Embeddings
    text: Embeddings
    pairs: PairSet | None = None
    data_image: Embeddings | None = None
    data_text: Embeddings | None = None

    def to_bytes(self) -> bytes:
        """The built-in embeddings as an .npz file. The user's images and captions do not go into a bundle."""
        buffer = io.BytesIO()
        np.savez(buffer, image=self.image, text=self.text, inputs=np.array(_inputs_sha256()))
        return buffer.getvalue()


@dataclass
class Report:
    """The result of a parity check, written to verify.json.

    Attributes:
        precision: Precision of the bundle.
        backend: The backend that ran the towers.
        limits: The limits that were checked.
        batches: The batch sizes that were run.
        image: The image tower.
        text: The text tower.
        top10_agreement: Share of torch's ten best images of a text that are among the ten best of the bundle.
        images: Number of images compared.
        texts: Number of texts compared.
        recall_torch: recall@1, 5 and 10 of torch on the user's captions, from 0 to 1.
        recall: The same of the bundle.
        problems: The exceeded limits by tower; empty if the bundle may be used.
    """

    precision: str
    backend: str
    limits: Limits
    batches: tuple[int, ...]
    image: TowerReport
    text: TowerReport
    top10_agreement: float
    images: int
    texts: int
    recall_torch: dict[str, float] | None = None
    recall: dict[str, float] | None = None
    problems: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def problem_text(self) -> str:
        """The problems as one line."""
        return "; ".join(f"{tower} tower: {', '.join(problems)}" for tower, problems in self.problems.items())


def _inputs_sha256() -> str:
    """Digest of the built-in inputs, which may change between versions of clipret."""
    digest = hashlib.sha256(repr(TEXTS).encode())
    for image in sample_images():
        digest.update(image.tobytes())
    return digest.hexdigest()


def load_reference(bundle: Bundle) -> Reference:
    """Read the embeddings of torch from a bundle.

    Args:
        bundle: The bundle.

    Returns:
        The reference, without data of the user.

    Raises:
        ClipretError: The bundle has no reference, or one for other built-in inputs.
    """
    with np.load(bundle.file("reference.npz"), allow_pickle=False) as stored:
        if str(stored["inputs"]) != _inputs_sha256():
            raise ClipretError(
                f"bundle {bundle.path} has a reference for the images of another version of clipret: export it again"
            )
        return Reference(stored["image"], stored["text"])


def parity_check(
    bundle: Bundle,
    expected: Reference,
    limits: Limits,
    *,
    device: str = "cpu",
    backend: BackendChoice = "auto",
    largest: int = 12,
) -> Report:
    """Run both towers as a search does, in batches of 1, 5 and `largest`, and compare the embeddings with torch's.

    Args:
        bundle: The bundle to check.
        expected: The embeddings of torch.
        limits: The largest differences allowed.
        device: cpu, cuda or cuda:N.
        backend: The backend that runs the towers.
        largest: Largest batch size, at least 12.

    Returns:
        The report. Wrong embeddings raise no exception: they are in `Report.problems`.

    Raises:
        ClipretError: The backend cannot be opened, or cannot run a batch.
    """
    batches = (1, 5, max(12, largest))
    repeat = -(-batches[-1] // len(expected.image))
    images = (sample_images() * repeat)[: batches[-1]]
    data: dict[str, Sequence[Path | str]] = {"image": (), "text": ()}
    if expected.pairs is not None:
        data = {"image": expected.pairs.paths, "text": expected.pairs.captions}
    reports: dict[str, TowerReport] = {}
    last: dict[str, Embeddings] = {}
    for name, builtin, items, user in (
        ("image", expected.image, images, expected.data_image),
        ("text", expected.text, TEXTS, expected.data_text),
    ):
        # One tower at a time: two large ones may not fit into memory together.
        encoder = Encoder(bundle, EncoderConfig(device=device, backend=backend))
        batched = []
        for size in batches:
            encoder.config = replace(encoder.config, batch_size=size)
            # Three images are enough for batch size 1: an embedding depends on its batch or it does not.
            part = items if name == "text" else items[: max(size, 3)]
            batched.append(_encode(encoder, name, part))
        targets = np.concatenate([builtin] * repeat)[: len(items)]
        reports[name], last[name] = compare(batched, targets, builtin), batched[-1][: len(builtin)]
        if user is not None and len(user):
            last[name] = _encode(encoder, name, data[name])
            reports[name] = include_data(reports[name], last[name], user)
        ran_on = encoder.backend_name(name)
    ours, target = TowerEmbeddings(last["image"], last["text"]), TowerEmbeddings(expected.image, expected.text)
    if expected.pairs is not None and expected.data_image is not None and expected.data_text is not None:
        target = TowerEmbeddings(expected.data_image, expected.data_text if expected.pairs.captions else expected.text)
    labelled = expected.pairs is not None and expected.pairs.captions
    report = Report(
        precision=bundle.manifest.precision,
        backend=ran_on,
        limits=limits,
        batches=batches,
        image=reports["image"],
        text=reports["text"],
        top10_agreement=top10_agreement(ours, target),
        images=len(ours.image),
        texts=len(ours.text),
        recall_torch=recalls(target, expected.pairs) if labelled and expected.pairs is not None else None,
        recall=recalls(ours, expected.pairs) if labelled and expected.pairs is not None else None,
        problems={name: problems for name, tower in reports.items() if (problems := exceeded(tower, limits))},
    )
    _judge_recall(report)
    return report


def check_bundle(
    bundle: Bundle, limits: Limits, *, data: Sample | None = None, device: str = "cpu", backend: BackendChoice = "auto"
) -> Report:
    """Repeat the parity check on this machine, with the embeddings and the recall of torch that the bundle has.

    Args:
        bundle: The bundle to check.
        limits: The largest differences allowed.
        data: The images and captions that the export was checked with.
        device: cpu, cuda or cuda:N.
        backend: The backend that runs the towers.

    Returns:
        The report.

    Raises:
        ClipretError: The export was checked with other data, or as `parity_check` and `load_reference`.
    """
    largest = max((size for engine in bundle.manifest.engines.values() for size in engine.batch), default=0)
    report = parity_check(
        bundle,
        load_reference(bundle),
        limits,
        device=device,
        backend=backend,
        largest=largest if device != "cpu" else 0,
    )
    if data is None:
        return report
    pairs = data.read()
    encoder = Encoder(bundle, EncoderConfig(device=device, backend=backend))
    batches = list(encoder.encode_images(range(len(pairs.paths)), lambda at: pairs.paths[at]))
    kept = pairs.subset([at for batch in batches for at in batch.items])
    before = json.loads(bundle.file("verify.json").read_text(encoding="utf-8"))
    if before["data_sha256"] != data_sha256(kept):
        images = before.get("images", before.get("pictures"))  # as older bundles call them
        raise ClipretError(
            f"bundle {bundle.path} was not exported with these {len(kept.paths)} images and {len(kept.captions)} "
            f"captions ({images} and {before['texts']} then): give the same --verify data=…, where=… and limit=…"
        )
    report.images, report.texts = len(kept.paths), len(kept.captions)
    if kept.captions:
        image = np.concatenate([batch.embeddings for batch in batches])
        report.recall_torch = before["recall_torch"]
        report.recall = recalls(TowerEmbeddings(image, encoder.encode_texts(kept.captions)), kept)
        _judge_recall(report)
    return report


def data_sha256(pairs: PairSet) -> str:
    """Digest of the file names and captions that a recall was measured with.

    Args:
        pairs: The images and captions.

    Returns:
        The SHA-256 in hexadecimal.
    """
    named = [[path.name for path in pairs.paths], pairs.captions, pairs.of_image]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _judge_recall(report: Report) -> None:
    """Add a recall@1 that differs too much to the problems of the report."""
    if report.recall is None or report.recall_torch is None:
        return
    lost = 100 * (report.recall_torch["recall_at_1"] - report.recall["recall_at_1"])
    if abs(lost) > report.limits.recall_points + 1e-9:
        # Report it for the tower that differs more: the next attempt improves that one.
        tower = "image" if report.image.mean_cosine < report.text.mean_cosine else "text"
        problem = f"recall@1 differs by {lost:+.2f} points, limit {report.limits.recall_points}"
        report.problems.setdefault(tower, []).append(problem)


def recalls(embeddings: TowerEmbeddings, pairs: PairSet) -> dict[str, float]:
    """Recall of the captions, ranked exactly over float16 embeddings as in a gallery.

    Args:
        embeddings: Embeddings of the images and captions of `pairs`.
        pairs: The images and captions.

    Returns:
        recall_at_1, recall_at_5 and recall_at_10, from 0 to 1.
    """
    metrics = evaluate(Ranker(embeddings.image.astype(np.float16)), embeddings.text, pairs.of_caption())
    return {f"recall_at_{k}": getattr(metrics, f"recall_at_{k}") for k in (1, 5, 10)}


def _encode(encoder: Encoder, name: str, items: Sequence[Image.Image | Path | str]) -> Embeddings:
    """All embeddings of a tower. A backend that cannot run the batch raises ClipretError."""
    try:
        if name == "text":
            return encoder.encode_texts([str(item) for item in items])
        embeddings = np.empty((0, encoder.bundle.manifest.embedding_dim), dtype=np.float32)
        for batch in encoder.encode_images(items, lambda item: item):  # type: ignore[arg-type, return-value]
            if batch.skipped:
                raise ClipretError(
                    f"{batch.skipped[0][0]} was readable before and is no longer: restore it, then check again"
                )
            embeddings = np.concatenate([embeddings, batch.embeddings])
        return embeddings
    except ClipretError:
        raise
    except Exception as error:  # the errors of the backends have no common base
        reason = one_line(error)
        raise ClipretError(
            f"the {name} tower does not run in batches of {encoder.config.batch_size}: {reason}"
        ) from error
