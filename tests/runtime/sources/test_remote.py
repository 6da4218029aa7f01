"""Images in an object store: a real S3 server on this machine, read by the same commands as local files."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from clipret import Bundle, ClipretError, Encoder, EncoderConfig, Gallery, index_images, open_source
from clipret.cli import main
from clipret.images.walk import ImageError
from clipret.locations import remote_in
from clipret.sources.item import PreloadedRead, without_bytes
from clipret.sources.source import read_stored

pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")]


@pytest.fixture
def bucket(upload: Callable[[str, Path], None], colour_folder: Path, tmp_path: Path) -> str:
    """images/, shards/{0..1}.tar with the colour as metadata of each image, rows.parquet with image bytes."""
    files = sorted(file for file in colour_folder.rglob("*.*"))
    here = tmp_path / "bucket"
    (here / "shards").mkdir(parents=True)
    for number in range(2):
        with tarfile.open(here / "shards" / f"{number}.tar", "w") as tar:
            for file in files[number::2]:
                name = f"{file.parent.name}-{file.stem}"
                tar.add(file, name + file.suffix)
                text = tarfile.TarInfo(name + ".txt")
                text.size = len(file.parent.name)
                tar.addfile(text, io.BytesIO(file.parent.name.encode()))
    table = pa.table({"image": [file.read_bytes() for file in files], "colour": [file.parent.name for file in files]})
    parquet.write_table(table, here / "rows.parquet", row_group_size=5)
    colour_folder.rename(here / "images")
    name = f"bucket-{abs(hash(str(tmp_path))) % 10**9}"
    upload(name, here)
    return name


def rows_of(gallery: Gallery) -> dict[str, tuple[float, ...]]:
    stored = gallery.read()
    rows = np.concatenate(stored.shards).tolist()
    return dict(zip(gallery.paths(stored.ids), map(tuple, rows), strict=True))


def filled(folder: Path, bundle: Path, source: str | Path) -> Gallery:
    encoder, opened = Encoder(Bundle.open(bundle), EncoderConfig(device="cpu", threads=1)), open_source(source)
    gallery = Gallery.create(folder, encoder.bundle, opened.root)
    index_images(gallery, encoder, opened)
    return gallery


@pytest.mark.parametrize("name", ["shards/{0..1}.tar", "shards/", "rows.parquet", "images", "images/red/0.jpg"])
def test_what_a_store_holds_is_what_a_disk_holds(name: str, bucket: str, tiny_bundle: Path, tmp_path: Path) -> None:
    remote = filled(tmp_path / "remote", tiny_bundle, f"s3://{bucket}/{name}")
    local = filled(tmp_path / "local", tiny_bundle, tmp_path / "bucket" / name)
    root = Path(local.info.root).relative_to(tmp_path / "bucket").as_posix()
    below = f"s3://{bucket}/" if root == "." else f"s3://{bucket}/{root}/"
    found, expected = rows_of(remote), rows_of(local)
    assert found == {below + path: row for path, row in expected.items()}
    ids = remote.read().ids
    assert remote.metadata(ids) == local.metadata(ids)
    # An image is read again by its path, as the page and the service do.
    for path, local_path in zip(list(found)[:2], expected, strict=False):
        content = read_stored(Path(local.info.root), local_path).content
        assert read_stored(Path(remote.info.root), path).content == content
        there = remote.file(path)
        assert read_stored(there.parent, there.name).content == content


def test_index_and_query_by_command(bucket: str, tiny_bundle: Path, tmp_path: Path) -> None:
    runner, gallery = CliRunner(), str(tmp_path / "gallery")
    source = f"s3://{bucket}/shards/{{0..1}}.tar"
    for counts in ("12 added, 0 changed, 0 unchanged", "0 added, 0 changed, 12 unchanged"):
        done = runner.invoke(main, ["index", str(tiny_bundle), source, gallery, "--device", "cpu"])
        assert done.exit_code == 0, done.output
        assert counts in done.output
    done = runner.invoke(main, ["query", gallery, "red", "-k", "1", "--where", "text = 'red'", "--device", "cpu"])
    assert f"s3://{bucket}/shards/" in done.output
    page = tmp_path / "results.html"
    done = runner.invoke(main, ["query", gallery, "red", "-k", "2", "--html", str(page), "--device", "cpu"])
    assert page.read_text(encoding="utf-8").count("data:image/jpeg;base64,") == 2


def test_an_annotations_file_may_name_images_of_a_store(bucket: str, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text(f"path,hour\ns3://{bucket}/images/red/0.jpg,3\nbucket/images/red/1.jpeg,4\n")
    gallery = filled(tmp_path / "gallery", tiny_bundle, tmp_path / "images.csv")
    assert gallery.paths([1, 2]) == [f"s3://{bucket}/images/red/0.jpg", "bucket/images/red/1.jpeg"]
    again = index_images(
        gallery, Encoder(Bundle.open(tiny_bundle), EncoderConfig(device="cpu")), open_source(tmp_path / "images.csv")
    )
    assert (again.unchanged, again.added, again.changed) == (2, 0, 0)


def test_items_can_drop_their_bytes(bucket: str) -> None:
    item = next(iter(open_source(f"s3://{bucket}/shards/0.tar")))
    assert isinstance(item.read, PreloadedRead)
    light = without_bytes(item)
    assert not isinstance(light.read, PreloadedRead)
    assert light.read() == item.read()


def test_errors_say_what_to_do(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reason in (
        ("shards/{0..2}.tar", r"shards/2\.tar does not exist: check the name and the range"),
        ("nothing", "does not exist: check the name"),
        ("images.csv", "cannot be read from a store: copy it to this machine"),
        ("rows.parquet?region=us-east-1", "set AWS_ENDPOINT_URL"),
        ("shards/{0..1}.tar.gz", "compressed as a whole"),
    ):
        with pytest.raises(ClipretError, match=reason):
            open_source(f"s3://{bucket}/{name}")
    with pytest.raises(ClipretError, match="which a gallery would store"):
        open_source(f"s3://key:secret@{bucket}/shards/0.tar")
    with pytest.raises(ImageError, match="cannot be read"):
        read_stored(tmp_path, f"s3://{bucket}/nothing.jpg")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ClipretError, match="check the name, the network, AWS_ENDPOINT_URL and AWS_REGION"):
        open_source(f"s3://{bucket}/shards/0.tar")
    with pytest.raises(ClipretError, match="cannot be opened"):
        open_source("hdfs://127.0.0.1:1/images")


def test_missing_credentials_are_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    """A server that tells strangers 403, as Amazon's does; the one of moto lets everybody in."""
    import http.server
    import threading

    class Closed(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Closed)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_EC2_METADATA_DISABLED": "true"}
        variables |= {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_REGION": "us-east-1"}
        arguments = ["index", str(tiny_bundle), "s3://somebody-elses/{0..3}.tar", str(tmp_path / "gallery")]
        for _ in range(2):
            done = CliRunner().invoke(main, [*arguments, "--device", "cpu"], env=variables)
            assert done.exit_code == 1
            assert "set credentials that may read it, with AWS_ACCESS_KEY_ID" in done.output
            assert len(done.output.strip().splitlines()) == 1
            assert not (tmp_path / "gallery").exists()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_addresses_and_paths() -> None:
    assert remote_in("/root/s3:/bucket/a b/c.jpg") == "s3://bucket/a b/c.jpg"
    assert remote_in("gs://bucket/key") == "gs://bucket/key"
    for path in ("/root/x:/y.jpg", "images/s3/a.jpg", "http://host/a.jpg"):
        assert remote_in(path) is None
