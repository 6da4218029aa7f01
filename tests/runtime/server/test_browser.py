"""The page in a real browser, as a user sees it."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipret import Bundle, Encoder, EncoderConfig, Gallery, index_images, open_source

pytest.importorskip("fastapi", reason="needs the extra serve")
api = pytest.importorskip("playwright.sync_api", reason="needs the extra dev")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, serving: Callable[..., Any], listed_gallery: Path) -> Iterator[Any]:
    """The page of a gallery of twelve images."""
    client = serving(listed_gallery)
    with opened(browser, client) as page:
        yield page


class opened:  # noqa: N801 (used as a function)
    """A page in the browser; when it is closed, no script error and no blocked or external request has occurred."""

    def __init__(self, browser: Any, client: Any, path: str = "", **options: Any) -> None:
        self.home = f"http://127.0.0.1:{client.port}/"
        self.context = browser.new_context(locale="en-US", **options)
        self.context.set_default_timeout(15_000)
        self.path = path
        self.problems: list[str] = []

    def __enter__(self) -> Any:
        page = self.page = self.context.new_page()
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda line: "Content Security" in line.text and self.problems.append(line.text))
        page.on(
            "request",
            lambda request: (
                self.problems.append(request.url) if not request.url.startswith((self.home, "blob:")) else None
            ),
        )
        page.goto(self.home + self.path)
        wait_until(page, "document.querySelector('#status').textContent || !document.querySelector('#error').hidden")
        return page

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert not self.problems


def colours(page: Any, count: int = 3) -> set[str]:
    """Folders of the first images shown."""
    labels = page.locator("#results li > button").evaluate_all(
        "all => all.map((one) => one.getAttribute('aria-label'))"
    )
    return {label.partition("/")[0] for label in labels[:count]}


def wait_for_status(page: Any, text: str) -> None:
    """Wait until the status contains a text and no search is running."""
    api.expect(page.locator("#status")).to_contain_text(text)
    api.expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")


def wait_until(page: Any, expression: str) -> None:
    """Wait until an expression holds. (Playwright's own way needs eval(), which the page's policy forbids.)"""
    deadline = time.monotonic() + 15
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(30)


def test_results_appear_while_typing(page: Any) -> None:
    assert "The gallery has 12 images" in page.locator("#status").inner_text()
    page.keyboard.type("blue")  # the box has the focus
    wait_for_status(page, "12 of 12 images")
    wait_until(page, "document.querySelector('#results button').ariaLabel.startsWith('blue/')")
    assert colours(page) == {"blue"}
    page.locator("#q").fill("red")
    wait_until(page, "document.querySelector('#results button').ariaLabel.startsWith('red/')")
    assert page.url.endswith("?q=red")
    wait_until(page, "[...document.images].every((one) => one.complete)")
    shapes = page.locator("#results img").evaluate_all("all => all.map((one) => [one.naturalWidth, one.clientHeight])")
    assert all(width and height for width, height in shapes)
    page.locator("#q").fill("")
    wait_for_status(page, "Describe an image")
    assert page.locator("#results li").count() == 0


def test_chinese(page: Any) -> None:
    page.locator("#language").select_option("zh")
    wait_for_status(page, "共有 12 张图片")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    api.expect(page.get_by_role("button", name="选项")).to_be_visible()
    page.get_by_label("图片内容").fill("红色")
    wait_for_status(page, "12 张中的 12 张")
    assert colours(page) == {"red"}
    # No search for unfinished characters of an input method.
    page.evaluate("""() => {
        const box = document.querySelector('#q');
        box.value = 'h';
        box.dispatchEvent(new InputEvent('input', { isComposing: true, bubbles: true }));
    }""")
    page.wait_for_timeout(400)
    assert colours(page) == {"red"}
    page.evaluate("""() => {
        const box = document.querySelector('#q');
        box.value = '灰色 grey';
        box.dispatchEvent(new CompositionEvent('compositionend', { bubbles: true }));
    }""")
    wait_until(page, "document.querySelector('#results button').ariaLabel.startsWith('grey/')")
    page.reload()
    wait_for_status(page, "12 张中的 12 张")  # the language is remembered


def test_search_by_an_uploaded_image(page: Any, colour_folder: Path) -> None:
    page.locator("#file").set_input_files(colour_folder / "grey/1.jpeg")
    wait_for_status(page, "12 of 12 images")
    assert colours(page) == {"grey"}
    assert "1.jpeg" in page.locator("#chips").inner_text()
    # An image that is dragged in replaces it.
    page.evaluate(
        """async (bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], 'mine.jpg', { type: 'image/jpeg' }));
            for (const kind of ['dragenter', 'dragover', 'drop']) {
                document.querySelector('#results').dispatchEvent(
                    new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
            }
        }""",
        list((colour_folder / "blue/0.jpg").read_bytes()),
    )
    wait_until(page, "document.querySelector('#results button').ariaLabel.startsWith('blue/')")
    assert page.locator("#chips li").count() == 1
    assert page.locator("#drop").is_hidden()
    page.get_by_role("button", name="Remove mine.jpg from the query").click()
    wait_for_status(page, "Describe an image")


def test_more_like_this_and_less(page: Any) -> None:
    page.locator("#q").fill("green")
    wait_for_status(page, "12 of 12")
    page.locator("#results li > button").first.click()
    viewer = page.get_by_role("dialog")
    api.expect(viewer).to_be_visible()
    assert viewer.get_by_role("heading").inner_text().startswith("green/")
    assert "colour" in viewer.locator("dl").inner_text()
    wait_until(page, "document.querySelector('#large').naturalWidth > 0")
    viewer.get_by_role("button", name="More like this").click()
    wait_for_status(page, "11 of 12")  # not itself
    assert colours(page, 2) == {"green"}
    assert re.search(r"\?like=\d+$", page.url)
    api.expect(page.locator("#q")).to_have_value("")
    page.locator("#results li > button").first.click()
    viewer.get_by_role("button", name="Less like this").click()
    wait_for_status(page, "10 of 12")
    assert re.search(r"\?like=\d+&unlike=\d+$", page.url)
    page.go_back()
    wait_for_status(page, "11 of 12")


def test_filters_and_excluded_words(page: Any) -> None:
    page.get_by_role("button", name="Options").click()
    page.locator("#q").fill("red")
    page.locator("select[data-column=colour]").select_option(label="blue (3)")
    wait_for_status(page, "3 of 12")
    assert colours(page) == {"blue"}
    page.get_by_label("Filter (SQL)").fill("number >= 1")
    wait_for_status(page, "2 of 12")
    assert "is.colour=" in page.url
    page.reload()
    wait_for_status(page, "2 of 12")
    api.expect(page.locator("select[data-column=colour]")).to_have_value('"blue"')
    page.locator("select[data-column=colour]").select_option("")
    page.get_by_label("Filter (SQL)").fill("")
    wait_for_status(page, "12 of 12")
    page.locator("#q").fill("red blue")
    page.get_by_label("Not showing").fill("red")
    wait_until(page, "document.querySelector('#results button').ariaLabel.startsWith('blue/')")


def test_no_results_and_errors_are_shown(page: Any) -> None:
    page.goto(page.url + "?q=red&where=number+%3E+99")
    wait_for_status(page, "No results")
    api.expect(page.get_by_text("No results").last).to_be_visible()
    page.get_by_label("Filter (SQL)").fill("numbr > 1")
    alert = page.get_by_role("alert")
    api.expect(alert).to_contain_text("no such column: numbr; its columns are id, path")
    page.get_by_label("Filter (SQL)").fill("number > 1")
    wait_for_status(page, "4 of 12")
    api.expect(alert).to_be_hidden()
    page.locator("#file").set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
    api.expect(alert).to_have_text("“notes.txt” is not an image.")
    page.locator("#file").set_input_files({"name": "half.jpg", "mimeType": "image/jpeg", "buffer": b"\xff\xd8\xff"})
    api.expect(alert).to_contain_text("the image cannot be used")
    page.route("**/search", lambda route: route.abort())
    page.locator("#q").fill("blue")
    api.expect(alert).to_have_text("The service does not answer. Is it still running?")


def test_keyboard_navigation(page: Any) -> None:
    page.keyboard.type("grey")
    wait_until(page, "location.search === '?q=grey'")  # the last key's search, not an earlier one's
    wait_for_status(page, "12 of 12")

    def focus_goes(condition: str) -> str:
        """Wait until the focus is where it should be; a browser moves it some time after a key press."""
        name = "(document.activeElement.ariaLabel ?? document.activeElement.id)"
        wait_until(page, f"(name => {condition}){name}")
        return str(page.evaluate(name))

    page.keyboard.press("ArrowDown")
    first = json.dumps(focus_goes("name.startsWith('grey/')"))
    page.keyboard.press("ArrowRight")
    focus_goes(f"name.startsWith('grey/') && name !== {first}")
    page.keyboard.press("Home")
    focus_goes(f"name === {first}")
    page.keyboard.press("ArrowDown")
    focus_goes(f"/, rank \\d+, /.test(name) && name !== {first}")
    page.keyboard.press("ArrowUp")
    focus_goes(f"name === {first}")
    page.keyboard.press("Enter")
    api.expect(page.get_by_role("dialog")).to_be_visible()
    name = page.locator("#viewerName").inner_text()
    page.keyboard.press("ArrowRight")
    api.expect(page.locator("#viewerName")).not_to_have_text(name)
    page.keyboard.press("Escape")
    api.expect(page.get_by_role("dialog")).to_be_hidden()
    focus_goes(f"/, rank \\d+, /.test(name) && name !== {first}")  # at the image that was shown last
    page.keyboard.press("m")
    wait_for_status(page, "11 of 12")
    page.keyboard.press("Escape")
    focus_goes("name === 'q'")
    page.keyboard.type("blue")
    wait_for_status(page, "11 of 12")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("/")
    page.keyboard.type("grey")  # replaces the selected text
    wait_until(page, "document.querySelector('#q').value === 'grey'")
    # Every element that can be reached by Tab has a visible focus.
    for _ in range(12):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        hidden = page.evaluate(
            "document.activeElement.classList.contains('hidden') || document.activeElement === document.body"
        )
        assert outline != "none" or hidden


def test_two_galleries_side_by_side(
    browser: Any,
    serving: Callable[..., Any],
    listed_gallery: Path,
    colour_folder: Path,
    tmp_path: Path,
    tiny_bundle: Path,
) -> None:
    (colour_folder / "red/0.jpg").rename(colour_folder / "red/new.jpg")
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))
    with Gallery.create(tmp_path / "other", encoder.bundle, colour_folder) as other:
        index_images(other, encoder, open_source(colour_folder))
    client = serving(listed_gallery, tmp_path / "other")
    with opened(browser, client, "?q=red&compare=other") as page:
        wait_for_status(page, "gallery and other: 11 of the first 12 in both")
        assert page.locator("#results h2").all_inner_texts() == ["gallery", "other"]
        assert page.locator("#results ol").count() == 2
        assert page.locator("#results li.only").count() == 2
        # "More like this": the image is uploaded to the other gallery, which does not have its id.
        page.locator("#results ol").first.locator("li > button").last.click()
        page.get_by_role("button", name="More like this").click()
        wait_for_status(page, "of the first 11 in both")
        assert page.locator("#results ol").nth(1).locator("li").count() == 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(browser: Any, serving: Callable[..., Any], listed_gallery: Path, scheme: str) -> None:
    """Contrast of at least 4.5 to 1 for text and 3 to 1 for borders of controls (WCAG 2.2, AA), a name for every
    control, and no horizontal scrolling on a phone."""
    with opened(browser, serving(listed_gallery), "?q=red&where=x", color_scheme=scheme) as page:
        api.expect(page.get_by_role("alert")).to_be_visible()
        page.get_by_label("Filter (SQL)").fill("")
        wait_for_status(page, "12 of 12")
        poor = page.evaluate(CONTRAST)
        assert poor == []
        names = page.locator("input:not([type=file]), select, button, a").evaluate_all(
            "all => all.filter((one) => one.checkVisibility() && !(one.labels?.[0]?.textContent || one.ariaLabel || "
            "one.textContent)).map((one) => one.id)"
        )
        assert names == []
        for width, height in ((360, 700), (3840, 2160)):
            page.set_viewport_size({"width": width, "height": height})
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            rows = page.evaluate(ROWS)
            assert all(right <= wide + 1 for right, wide in rows)
            assert sum(wide - right < 12 for right, wide in rows) >= len(rows) - 1  # all rows but the last are full


# The right edge of the last image of each row, and the width of the list.
ROWS = """() => {
  const list = document.querySelector('#results ol');
  const rows = new Map();
  for (const item of list.children) {
    rows.set(item.offsetTop, item.offsetLeft + item.offsetWidth - list.offsetLeft);
  }
  return [...rows.values()].map((right) => [right, list.clientWidth]);
}"""
CONTRAST = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((one) => {
      const part = one / 255;
      return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!/, 0(\\.\\d+)?\\)|\\/ 0/.test(colour) && colour !== 'transparent') return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const poor = [];
  for (const node of document.querySelectorAll('body *')) {
    if (!node.checkVisibility() || node.tagName === 'OPTION') continue;
    const style = getComputedStyle(node);
    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
    const text = own ? ratio(style.color, behind(node)) : 99;
    const edge = ['INPUT', 'BUTTON', 'SELECT'].includes(node.tagName) && style.borderTopWidth !== '0px'
      && node.id && !node.closest('.quiet') ? ratio(style.borderTopColor, behind(node)) : 99;
    if (text < 4.5 || edge < 3) poor.push([node.tagName, node.id, node.className, text, edge]);
  }
  return poor;
}"""


