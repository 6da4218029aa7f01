import base64
import io
import os
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from clipret import Bundle, Encoder, EncoderConfig, Gallery, Searcher
from clipret.cli import main
from clipret.errors import ClipretError
from clipret.evaluation.charts import curve, histogram
from clipret.evaluation.evaluate import evaluate_search, read_ground_truth
from clipret.evaluation.report import attributes, recall_curve, scores_of, worst
from clipret.reports.page import GAP, ROWS, Card, Section, _justify, write_page
from clipret.reports.render import render

HOSTILE = """<script>alert("1")</script>'&amp;"""


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """The elements of a page in order, each with all text inside it."""

    elements: list[Element] = field(default_factory=list)
    _open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def read(cls, path: Path) -> "Page":
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        assert page._open == [], "every element is closed"
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in ("meta", "img", "input"):
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        return [e for e in self.elements if e.tag == tag and attributes.items() <= e.attributes.items()]

    def texts(self, tag: str) -> list[str]:
        return [element.text for element in self.all(tag)]


def image(path: Path, size: tuple[int, int] = (60, 40), colour: str = "red", **options: object) -> Path:
    Image.new("RGB", size, colour).save(path, **options)
    return path


def write(folder: Path, *sections: Section, facts: tuple[tuple[str, str], ...] = (), title: str = "clipret") -> Page:
    write_page(folder / "page.html", title=title, facts=facts, sections=sections)
    return Page.read(folder / "page.html")


def thumbnails(page: Page) -> list[Image.Image]:
    head = "data:image/jpeg;base64,"
    sources = [image.attributes["src"] for image in page.all("img")]
    assert all(source.startswith(head) for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.removeprefix(head)))) for source in sources]


def test_images_are_in_rank_order_with_score_and_label(tmp_path: Path) -> None:
    cards = [
        Card(image(tmp_path / "wide.png", (2000, 1000), "red"), "a/wide.png", 0.34567),
        Card(image(tmp_path / "small.png", (30, 40), "blue"), "a/small.png", -0.0001),
    ]
    page = write(tmp_path, Section("一辆红色的轿车", cards, "AP@10 0.83"), facts=(("mAP@10", "0.71"), ("model", "ViT")))
    assert page.texts("h1") == ["clipret"]
    assert page.texts("h2") == ["一辆红色的轿车"]
    assert "AP@10 0.83" in page.texts("p")
    assert list(zip(page.texts("dt"), page.texts("dd"), strict=True)) == [("mAP@10", "0.71"), ("model", "ViT")]
    assert page.texts("b") == ["1", "2"]
    assert page.texts("data") == ["0.346", "0.000"]
    assert [e.text for e in page.all("span", **{"class": "label"})] == ["a/wide.png", "a/small.png"]
    wide, small = thumbnails(page)
    assert (wide.size, small.size) == ((256, 128), (30, 40))
    assert wide.getpixel((9, 9))[0] > 200 > 90 > small.getpixel((9, 9))[0]
    assert [e.attributes["alt"] for e in page.all("img")] == ["a/wide.png", "a/small.png"]
    assert {e.attributes["loading"] for e in page.all("img")} == {"lazy"}


def test_a_page_is_self_contained(tmp_path: Path) -> None:
    page = write(tmp_path, Section("dog", [Card(image(tmp_path / "1.jpg"), "1.jpg", 0.3)]))
    assert not page.all("script") + page.all("link") + page.all("iframe")
    (style,) = page.texts("style")
    assert not re.search(r"url\(|@import", style)
    (policy,) = [e.attributes["content"] for e in page.all("meta") if "http-equiv" in e.attributes]
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:", (tmp_path / "page.html").read_text(encoding="utf-8"))


def test_right_and_wrong_are_named_in_words(tmp_path: Path) -> None:
    path = image(tmp_path / "1.png")
    cards = [Card(path, str(number), 0.3, relevant) for number, relevant in enumerate((True, False, None))]
    page = write(tmp_path, Section("dog", cards))
    right, wrong, unknown = page.texts("figcaption")
    assert ("✓" in right, "right" in right) == (True, True)
    assert ("✗" in wrong, "wrong" in wrong) == (True, True)
    assert not re.search(r"✓|✗|right|wrong", unknown)
    assert [e.attributes.get("class") for e in page.all("li")] == ["right", None, None]


