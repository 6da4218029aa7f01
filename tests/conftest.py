"""Fixtures for all rooms: the tiny bundle, coloured images, a store of objects, the real data where it is next to
the checkout."""

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipret.hardware.cpu import int8_saturates

ROOT = Path(__file__).resolve().parent.parent
# A shell starts what runs in its background deaf to Ctrl-C, and so would be the processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test says by a mark what it needs of the processor."""
    if item.get_closest_marker("needs_vnni") and int8_saturates():
        pytest.skip("this processor has no VNNI, or CLIPRET_CPU says so")


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """A bundle that knows nine colour words; see make_tiny_bundle.py."""
    return ROOT / "tests" / "data" / "tiny-bundle"


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """Three images of each colour, none of them square: red/0.jpg … grey/2.png."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for colour, rgb in COLOURS.items():
        (folder / colour).mkdir(parents=True)
        for number in range(3):
            noise = rng.integers(-9, 10, (20 + 7 * number, 40, 3))
            pixels = (np.array(rgb) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / colour / f"{number}.{('jpg', 'jpeg', 'png')[number]}")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path | None:
    """Real images, captions and tokenizer vectors, which are not part of the project. A test that takes them has data
    of its own, too: None where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="module")
def upload() -> Iterator[Callable[[str, Path], None]]:
    """upload(bucket, folder) puts every file below a folder into a bucket of a real S3 server on this machine, which
    clipret finds by the variables that are set meanwhile."""
    server_module = pytest.importorskip("moto.server", reason="needs moto")
    fs = pytest.importorskip("pyarrow.fs", reason="needs the extra parquet")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()

    def put(bucket: str, folder: Path) -> None:
        store = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
        store.create_dir(bucket)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                with store.open_output_stream(f"{bucket}/{file.relative_to(folder).as_posix()}") as stream:
                    stream.write(file.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield put
    server.stop()
