"""Micro-batches: requests that arrive while the model is busy are answered together."""

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
    """Passes waiting items to `run`, a batch at a time, in a thread of `executor`.

    `run` returns for each item its result or its exception. A batch has at least one item and at most `most` in total
    `size`. The thread is never idle to fill a batch, except after a batch of several items: then as many are expected
    again, and it waits for them for at most `gather` seconds. A single client never waits. (Delayed batching is from
    Clipper, Crankshaw et al., NSDI 2017; the expectation is ours.)
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R | Exception]],
        executor: Executor,
        *,
        most: int,
        gather: float,
        waiting: int,
        size: Callable[[T], int] = lambda _: 1,
        note: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._run, self._executor, self._size, self._note = run, executor, size, note
        self._most, self._gather, self._limit = most, gather, waiting
        self._waiting = deque[tuple[T, asyncio.Future[R]]]()
        self._wanted = 1
        self._enough = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """The number of waiting items."""
        return len(self._waiting)

    async def submit(self, item: T) -> R:
        """The result of one item. Raises BusyError if too many wait, or the exception that `run` returned for it."""
        if len(self._waiting) >= self._limit:
            raise BusyError(f"{len(self._waiting)} searches are waiting: try again in a moment")
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self._wanted:
            self._enough.set()
        return await future

    def start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End the work; waiting items fail because the service stops."""
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
            self._wanted = 1
            if not self._waiting:
                self._enough.clear()
                await self._enough.wait()
            if len(self._waiting) < min(last, self._most):
                self._wanted = min(last, self._most)
                self._enough.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._enough.wait(), self._gather)
            batch = self._taken()
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
            self._note(len(batch))
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue  # its client has gone
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _taken(self) -> list[tuple[T, asyncio.Future[R]]]:
        """The next batch: the longest waiting items, without those whose clients have left."""
        batch = list[tuple[T, asyncio.Future[R]]]()
        total = 0
        while self._waiting:
            item, future = self._waiting[0]
            size = 0 if future.done() else self._size(item)
            if batch and total + size > self._most:
                break
            self._waiting.popleft()
            if size:
                batch.append((item, future))
                total += size
        return batch
