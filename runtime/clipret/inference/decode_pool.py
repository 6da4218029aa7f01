"""Decode threads that run ahead of a tower: images in, batches of pixels out, in order and with bounded memory.

The interpreter joins the threads of concurrent.futures at its end, so one image that hangs its decoder would hang the
process. The daemon threads of this module are abandoned instead.
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

__all__ = ["Batch", "DecodePool"]

T = TypeVar("T")

_MAX_ABANDONED = 64  # hanging threads; more than a few mean that the drive hangs and not the images


@dataclass(eq=False)
class Batch(Generic[T]):
    """A batch of images; complete when it comes out of a `DecodePool`.

    Attributes:
        memory: The array that is filled, uint8 [batch size,S,S,3].
        items: The items that were decoded, in the order of the input.
        skipped: The items that could not be decoded, with the reasons, in the order of the input.
        reasons: The reasons by position, before `close_gaps`.
        waiting: Number of images that are not decoded yet.
        error: An exception other than ImageError.
    """

    memory: Pixels
    items: list[T] = field(default_factory=list)
    skipped: list[tuple[T, str]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    waiting: int = 0
    error: BaseException | None = None

    @property
    def pixels(self) -> Pixels:
        """The pixels of `items`, uint8 [n,S,S,3]."""
        return self.memory[: len(self.items)]

    def close_gaps(self) -> None:
        """Move the images together in memory, so that no tower sees the gap of a skipped image."""
        if not self.reasons:
            return
        decoded = [position for position in range(len(self.items)) if position not in self.reasons]
        for target, position in enumerate(decoded):
            if target != position:
                self.memory[target] = self.memory[position]
        self.skipped = [(self.items[position], reason) for position, reason in sorted(self.reasons.items())]
        self.items = [self.items[position] for position in decoded]


@dataclass(eq=False)
class _Job(Generic[T]):
    """An image to decode into `batch` at `position`; `thread` began at `started`, in seconds of the monotonic clock."""

    item: T
    batch: Batch[T]
    position: int
    started: float = 0.0
    thread: threading.Thread | None = None
    abandoned: bool = False


class DecodePool(Generic[T]):
    """Decodes images in threads and iterates over the batches.

    The thread that iterates reads `items`, at most `batches` batches ahead. The memory is `batches` arrays of
    batch_size * S * S * 3 bytes, allocated once, and the images that the threads are decoding. A batch belongs to the
    caller until `release`.

    An ImageError skips the image. So does the timeout: the thread is abandoned and another one replaces it. Pixels are
    copied to a batch under the lock, and only while the batch waits for them, so an abandoned thread cannot write to a
    batch. (A decoder that hangs without releasing Python's global lock stops the process; Pillow's release it.) Any
    other exception, from `decode` or `items`, is raised by the iteration after the batches before it.

    Args:
        items: The images, of any type.
        decode: Decodes an item to uint8 [S,S,3]; called in the threads.
        size: S, in pixels.
        batch_size: Images per batch.
        threads: Number of decode threads.
        batches: Maximum number of batches in memory.
        timeout: Seconds after which an image is skipped.

    Attributes:
        decode_seconds: Time of decoding including reading, summed over the threads.
        wait_seconds: Time in which the iteration waited for pixels.
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
        self._job_added = threading.Condition(self._lock)  # or the pool was stopped
        self._batch_done = threading.Condition(self._lock)
        self._jobs: deque[_Job[T]] = deque()
        self._running: set[_Job[T]] = set()
        self._ahead: deque[Batch[T]] = deque()
        self._free_batches = batches
        self._free_memory: list[Pixels] = []
        self._started_threads = 0
        self._abandoned: list[threading.Thread] = []
        self._exhausted = self._stopped = False
        self._failure: Exception | None = None
        self.decode_seconds = 0.0
        self.wait_seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop without waiting: threads that are decoding end after their image, the others at once."""
        with self._lock:
            self._stopped = True
            self._jobs.clear()
            self._job_added.notify_all()

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
                self._batch_done.wait(self._until_next_timeout())
                self._abandon_late()
        self.wait_seconds += time.perf_counter() - began
        self._ahead.popleft()
        if batch.error is not None:
            raise batch.error
        batch.close_gaps()
        return batch

    def release(self, batch: Batch[T]) -> None:
        """Return the memory of a batch to the pool; its pixels will be overwritten."""
        self._free_memory.append(batch.memory)
        self._free_batches += 1

    def _fill(self) -> None:
        """Add jobs as far ahead as there is memory."""
        while self._free_batches and not self._exhausted:
            memory = self._free_memory.pop() if self._free_memory else np.empty(self._shape, dtype=np.uint8)
            batch: Batch[T] = Batch(memory)
            try:
                for _, item in zip(range(self._shape[0]), self._items, strict=False):
                    self._add_job(item, batch)
            except Exception as error:  # from the iterable; the items before it are still decoded
                self._failure = error
            self._exhausted = self._failure is not None or len(batch.items) < self._shape[0]
            if batch.items:
                self._ahead.append(batch)
                self._free_batches -= 1

    def _add_job(self, item: T, batch: Batch[T]) -> None:
        with self._lock:
            self._jobs.append(_Job(item, batch, len(batch.items)))
            batch.items.append(item)
            batch.waiting += 1
            self._job_added.notify()
        if self._started_threads < self._threads:
            self._start_thread()

    def _start_thread(self) -> None:
        self._started_threads += 1
        threading.Thread(target=self._work, name=f"decode-{self._started_threads}", daemon=True).start()

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            pixels: Pixels | None = None
            error: BaseException | None = None
            try:
                pixels = self._decode(job.item)
                if pixels.shape != self._shape[1:]:
                    raise ValueError(f"decoded to {pixels.shape}, not {self._shape[1:]}")
            except BaseException as raised:  # raised again in the thread that iterates
                error = raised
            with self._lock:
                if job.abandoned:
                    return
                self._finish(job, pixels, error)

    def _next_job(self) -> _Job[T] | None:
        """Wait for the next job; None after the pool was stopped."""
        with self._lock:
            while not self._jobs and not self._stopped:
                self._job_added.wait()
            if self._stopped:
                return None
            job = self._jobs.popleft()
            job.started = time.monotonic()
            job.thread = threading.current_thread()
            self._running.add(job)
            return job

    def _finish(self, job: _Job[T], pixels: Pixels | None, error: BaseException | None) -> None:
        """Store the result of a job; the caller holds the lock."""
        batch = job.batch
        self._running.discard(job)
        self.decode_seconds += time.monotonic() - job.started
        if isinstance(error, ImageError):
            batch.reasons[job.position] = str(error)
        elif error is not None:
            batch.error = batch.error or error
        elif pixels is not None:
            batch.memory[job.position] = pixels
        batch.waiting -= 1
        if not batch.waiting:
            self._batch_done.notify_all()

    def _until_next_timeout(self) -> float:
        """Seconds until the first image that is being decoded times out."""
        first = min((job.started for job in self._running), default=time.monotonic())
        return max(first + self._timeout - time.monotonic(), 0.0)

    def _abandon_late(self) -> None:
        """Skip the images that have timed out and replace their threads; the caller holds the lock."""
        now = time.monotonic()
        for job in [job for job in self._running if now - job.started >= self._timeout]:
            job.abandoned = True
            self._abandoned = [thread for thread in (*self._abandoned, job.thread) if thread and thread.is_alive()]
            self._finish(job, None, ImageError(f"took longer than {self._timeout:g} s"))
            if len(self._abandoned) > _MAX_ABANDONED:
                raise ClipretError(
                    f"{len(self._abandoned)} images at once take longer than {self._timeout:g} s: check whether their "
                    "drive still responds, or raise image_timeout"
                )
            self._start_thread()
