"""The files of the page: both languages are complete, nothing is inline or external."""

import re
from pathlib import Path

STATIC = Path(__file__).parents[3] / "runtime" / "clipret" / "server" / "static"


def read(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def test_both_languages_have_all_texts() -> None:
    english, chinese = (
        dict(re.findall(r'^    (\w+): "(.+)",$', part, re.MULTILINE)) for part in read("words.js").split("  zh: {")
    )
    assert list(english) == list(chinese)
    for name, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[name]))
    page = read("index.html")
    scripts = "".join(read(file.name) for file in STATIC.glob("*.js") if file.name != "words.js")
    used = set(re.findall(r'data-(?:text|placeholder|label)="(\w+)"', page))
    # A call may choose between two names: say(a ? "like" : "unlike").
    used |= {name for call in re.findall(r"\bsay\(([^;]*)", scripts) for name in re.findall(r'"(\w+)"', call)}
    assert set(english) <= used
    assert set(re.findall(r'\bsay\("(\w+)"', scripts)) <= set(english)


def test_nothing_is_inline_or_external() -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|[\"']//|@import|url\(", text), file.name
        assert "innerHTML" not in text
        assert "eval(" not in text
        if file.suffix == ".html":
            assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=|javascript:", text), file.name