def test_all_values_are_escaped(tmp_path: Path) -> None:
    good, missing = image(tmp_path / "1.png"), tmp_path / f"{HOSTILE.replace('/', '')}.png"
    cards = [Card(path, HOSTILE, 0.3, True) for path in (good, missing)]
    page = write(tmp_path, *[Section(HOSTILE, cards, HOSTILE)] * 9, facts=((HOSTILE, HOSTILE),), title=HOSTILE)
    assert not page.all("script")
    assert page.texts("title") == page.texts("h1") == page.texts("dt") == page.texts("dd") == [HOSTILE]
    assert page.texts("h2")[1:] == [HOSTILE] * 9
    assert page.texts("p") == [HOSTILE] * 9
    labels = page.all("span", **{"class": "label"})
    assert {e.text for e in labels} == {e.attributes["title"] for e in labels} == {HOSTILE}
    assert {e.attributes["alt"] for e in page.all("img")} == {HOSTILE}
    assert {e.attributes["aria-label"] for e in page.all("div", role="img")} == {HOSTILE}


def test_missing_and_broken_images_are_tiles_with_a_reason(tmp_path: Path) -> None:
    whole = image(tmp_path / "whole.jpg", (80, 80))
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:400])
    (tmp_path / "text.jpg").write_text("no image")
    names = ["gone.jpg", "half.jpg", "text.jpg", "whole.jpg"]
    page = write(tmp_path, Section("dog", [Card(tmp_path / name, name, 0.3) for name in names]))
    tiles = page.all("div", role="img")
    assert [tile.attributes["aria-label"] for tile in tiles] == names[:3]
    assert [e.text for e in page.all("span", **{"class": "label"})] == names
    for tile, reason in zip(tiles, ["No such file", "broken|truncated", "not an image"], strict=True):
        assert re.search(reason, tile.text)
    assert len(thumbnails(page)) == 1


def test_thumbnails_are_upright_flattened_scaled_and_without_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    exif[0x010E] = "secret place"
    image(tmp_path / "turned.jpg", (1200, 400), exif=exif, comment=b"secret note")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((40, 40), 32896, np.uint16)).save(tmp_path / "deep.png")
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    names = ["turned.jpg", "clear.png", "deep.png", "print.jpg"]
    turned, clear, deep, printed = thumbnails(
        write(tmp_path, Section("dog", [Card(tmp_path / name, name, 0.3) for name in names]))
    )
    assert turned.size == (85, 256)
    assert not turned.getexif()
    assert not turned.info.get("comment")
    assert clear.getpixel((5, 5)) == (255, 255, 255)
    assert abs(deep.getpixel((5, 5))[0] - 128) <= 1
    assert printed.getpixel((5, 5))[0] > 200 > 60 > printed.getpixel((5, 5))[2]


@pytest.mark.parametrize("name", ["a b#1?%20.png", "javascript:alert(1).png", "猫.png"])
def test_an_image_links_to_its_file_relative_to_the_page(tmp_path: Path, name: str) -> None:
    (tmp_path / "pages").mkdir()
    page = write(tmp_path / "pages", Section("cat", [Card(image(tmp_path / name), name, 0.3)]))
    (link,) = [e.attributes["href"] for e in page.all("a")]
    assert not re.search(r"[ #?:]", link)
    assert (tmp_path / "pages" / unquote(link)).resolve() == (tmp_path / name).resolve()


def test_file_names_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    page = write(tmp_path, Section("cafe", [Card(tmp_path / name, name, 0.3)]))
    assert [e.text for e in page.all("span", **{"class": "label"})] == ["caf?.png"]


