"""Lists of images and captions: CSV, TSV and JSON lines, with columns named or detected."""

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
"""What a gallery knows of each image by itself, with types; columns of metadata have other names."""

_NAMES = {
    "image": ("path", "filepath", "file_path", "image", "image_path", "filename", "file_name", "file", "img"),
    "caption": ("caption", "title", "text", "query", "sentence"),
}

_INTEGER = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """A table in memory. Every value is a string; what JSON calls null is the empty string."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, str]]


def read_table(path: str | Path, where: str | None = None) -> Table:
    """Read a .csv, .tsv, .txt or .jsonl file, UTF-8, with a header.

    The separator is the one of comma, tab, semicolon and bar that the header holds most of. Tab-separated files are
    read without quoting, since captions hold quotation marks; the others by the usual CSV rules. `where` is an SQL
    expression over the columns, such as  split = 'val' and lang = 'en';  values that look like numbers
    compare as numbers.

    Raises ClipretError: missing file, not UTF-8, a row whose number of fields differs from the header's
    (with its line number), a bad expression, no rows.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ClipretError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ClipretError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 and try again") from None
    reader = _read_jsonl if path.suffix.lower() in (".jsonl", ".ndjson", ".json") else _read_separated
    columns, rows = reader(path, text)
    if where is not None:
        rows = _filter(path, columns, rows, where)
    if not rows:
        reason = f"no row with {where}" if where is not None else "no rows"
        raise ClipretError(f"{path} holds {reason}: nothing to do")
    return Table(path, columns, rows)


def pick_column(table: Table, given: str | None, kind: Literal["image", "caption"]) -> str:
    """The column that holds the images' paths or their captions: `given`, or the first usual name.

    Raises ClipretError that lists the columns there are.
    """
    by_name = {column.lower(): column for column in reversed(table.columns)}
    wanted = (given,) if given is not None else _NAMES[kind]
    for name in wanted:
        if name in table.columns:
            return name
        if name.lower() in by_name:
            return by_name[name.lower()]
    looked_for = given if given is not None else f"{kind} column (looked for {', '.join(_NAMES[kind])})"
    raise ClipretError(
        f"{table.path} has no {looked_for}: its columns are {', '.join(table.columns)}; "
        f"name one with --column {kind}=NAME (in clipret-train fit, --set {kind}_column=NAME)"
    )


def _read_separated(path: Path, text: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    header, _, _ = text.partition("\n")
    # Of a single column the header says nothing: a .csv is then what its name says.
    separator = max(",\t;|" if path.suffix.lower() == ".csv" else "\t,;|", key=header.count)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    # Not strict, a quotation mark that is not closed would take all to the end of the file into one field.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    rows: list[dict[str, str]] = []
    began = 1
    try:
        columns = tuple(name.strip() for name in next(lines, []))
        if not any(columns):
            raise ClipretError(f"{path} is empty: it needs a header line and rows")
        if len(set(columns)) != len(columns):
            raise ClipretError(f"{path} names a column twice in its header: {', '.join(columns)}")
        began = lines.line_num + 1
        for values in lines:
            began = lines.line_num + 1
            if not values:
                continue  # a blank line, as many editors leave at the end
            if len(values) != len(columns):
                raise ClipretError(
                    f"{path} line {lines.line_num} has {len(values)} fields, its header {len(columns)}: mend or quote "
                    "that line"
                )
            rows.append(dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise ClipretError(f"{path} line {began}: {error}: mend the quotation marks there") from None
    return columns, rows


def _read_jsonl(path: Path, text: str) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    objects: list[dict[str, object]] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut strings at U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits, and of deep nesting
            raise ClipretError(f"{path} line {number} is not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(value, dict):
            raise ClipretError(f"{path} line {number} is not a JSON object: write one object a line")
        objects.append(value)
    columns = tuple(dict.fromkeys(key for value in objects for key in value))
    return columns, [{column: _as_text(value.get(column)) for column in columns} for value in objects]


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _filter(path: Path, columns: Sequence[str], rows: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """Rows for which the SQL expression is true, by sqlite itself: one grammar here and in a gallery's filters."""
    # NUMERIC affinity turns what looks like a number into one and leaves the rest text.
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
                chosen = [row[0] for row in database.execute(f"SELECT rowid FROM t WHERE ({where}\n) ORDER BY rowid")]
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise ClipretError(
                f"--where {where!r} cannot be used on {path}: {error}; its columns are {', '.join(columns)}"
            ) from None
    return [rows[number - 1] for number in chosen]


def as_number(value: str | int | float | None) -> str | int | float | None:
    """What sqlite makes of a value in a NUMERIC column: a text that is written as a number is that number."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    if _INTEGER.fullmatch(value) and len(value) < 100 and -(1 << 63) <= int(value) < 1 << 63:
        return int(value)
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def quoted(name: str) -> str:
    """A column's name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def check_quotes(where: str, columns: Sequence[str]) -> None:
    """Raise ClipretError for a double-quoted name that is no column: sqlite would silently take it for a text."""
    known = {column.lower() for column in columns}
    for name in re.findall(r'"((?:[^"]|"")*)"', re.sub(r"'(?:[^']|'')*'", "", where)):
        if name.replace('""', '"').lower() not in known:
            raise ClipretError(
                f'--where {where!r} names a column "{name}" that is none of {", ".join(columns)}: put texts in single '
                "quotes"
            )


@contextlib.contextmanager
def reading_only(database: sqlite3.Connection, selects: int) -> Iterator[None]:
    """Inside the block the database answers one SELECT and nothing else: it runs an expression that a stranger wrote.

    The statement holds `selects` of them; another one is the stranger's, who could read what is deleted.
    """
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
    found = 0

    def answer(action: int, _: str | None, name: str | None, *__: str | None) -> int:
        nonlocal found
        found += action == sqlite3.SQLITE_SELECT
        if found > selects:
            return sqlite3.SQLITE_DENY
        # printf('%.*c', 2000000000, 'x') runs for minutes, and nothing can interrupt a function.
        endless = action == sqlite3.SQLITE_FUNCTION and name in ("printf", "format")
        return sqlite3.SQLITE_OK if action in allowed and not endless else sqlite3.SQLITE_DENY

    database.set_authorizer(answer)
    try:
        yield
    finally:
        database.set_authorizer(None)
