"""Indexing on a Ray cluster: the images of a source through many encoders, into a gallery that one process writes.

A source is cut into parts that any process can read by itself: an archive, a group of rows of a Parquet file, or some
thousand names. Ray Data streams the parts through a pool of actors, each with an `Encoder` of its own, and gives their
rows back in the order of the source; here they are committed as a run on one machine commits them. What an actor had
not finished when its machine was lost, Ray gives to another. Nothing is committed before it has come back, and no
block of a part is taken twice.

Ray Data takes a list of its inputs before it starts, so names are handed to it a million at a time.
"""

import contextlib
import json
import logging
import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from clipret.bundle import Bundle
from clipret.errors import ClipretError, one_line, require
from clipret.gallery.gallery import Gallery, ImageRecord
from clipret.images.walk import ImageFile
from clipret.indexing.index import IndexReport, Job, Run
from clipret.indexing.ray_worker import Block, Part, Result, Settings, State, encode_part
from clipret.inference.encoder import EncodedBatch, Encoder, EncodeStats
from clipret.sources.item import Item
from clipret.sources.source import Source, Stream

__all__ = ["Pool", "connect", "index_on_cluster"]

_NAMES = 2048  # a part of a source of names
_PARTS = 512  # handed to Ray Data at a time, of a source of names
_TOGETHER = 256  # images taken up at once
_STORE = 512 << 20  # bytes of shared memory of a cluster that is started here: the rows on their way
_THREADS = 4  # of an actor on processors: more of them decode and compute less well together than apart
_ADDRESS_SECONDS = 10

_SCHEMA = """
CREATE TABLE IF NOT EXISTS parts (  -- archives that were read from one end to the other
    first TEXT PRIMARY KEY, last TEXT NOT NULL,  -- the paths of their images are in this range
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    images INTEGER NOT NULL, skipped TEXT NOT NULL
)
"""


def index_on_cluster(
    gallery: Gallery,
    pool: "Pool",
    source: Source,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = lambda items: items,
    *,
    prune: bool = False,
) -> IndexReport:
    """As `index_images`, with the work spread over a pool of `connect`: the same images, ids, metadata, report.

    An image whose bytes the gallery holds under another name is encoded again here. Archives that were
    read to their end and have not changed since are not read again. One that breaks off is told at the end, when all
    others are done. Raises ClipretError as `index_images` does, and where the cluster fails; what was committed by
    then is kept, and the next run goes on from there.
    """
    gallery.check(Bundle.open(pool.settings.bundle))
    began = time.perf_counter()
    with gallery.writing(), Run(gallery, source) as run:
        work = _Taking(run, progress)
        try:
            for parts in _waves(run, work, source):
                for block in pool.blocks(parts):
                    work.take(block)
        finally:  # Ctrl-C included: what came back is kept
            work.flush()
            run.report.stages = work.stats
            run.commit()
            work.note_parts()
            run.write_skipped()
        if not work.broken:
            run.finish(prune)
    run.report.seconds = work.stats.seconds = time.perf_counter() - began
    if work.broken:
        more = f", and {len(work.broken) - 1} others likewise" if len(work.broken) > 1 else ""
        raise ClipretError(f"{work.broken[0]}{more}; everything else is done")
    return run.report


@contextlib.contextmanager
def connect(address: str, settings: Settings, workers: int | None = None) -> Iterator["Pool"]:
    """A pool of encoders on a Ray cluster.

    `address`: "auto" is the cluster of this machine or of RAY_ADDRESS, else one that is started here and lives as long
    as the block; or HOST:PORT. `workers`: actors, default one a GPU, or on processors as many as there is room for.
    Raises ClipretError where the cluster cannot be reached or is too small.
    """
    ray, ours = _ray(address)
    try:
        yield Pool(ray, settings, workers)
    finally:
        if ours:
            ray.shutdown()


def _ray(address: str) -> tuple[Any, bool]:
    """Ray, connected to a cluster, and whether it was connected here. Raises ClipretError."""
    named = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters is raised
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if named != "auto":
            _reachable(named)
        ray = require("ray", "ray")
        if ray.is_initialized():
            return ray, False
        if named != "auto":
            ray.init(address=named, **quiet)
            return ray, True
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:  # there is none
            ray.init(include_dashboard=False, object_store_memory=_STORE, **quiet)
    except (RuntimeError, ValueError, OSError) as error:
        reason = one_line(error)
        raise ClipretError(
            f"the Ray cluster at {named} cannot be reached ({reason}): name it as  ray start --head  does"
        ) from None
    return ray, True


