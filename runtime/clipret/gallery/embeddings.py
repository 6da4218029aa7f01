"""Embeddings computed elsewhere, with their images: .npy, .npz, Parquet, arrays."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from clipret.errors import ClipretError, require
from clipret.tables import Table, pick_column, read_table

__all__ = ["BLOCK", "FINGERPRINT", "Embeddings", "Record", "Value", "list_beside", "open_embeddings"]

BLOCK = 8192  # rows: 16 MiB of float32 at 512 dimensions
FINGERPRINT = b"clipret.fingerprint"  # the key under which a Parquet file of ours names its bundle

Value = str | int | float | None
Record = Mapping[str, Value]
Rows = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings with their images.

    Attributes:
        blocks: Reads them again on each call: embeddings [b,D] as they are, and b records, whose `image_column` is the
            path.
        fingerprint: Of the bundle, if the file has it.
    """

    name: str
    folder: Path
    count: int
    dimension: int
    image_column: str
    blocks: Callable[[], Iterator[tuple[Rows, Sequence[Record]]]]
    fingerprint: str | None = None


def list_beside(file: Path) -> Path:
    """The file that describes the rows of an exported .npy file or faiss index."""
    return file.with_name(file.name + ".jsonl")


def open_embeddings(
    source: Path | Rows,
    paths: Path | Sequence[str] | None = None,
    *,
    image_column: str | None = None,
    embedding_column: str | None = None,
) -> Embeddings:
    """Open embeddings for `import_embeddings`, and check them before a gallery is changed.

    Args:
        source: An array float16, float32 or float64 [N,D], an .npy file of one, an .npz file with one, or a .parquet
            file with a column of float lists.
        paths: The image of each embedding: a .csv, .tsv or .jsonl file, a .txt file with a path per line, or a
            sequence. Not for .parquet, which has a column of paths; optional for an .npz file with an array of strings
            and for an .npy file of `export_gallery`. Further columns become metadata.
        image_column: Column of the paths. Default: detected.
        embedding_column: Column of the embeddings, needed if there are several.

    Raises:
        ClipretError: A file that cannot be read, a different number of paths and embeddings, or a missing column.
    """
    if isinstance(source, np.ndarray):
        return _from_array("the array", Path.cwd(), source, paths, image_column)
    kind = source.suffix.lower()
    if kind == ".parquet":
        if paths is not None:
            raise ClipretError(f"{source} names its images itself: leave the list of paths out")
        return _from_parquet(source, image_column, embedding_column)
    if kind not in (".npy", ".npz"):
        raise ClipretError(f"{source} is of no known kind: give a .npy, .npz or .parquet file")
    try:
        rows, held = _load(source)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ClipretError(f"{source} cannot be read ({error}): give a .npy, .npz or .parquet file") from error
    return _from_array(str(source), source.parent, rows, held if paths is None else paths, image_column)


def _load(source: Path) -> tuple[Rows, Path | list[str] | None]:
    """The embeddings of an .npy (memory-mapped) or .npz file, and the paths that come with them."""
    if source.suffix.lower() == ".npy":
        listed = list_beside(source)
        return np.lib.format.open_memmap(source, mode="r"), listed if listed.is_file() else None
    with source.open("rb") as file, np.load(file, allow_pickle=False) as content:
        arrays: list[npt.NDArray[Any]] = [content[name] for name in content.files]
    rows = [array for array in arrays if array.ndim == 2 and array.dtype.kind == "f"]
    names = [array for array in arrays if array.ndim == 1 and array.dtype.kind == "U"]
    if len(rows) != 1 or len(names) > 1:
        raise ClipretError(
            f"{source} holds {len(rows)} arrays of floats [N,D] and {len(names)} of strings [N]: save one of each"
        )
    return rows[0], [str(name) for name in names[0]] if names else None


