"""Micro-batches: which items form a batch, and what happens to the others when one fails."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from clipret.server.batcher import Batcher
from clipret.server.limits import BusyError


def together(work: Any, *, run: Any, **options: Any) -> Any:
    async def main() -> Any:
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(run, pool, **{"max_size": 4, "gather": 0.0, "max_waiting": 100, **options})
            batcher.start()
            try:
                return await work(batcher)
            finally:
                await batcher.stop()

    return asyncio.run(main())


def test_items_that_arrive_during_a_run_are_one_batch() -> None:
    batches, release = [], threading.Event()

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        release.wait(10)
        return [10 * item for item in items]

    async def work(batcher: Any) -> list[int]:
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(batcher.submit(number)) for number in range(1, 7)]
        await asyncio.sleep(0.05)
        assert len(batcher) == 6
        release.set()
        return list(await asyncio.gather(first, *rest))

    assert together(work, run=run) == [0, 10, 20, 30, 40, 50, 60]
    assert batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_large_item_is_a_batch_and_sizes_are_limited() -> None:
    batches = []

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        time.sleep(0.02)
        return items

    async def work(batcher: Any) -> None:
        await asyncio.gather(*(batcher.submit(size) for size in (9, 2, 2, 2, 9)))

    together(work, run=run, size=lambda size: size)
    assert batches == [[9], [2, 2], [2], [9]]


def test_an_error_affects_only_its_item() -> None:
    def run(items: list[int]) -> list[Any]:
        if 13 in items:
            raise RuntimeError("the model")
        return [ValueError("even") if item % 2 == 0 else item for item in items]

    async def work(batcher: Any) -> list[Any]:
        first = await asyncio.gather(*map(batcher.submit, (1, 2, 3)), return_exceptions=True)
        second = await asyncio.gather(*map(batcher.submit, (13, 5)), return_exceptions=True)
        return [*first, *second, await batcher.submit(7)]

    one, two, three, *both, seven = together(work, run=run)
    assert (one, three, seven) == (1, 3, 7)
    assert isinstance(two, ValueError)
    assert all(isinstance(error, RuntimeError) for error in both)


def test_items_of_disconnected_clients_are_left_out_and_too_many_are_refused() -> None:
    batches, release = [], threading.Event()

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        release.wait(10)
        return items

    async def work(batcher: Any) -> list[int]:
        tasks = [asyncio.create_task(batcher.submit(0))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match="3 searches are waiting"):
            await batcher.submit(4)
        tasks.pop(2).cancel()
        release.set()
        return list(await asyncio.gather(*tasks))

    assert together(work, run=run, max_waiting=3) == [0, 1, 3]
    assert batches == [[0], [1, 3]]


def test_a_single_client_never_waits_and_expected_items_only_for_a_limited_time() -> None:
    async def work(batcher: Any) -> list[float]:
        times = []
        for count in (1, 1, 3, 1, 1):
            began = time.monotonic()
            await asyncio.gather(*(batcher.submit(number) for number in range(count)))
            times.append(time.monotonic() - began)
        return times

    single, again, three, after, last = together(work, run=list, gather=2.0)
    assert max(single, again, three, last) < 1.5  # leaves room for delays of the machine
    assert after >= 0.7  # after a batch of three, three were expected


def test_items_that_wait_when_the_batcher_stops_fail() -> None:
    async def work(batcher: Any) -> list[Any]:
        tasks = [asyncio.create_task(batcher.submit(number)) for number in range(6)]
        await asyncio.sleep(0.05)
        await batcher.stop()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    def run(items: list[int]) -> list[int]:
        time.sleep(0.3)
        return items

    assert all(isinstance(error, BusyError) for error in together(work, run=run))
