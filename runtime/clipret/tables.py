"""Annotations files: CSV, TSV and JSON lines, with columns named or detected."""

import contextlib
import csv
import io
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipret.errors import ClipretError

__all__ = ["OWN_COLUMNS", "Table", "as_number", "check_quotes", "pick_column", "quoted", "read_table", "reading_only"]

OWN_COLUMNS = {"id": int, "path": str, "size": int, "mtime_ns": int, "hash": str}
"""The columns that a gallery has for every image, with their types; metadata columns have other names."""

_NAMES = {
    "image": ("path", "filepath", "file_path", "image", "image_path", "filename", "file_name", "file", "img"),
    "caption": ("caption", "title", "text", "query", "sentence"),
}

_INTEGER = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """A table in memory.

    Attributes:
        path: The file.
        columns: Names of the columns.
        rows: The rows as dicts by column. Every value is a string; JSON's null is the empty string.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, str]]


def read_table(path: str | Path, where: str | None = None) -> Table:
    """Read a .csv, .tsv, .txt or .jsonl file in UTF-8; all but JSONL need a header.

    The separator is the comma, tab, semicolon or vertical bar, whichever is most frequent in the header. Tab-separated
    files are read without quoting, since captions contain quotation marks; the others by the usual CSV rules.

    Args:
        path: The file.
        where: SQL expression over the columns, such as `split = 'val' and lang = 'en'`. Values that look like numbers
            compare as numbers.

    Raises:
        ClipretError: The file is missing or not UTF-8, a row has another number of fields than the header (the message
            has its line number), the expression is invalid, or no rows are left.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ClipretError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise ClipretError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again") from error
    reader = _read_jsonl if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else _read_separated
    columns, rows = reader(path, text)
    if where is not None:
        rows = _filter(path, columns, rows, where)
    if not rows:
        reason = f"no row with {where}" if where is not None else "no rows"
        raise ClipretError(f"{path} has {reason}: check the file{' and --where' if where is not None else ''}")
    return Table(path, columns, rows)


def pick_column(table: Table, column: str | None, kind: Literal["image", "caption"]) -> str:
    """Find the column of image paths or captions.

    Args:
        table: The table.
        column: Name of the column, in any case; None: the first column with one of the usual names.
        kind: What the column holds.

    Raises:
        ClipretError: There is no such column. The message lists the columns of the table.
    """
    by_name = {name.lower(): name for name in reversed(table.columns)}
    names = (column,) if column is not None else _NAMES[kind]
    for name in names:
        if name in table.columns:
            return name
        if name.lower() in by_name:
            return by_name[name.lower()]
    looked_for = column if column is not None else f"{kind} column (looked for {', '.join(_NAMES[kind])})"
    raise ClipretError(
        f"{table.path} has no {looked_for}: its columns are {', '.join(table.columns)}; "
        f"name one with --column {kind}=NAME (in clipret-train fit, --set {kind}_column=NAME)"
    )


