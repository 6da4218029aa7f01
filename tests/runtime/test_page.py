import re
from pathlib import Path

import pytest
from PIL import Image

from clipret.errors import ClipretError
from clipret.page import Card, Section, write_page

FACTS = [("mAP@10", "0.71"), ("<model>", "a & b")]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / 'a"b.png'
    Image.new("RGBA", (900, 300), (200, 0, 0, 128)).save(path)
    return path


def page(tmp_path: Path, sections: list[Section]) -> str:
    write_page(tmp_path / "page.html", title="a <script> title", facts=FACTS, sections=sections)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_everything_from_outside_is_escaped(tmp_path: Path, picture: Path) -> None:
    card = Card(picture, '<img src=x onerror="alert(1)">', 0.5)
    text = page(tmp_path, [Section('<script>alert("q")</script>', [card], note="<i>note</i>")])
    assert "<script>" not in text
    assert 'onerror="' not in text
    assert "<i>" not in text
    assert "a &amp; b" in text
    assert "&lt;script&gt;alert(&quot;q&quot;)" in text


def test_it_needs_nothing_from_outside(tmp_path: Path, picture: Path) -> None:
    text = page(tmp_path, [Section("红色的车", [Card(picture, "a", 0.25)])])
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "http" not in text
    assert 'width="240" height="80"' in text
    assert "0.250" in text
    assert "红色的车" in text


def test_right_and_wrong_are_said_in_words(tmp_path: Path, picture: Path) -> None:
    cards = [Card(picture, "a", 0.9, True), Card(picture, "b", 0.8, False), Card(picture, "c", 0.7)]
    text = page(tmp_path, [Section("q", cards)])
    assert re.findall(r'<li class="(\w*)">', text) == ["right", "wrong", ""]
    assert text.count('<b class="mark">') == 2


def test_a_missing_picture_is_a_tile_with_the_reason(tmp_path: Path) -> None:
    text = page(tmp_path, [Section("q", [Card(tmp_path / "gone.jpg", "gone.jpg", 0.1)])])
    assert "gone.jpg<br>cannot be read: No such file" in text


def test_many_queries_get_a_list_of_links(tmp_path: Path) -> None:
    few, many = ([Section(f"query {n}", []) for n in range(count)] for count in (8, 9))
    assert "<nav" not in page(tmp_path, few)
    text = page(tmp_path, many)
    assert re.findall(r'<a href="#(q\d+)">', text) == re.findall(r'<section id="(q\d+)">', text)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ClipretError, match="cannot be written: No such file or directory"):
        write_page(tmp_path / "no/page.html", title="t", facts=[], sections=[])