def test_names_and_metadata_are_escaped(
    browser: Any, serving: Callable[..., Any], colour_folder: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    bad = "<img src=x onerror=document.title='taken'>"
    (colour_folder / "red/0.jpg").rename(colour_folder / f"{bad}.jpg")
    (colour_folder / "list.csv").write_text(f'path,"{bad}"\n"{bad}.jpg","{bad}"\ngreen/0.jpg,other\n')
    encoder = Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu", threads=1))
    with Gallery.create(tmp_path / bad, encoder.bundle, colour_folder) as gallery:
        index_images(gallery, encoder, open_source(colour_folder / "list.csv"))
    with opened(browser, serving(tmp_path / bad), "?q=red&where=" + bad) as page:
        api.expect(page.get_by_role("alert")).to_contain_text(bad)
        page.get_by_label("Filter (SQL)").fill("")
        wait_for_status(page, "2 of 2")
        assert bad in page.locator("#results li").first.inner_text()
        page.locator("#results li > button").first.click()
        assert page.locator("#viewerFacts").inner_text().count(bad) == 2
        page.keyboard.press("m")
        wait_for_status(page, "1 of 2")
        assert bad in page.locator("#chips").inner_text()
        assert "taken" not in page.title()


def test_the_api_documentation(page: Any) -> None:
    page.goto(page.url + "docs")
    api.expect(page.get_by_role("heading", name="POST /search", exact=True)).to_be_visible()
    api.expect(page.get_by_role("heading", name="SearchRequest")).to_be_visible()