def _read_separated(path: Path, text: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    header, _, _ = text.partition("\n")
    # The header of a single column has no separator: the file name decides then.
    separator = max(",\t;|" if path.suffix.lower() == ".csv" else "\t,;|", key=header.count)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    # Without strict, an unclosed quotation mark would read the rest of the file into one field.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    rows: list[dict[str, str]] = []
    first_line = 1  # of the current row, which may span lines
    try:
        columns = tuple(name.strip() for name in next(lines, []))
        if not any(columns):
            raise ClipretError(f"{path} is empty: it needs a header line and rows")
        if len(set(columns)) != len(columns):
            raise ClipretError(f"{path} has a column twice in its header ({', '.join(columns)}): rename one")
        first_line = lines.line_num + 1
        for values in lines:
            first_line = lines.line_num + 1
            if not values:
                continue  # a blank line, which many editors leave at the end
            if len(values) != len(columns):
                raise ClipretError(
                    f"{path} line {lines.line_num} has {len(values)} fields, its header {len(columns)}: correct or "
                    "quote that line"
                )
            rows.append(dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise ClipretError(f"{path} line {first_line}: {error}: correct the quotation marks there") from error
    return columns, rows


def _read_jsonl(path: Path, text: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    objects: list[dict[str, object]] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut strings at U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits and deep nesting
            raise ClipretError(
                f"{path} line {number} is not JSON ({getattr(error, 'msg', error)}): correct that line"
            ) from error
        if not isinstance(value, dict):
            raise ClipretError(f"{path} line {number} is not a JSON object: write one object per line")
        objects.append(value)
    columns = tuple(dict.fromkeys(key for value in objects for key in value))
    return columns, [{column: _as_text(value.get(column)) for column in columns} for value in objects]


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _filter(path: Path, columns: Sequence[str], rows: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """Select the rows for which an SQL expression is true, with sqlite, which has the grammar of gallery filters."""
    # NUMERIC affinity converts values that look like numbers and leaves the others text.
    names = [quoted(column) for column in columns]
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        check_quotes(where, columns)
        try:
            database.execute(f"CREATE TABLE t ({', '.join(name + ' NUMERIC' for name in names)})")
            database.executemany(
                f"INSERT INTO t VALUES ({','.join('?' * len(columns))})", (tuple(r.values()) for r in rows)
            )
            database.commit()
            with reading_only(database, selects=1):
                numbers = [row[0] for row in database.execute(f"SELECT rowid FROM t WHERE ({where}\n) ORDER BY rowid")]
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ClipretError(
                f"--where {where!r} cannot be used on {path}: {error}; its columns are {', '.join(columns)}"
            ) from error
    return [rows[number - 1] for number in numbers]


def as_number(value: str | int | float | None) -> str | int | float | None:
    """Convert a value as sqlite does in a NUMERIC column: a string that looks like a number becomes one.

    Examples:
        >>> as_number("7.0"), as_number("7.5"), as_number("7 cars")
        (7, 7.5, '7 cars')
    """
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    if _INTEGER.fullmatch(value) and len(value) < 100 and -(1 << 63) <= int(value) < 1 << 63:
        return int(value)
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def quoted(name: str) -> str:
    """Quote a column name for SQL.

    Examples:
        >>> quoted("day of week")
        '"day of week"'
    """
    return '"' + name.replace('"', '""') + '"'


def check_quotes(where: str, columns: Sequence[str]) -> None:
    """Check the double-quoted names of an SQL expression: sqlite would silently read an unknown one as a string.

    Args:
        where: The expression.
        columns: Names of the columns.

    Raises:
        ClipretError: A double-quoted name is not a column.
    """
    names = {column.lower() for column in columns}
    for name in re.findall(r'"((?:[^"]|"")*)"', re.sub(r"'(?:[^']|'')*'", "", where)):
        if name.replace('""', '"').lower() not in names:
            raise ClipretError(
                f'--where {where!r} names a column "{name}" that is none of {", ".join(columns)}: put strings in '
                "single quotes"
            )


@contextlib.contextmanager
def reading_only(database: sqlite3.Connection, selects: int) -> Iterator[None]:
    """Restrict a database to SELECT inside the block, to run an untrusted expression.

    Args:
        database: The database.
        selects: Number of SELECTs in the trusted statement. One more comes from the expression, which could read
            deleted images with it, and is denied.
    """
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
    count = 0

    def authorize(action: int, _: str | None, name: str | None, *__: str | None) -> int:
        nonlocal count
        count += action == sqlite3.SQLITE_SELECT
        if count > selects:
            return sqlite3.SQLITE_DENY
        # printf('%.*c', 2000000000, 'x') runs for minutes, and a function cannot be interrupted.
        endless = action == sqlite3.SQLITE_FUNCTION and name in ("printf", "format")
        return sqlite3.SQLITE_OK if action in allowed and not endless else sqlite3.SQLITE_DENY

    database.set_authorizer(authorize)
    try:
        yield
    finally:
        database.set_authorizer(None)
