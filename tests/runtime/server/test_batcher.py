"""Micro-batches: who is answered with whom, and what happens to the others when one goes wrong."""

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
            batcher = Batcher(run, pool, **{"most": 4, "gather": 0.0, "waiting": 100, **options})
            batcher.start()
            try:
                return await work(batcher)
            finally:
                await batcher.stop()

    return asyncio.run(main())


def test_what_comes_while_the_engine_works_is_one_batch() -> None:
    batches, held = [], threading.Event()

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        held.wait(10)
        return [10 * item for item in items]

    async def work(batcher: Any) -> list[int]:
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(batcher.submit(number)) for number in range(1, 7)]
        await asyncio.sleep(0.05)
        assert len(batcher) == 6
        held.set()
        return list(await asyncio.gather(first, *rest))

    assert together(work, run=run) == [0, 10, 20, 30, 40, 50, 60]
    assert batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_large_item_goes_alone_and_sizes_are_kept() -> None:
    batches = []

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        time.sleep(0.02)
        return items

    async def work(batcher: Any) -> None:
        await asyncio.gather(*(batcher.submit(size) for size in (9, 2, 2, 2, 9)))

    together(work, run=run, size=lambda size: size)
    assert batches == [[9], [2, 2], [2], [9]]


def test_an_error_is_its_own_item_s() -> None:
    def run(items: list[int]) -> list[Any]:
        if 13 in items:
            raise RuntimeError("the engine")
        return [ValueError("even") if item % 2 == 0 else item for item in items]

    async def work(batcher: Any) -> list[Any]:
        first = await asyncio.gather(*map(batcher.submit, (1, 2, 3)), return_exceptions=True)
        second = await asyncio.gather(*map(batcher.submit, (13, 5)), return_exceptions=True)
        return [*first, *second, await batcher.submit(7)]

    one, two, three, *both, seven = together(work, run=run)
    assert (one, three, seven) == (1, 3, 7)
    assert isinstance(two, ValueError)
    assert all(isinstance(error, RuntimeError) for error in both)


def test_clients_that_have_gone_are_left_out_and_too_many_are_refused() -> None:
    batches, held = [], threading.Event()

    def run(items: list[int]) -> list[int]:
        batches.append(items)
        held.wait(10)
        return items

    async def work(batcher: Any) -> list[int]:
        tasks = [asyncio.create_task(batcher.submit(0))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match="3 searches are waiting"):
            await batcher.submit(4)
        tasks.pop(2).cancel()
        held.set()
        return list(await asyncio.gather(*tasks))

    assert together(work, run=run, waiting=3) == [0, 1, 3]
    assert batches == [[0], [1, 3]]


def test_a_lone_client_never_waits_and_an_expected_one_only_so_long() -> None:
    async def work(batcher: Any) -> list[float]:
        times = []
        for count in (1, 1, 3, 1, 1):
            began = time.monotonic()
            await asyncio.gather(*(batcher.submit(number) for number in range(count)))
            times.append(time.monotonic() - began)
        return times

    lone, again, three, after, last = together(work, run=list, gather=2.0)
    assert max(lone, again, three, last) < 1.5  # the machine's own delays are what is left to wait for
    assert after >= 0.7  # after a batch of three, three were expected


def test_those_who_wait_at_the_end_are_told() -> None:
    async def work(batcher: Any) -> list[Any]:
        tasks = [asyncio.create_task(batcher.submit(number)) for number in range(6)]
        await asyncio.sleep(0.05)
        await batcher.stop()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    def run(items: list[int]) -> list[int]:
        time.sleep(0.3)
        return items

    assert all(isinstance(one, BusyError) for one in together(work, run=run))