def _reachable(address: str) -> None:
    """Raises OSError at once, where Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("an address is HOST:PORT")
    socket.create_connection((host, int(port)), timeout=_ADDRESS_SECONDS).close()


class _Actor:
    """A process of the pool. The encoder is made at the first part, so that what it lacks is an answer like others."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._encoder: Encoder | None = None

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        part: Part = pickle.loads(batch["part"][0])
        try:
            self._encoder = self._encoder or self._settings.open()
        except ClipretError as error:
            fatal = Block(part.number, 0, [], np.empty((0, 0), np.float16), True, fatal=str(error))
            yield {"block": [pickle.dumps(fatal)]}
            return
        for block in encode_part(self._encoder, part, self._settings.flip):
            yield {"block": [pickle.dumps(block)]}


class Pool:
    """The actors, by Ray Data: at most two parts each at a time, and results as far ahead as its memory allows."""

    def __init__(self, ray: Any, settings: Settings, workers: int | None) -> None:
        self._ray = ray
        there = ray.cluster_resources()
        processors, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
        self._gpus = 1 if gpus and settings.encoder.device != "cpu" else 0
        threads = settings.encoder.threads
        if threads is None:
            threads = max(processors // gpus, 1) if self._gpus else min(_THREADS, max(processors, 1))
        most = min(gpus, processors // threads) if self._gpus else processors // threads
        workers = workers or most
        if not 0 < workers <= most:
            has = f"{processors} processors" + (f" and {gpus} GPUs" if self._gpus else "")
            raise ClipretError(
                f"the cluster has {has}, which is room for {most} workers of {threads} threads, not {max(workers, 1)}: "
                "change --workers or --encoder threads="
            )
        self.workers = workers
        self.settings = replace(settings, encoder=replace(settings.encoder, threads=threads))

    def blocks(self, parts: Sequence[Part]) -> Iterator[Block]:
        """What the actors make of the parts, in their order."""
        if not parts:
            return
        data = require("ray.data", "ray")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False  # a bar of our own counts images
        context.execution_options.preserve_order = True
        rows = [{"part": self._ray.cloudpickle.dumps(part)} for part in parts]  # a source may be a program's own
        made = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(self.settings,),
            batch_size=1,
            compute=data.ActorPoolStrategy(
                min_size=1, max_size=min(self.workers, len(rows)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=self.settings.encoder.threads,
            num_gpus=self._gpus,
        )
        expected = (parts[0].number, 0)
        try:
            for table in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for content in table["block"]:
                    block: Block = pickle.loads(content.as_py())
                    if block.fatal is not None:
                        raise ClipretError(block.fatal)
                    if (block.part, block.number) != expected:
                        raise ClipretError(
                            f"Ray gave block {block.number} of part {block.part} where {expected} was due: run again, "
                            "which goes on from what is committed"
                        )
                    expected = (block.part + 1, 0) if block.last else (block.part, block.number + 1)
                    yield block
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error  # of an actor's own error, without its traceback as text
            said = (str(cause).strip().splitlines() or [""])[0][:200]
            raise ClipretError(
                f"the Ray cluster failed ({type(cause).__name__}: {said}): run again to go on from what is committed"
            ) from None


@dataclass(frozen=True)
class _Named(Item):
    """An item that an actor has dealt with: what became of it, and the block with its row."""

    result: Result
    block: Block


class _Taking:
    """Blocks as they come back, into the run."""

    def __init__(self, run: Run, progress: Callable[[Iterable[Item]], Iterable[Item]]) -> None:
        self.run = run
        self.stats = EncodeStats()
        self.broken: list[str] = []
        self.streams: dict[int, Stream] = {}
        self._queue = deque[_Named]()
        self._shown = iter(progress(self._next()))
        self._jobs: list[Job] = []
        self._skipped: dict[int, list[tuple[str, str]]] = {}
        self._whole = deque[tuple[Stream, int, list[tuple[str, str]]]]()  # with the change after which it is complete

    def _next(self) -> Iterator[Item]:
        while True:  # is asked for as many as there are
            yield self._queue.popleft()

    def take(self, block: Block) -> None:
        stats = self.stats
        stats.decode_seconds += block.decode_seconds
        stats.wait_seconds += block.wait_seconds
        stats.compute_seconds += block.compute_seconds
        self._queue.extend(_named(result, block) for result in block.results)
        for job in self.run.jobs(islice(self._shown, len(block.results))):
            self._jobs.append(job)
            if len(self._jobs) == _TOGETHER:
                self.flush()
        skipped = self._skipped.setdefault(block.part, [])
        for one in block.results:
            if one.reason is not None:
                skipped.append((self.run.stored(_named(one, block)), one.reason))
        if block.last:
            self.flush()
            told = self._skipped.pop(block.part)
            if block.error is not None:
                self.broken.append(block.error)
            elif block.part in self.streams:
                self._whole.append((self.streams.pop(block.part), self.run.changes, told))
            self.note_parts()

    def flush(self) -> None:
        """Hand the jobs that wait to the run, as a batch of its own encoder."""
        made, rows, skipped = list[Job](), [], list[tuple[Job, str]]()
        for job in self._jobs:
            assert isinstance(job.item, _Named)
            result, block = job.item.result, job.item.block
            if result.file is not None:
                job.image = ImageRecord(job.stored, *result.file)
                if job.replaces is not None and job.replaces[1].hash == result.file[2]:
                    job.twin = job.replaces[0]
            if result.reason is not None or job.twin is not None:
                skipped.append((job, result.reason or "the gallery holds its row"))
            else:
                assert result.position is not None
                made.append(job)
                rows.append(block.embeddings[result.position])
        if self._jobs:
            self.stats.images += len(made)
            self.stats.skipped += sum(job.twin is None for job, _ in skipped)
            dim = self.run.gallery.info.embedding_dim
            self.run.take(EncodedBatch(np.array(rows, np.float32).reshape(-1, dim), made, skipped))
        self._jobs = []

    def note_parts(self) -> None:
        """Remember the archives of which everything is committed."""
        database = self.run.gallery.database
        while self._whole and self.run.kept >= self._whole[0][1]:
            stream, _, skipped = self._whole.popleft()
            bounds = _bounds(self.run, stream)
            with self.run.gallery.refusable(), database.transaction() as transaction:
                transaction.execute(_SCHEMA)
                transaction.execute(
                    "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?, ?)",
                    (*bounds, stream.size, stream.mtime_ns, _count(self.run, bounds), json.dumps(skipped)),
                )


def _named(result: Result, block: Block) -> _Named:
    return _Named(result.path, _never, result.size, result.mtime_ns, result.metadata, result, block)


def _never() -> ImageFile:
    raise AssertionError("an actor has read it")


def _waves(run: Run, work: _Taking, source: Source) -> Iterator[list[Part]]:
    """The parts of a source that are to be done, as many together as Ray Data shall hold."""
    if source.streams:
        parts = list[Part]()
        for stream in source.streams:
            if not _known(run, stream):
                parts.append(Part(len(parts), stream.items, _held_stream(run, stream)))
                work.streams[parts[-1].number] = stream
        yield parts
        return
    wave = list[Part]()
    items = iter(source)
    number = 0
    while some := list(islice(items, _NAMES)):
        wave.append(Part(number, partial(iter, some), _held_names(run, some)))
        number += 1
        if len(wave) == _PARTS:
            yield wave
            wave = []
    yield wave


def _held_names(run: Run, items: Sequence[Item]) -> dict[str, State]:
    stored = {}
    for item in items:
        with contextlib.suppress(UnicodeEncodeError):  # such names are skipped when they come back
            item.path.encode()
            stored[run.stored(item)] = item.path
    known = run.gallery.database.by_path(list(stored))
    return {stored[path]: _state(image) for path, (_, image) in known.items()}


def _state(image: ImageRecord) -> State:
    return image.size, image.mtime_ns, image.hash


def _held_stream(run: Run, stream: Stream) -> dict[str, State]:
    """What the gallery holds of an archive, by the paths in the source."""
    here, there = _folder(stream.first), _folder(_bounds(run, stream)[0])
    statement = "SELECT path, size, mtime_ns, hash FROM rows WHERE deleted = 0 AND path >= ? AND path < ?"
    rows = run.gallery.database.query(statement, *_bounds(run, stream))
    return {here + path.removeprefix(there): (size, mtime, digest) for path, size, mtime, digest in rows}


def _folder(path: str) -> str:
    return path[: path.rindex("/") + 1]


def _bounds(run: Run, stream: Stream) -> tuple[str, str]:
    """The range of an archive's images in the gallery's words."""
    archive = stream.first.rpartition("/")[0]
    stored = run.stored(Item(archive, _never, None, None, {}))
    return stored + stream.first[len(archive) :], stored + stream.last[len(archive) :]


def _count(run: Run, bounds: tuple[str, str]) -> int:
    statement = "SELECT count(*) FROM rows WHERE deleted = 0 AND path >= ? AND path < ?"
    return int(run.gallery.database.query(statement, *bounds)[0][0])


def _known(run: Run, stream: Stream) -> bool:
    """Whether everything of an archive is in the gallery; then it is counted as unchanged."""
    database, bounds = run.gallery.database, _bounds(run, stream)
    if not database.query("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'parts'"):
        return False
    statement = "SELECT last, size, mtime_ns, images, skipped FROM parts WHERE first = ?"
    found = database.query(statement, bounds[0])
    if not found or found[0][:3] != (bounds[1], stream.size, stream.mtime_ns) or found[0][3] != _count(run, bounds):
        return False
    run.leave(*bounds)
    run.report.skipped += [(path, reason) for path, reason in json.loads(found[0][4])]
    return True
