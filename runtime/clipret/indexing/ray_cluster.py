"""Indexing on a Ray cluster: many encoders for the images of a source, and one process that writes the gallery.

A source is split into units that any process can read independently: an archive, a row group of a Parquet file, or some
thousand names. Ray Data streams the units through a pool of actors, each with its own `Encoder`, and returns the
embeddings in the order of the source. This process commits them as on a single machine. If the machine of an actor is
lost, Ray gives its unfinished units to another actor. Only returned results are committed, and no block is taken twice.

Ray Data needs a list of its inputs before it starts, so a source of names is passed to it a million names at a time.
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
from clipret.indexing.ray_worker import FileState, Result, ResultBlock, Settings, WorkUnit, encode_unit
from clipret.inference.encoder import EncodedBatch, Encoder, EncodeStats
from clipret.sources.item import Item
from clipret.sources.source import Source, Stream

__all__ = ["Pool", "connect", "index_on_cluster"]

_UNIT_NAMES = 2048  # names per unit, for a source of names
_WAVE_UNITS = 512  # units passed to Ray Data at a time, for a source of names
_FLUSH_IMAGES = 256  # images passed to the run at once
_STORE = 512 << 20  # bytes of shared memory of a cluster that is started here, for the embeddings in transit
_THREADS = 4  # of an actor on processors: more threads scale worse than more actors
_CONNECT_SECONDS = 10

_SCHEMA = """
CREATE TABLE IF NOT EXISTS parts (  -- archives that were read completely
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
    """Index like `index_images`, spread over a cluster, with the same images, ids, metadata and report.

    An image whose bytes are in the gallery under another path is encoded again. Archives that were read completely and
    have not changed since are not read again. An error for damaged archives is raised after all others are indexed.

    Args:
        gallery: The gallery to write.
        pool: The encoders, from `connect`.
        source: The images.
        progress: Wraps the iteration over the images, for a progress bar.
        prune: Delete images that the source does not name.

    Raises:
        ClipretError: As for `index_images`, and if the cluster fails. What has been committed is kept, and the next run
            continues from there.
    """
    gallery.check(Bundle.open(pool.settings.bundle))
    began = time.perf_counter()
    with gallery.writing(), Run(gallery, source) as run:
        collector = _Collector(run, progress)
        try:
            for units in _waves(run, collector, source):
                for block in pool.blocks(units):
                    collector.add(block)
        finally:  # also after Ctrl-C: results that came back are kept
            collector.flush()
            run.report.stages = collector.stats
            run.commit()
            collector.record_complete()
            run.write_skipped()
        if not collector.broken:
            run.finish(prune)
    run.report.seconds = collector.stats.seconds = time.perf_counter() - began
    if collector.broken:
        more = f", and {len(collector.broken) - 1} more like it" if len(collector.broken) > 1 else ""
        raise ClipretError(f"{collector.broken[0]}{more}; everything else is done")
    return run.report


@contextlib.contextmanager
def connect(address: str, settings: Settings, workers: int | None = None) -> Iterator["Pool"]:
    """Open a pool of encoders on a Ray cluster.

    Args:
        address: HOST:PORT, or "auto" for the cluster of RAY_ADDRESS or of this machine, or else a new one that lives as
            long as the block.
        settings: How each worker opens its encoder.
        workers: Number of actors; default: one per GPU, or as many as fit on processors.

    Raises:
        ClipretError: The cluster cannot be reached or is too small.
    """
    ray, connected_here = _ray(address)
    try:
        yield Pool(ray, settings, workers)
    finally:
        if connected_here:
            ray.shutdown()


def _ray(address: str) -> tuple[Any, bool]:
    """Connect Ray to a cluster; returns the module and whether this call connected it. Raises ClipretError."""
    target = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # important errors are raised
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if target != "auto":
            _check_reachable(target)
        ray = require("ray", "ray")
        if ray.is_initialized():
            return ray, False
        if target != "auto":
            ray.init(address=target, **quiet)
            return ray, True
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:  # there is no cluster
            ray.init(include_dashboard=False, object_store_memory=_STORE, **quiet)
    except (RuntimeError, ValueError, OSError) as error:
        reason = one_line(error)
        raise ClipretError(
            f"the Ray cluster at {target} cannot be reached ({reason}): use the address that  ray start --head  prints"
        ) from error
    return ray, True


def _check_reachable(address: str) -> None:
    """Raise OSError at once for an address that cannot be reached, where Ray would retry for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("an address is HOST:PORT")
    socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


class _Actor:
    """A process of the pool. It opens its encoder at the first unit, so that an error is returned as a result."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._encoder: Encoder | None = None

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        unit: WorkUnit = pickle.loads(batch["unit"][0])
        try:
            self._encoder = self._encoder or self._settings.open()
        except ClipretError as error:
            fatal = ResultBlock(unit.number, 0, [], np.empty((0, 0), np.float16), True, fatal=str(error))
            yield {"block": [pickle.dumps(fatal)]}
            return
        for block in encode_unit(self._encoder, unit, self._settings.flip):
            yield {"block": [pickle.dumps(block)]}


class Pool:
    """A pool of actors through Ray Data. Each has at most two units at a time; results are bounded by Ray's memory.

    Args:
        ray: The module, connected to a cluster.
        settings: How each actor opens its encoder.
        workers: Number of actors; default: one per GPU, or as many as fit on processors.

    Attributes:
        workers: Number of actors.
        settings: The settings with the number of threads resolved.

    Raises:
        ClipretError: The cluster is too small.
    """

    def __init__(self, ray: Any, settings: Settings, workers: int | None) -> None:
        self._ray = ray
        resources = ray.cluster_resources()
        processors, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        self._gpus = 1 if gpus and settings.encoder.device != "cpu" else 0
        threads = settings.encoder.threads
        if threads is None:
            threads = max(processors // gpus, 1) if self._gpus else min(_THREADS, max(processors, 1))
        max_workers = min(gpus, processors // threads) if self._gpus else processors // threads
        workers = workers or max_workers
        if not 0 < workers <= max_workers:
            has = f"{processors} processors" + (f" and {gpus} GPUs" if self._gpus else "")
            raise ClipretError(
                f"the cluster has {has}, room for {max_workers} workers of {threads} threads, not {max(workers, 1)}: "
                "change --workers or --encoder threads="
            )
        self.workers = workers
        self.settings = replace(settings, encoder=replace(settings.encoder, threads=threads))

    def blocks(self, units: Sequence[WorkUnit]) -> Iterator[ResultBlock]:
        """Encode units on the cluster.

        Args:
            units: The units, numbered consecutively.

        Yields:
            Their blocks in order.

        Raises:
            ClipretError: An encoder cannot be opened, or the cluster fails.
        """
        if not units:
            return
        data = require("ray.data", "ray")
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False  # clipret's own bar counts images
        context.execution_options.preserve_order = True
        rows = [{"unit": self._ray.cloudpickle.dumps(unit)} for unit in units]  # a source may be defined in a script
        results = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(self.settings,),
            batch_size=1,
            compute=data.ActorPoolStrategy(
                min_size=1, max_size=min(self.workers, len(rows)), max_tasks_in_flight_per_actor=2
            ),
            num_cpus=self.settings.encoder.threads,
            num_gpus=self._gpus,
        )
        expected = (units[0].number, 0)
        try:
            for table in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for content in table["block"]:
                    block: ResultBlock = pickle.loads(content.as_py())
                    if block.fatal is not None:
                        raise ClipretError(block.fatal)
                    if (block.unit, block.number) != expected:
                        raise ClipretError(
                            f"Ray returned block {block.number} of unit {block.unit} instead of {expected}: run again "
                            "to continue from what is committed"
                        )
                    expected = (block.unit + 1, 0) if block.last else (block.unit, block.number + 1)
                    yield block
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error  # the error of an actor, without its traceback as text
            message = (str(cause).strip().splitlines() or [""])[0][:200]
            raise ClipretError(
                f"the Ray cluster failed ({type(cause).__name__}: {message}): run again to continue from what is "
                "committed"
            ) from error


@dataclass(frozen=True)
class _ProcessedItem(Item):
    """An item with its result, and the block that has its embedding."""

    result: Result
    block: ResultBlock


class _Collector:
    """Passes the blocks that come back to the run."""

    def __init__(self, run: Run, progress: Callable[[Iterable[Item]], Iterable[Item]]) -> None:
        self.run = run
        self.stats = EncodeStats()
        self.broken: list[str] = []
        self.streams: dict[int, Stream] = {}
        self._queue = deque[_ProcessedItem]()
        self._shown = iter(progress(self._next()))
        self._jobs: list[Job] = []
        self._skipped: dict[int, list[tuple[str, str]]] = {}
        # Streams that were read completely, with the number of changes after which they are committed.
        self._complete = deque[tuple[Stream, int, list[tuple[str, str]]]]()

    def _next(self) -> Iterator[Item]:
        while True:  # the caller takes as many as are queued
            yield self._queue.popleft()

    def add(self, block: ResultBlock) -> None:
        """Add a block, in the order of the source."""
        stats = self.stats
        stats.decode_seconds += block.decode_seconds
        stats.wait_seconds += block.wait_seconds
        stats.compute_seconds += block.compute_seconds
        self._queue.extend(_processed(result, block) for result in block.results)
        for job in self.run.jobs(islice(self._shown, len(block.results))):
            self._jobs.append(job)
            if len(self._jobs) == _FLUSH_IMAGES:
                self.flush()
        skipped = self._skipped.setdefault(block.unit, [])
        for result in block.results:
            if result.reason is not None:
                skipped.append((self.run.stored(_processed(result, block)), result.reason))
        if block.last:
            self.flush()
            skipped = self._skipped.pop(block.unit)
            if block.error is not None:
                self.broken.append(block.error)
            elif block.unit in self.streams:
                self._complete.append((self.streams.pop(block.unit), self.run.changes, skipped))
            self.record_complete()

    def flush(self) -> None:
        """Pass the waiting jobs to the run, like a batch of an encoder."""
        encoded, embeddings, skipped = list[Job](), [], list[tuple[Job, str]]()
        for job in self._jobs:
            assert isinstance(job.item, _ProcessedItem)
            result, block = job.item.result, job.item.block
            if result.file is not None:
                job.image = ImageRecord(job.stored, *result.file)
                if job.replaces is not None and job.replaces[1].hash == result.file[2]:
                    job.twin = job.replaces[0]
            if result.reason is not None or job.twin is not None:
                skipped.append((job, result.reason or "the gallery holds its embedding"))
            else:
                assert result.position is not None
                encoded.append(job)
                embeddings.append(block.embeddings[result.position])
        if self._jobs:
            self.stats.images += len(encoded)
            self.stats.skipped += sum(job.twin is None for job, _ in skipped)
            dim = self.run.gallery.info.embedding_dim
            self.run.add(EncodedBatch(np.array(embeddings, np.float32).reshape(-1, dim), encoded, skipped))
        self._jobs = []

    def record_complete(self) -> None:
        """Record the archives whose images are all committed."""
        database = self.run.gallery.database
        while self._complete and self.run.committed >= self._complete[0][1]:
            stream, _, skipped = self._complete.popleft()
            bounds = _bounds(self.run, stream)
            with self.run.gallery.refusable(), database.transaction() as transaction:
                transaction.execute(_SCHEMA)
                transaction.execute(
                    "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?, ?)",
                    (*bounds, stream.size, stream.mtime_ns, _count(self.run, bounds), json.dumps(skipped)),
                )


def _processed(result: Result, block: ResultBlock) -> _ProcessedItem:
    return _ProcessedItem(result.path, _unread, result.size, result.mtime_ns, result.metadata, result, block)


def _unread() -> ImageFile:
    raise AssertionError("an actor has read it")


def _waves(run: Run, collector: _Collector, source: Source) -> Iterator[list[WorkUnit]]:
    """The units of a source that need work, in lists for Ray Data."""
    if source.streams:
        units = list[WorkUnit]()
        for stream in source.streams:
            if not _is_complete(run, stream):
                units.append(WorkUnit(len(units), stream.items, _indexed_of_stream(run, stream)))
                collector.streams[units[-1].number] = stream
        yield units
        return
    wave = list[WorkUnit]()
    items = iter(source)
    number = 0
    while chunk := list(islice(items, _UNIT_NAMES)):
        wave.append(WorkUnit(number, partial(iter, chunk), _indexed_of_names(run, chunk)))
        number += 1
        if len(wave) == _WAVE_UNITS:
            yield wave
            wave = []
    yield wave


def _indexed_of_names(run: Run, items: Sequence[Item]) -> dict[str, FileState]:
    """The state of items that are in the gallery, by their paths in the source."""
    source_path = {}
    for item in items:
        with contextlib.suppress(UnicodeEncodeError):  # such names are skipped when they come back
            item.path.encode()
            source_path[run.stored(item)] = item.path
    images = run.gallery.database.by_path(list(source_path))
    return {source_path[path]: _state(image) for path, (_, image) in images.items()}


def _state(image: ImageRecord) -> FileState:
    return image.size, image.mtime_ns, image.hash


def _indexed_of_stream(run: Run, stream: Stream) -> dict[str, FileState]:
    """The state of an archive's images that are in the gallery, by their paths in the source."""
    source_folder, gallery_folder = _folder(stream.first), _folder(_bounds(run, stream)[0])
    statement = "SELECT path, size, mtime_ns, hash FROM rows WHERE deleted = 0 AND path >= ? AND path < ?"
    rows = run.gallery.database.query(statement, *_bounds(run, stream))
    return {
        source_folder + path.removeprefix(gallery_folder): (size, mtime, digest) for path, size, mtime, digest in rows
    }


def _folder(path: str) -> str:
    return path[: path.rindex("/") + 1]


def _bounds(run: Run, stream: Stream) -> tuple[str, str]:
    """The bounds of the paths of an archive's images in the gallery."""
    archive = stream.first.rpartition("/")[0]
    stored = run.stored(Item(archive, _unread, None, None, {}))
    return stored + stream.first[len(archive) :], stored + stream.last[len(archive) :]


def _count(run: Run, bounds: tuple[str, str]) -> int:
    statement = "SELECT count(*) FROM rows WHERE deleted = 0 AND path >= ? AND path < ?"
    return int(run.gallery.database.query(statement, *bounds)[0][0])


def _is_complete(run: Run, stream: Stream) -> bool:
    """Whether all images of an archive are in the gallery; if so, they are counted as unchanged."""
    database, bounds = run.gallery.database, _bounds(run, stream)
    if not database.query("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'parts'"):
        return False
    statement = "SELECT last, size, mtime_ns, images, skipped FROM parts WHERE first = ?"
    rows = database.query(statement, bounds[0])
    if not rows or rows[0][:3] != (bounds[1], stream.size, stream.mtime_ns) or rows[0][3] != _count(run, bounds):
        return False
    run.keep_unchanged(*bounds)
    run.report.skipped += [(path, reason) for path, reason in json.loads(rows[0][4])]
    return True
