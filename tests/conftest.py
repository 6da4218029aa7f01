"""Fixtures for all rooms: the tiny bundle, coloured pictures, the real data where it lies beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """A bundle that knows nine colour words; see make_tiny_bundle.py."""
    return ROOT / "tests" / "data" / "tiny-bundle"


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """Three pictures of each colour, none of them square: red/0.jpg … grey/2.png."""
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for colour, rgb in COLOURS.items():
        (folder / colour).mkdir(parents=True)
        for number in range(3):
            noise = rng.integers(-9, 10, (20 + 7 * number, 40, 3))
            pixels = (np.array(rgb) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / colour / f"{number}.{('jpg', 'jpeg', 'png')[number]}")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures and captions; not part of the project, so tests that need them skip where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
