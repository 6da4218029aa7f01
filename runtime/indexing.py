"""Indexing: pictures from a folder or a list into a gallery, resumable at every commit."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipret.encoder import EncodedBatch, Encoder
from clipret.errors import ClipretError, printable
from clipret.files import write_file
from clipret.gallery import Gallery, Picture
from clipret.images import PictureError, find_pictures, read_picture
from clipret.tables import pick_column, read_table

__all__ = ["IndexReport", "index_pictures", "list_pictures"]

_SHARD_ROWS = 8192  # a commit each: what an interrupted run loses at most


@dataclass(frozen=True)
class IndexReport:
    """What an indexing run did. `skipped`: path and reason of each picture that could not be used."""

    added: int
    changed: int
    unchanged: int
    skipped: list[tuple[str, str]]
    seconds: float

    @property
    def encoded(self) -> int:
        return self.added + self.changed


def list_pictures(
    source: Path, *, image_column: str | None = None, image_root: Path | None = None, where: str | None = None
) -> tuple[list[Path], Path]:
    """The pictures that a folder (recursively) or a .csv/.tsv/.jsonl list names, each once, and their root.

    Paths in a list are relative to `image_root`, by default the list's folder. Raises ClipretError for
    an empty folder, a list without rows or without an image column.
    """
    if source.is_dir() or not source.exists():
        return find_pictures(source), source
    table = read_table(source, where)
    column = pick_column(table, image_column, "image")
    root = image_root or source.parent
    return [root / name for name in dict.fromkeys(row[column] for row in table.rows)], root


@dataclass
class _Job:
    """A picture on its way through the encoder; the decode thread that reads the file fills in `picture`."""

    file: Path
    stored: str
    picture: Picture | None = None

    def read(self) -> bytes:
        if not _is_utf8(self.stored):
            raise PictureError("its name is not UTF-8: rename it")  # the database and every report are UTF-8
        content = read_picture(self.file)
        self.picture = Picture(self.stored, content.size, content.mtime_ns, content.digest)
        return content.content


def index_pictures(
    gallery: Gallery,
    encoder: Encoder,
    files: Sequence[Path],
    progress: Callable[[Iterable[_Job]], Iterable[_Job]] = lambda jobs: jobs,
) -> IndexReport:
    """Encode the files that the gallery does not hold yet, or that have changed, and commit them shard by shard.

    Unreadable pictures are skipped and written with their reasons to `skipped.tsv` in the gallery. Raises
    ClipretError when the bundle is not the gallery's, another process is writing, the disk is full, or nothing
    at all could be read; what was committed by then is kept, and the next run goes on from there.
    """
    gallery.check(encoder.bundle)
    started = time.perf_counter()
    added, changed = 0, 0
    skipped: list[tuple[str, str]] = []
    with gallery.writing():
        known = gallery.pictures()
        by_path = {gallery.stored_path(file): file for file in files}  # a list may name one file in two ways
        jobs = [_Job(file, stored) for stored, file in by_path.items()]
        todo = [job for job in jobs if not _is_known(job, known)]
        # One list, appended to in one step: Ctrl-C can come between any two.
        batches: list[EncodedBatch[_Job]] = []

        def commit() -> None:
            nonlocal added, changed
            # Taken out first: Ctrl-C just after the append must not append them again.
            taken = batches.copy()
            batches.clear()
            pictures = [job.picture for batch in taken for job in batch.items if job.picture is not None]
            if pictures:
                gallery.append(pictures, np.concatenate([batch.rows for batch in taken]))
            replaced = sum(picture.path in known for picture in pictures)
            added, changed = added + len(pictures) - replaced, changed + replaced
            skipped.extend((job.stored, reason) for batch in taken for job, reason in batch.skipped)

        try:
            for batch in encoder.encode_images(progress(todo), _Job.read):
                batches.append(batch)
                if sum(len(batch.items) for batch in batches) >= _SHARD_ROWS:
                    commit()
        except KeyboardInterrupt:
            commit()  # what is encoded is kept
            raise
        commit()
        _report(gallery, skipped)
    if todo and len(skipped) == len(jobs):
        path, reason = skipped[0]
        raise ClipretError(f"none of the {len(jobs)} pictures could be used; the first: {path}: {reason}")
    return IndexReport(added, changed, len(jobs) - len(todo), skipped, time.perf_counter() - started)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python reads the bytes of such names as lone surrogates
        return False
    return True


def _is_known(job: _Job, known: dict[str, Picture]) -> bool:
    picture = known.get(job.stored)
    if picture is None:
        return False
    try:
        status = job.file.stat()
    except OSError:
        return False  # reading it will give the reason
    return (picture.size, picture.mtime_ns) == (status.st_size, status.st_mtime_ns)


def _report(gallery: Gallery, skipped: Sequence[tuple[str, str]]) -> None:
    file = gallery.path / "skipped.tsv"
    if not skipped:
        file.unlink(missing_ok=True)
        return
    lines = [f"{printable(path)}\t{printable(reason)}" for path, reason in skipped]
    write_file(file, "\n".join(["path\treason", *lines]) + "\n")
