"""The hardware for a gallery of a given size: hours, processors, storage and memory, each with its formula and origin.

A line is "measured" (on this model, in benchmarks/results/), "computed" (from another measurement, by the formula
shown), or "given" by the user. Nothing is guessed: values that were never measured, such as a GPU's rate, must be
given.
"""

import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from clipret.errors import ClipretError
from clipret.schema import Amount, Count, checked

__all__ = ["Line", "Rates", "Workload", "plan", "read_rates"]

T = TypeVar("T")
Origin = Literal["measured", "computed", "given", "missing"]
_HNSW_M = 16  # of Milvus's own default
_BATCH = "16"  # queries ranked together: what a service under load gathers


@dataclass(frozen=True)
class Workload:
    """What to plan for.

    Attributes:
        images: Number of images.
        model: Name of the model.
        precision: Of encoding on processors.
        qps: Queries per second.
        gpus, cores: The hardware that encodes; how long does it take?
        hours: The time for encoding; how much hardware does it take?
        rate: Images per second of one GPU with this model, as measured by the user.
        tflops: TFLOP/s that a GPU sustains, instead of `rate`.
        image: Size of the images.
        kilobytes: Size of an image's file.
        milvus_qps: Queries per second of one Milvus query node, from eval --against on the user's own index.
    """

    images: int
    model: str
    precision: str = "bf16"
    qps: float = 0.0
    gpus: int = 0
    cores: int = 0
    hours: float | None = None
    rate: float | None = None
    tflops: float | None = None
    image: str = "0.3 MP"
    kilobytes: float | None = None
    milvus_qps: float | None = None


@dataclass(frozen=True)
class Line:
    """One figure: `value` in `unit`; None if something is missing, which `formula` then names."""

    part: str
    name: str
    value: float | None
    unit: str
    formula: str
    origin: Origin


class Model(msgspec.Struct, frozen=True):
    """Dimension of its embeddings, and GFLOP per image and per query."""

    dim: Count
    image_gflop: Amount
    text_gflop: Amount


class EncodeRates(msgspec.Struct, frozen=True):
    """Of `model`, by precision."""

    measured_on: str
    model: str
    images_a_core_second: dict[str, Amount]
    gflops_a_core: dict[str, Amount]
    queries_a_core_second: dict[str, Amount]


class Decoding(msgspec.Struct, frozen=True):
    default: Amount
    fast: Amount


class DecodeRates(msgspec.Struct, frozen=True):
    """By image size."""

    measured_on: str
    core_ms_a_image: dict[str, Decoding]


class RankRates(msgspec.Struct, frozen=True):
    """For a number of embeddings of dimension `dim`, by the number of queries ranked together."""

    measured_on: str
    rows: Count
    dim: Count
    core_ms_a_query: dict[str, Amount]


class GalleryRates(msgspec.Struct, frozen=True):
    measured_on: str
    database_bytes_a_image: Amount


class Rates(msgspec.Struct, frozen=True):
    """rates.json. Further keys are ignored."""

    models: dict[str, Model]
    encode: EncodeRates
    decode: DecodeRates
    rank: RankRates
    gallery: GalleryRates


