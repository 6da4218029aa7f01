"""The images of the page in docs/, taken in a real Chromium of what `make demo` has made.

    python benchmarks/screenshots.py demo docs [--other BUNDLE]

Indexes the demo's clean images with their captions as metadata, serves them, photographs the page: wide and light,
on a phone in Chinese and dark, and side by side with the same images under another bundle.
"""

import argparse
import contextlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Page, sync_playwright

CLIPRET = (sys.executable, "-m", "clipret.cli")
READY = """document.querySelector('#status').textContent && !document.querySelector('#results[aria-busy]')
    && [...document.images].every((one) => one.complete || one.getBoundingClientRect().top > innerHeight)"""


def photograph(page: Page, out: Path) -> None:
    """As a PNG of 256 colours, a third of the size of the whole palette."""
    while not page.evaluate(READY):
        page.wait_for_timeout(100)
    page.wait_for_timeout(500)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size >> 10} KiB", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--other", type=Path, help="A bundle to compare with: demo/run after few epochs, exported.")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bundles = {"tuned": arguments.demo / "bundle"} | ({"early": arguments.other} if arguments.other else {})
        galleries = [Path(folder, name) for name in bundles]
        for gallery, bundle in zip(galleries, bundles.values(), strict=True):
            source = arguments.demo / "web" / "captions.csv"
            subprocess.run([*CLIPRET, "index", str(bundle), str(source), str(gallery)], check=True)
        command = [*CLIPRET, "serve", *map(str, galleries), "--port", "0"]
        server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(server.terminate)
        assert server.stdout is not None
        home = re.findall(r"http://\S+", server.stdout.readline())[0]
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )

        def shot(name: str, width: int, height: int, asked: dict[str, str], **options: Any) -> None:
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            page = context.new_page()
            page.goto(home + "?" + urlencode(asked))
            photograph(page, arguments.out / name)
            context.close()

        shot("page.png", 1180, 720, {"q": "a red bus at night"}, locale="en-US", color_scheme="light")
        shot("page-phone.png", 390, 780, {"q": "一辆黄色的卡车"}, locale="zh-CN", color_scheme="dark")
        if arguments.other:
            asked = {"q": "a woman in a blue dress", "compare": "early"}
            shot("page-compare.png", 1180, 720, asked, locale="en-US", color_scheme="light")
        browser.close()


if __name__ == "__main__":
    main()
