"""The export's own check: the bundle, run by the runtime's own code, against torch."""

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from clipret.bundle import Bundle
from clipret.encoder import Encoder
from clipret.errors import ClipretError
from clipret.images import fit
from clipret.text import Tokenizer
from clipret.training.loaded import LoadedModel

__all__ = ["LIMITS", "Check", "Reference", "reference", "verify"]

Rows = npt.NDArray[np.float32]

LIMITS = {"fp32": 0.999999, "fp16": 0.9999}  # smallest cosine to torch float32 that is let through
BATCHES = (1, 3, 8)

TEXTS = (
    "red",
    "a red sedan",
    "a woman with a backpack, seen from behind",
    "一辆红色的轿车停在路边",
    "two dogs run across a field of tall grass while a man in a yellow coat watches them from the fence",
    "night, rain",
    "a grey truck",
    "The quick brown fox jumps over the lazy dog; " * 12,  # longer than any context: the cut must agree too
)


@dataclass(frozen=True)
class Check:
    """One tower against torch: the worst row over all batch sizes."""

    min_cosine: float
    max_error: float
    limit: float
    batches: tuple[int, ...] = BATCHES


@dataclass(frozen=True)
class Reference:
    """What torch makes of the check's inputs, computed before any layer is replaced: unit rows float32 [N,D]."""

    image: Rows
    text: Rows


def pictures() -> list[Image.Image]:
    """Eight pictures, none of them square: smooth colour fields with hard-edged shapes and noise, always the same."""
    made = []
    for number, (width, height) in enumerate([(320, 200), (90, 251), (640, 64), (33, 77), (500, 499), (224, 180)] * 2):
        if number == max(BATCHES):
            break
        rng = np.random.default_rng(number)
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-0.08, 0.08, (3, 3)) * (1, 1, 40)]
        canvas = 127 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
        canvas[height // 4 : height // 2, width // 5 : width // 2] = rng.integers(0, 256, 3)
        made.append(Image.fromarray(canvas.clip(0, 255).astype(np.uint8)))
    return made


def reference(loaded: LoadedModel) -> Reference:
    """Embeddings by the model's own encode_image and encode_text in float32, texts at full context length."""
    model = loaded.model.float().eval()
    pixels = np.stack([fit(picture, loaded.image) for picture in pictures()])
    tokens = Tokenizer(loaded.tokenizer_json, loaded.text)(TEXTS)
    short = loaded.text.context_length - tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, short)), constant_values=loaded.text.pad_id)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (loaded.mean, loaded.std))
    with torch.inference_mode():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        image = F.normalize(model.encode_image((images - mean) / std), dim=-1)  # type: ignore[operator]
        text = F.normalize(model.encode_text(torch.from_numpy(tokens)), dim=-1)  # type: ignore[operator]
    return Reference(image.numpy(), text.numpy())


def verify(bundle: Bundle, expected: Reference) -> dict[str, object]:
    """Run both towers of a bundle as a search would and compare them with `expected`.

    Returns the report that becomes verify.json. Raises ClipretError when a tower misses the precision's limit
    or confuses two of the inputs.
    """
    limit = LIMITS[bundle.manifest.precision]
    found: dict[str, list[Rows]] = {"image": [], "text": []}
    for size in BATCHES:
        encoder = Encoder(bundle, batch_size=size)
        batches = list(encoder.encode_images(pictures(), lambda picture: picture))
        found["image"].append(np.concatenate([batch.rows for batch in batches]))
        found["text"].append(encoder.encode_texts(TEXTS))
    report: dict[str, object] = {"precision": bundle.manifest.precision}
    for name, target in (("image", expected.image), ("text", expected.text)):
        report[name] = asdict(_compare(name, found[name], target, limit))
    return report


def _compare(name: str, found: list[Rows], target: Rows, limit: float) -> Check:
    cosine = min(float(_cosines(rows, target).min()) for rows in found)
    error = max(float(np.abs(rows - target).max()) for rows in found)
    if not cosine >= limit:  # also true for NaN
        raise ClipretError(
            f"the exported {name} tower differs from torch (smallest cosine {cosine:.6f}, limit {limit}): "
            "nothing was written; export without --fp16, or report this model"
        )
    # Untrained towers map everything to nearly the same row, and then a cosine alone proves little.
    if any((rows @ target.T).argmax(axis=1).tolist() != list(range(len(target))) for rows in found):
        raise ClipretError(f"the exported {name} tower takes one check input for another: nothing was written")
    return Check(cosine, error, limit)


def _cosines(rows: Rows, target: Rows) -> npt.NDArray[np.float64]:
    a, b = rows.astype(np.float64), target.astype(np.float64)
    cosines: npt.NDArray[np.float64] = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return cosines
