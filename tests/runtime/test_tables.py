import contextlib
import sqlite3
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipret.errors import ClipretError
from clipret.tables import as_number, pick_column, read_table

CSV = 'path,lang,caption,hour\na.jpg,en,"red, ""big"" car",5\nb.jpg,zh,红色的车,11\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_with_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "t.csv", "\ufeff" + CSV))
    assert table.columns == ("path", "lang", "caption", "hour")
    assert table.rows[0]["caption"] == 'red, "big" car'
    assert table.rows[1]["caption"] == "红色的车"


def test_tabs_are_read_without_quoting(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "t.txt", 'path\tcaption\na.jpg\t"Go" says the sign, twice\n'))
    assert table.rows == [{"path": "a.jpg", "caption": '"Go" says the sign, twice'}]


def test_json_strings_may_hold_what_unicode_calls_a_line_end(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "t.jsonl", '{"path": "a\u2028b.jpg"}\r\n{"path": "c.jpg"}\r\n'))
    assert [row["path"] for row in table.rows] == ["a\u2028b.jpg", "c.jpg"]


def test_semicolons_and_windows_line_ends(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "t.csv", "path;caption\r\na;b, c\r\n\r\n")).rows == [
        {"path": "a", "caption": "b, c"}
    ]


def test_json_lines(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "t.jsonl", '{"image": "a", "n": 3}\n\n{"image": "b", "caption": null}\n'))
    assert table.columns == ("image", "n", "caption")
    assert table.rows == [{"image": "a", "n": "3", "caption": ""}, {"image": "b", "n": "", "caption": ""}]


def test_where_compares_numbers_as_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", CSV)
    assert [row["path"] for row in read_table(path, "hour < 10").rows] == ["a.jpg"]
    assert [row["path"] for row in read_table(path, "lang = 'zh' or caption like '%big%'").rows] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("language = 'en'", "no such column: language.*its columns are path, lang, caption, hour"),
        ("hour <", "cannot be used"),
        ("hour < 0", "has no row with hour < 0"),
        ("1) UNION SELECT load_extension('x'", "cannot be used"),
        ("exists(SELECT * FROM sqlite_master)", "cannot be used"),
    ],
)
def test_where_errors(tmp_path: Path, where: str, message: str) -> None:
    with pytest.raises(ClipretError, match=message):
        read_table(write(tmp_path, "t.csv", CSV), where)


def test_columns_that_sqlite_takes_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", "path,Lang,lang\na,b,c\n")
    assert read_table(path).rows == [{"path": "a", "Lang": "b", "lang": "c"}]
    with pytest.raises(ClipretError, match=r"cannot be used on .*: duplicate column name: lang"):
        read_table(path, "1 = 1")


@given(st.one_of(st.text("0123456789.eE+- \tx", max_size=12), st.floats().map(str), st.integers().map(str)))
@example("12345678901234567890")
@example("9007199254740993.0")
@example("1_0")
@example("\uff19")
def test_numbers_are_those_of_sqlite(text: str) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE t (value NUMERIC)")
        database.execute("INSERT INTO t VALUES (?)", (text,))
        [[held]] = database.execute("SELECT value FROM t")
    found = as_number(text)
    assert isinstance(found, str) == isinstance(held, str)
    # sqlite rounds the last bit of large powers of ten otherwise.
    assert found == (held if isinstance(held, str) else pytest.approx(held, rel=1e-14, abs=0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "path,caption\na,b,c\n", "line 2 has 3 fields, its header 2"),
        ("t.csv", "path,path\na,b\n", "has a column twice"),
        ("t.csv", "", "is empty"),
        ("t.csv", "path,caption\n", "has no rows"),
        ("t.csv", b"path,caption\n\xff,b\n", "not UTF-8"),
        ("t.jsonl", '{"a": 1}\n[2]\n', "line 2 is not a JSON object"),
        ("t.jsonl", "{'a': 1}\n", "line 1 is not JSON"),
        ("t.jsonl", "[" * 100000, "line 1 is not JSON"),
        (
            "t.csv",
            'path,caption\na,b\nc,"not closed\nd,e\nf,g\n',
            "line 3: unexpected end of data: correct the quotation",
        ),
    ],
)
def test_broken_tables_say_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ClipretError, match=message):
        read_table(write(tmp_path, name, content))


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="cannot be read: No such file"):
        read_table(tmp_path / "gone.csv")


def test_columns_are_detected_or_named(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "t.csv", "ID,FilePath,Caption,note\n1,a,b,c\n"))
    assert pick_column(table, None, "image") == "FilePath"
    assert pick_column(table, None, "caption") == "Caption"
    assert pick_column(table, "note", "caption") == "note"
    with pytest.raises(
        ClipretError, match=r"no colour: its columns are ID, FilePath, Caption, note; .*--column caption=NAME"
    ):
        pick_column(table, "colour", "caption")
    with pytest.raises(ClipretError, match="looked for path, filepath"):
        pick_column(read_table(write(tmp_path, "u.csv", "a,b\n1,2\n")), None, "image")


def test_a_single_column_is_read_as_its_name_says(tmp_path: Path) -> None:
    for name, expected in (("q.csv", "red, bright"), ("q.tsv", '"red, bright"')):
        (tmp_path / name).write_text('caption\n"red, bright"\n')
        assert read_table(tmp_path / name).rows == [{"caption": expected}]
