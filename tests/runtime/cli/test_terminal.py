"""Images in terminals, decoded again as a terminal would; nothing of them elsewhere."""

import base64
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret.cli.terminal import detect, kitty, link, sixel, strip

pytestmark = pytest.mark.slow


def decoded_sixel(text: str) -> np.ndarray:
    """What a terminal with a black background draws, float [H,W,3] in shares of full light."""
    body = re.fullmatch(r'\033P0;1;0q"1;1;(\d+);(\d+)((?s:.)*)\033\\', text)
    assert body is not None
    width, height, drawn = int(body[1]), int(body[2]), np.zeros((6 * (int(body[2]) // 6 + 1), int(body[1]), 3))
    palette, colour, x, y, spent = dict[int, list[float]](), None, 0, 0, 0
    for found in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|(\$)|(-)|!(\d+)([?-~])|([?-~])", body[3]):
        spent += len(found[0])
        if found[1]:
            levels = [int(value) for value in found.groups()[1:4]]
            assert max(levels) <= 100
            palette[int(found[1])] = [level / 100 for level in levels]
        elif found[5]:
            colour = palette[int(found[5])]
        elif found[6]:
            x = 0
        elif found[7]:
            x, y = 0, y + 6
        else:
            count, bits = (int(found[8]), found[9]) if found[8] else (1, found[10])
            for row in range(6):
                if (ord(bits) - 63) >> row & 1:
                    assert (drawn[y + row, x : x + count] == 0).all(), "no pixel is drawn twice"
                    drawn[y + row, x : x + count] = colour
            x += count
            assert x <= width
    assert spent == len(body[3]), "nothing else is in it"
    assert (drawn[height:] == 0).all()
    return drawn[:height]


def decoded_kitty(text: str) -> Image.Image:
    chunks = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", text)
    assert "".join(f"\033_G{keys};{content}\033\\" for keys, content in chunks) == text
    assert chunks[0][0].startswith("a=T,f=100,q=2,")
    assert [keys[-3:] for keys, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]
    assert all(len(content) <= 4096 and len(content) % 4 == 0 for _, content in chunks)
    return Image.open(io.BytesIO(base64.b64decode("".join(content for _, content in chunks))))


def test_sixels_are_the_image() -> None:
    rng = np.random.default_rng(0)
    levels = (rng.integers(1, 6, (25, 33, 3)) * 51).astype(np.uint8)  # 125 colours, and 25 is no multiple of 6
    levels[:, 5:20] = levels[0, 0]  # runs
    alpha = np.full((25, 33, 1), 255, np.uint8)
    alpha[3:9, 20:30] = 0
    drawn = decoded_sixel(sixel(Image.fromarray(np.concatenate([levels, alpha], axis=2))))
    assert drawn.shape == (25, 33, 3)
    expected = levels / 255 * (alpha > 0)
    np.testing.assert_allclose(drawn, expected, atol=0.011)


def test_sixels_of_a_photograph_are_near_it() -> None:
    across, down = np.meshgrid(np.arange(200), np.arange(90))
    levels = np.stack([across, down * 2, 255 - across], axis=2).astype(np.uint8)
    drawn = decoded_sixel(sixel(Image.fromarray(levels)))
    assert np.abs(drawn - levels / 255).mean() < 0.05


def test_kittys_protocol_is_the_image() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (80, 120, 4), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(decoded_kitty(kitty(Image.fromarray(levels)))), levels)


def test_a_strip_has_rows_that_fit() -> None:
    shapes = [(300, 100), (100, 100), (50, 200), (9000, 100)]
    found = strip([*(Image.new("RGB", size, "red") for size in shapes), None], 400, 100)
    assert found.width <= 400
    assert found.height == 4 * 100 + 3 * 6
    levels = np.asarray(found)
    assert (levels[50, 250] == (255, 0, 0, 255)).all()
    assert levels[50, 303, 3] == 0  # between two images
    assert (levels[..., :3] == 128).all(axis=2).sum() > 8000  # what cannot be read
    assert strip([], 400, 100).width == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "none"),
        ({"TERM": "dumb"}, "none"),
        ({"TERM": "linux"}, "none"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "sixel"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, "links"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "links"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, "links"),
    ],
)
def test_the_environment_tells_what_a_terminal_can(environment: dict[str, str], expected: str) -> None:
    assert detect(environment) == expected


def test_a_link_is_one_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a b\033.jpg"
    shown = link(file, "a b")
    assert shown == f"\033]8;;{tmp_path.as_uri()}/a%20b%1B.jpg\033\\a b\033]8;;\033\\"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_query_shows_images_where_stdout_can(
    listed_gallery: Path,
    on_terminal: Callable[..., bytes],
    run_command: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("KITTY_WINDOW_ID", "STY", "TERM_PROGRAM", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    (listed_gallery.parent / "images/red/1.jpeg").unlink()
    command = [sys.executable, "-m", "clipret.cli", "query", str(listed_gallery), "red", "-k", "4"]
    plain = run_command(command)
    assert b"\033" not in plain
    for show in ("auto", "kitty", "sixel", "links"):
        assert run_command([*command, "--show", show], TERM="xterm-kitty") == plain

    def shown(*options: str, **environment: str) -> str:
        told = on_terminal([*command, *options], **{"NO_COLOR": "1", "TERM": "xterm", **environment})
        return told.decode().replace("\r\n", "\n")

    bare = plain.decode()
    assert shown("--show", "none") == shown(TERM="dumb") == bare
    linked = shown()
    assert re.sub(r"\033\]8;;[^\033]*\033\\", "", linked) == bare
    files = re.findall(r"\033\]8;;file://([^\033]+)\033\\", linked)
    assert [file.split("/")[-2] for file in files[:2]] == ["red", "red"]
    assert len(files) == 3  # one file is gone
    strip_of, _, table = shown(TERM="xterm-kitty").partition("\n")
    image = decoded_kitty(strip_of).convert("RGB")
    assert image.height == 2 * 128 + 6  # two rows of what 80 columns hold
    assert table == linked
    assert np.asarray(image)[..., 0].max() > 200  # a red one
    sixels, _, table = shown("--show", "sixel").partition("\n")
    assert decoded_sixel(sixels).shape[0] == 2 * 128 + 6
    assert table == linked
    assert "\033" not in shown("--json", TERM="xterm-kitty")