def test_many_sections_have_a_navigation(tmp_path: Path) -> None:
    path = image(tmp_path / "1.png")
    sections = [Section(f"query {n}", [Card(path, "1.png", 0.3, n == 0)] if n != 1 else []) for n in range(9)]
    assert not write(tmp_path, *sections[:8]).all("nav")
    page = write(tmp_path, *sections)
    (nav,) = page.all("nav")
    assert "9 queries" in nav.text
    targets = [e.attributes["href"] for e in page.all("a") if e.attributes["href"].startswith("#q")]
    assert targets == ["#" + e.attributes["id"] for e in page.all("section")]
    assert [e.attributes.get("class") for e in page.all("section")] == ["hit"] + [None] * 8
    assert len(page.all("input", id="misses")) == 1
    unjudged = [Section("query", [Card(path, "1.png", 0.3)])] * 9
    assert not write(tmp_path, *unjudged).all("input")


def test_no_results(tmp_path: Path) -> None:
    assert "No results." in write(tmp_path, Section("dog", [])).texts("p")
    assert write(tmp_path).all("main")


@pytest.mark.parametrize("row", ROWS.values())
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 19, 50])
def test_rows_are_full_and_not_too_wide(row: float, count: int) -> None:
    ratios = np.random.default_rng(count).uniform(0.6, 2.2, count).tolist()
    width = 1000.0
    rows, used = [[]], 0.0
    for ratio, css in zip(ratios, _justify(ratios, row), strict=True):
        percent, pixels = map(float, re.fullmatch(r"calc\((\S+)% - (\S+)px\)", css).groups())
        size = percent / 100 * width - pixels
        if used + size > width:  # as flex-wrap does
            rows.append([])
            used = 0.0
        used += size + GAP
        rows[-1].append((ratio, size))
    for line in rows:
        heights = [size / ratio for ratio, size in line]
        assert max(heights) - min(heights) < 1
        if len(rows) > 1 or sum(ratios) >= row:
            assert sum(size for _, size in line) + GAP * (len(line) - 1) == pytest.approx(width, abs=0.5 * len(line))
        assert 0.4 < row * heights[0] / width < 2.1


def test_a_page_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClipretError, match="gone is not a folder"):
        write(tmp_path / "gone")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ClipretError, match="is a folder"):
        write(tmp_path)
    (tmp_path / "page.html").rmdir()
    write(tmp_path, title="old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ClipretError, match="No space left"):
        write(tmp_path, title="new")
    assert Page.read(tmp_path / "page.html").texts("h1") == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="clipret-search")
    assert result.exit_code == 0, result.stderr
    return result.stdout


def cells(page: Page, caption: str) -> list[list[str]]:
    """The rows of the table in the figure with this heading."""
    figures = (at for at, element in enumerate(page.elements) if element.tag == "figure" and caption in element.text)
    rows = list[list[str]]()
    for element in page.elements[next(figures) + 1 :]:
        if element.tag in ("figure", "section"):
            break
        if element.tag == "tr":
            rows.append([])
        elif element.tag in ("th", "td"):
            rows[-1].append(element.text)
    return rows


def test_the_page_of_an_evaluation_shows_its_numbers(
    listed_gallery: Path, query_list: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    run("eval", listed_gallery, query_list, "--html", tmp_path / "p.html")
    page = Page.read(tmp_path / "p.html")
    searcher = Searcher(
        Gallery.open(listed_gallery), Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))
    )
    truth = read_ground_truth(searcher, query_list)
    result = evaluate_search(searcher, truth)
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["recall@1"] == f"{100 * result.metrics.recall_at_1:.2f}%"
    assert facts["mAP@10"] == f"{result.metrics.map_at_10:.4f}"
    points = dict(recall_curve(result.first_ranks, 12))
    assert cells(page, "Recall")[1:] == [[f"{k}", f"{points[k]:.2%}"] for k in (1, 5, 10)]
    dots = page.all("circle")
    assert [float(dot.attributes["cy"]) for dot in dots] == [
        pytest.approx(230 - points[k] * 218, abs=0.1) for k in (1, 5, 10)
    ]
    assert cells(page, "Recall")[0] == ["k", "recall@k"]
    scores = scores_of(searcher, result)
    table = cells(page, "Scores")[1:]
    assert [(int(right), int(wrong)) for _, right, wrong in table] == list(zip(scores.right, scores.wrong, strict=True))
    assert f"in {scores.above:.1%}" in " ".join(page.texts("figcaption"))
    colour = attributes(searcher, result)[0]
    head, *lines = cells(page, "Confusion: colour")
    assert head[1:-1] == colour.found
    assert [line[0] for line in lines] == colour.wanted
    shown = [[int(value.replace("·", "0")) for value in line[1:-1]] for line in lines]
    assert shown == colour.counts
    assert [line[-1] for line in lines] == [f"{share:.1%}" for share in colour.among]
    for plot in page.all("svg", **{"class": "plot"}):
        assert plot.attributes["role"] == "img"
        assert plot.attributes["aria-label"]
    assert len(page.all("details")) == 2
    assert page.texts("h2")[-6:] == [list(truth.relevant)[at] for at in worst(result)]
    assert not page.all("script")
    assert not re.search(r"https?:", (tmp_path / "p.html").read_text(encoding="utf-8"))


