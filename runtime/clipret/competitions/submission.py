"""Answers to two competitions, written only if their scorers would accept them.

Traffic retrieval (CVPR 2023 foundation model challenge, track 2): JSON, the texts in order, ten images each:

    {"results": [{"text": "a white Audi sedan.", "image_names": ["0017.jpg", …]}, …]}

Product retrieval (iFLYTEK 2024 multimodal retrieval): a CSV in the form of the sample submission, one image per query.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Self

from clipret.errors import ClipretError
from clipret.tables import Table, pick_column, read_table

__all__ = ["FORMS", "Form", "Sample", "image_names", "product_answer", "traffic_answer"]

Form = Literal["path", "name", "stem"]
FORMS: tuple[Form, ...] = ("path", "name", "stem")

_NAMING: dict[Form, Callable[[str], str]] = {
    "path": lambda path: path,
    "name": lambda path: PurePosixPath(path).name,
    "stem": lambda path: PurePosixPath(path).stem,
}


def image_names(paths: Iterable[str], form: Form) -> dict[str, str]:
    """The name of each image in an answer: its stored path, its file name, or that without the suffix. Raises
    ClipretError for duplicates.
    """
    names = {path: _NAMING[form](path) for path in paths}
    owners = defaultdict[str, list[str]](list)
    for path, name in names.items():
        owners[name].append(path)
    for name, own in owners.items():
        if len(own) > 1:
            raise ClipretError(f"{own[0]} and {own[1]} would both be called {name}: use another --format names=…")
    return names


def traffic_answer(
    texts: Sequence[str], found: Sequence[Sequence[str]], known: Collection[str] | None = None, k: int = 10
) -> str:
    """The JSON of an answer to the traffic challenge.

    Args:
        texts: The queries.
        found: The names of the images of each query.
        known: The names of all test images; None if unknown.
        k: The number of images per query.

    Raises:
        ClipretError: The scorer would reject the answer: a query is missing or blank, or does not have exactly k
            different known images. The message has the query's number.
    """
    _check_texts(texts, len(found))
    for number, (text, names) in enumerate(zip(texts, found, strict=True), 1):
        where = f"text {number} ({text!r})"
        if len(names) != k:
            raise ClipretError(f"{where} has {len(names)} images, the scorer wants {k}: search again with -k {k}")
        _check_names(where, names, known)
    results = [{"text": text, "image_names": list(names)} for text, names in zip(texts, found, strict=True)]
    return json.dumps({"results": results}, ensure_ascii=False, indent=1) + "\n"


@dataclass(frozen=True)
class Sample:
    """The form of a sample submission: its columns, separator, line ends, and how it names images. `caption` is None if
    it has images only, in the order of the queries.
    """

    table: Table
    image: str
    caption: str | None
    separator: str
    line_end: str
    mark: bool  # whether it starts with a byte order mark, as spreadsheets write it

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ClipretError for what `read_table` raises, and for a column that is neither image nor caption."""
        table = read_table(path)
        image = pick_column(table, None, "image")
        others = [column for column in table.columns if column != image]
        caption = pick_column(table, None, "caption") if others else None
        strange = [column for column in others if column != caption]
        if strange:
            raise ClipretError(f"{path} has a column {strange[0]!r} that is neither image nor caption: take it out")
        data = path.read_bytes()
        header = data.decode("utf-8-sig").splitlines()[0]
        separator = next((mark for mark in ",\t;|" if len(header.split(mark)) == len(table.columns)), ",")
        return cls(table, image, caption, separator, "\r\n" if b"\r\n" in data else "\n", data[:3] == b"\xef\xbb\xbf")

    def form(self, paths: Collection[str]) -> Form:
        """How the sample names images, of all that are known by these stored paths.

        Raises ClipretError when no form gives all of its names: nothing is guessed.
        """
        used = [row[self.image].strip() for row in self.table.rows]
        for form in FORMS:
            names = {_NAMING[form](path) for path in paths}
            if all(name in names for name in used):
                return form
        every = {_NAMING[form](path) for form in FORMS for path in paths}
        odd = next((name for name in used if name not in every), used[0])
        raise ClipretError(
            f"{self.table.path} calls an image {odd!r}, which is no path, file name or name without suffix of one "
            "that is known: say how the answer names them with --format names=…"
        )


def product_answer(
    sample: Sample,
    texts: Sequence[str],
    found: Sequence[str],
    known: Collection[str] | None = None,
    *,
    once: bool = False,
) -> str:
    """The CSV of an answer to the product contest, in the form of the sample.

    Args:
        sample: The sample submission.
        texts: The queries.
        found: The name of the image of each query.
        known: The names of all test images; None if unknown.
        once: No image may answer two queries.

    Raises:
        ClipretError: The scorer would reject the answer: a query is missing or blank, their number or order differs
            from a sample that lists them, an image is unknown, or a name does not fit the sample's form. The message
            has the query's number.
    """
    _check_texts(texts, len(found))
    _check_sample(sample, texts)
    for number, (text, name) in enumerate(zip(texts, found, strict=True), 1):
        _check_names(f"query {number} ({text!r})", [name], known)
    if once:
        _check_names("the answer", found, known)
    rows = [list(sample.table.columns)]
    for text, name in zip(texts, found, strict=True):
        rows.append([name if column == sample.image else text for column in sample.table.columns])
    return ("\ufeff" if sample.mark else "") + _separated(rows, sample)


def _separated(rows: Sequence[Sequence[str]], sample: Sample) -> str:
    if sample.separator != "\t":
        out = io.StringIO()
        csv.writer(out, delimiter=sample.separator, lineterminator=sample.line_end).writerows(rows)
        return out.getvalue()
    for number, row in enumerate(rows):  # such files are read without quoting
        if any(mark in value for value in row for mark in "\t\r\n"):
            raise ClipretError(
                f"query {number} ({row}) holds a tab or a line end, which the sample's shape cannot hold"
            )
    return "".join("\t".join(row) + sample.line_end for row in rows)


def _check_sample(sample: Sample, texts: Sequence[str]) -> None:
    """A sample with as many queries as there are must list the same ones, if it lists any."""
    rows = sample.table.rows
    if sample.caption is not None and len(rows) == len(texts):
        for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1):
            if row[sample.caption].strip() != text.strip():
                raise ClipretError(
                    f"query {number} is {text!r}, in {sample.table.path} {row[sample.caption]!r}: keep its order"
                )
    if len(rows) > len(texts):
        raise ClipretError(f"{sample.table.path} has {len(rows)} rows for {len(texts)} queries: give all of them")


def _check_texts(texts: Sequence[str], found: int) -> None:
    if not texts:
        raise ClipretError("there are no texts to answer: check the list")
    if len(texts) != found:
        raise ClipretError(f"there are {len(texts)} texts and {found} answers: answer every text")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ClipretError(f"text {number} is blank: fill it in")


def _check_names(where: str, names: Sequence[str], known: Collection[str] | None) -> None:
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ClipretError(f"{where} has the image {double} twice: the scorer would reject it; remove duplicates")
    if known is not None:
        for name in names:
            if name not in known:
                raise ClipretError(f"{where} has the image {name}, which is not among the test images: remove it")
