"""Decode threads that run ahead of an engine: images in, whole batches of pixels out, in order and in bounded memory.

The threads are this module's own, because those of concurrent.futures are joined when the interpreter ends: one image
that hangs its decoder would hang the process with it. These are daemons and are left behind.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np

from clipret.arrays import Pixels
from clipret.errors import ClipretError
from clipret.images.walk import ImageError

__all__ = ["Batch", "Decoding"]

T = TypeVar("T")

_MOST_ABANDONED = 64  # hanging threads; with more than a few it is not the images but the drive they lie on


@dataclass(eq=False)
class Batch(Generic[T]):
    """One batch on its way. When it comes out of a `Decoding`, `items` are the images in `pixels`, uint8 [n,S,S,3],
    and `skipped` those that could not be decoded, with the reason; both in the order of the input."""

    memory: Pixels
    items: list[T] = field(default_factory=list)
    skipped: list[tuple[T, str]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    waiting: int = 0
    error: BaseException | None = None

    @property
    def pixels(self) -> Pixels:
        return self.memory[: len(self.items)]

    def close_gaps(self) -> None:
        """Move the rows together: an image that was skipped leaves no row that an engine would see."""
        if not self.reasons:
            return
        kept = [row for row in range(len(self.items)) if row not in self.reasons]
        for to, row in enumerate(kept):
            if to != row:
                self.memory[to] = self.memory[row]
        self.skipped = [(self.items[row], reason) for row, reason in sorted(self.reasons.items())]
        self.items = [self.items[row] for row in kept]


@dataclass(eq=False)
class _Job(Generic[T]):
    """One image: its batch and its row there. `thread` took it at `started`, in seconds of the monotonic clock."""

    item: T
    batch: Batch[T]
    row: int
    started: float = 0.0
    thread: threading.Thread | None = None
    abandoned: bool = False


class Decoding(Generic[T]):
    """Iterates over the batches of `items`, decoded by `threads` threads with `decode(item) -> uint8 [S,S,3]`.

    `items` is read by the thread that iterates here, at most `batches` batches of `batch_size` ahead. The memory is as
    many arrays of batch_size * S * S * 3 bytes, made once, and what the threads hold. A batch belongs to the caller
    until `release(batch)` gives its memory back.

    A ImageError skips the image. One that takes longer than `timeout` seconds is skipped as well: its
    thread is left behind and another takes its place. Every row is copied into its batch under the lock and only while
    the batch waits for it, so nothing that a thread left behind still writes can reach a batch. (A decoder that hangs
    without releasing Python's lock stops everything; Pillow's release it.) Any other exception, of `decode` or
    of `items`, is raised here once the batches before it have been given out.
    """

    def __init__(
        self,
        items: Iterable[T],
        decode: Callable[[T], Pixels],
        size: int,
        batch_size: int,
        *,
        threads: int,
        batches: int,
        timeout: float,
    ) -> None:
        self._items, self._decode = iter(items), decode
        self._shape = (batch_size, size, size, 3)
        self._threads, self._timeout = threads, timeout
        self._lock = threading.Lock()
        self._offered = threading.Condition(self._lock)  # a job for the threads, or the end
        self._finished = threading.Condition(self._lock)  # a batch is whole
        self._jobs: deque[_Job[T]] = deque()
        self._running: set[_Job[T]] = set()
        self._ahead: deque[Batch[T]] = deque()
        self._free = batches
        self._pool: list[Pixels] = []
        self._started = 0
        self._abandoned: list[threading.Thread] = []
        self._exhausted = self._stopped = False
        self._failure: Exception | None = None
        self.decode_seconds = 0.0  # summed over the threads, reading included
        self.wait_seconds = 0.0  # in which the caller waited here for pixels

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody waits: threads that are decoding end after their image, the others at once."""
        with self._lock:
            self._stopped = True
            self._jobs.clear()
            self._offered.notify_all()

    def __iter__(self) -> Iterator[Batch[T]]:
        return self

    def __next__(self) -> Batch[T]:
        self._fill()
        if not self._ahead:
            if self._failure is not None:
                raise self._failure
            raise StopIteration
        batch = self._ahead[0]
        began = time.perf_counter()
        with self._lock:
            while batch.waiting:
                self._finished.wait(self._until_next_limit())
                self._abandon_late()
        self.wait_seconds += time.perf_counter() - began
        self._ahead.popleft()
        if batch.error is not None:
            raise batch.error
        batch.close_gaps()
        return batch

    def release(self, batch: Batch[T]) -> None:
        """Give the memory of a batch back; its pixels belong to other images from now on."""
        self._pool.append(batch.memory)
        self._free += 1

    def _fill(self) -> None:
        """Offer images to the threads, as far ahead as there is memory."""
        while self._free and not self._exhausted:
            batch: Batch[T] = Batch(self._pool.pop() if self._pool else np.empty(self._shape, dtype=np.uint8))
            try:
                for _, item in zip(range(self._shape[0]), self._items, strict=False):
                    self._offer(item, batch)
            except Exception as error:  # the iterable's own: what came before it is not lost
                self._failure = error
            self._exhausted = self._failure is not None or len(batch.items) < self._shape[0]
            if batch.items:
                self._ahead.append(batch)
                self._free -= 1

    def _offer(self, item: T, batch: Batch[T]) -> None:
        with self._lock:
            self._jobs.append(_Job(item, batch, len(batch.items)))
            batch.items.append(item)
            batch.waiting += 1
            self._offered.notify()
        if self._started < self._threads:
            self._start()

    def _start(self) -> None:
        self._started += 1
        threading.Thread(target=self._work, name=f"decode-{self._started}", daemon=True).start()

    def _work(self) -> None:
        while (job := self._take()) is not None:
            pixels: Pixels | None = None
            error: BaseException | None = None
            try:
                pixels = self._decode(job.item)
                if pixels.shape != self._shape[1:]:
                    raise ValueError(f"decoded to {pixels.shape}, not {self._shape[1:]}")
            except BaseException as raised:  # handed to the thread that iterates
                error = raised
            with self._lock:
                if job.abandoned:
                    return
                self._settle(job, pixels, error)

    def _take(self) -> _Job[T] | None:
        """The next job, None at the end."""
        with self._lock:
            while not self._jobs and not self._stopped:
                self._offered.wait()
            if self._stopped:
                return None
            job = self._jobs.popleft()
            job.started = time.monotonic()
            job.thread = threading.current_thread()
            self._running.add(job)
            return job

    def _settle(self, job: _Job[T], pixels: Pixels | None, error: BaseException | None) -> None:
        """Note the outcome of a job; the lock is held."""
        batch = job.batch
        self._running.discard(job)
        self.decode_seconds += time.monotonic() - job.started
        if isinstance(error, ImageError):
            batch.reasons[job.row] = str(error)
        elif error is not None:
            batch.error = batch.error or error
        elif pixels is not None:
            batch.memory[job.row] = pixels
        batch.waiting -= 1
        if not batch.waiting:
            self._finished.notify_all()

    def _until_next_limit(self) -> float:
        first = min((job.started for job in self._running), default=time.monotonic())
        return max(first + self._timeout - time.monotonic(), 0.0)

    def _abandon_late(self) -> None:
        """Skip the images whose time is over and put other threads in place of theirs; the lock is held."""
        now = time.monotonic()
        for job in [job for job in self._running if now - job.started >= self._timeout]:
            job.abandoned = True
            self._abandoned = [thread for thread in (*self._abandoned, job.thread) if thread and thread.is_alive()]
            self._settle(job, None, ImageError(f"took longer than {self._timeout:g} s"))
            if len(self._abandoned) > _MOST_ABANDONED:
                raise ClipretError(
                    f"{len(self._abandoned)} images at once take longer than {self._timeout:g} s: does the drive "
                    "that they lie on still answer?"
                )
            self._start()