def test_missed_images_are_shown_with_their_rank(listed_gallery: Path, tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("title,path\nred,blue/0.jpg\nred,green/0.jpg\nred,red/1.jpeg\ngrey,grey/0.jpg\n")
    run("eval", listed_gallery, tmp_path / "q.csv", "--image-root", tmp_path / "images", "--html", tmp_path / "p.html")
    page = Page.read(tmp_path / "p.html")
    (heading,) = page.texts("h3")
    assert heading == "Relevant, not among the first results"
    order = run("query", listed_gallery, "red", "-k", 12).splitlines()[1:]
    ranks = {line.split()[2]: line.split()[0] for line in order}
    (red,) = [section for section in page.all("section") if heading in section.text]
    shown = [line for line in red.text.partition(heading)[2].splitlines() if line.strip()]
    missed = sorted(
        (path for path in ("blue/0.jpg", "green/0.jpg") if int(ranks[path]) > 10), key=lambda p: int(ranks[p])
    )
    assert missed
    assert [line.split()[0] for line in shown] == [ranks[path] for path in missed]
    assert all(path in line for path, line in zip(missed, shown, strict=True))


def test_a_page_of_thousands_of_queries_stays_small(listed_gallery: Path, tmp_path: Path) -> None:
    lines = [f"red {number},red/0.jpg" if number % 2 else f"blue {number},red/1.jpeg" for number in range(3000)]
    (tmp_path / "q.csv").write_text("\n".join(["title,path", *lines]))
    options = ["--image-root", tmp_path / "images", "--html", f"{tmp_path / 'p.html'},queries=11"]
    run("eval", listed_gallery, tmp_path / "q.csv", *options)
    page = Page.read(tmp_path / "p.html")
    texts = [section.text.split()[0] for section in page.all("section")]
    assert len(texts) == 11
    assert texts[:6] == ["blue"] * 6
    assert "red" in texts[6:]
    assert "The 6 worst queries, by AP@10, then an even sample of 5 of the other 2994." in page.texts("p")
    assert (tmp_path / "p.html").stat().st_size < 1 << 20


def elements(svg: str) -> list[Element]:
    page = Page()
    page.feed(svg)
    return page.elements


def test_charts_of_unusual_numbers() -> None:
    for chart in (
        curve("R", "n", [(1, 1.0)], [1]),
        curve("<b>", '"', [(1, 0.0), (2, 0.5)], [1, 2]),
        histogram("S", "n", [0.5, 0.5], [1], [0], ("<i>", "b")),
        histogram("S", "n", [0.0, 0.5, 1.0], [0, 0], [0, 0], ("a", "b")),
    ):
        html = render("charts.html.j2", charts=[chart])
        assert "nan" not in html
        assert "inf" not in html
        assert not [element for element in elements(html) if element.tag in ("b", "i")]


def test_rare_values_are_combined(listed_gallery: Path, tmp_path: Path) -> None:
    """The matrix of an attribute with many values has the most frequent ones and one row for the others."""
    lines = [f"red {number},colour {number}" for number in range(20)]
    (tmp_path / "q.csv").write_text("\n".join(["title,colour", *lines, "red,red", "blue,blue"]))
    run("eval", listed_gallery, tmp_path / "q.csv", "--equal", "colour", "--html", tmp_path / "p.html")
    assert [line[0] for line in cells(Page.read(tmp_path / "p.html"), "Confusion: colour")[1:]] == ["blue", "red"]
