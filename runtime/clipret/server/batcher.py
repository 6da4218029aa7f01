"""Micro-batches: requests that arrive while the model is busy are processed together."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

from clipret.server.limits import BusyError

__all__ = ["Batcher"]

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Passes waiting items to a function, one batch at a time.

    The thread does not wait to fill a batch, with one exception: after a batch of several items, as many are expected
    again, and it waits for them for a short time. A single client never waits. (Delayed batching is from Clipper,
    Crankshaw et al., NSDI 2017; expecting the size of the last batch is our addition.)

    Args:
        run: Returns the result or the exception of each item of a batch.
        executor: `run` is called in one of its threads.
        max_size: Largest total size of a batch; a batch has at least one item, whatever its size.
        gather: Longest time to wait for expected items, seconds.
        max_waiting: Number of waiting items from which new ones are refused.
        size: Returns the size of an item.
        on_batch: Called with the number of items of each batch.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R | Exception]],
        executor: Executor,
        *,
        max_size: int,
        gather: float,
        max_waiting: int,
        size: Callable[[T], int] = lambda _: 1,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._run, self._executor, self._size, self._on_batch = run, executor, size, on_batch
        self._max_size, self._gather, self._max_waiting = max_size, gather, max_waiting
        self._waiting = deque[tuple[T, asyncio.Future[R]]]()
        self._expected = 1  # items to wait for
        self._enough = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """The number of waiting items."""
        return len(self._waiting)

    async def submit(self, item: T) -> R:
        """Wait for the result of one item.

        Raises:
            BusyError: Too many items are waiting, or the service stops.
            Exception: The exception that `run` returned for the item.
        """
        if len(self._waiting) >= self._max_waiting:
            raise BusyError(f"{len(self._waiting)} searches are waiting: try again in a moment")
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self._expected:
            self._enough.set()
        return await future

    def start(self) -> None:
        """Start processing, in the running event loop."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Stop processing; waiting items fail with BusyError."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(BusyError("the service is stopping"))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        last = 1
        while True:
            self._expected = 1
            if not self._waiting:
                self._enough.clear()
                await self._enough.wait()
            if len(self._waiting) < min(last, self._max_size):
                self._expected = min(last, self._max_size)
                self._enough.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._enough.wait(), self._gather)
            batch = self._take_batch()
            if not batch:
                continue
            last = len(batch)
            try:
                results = await loop.run_in_executor(self._executor, self._run, [item for item, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            except asyncio.CancelledError:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(BusyError("the service is stopping"))
                raise
            self._on_batch(len(batch))
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue  # its client has disconnected
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _take_batch(self) -> list[tuple[T, asyncio.Future[R]]]:
        """The items that have waited longest, without those whose clients have disconnected."""
        batch = list[tuple[T, asyncio.Future[R]]]()
        total = 0
        while self._waiting:
            item, future = self._waiting[0]
            size = 0 if future.done() else self._size(item)
            if batch and total + size > self._max_size:
                break
            self._waiting.popleft()
            if size:
                batch.append((item, future))
                total += size
        return batch