def read_rates(file: Path | None = None) -> Rates:
    """The rates of the package, or of a file of the same form. Raises ClipretError."""
    source = importlib.resources.files("clipret.diagnostics") / "rates.json" if file is None else file
    try:
        return checked(json.loads(source.read_bytes()), Rates)
    except OSError as error:
        raise ClipretError(f"{source} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ClipretError(f"{source} holds no rates ({error}): benchmarks/make_rates.py writes it") from error


def plan(workload: Workload, rates: Rates) -> list[Line]:
    """The figures, in the order in which they depend on each other. Raises ClipretError if there is no rate."""
    model = _pick(rates.models, workload.model, "model")
    encode = _Encoding(workload, model, rates)
    lines = [*encode.lines(), *_storage(workload, model, rates)]
    if workload.qps:
        lines += _searching(workload, model, rates)
    return lines


def _pick(table: Mapping[str, T], name: str, kind: str) -> T:
    if name not in table:
        raise ClipretError(f"there are no rates of {kind} {name}: choose one of {', '.join(table)}, or pass --rates")
    return table[name]


class _Encoding:
    def __init__(self, workload: Workload, model: Model, rates: Rates) -> None:
        self.workload, self.model, self.rates = workload, model, rates
        self.part = "encoding"

    def lines(self) -> list[Line]:
        workload, encode, decode = self.workload, self.rates.encode, self.rates.decode
        lines = list[Line]()
        gflops = _pick(encode.gflops_a_core, workload.precision, "precision")
        if workload.model == encode.model:
            core = encode.images_a_core_second[workload.precision]
            how: tuple[str, Origin] = (encode.measured_on, "measured")
        else:
            core = gflops / self.model.image_gflop
            how = (
                f"{gflops:g} GFLOP/s a core ({encode.measured_on}) / {self.model.image_gflop:g} GFLOP an image",
                "computed",
            )
        lines.append(self._line("a core, tower alone", core, "images/s", *how))
        milliseconds = _pick(decode.core_ms_a_image, workload.image, "image size").default
        origin = f"a JPEG of {workload.image}, {decode.measured_on}"
        lines.append(self._line("decoding", milliseconds, "core ms/image", origin, "measured"))
        both = 1 / (1 / core + milliseconds / 1000)
        formula = f"1 / (1/{core:.4g} + {milliseconds:g} ms)"
        lines.append(self._line("a core, with decoding", both, "images/s", formula, "computed"))
        hours = workload.images / both / 3600
        lines.append(
            self._line("on processors", hours, "core hours", f"{workload.images:.3g} / {both:.4g} / 3600", "computed")
        )
        lines += self._time("cores", workload.cores, hours, "core hours")
        lines += self._gpu(milliseconds)
        if workload.kilobytes is None:
            lines.append(self._missing("to be read", "TB", "give kilobytes=…, the size of an image file"))
        else:
            total = workload.images * workload.kilobytes * 1e3
            formula = f"{workload.images:.3g} x {workload.kilobytes:g} kB"
            lines.append(self._line("to be read", total / 1e12, "TB", formula, "given"))
            if workload.hours is not None:
                network = 8 * total / (3600 * workload.hours) / 1e9
                formula = f"8 x {total / 1e12:.3g} TB / {workload.hours:g} h"
                lines.append(self._line("from the store", network, "Gbit/s", formula, "computed"))
        return lines

    def _time(self, what: str, count: int, work: float, unit: str) -> list[Line]:
        """Hours on so many machines, or machines for so many hours."""
        if self.workload.hours is not None:
            need = math.ceil(work / self.workload.hours)
            return [
                self._line(
                    f"{what} for {self.workload.hours:g} h",
                    need,
                    what,
                    f"{work:.4g} {unit} / {self.workload.hours:g} h",
                    "computed",
                )
            ]
        if count:
            return [self._line(f"on {count} {what}", work / count, "hours", f"{work:.4g} {unit} / {count}", "computed")]
        return []

    def _gpu(self, milliseconds: float) -> list[Line]:
        workload = self.workload
        if workload.rate is not None:
            rate = workload.rate
            lines = [self._line("a GPU", rate, "images/s", "rate", "given")]
        elif workload.tflops is not None:
            rate = 1000 * workload.tflops / self.model.image_gflop
            formula = f"{workload.tflops:g} TFLOP/s (tflops) / {self.model.image_gflop:g} GFLOP an image"
            lines = [self._line("a GPU", rate, "images/s", formula, "computed")]
        else:
            advice = "no GPU was measured: give rate=…, which clipret-search index prints there, or tflops=…"
            return [self._missing("a GPU", "images/s", advice)]
        hours = workload.images / rate / 3600
        formula = f"{workload.images:.3g} / {rate:.4g} / 3600"
        lines.append(self._line("on GPUs", hours, "GPU hours", formula, "computed"))
        lines += self._time("GPUs", workload.gpus, hours, "GPU hours")
        cores = rate * milliseconds / 1000
        formula = f"{rate:.4g} images/s x {milliseconds:g} ms"
        lines.append(self._line("cores that decode for a GPU", cores, "cores", formula, "computed"))
        return lines

    def _line(self, name: str, value: float, unit: str, formula: str, origin: Origin) -> Line:
        return Line(self.part, name, value, unit, formula, origin)

    def _missing(self, name: str, unit: str, formula: str) -> Line:
        return Line(self.part, name, None, unit, formula, "missing")


def _storage(workload: Workload, model: Model, rates: Rates) -> list[Line]:
    dim, part = int(model.dim), "storage"
    database = rates.gallery.database_bytes_a_image
    images, many = workload.images, f"{workload.images:.3g}"
    each: list[tuple[str, float, str, Origin]] = [
        ("embeddings, float16", 2 * dim, f"{many} x 2 x {dim}", "computed"),
        ("quantized, int8", dim, f"{many} x {dim}", "computed"),
        ("database", database, f"{many} x {database:g}: {rates.gallery.measured_on}, no metadata", "measured"),
    ]
    lines = [Line(part, name, images * size / 1e9, "GB", formula, origin) for name, size, formula, origin in each]
    total = sum(line.value or 0 for line in lines)
    lines.append(Line(part, "a gallery", total, "GB", "the three above", "computed"))
    return lines


def _searching(workload: Workload, model: Model, rates: Rates) -> list[Line]:
    dim, encode, rank, part = int(model.dim), rates.encode, rates.rank, "searching"
    many, lines = f"{workload.images:.3g}", list[Line]()
    if workload.model == encode.model:
        texts, how = encode.queries_a_core_second[workload.precision], encode.measured_on
        origin: Origin = "measured"
    else:
        texts = encode.gflops_a_core[workload.precision] / model.text_gflop
        how, origin = (
            f"{encode.gflops_a_core[workload.precision]:g} GFLOP/s a core / {model.text_gflop:g} GFLOP",
            "computed",
        )
    lines.append(Line(part, "texts a core", texts, "texts/s", how, origin))
    formula = f"{workload.qps:g} / {texts:.4g}"
    lines.append(Line(part, "cores for texts", workload.qps / texts, "cores", formula, "computed"))
    measured = rank.core_ms_a_query[_BATCH]
    query = measured * workload.images / rank.rows * dim / rank.dim
    ratio = f"{many} / {rank.rows:.0e} x {dim} / {rank.dim}"
    formula = f"{measured:g} ms ({rank.measured_on}, {_BATCH} at once) x {ratio}"
    lines.append(Line(part, "exact ranking", query, "core ms/query", formula, "computed"))
    formula = f"{workload.qps:g} x {query:.4g} ms"
    lines.append(Line(part, "cores for exact ranking", workload.qps * query / 1000, "cores", formula, "computed"))
    lines.append(
        Line(part, "memory, exact", workload.images * dim / 1e9, "GB", f"quantized: {many} x {dim}", "computed")
    )
    for name, size, formula in (
        ("memory, Milvus FLAT or IVF_FLAT", 4 * dim, f"{many} x 4 x {dim}"),
        ("memory, Milvus IVF_SQ8", dim, f"{many} x {dim}"),
        ("memory, Milvus HNSW", 4 * dim + 8 * _HNSW_M, f"{many} x (4 x {dim} + 2 x {_HNSW_M} links x 4)"),
    ):
        lines.append(Line(part, name, workload.images * size / 1e9, "GB", formula, "computed"))
    if workload.milvus_qps is None:
        advice = "give milvus_qps=…: what  clipret-search eval milvus+URI QUERIES --against exact  says of a node"
        lines.append(Line(part, "Milvus query nodes", None, "nodes", advice, "missing"))
    else:
        nodes = math.ceil(workload.qps / workload.milvus_qps)
        formula = f"{workload.qps:g} / {workload.milvus_qps:g} (milvus_qps), each with all of the index"
        lines.append(Line(part, "Milvus query nodes", nodes, "nodes", formula, "computed"))
    return lines
