"""What is a figure in a benchmark's JSON: numbers by their path, with the unit's direction where there is one.

Names of keys carry the units ("ms_a_query", "images_a_second"), here as in every benchmark's result; the part of
the path nearest to the number that names one decides whether more is better.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Figure", "direction", "figures", "is_peer", "label_of"]

Better = Literal["higher", "lower"]

_HIGHER = re.compile(
    r"a_(cpu_)?second|_rate$|^rate|times_|ratio|share|gflops|gb_a_second|recall|map_at|cosine|faiss_over|^speedup|top10",
    re.I,
)
_LOWER = re.compile(
    r"(^|_)ms(_|$)|seconds|(^|_)(mib|mb|gib|bytes)(_|$)|^parts$|in_another_order|levels|^slope$|bytes_a_", re.I
)
_IGNORED = re.compile(r"floor|limit|wall|peak_gflops|imports|course|^min_cosine_is|hubness|known", re.I)
_PEERS = re.compile(
    r"open_clip|faiss|pillow|cv2|torchvision|plain|sentence|rclip|numpy|torch|onnx batch 1|onnxruntime batch 1|alone",
    re.I,
)


@dataclass(frozen=True)
class Figure:
    """A number of a question, under the path of keys that leads to it."""

    question: str
    path: tuple[str, ...]
    value: float

    @property
    def name(self) -> str:
        return f"{self.question}: {', '.join(self.path)}"

    @property
    def better(self) -> Better | None:
        return direction(self.path)


def direction(path: tuple[str, ...]) -> Better | None:
    """Whether more of it is better; None where it is no measure but a size or a setting."""
    if any(_IGNORED.search(part) for part in path):
        return None
    for part in reversed(path):
        if _HIGHER.search(part):
            return "higher"
        if _LOWER.search(part):
            return "lower"
    return None


def is_peer(path: tuple[str, ...]) -> bool:
    """Whether a figure is that of a peer that is measured with clipret: its change is not ours."""
    return any(_PEERS.search(part) and not _HIGHER.search(part) and not _LOWER.search(part) for part in path)


def label_of(record: dict[str, Any], number: int) -> str:
    """What a line of a list is called: its words, in their order."""
    words = [str(value) for value in record.values() if isinstance(value, str)]
    return " ".join(words) or str(record.get("rows", record.get("count", number)))


def figures(question: str, result: Any, path: tuple[str, ...] = ()) -> Iterator[Figure]:
    """Every number below `result`, a JSON value."""
    if isinstance(result, dict):
        for key, value in result.items():
            if key != "plots":
                yield from figures(question, value, (*path, str(key)))
    elif isinstance(result, list):
        for number, value in enumerate(result):
            if isinstance(value, dict):
                yield from figures(question, value, (*path, label_of(value, number)))
    elif isinstance(result, int | float) and not isinstance(result, bool):
        yield Figure(question, path, float(result))