def _from_array(
    name: str, folder: Path, rows: Rows, paths: Path | Sequence[str] | None, image_column: str | None
) -> Embeddings:
    if rows.dtype.kind != "f" or rows.ndim != 2 or not rows.size:
        raise ClipretError(f"{name} holds {rows.dtype} {list(rows.shape)}: embeddings are floats [N,D]")
    if paths is None:
        raise ClipretError(f"{name} does not say which images its rows belong to: name a list with --paths")
    records: Sequence[Record]
    if isinstance(paths, Path):
        folder = paths.parent
        records, column = _read_list(paths, image_column)
    else:
        records, column = [{"path": path} for path in paths], "path"
    if len(records) != len(rows):
        raise ClipretError(f"{name} has {len(rows)} rows, its list {len(records)} paths: give one path for each row")

    def blocks() -> Iterator[tuple[Rows, Sequence[Record]]]:
        for start in range(0, len(rows), BLOCK):
            yield rows[start : start + BLOCK], records[start : start + BLOCK]

    return Embeddings(name, folder, len(rows), rows.shape[1], column, blocks)


def _read_list(path: Path, image_column: str | None) -> tuple[Sequence[Record], str]:
    if path.suffix.lower() != ".txt":
        table = read_table(path)
        return table.rows, pick_column(table, image_column, "image")
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ClipretError(f"{path} cannot be read ({error}): it needs to be UTF-8, a path a line") from error
    return [{"path": line} for line in lines], "path"


def _from_parquet(path: Path, image_column: str | None, embedding_column: str | None) -> Embeddings:
    pa, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    broken = partial("{} cannot be read ({}): give a Parquet file".format, path)
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise ClipretError(broken(error)) from error
    schema, count = file.schema_arrow, file.metadata.num_rows
    lists = [field.name for field in schema if _is_vector(pa, field.type)]
    vectors = [name for name in lists if embedding_column in (None, name)]
    if len(vectors) != 1:
        named = f"column {embedding_column} of embeddings" if embedding_column else "single column of embeddings"
        raise ClipretError(
            f"{path} has no {named}: its lists of floats are {', '.join(lists) or 'none'}; "
            "name one with --column embedding=NAME"
        )
    others = [name for name in schema.names if name not in lists]
    column = pick_column(Table(path, tuple(others), []), image_column, "image")

    def batches() -> Iterator[Any]:
        try:
            yield from file.iter_batches(BLOCK, columns=[*others, *vectors])
        except (OSError, pa.ArrowException) as error:
            raise ClipretError(broken(error)) from error

    def blocks() -> Iterator[tuple[Rows, Sequence[Record]]]:
        done = 0
        for batch in batches():
            rows = _vectors(batch.column(vectors[0]), dimension, f"{path} from row {done}")
            values = [map(_value, batch.column(name).to_pylist()) for name in others]
            yield rows, [dict(zip(others, record, strict=True)) for record in zip(*values, strict=True)]
            done += len(rows)

    first = next(batches(), None)
    lengths = [] if first is None else first.column(vectors[0]).drop_null().value_lengths().to_pylist()
    if not lengths or not lengths[0]:
        raise ClipretError(f"{path} holds no embeddings at its beginning: nothing to import")
    dimension = int(lengths[0])
    fingerprint = (schema.metadata or {}).get(FINGERPRINT)
    return Embeddings(
        str(path), path.parent, count, dimension, column, blocks, fingerprint.decode() if fingerprint else None
    )


def _is_vector(pa: Any, type_: Any) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(kind(type_) for kind in kinds) and pa.types.is_floating(type_.value_type)


def _vectors(column: Any, dimension: int, where: str) -> Rows:
    """Lists of floats as embeddings [b,D]; a missing list becomes NaN."""
    lengths = set(column.drop_null().value_lengths().to_pylist()) - {dimension}
    if lengths:
        raise ClipretError(
            f"{where}: an embedding of {lengths.pop()} values, the first has {dimension}: correct the file"
        )
    values = column.flatten().to_numpy(zero_copy_only=False)
    rows = np.full((len(column), dimension), np.nan, values.dtype)
    rows[column.is_valid().to_numpy(zero_copy_only=False)] = values.reshape(-1, dimension)
    return rows


def _value(value: object) -> Value:
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
