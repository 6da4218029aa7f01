"""Batches of pixels in order, even if decode threads are late, hang, fail, or are never stopped."""

import gc
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from clipret.errors import ClipretError
from clipret.images.walk import ImageError
from clipret.inference import decode_pool
from clipret.inference.decode_pool import DecodePool

Pixels = npt.NDArray[np.uint8]
SIZE = 3


def pixels(value: int) -> Pixels:
    return np.full((SIZE, SIZE, 3), value % 256, dtype=np.uint8)


def decoding(items: Iterable[int], decode: Callable[[int], Pixels] = pixels, **options: Any) -> DecodePool[int]:
    settings: dict[str, Any] = {"threads": 3, "batches": 3, "timeout": 60.0, **options}
    return DecodePool(items, decode, SIZE, settings.pop("batch_size", 4), **settings)


def collect(batches: DecodePool[int]) -> list[tuple[list[int], list[int], list[tuple[int, str]]]]:
    """The batches as items, value of each image and skipped; checks that each image has a single value."""
    found = []
    with batches:
        for batch in batches:
            assert (batch.pixels == batch.pixels[:, :1, :1, :1]).all()
            found.append((batch.items, batch.pixels[:, 0, 0, 0].tolist(), batch.skipped))
            batches.release(batch)
    return found


def decode_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode-")]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while decode_threads() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not decode_threads()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 100])
@pytest.mark.parametrize("threads", [1, 7])
def test_the_order_is_that_of_the_input(count: int, threads: int) -> None:
    def slow(item: int) -> Pixels:
        time.sleep(random.random() * 0.002)
        return pixels(item)

    found = collect(decoding(range(count), slow, threads=threads))
    assert [item for items, _, _ in found for item in items] == list(range(count))
    assert [value for _, values, _ in found for value in values] == list(range(count))
    assert [len(items) for items, _, _ in found] == [min(4, count - low) for low in range(0, count, 4)]


@pytest.mark.parametrize("bad", [{0}, {3}, {0, 1, 2, 3}, {1, 2, 6, 8}, set(range(9))])
def test_a_skipped_image_leaves_no_gap(bad: set[int]) -> None:
    def decode(item: int) -> Pixels:
        if item in bad:
            raise ImageError(f"no {item}")
        return pixels(item)

    found = collect(decoding(range(9), decode))
    good = [item for item in range(9) if item not in bad]
    assert [item for items, _, _ in found for item in items] == good
    assert [value for _, values, _ in found for value in values] == good
    assert [entry for _, _, skipped in found for entry in skipped] == [(item, f"no {item}") for item in sorted(bad)]


def test_an_image_that_hangs_is_skipped_and_the_rest_arrives() -> None:
    released = threading.Event()

    def decode(item: int) -> Pixels:
        if item in (2, 3, 9):
            released.wait()
        return pixels(item)

    # As many images hang as there are threads: other threads must replace them.
    found = collect(decoding(range(12), decode, threads=3, timeout=0.2))
    good = [item for item in range(12) if item not in (2, 3, 9)]
    assert [value for _, values, _ in found for value in values] == good
    assert [entry for *_, skipped in found for entry in skipped] == [
        (item, "took longer than 0.2 s") for item in (2, 3, 9)
    ]
    released.set()


def test_a_late_thread_writes_to_no_batch() -> None:
    released, back = threading.Event(), threading.Event()

    def decode(item: int) -> Pixels:
        if item == 1:
            released.wait()
            back.set()
            return pixels(99)
        return pixels(item)

    batches = decoding(range(16), decode, threads=2, batches=1, timeout=0.1)
    with batches:
        first = next(batches)
        assert (first.items, first.skipped) == ([0, 2, 3], [(1, "took longer than 0.1 s")])
        batches.release(first)
        for expected in ([4, 5, 6, 7], [8, 9, 10, 11]):  # in the memory that the late thread would write to
            batch = next(batches)
            released.set()
            assert back.wait(10)
            while len(decode_threads()) > 2:
                time.sleep(0.001)
            assert batch.items == batch.pixels[:, 0, 0, 0].tolist() == expected
            batches.release(batch)


def test_a_drive_that_does_not_respond_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_pool, "_MAX_ABANDONED", 5)
    released = threading.Event()

    def decode(_: int) -> Pixels:
        released.wait()
        raise ImageError("too late")

    with pytest.raises(ClipretError, match=r"6 images at once take longer than 0\.05 s: check whether"):
        collect(decoding(range(100), decode, threads=2, timeout=0.05))
    released.set()


def test_the_input_is_read_ahead_within_bounds() -> None:
    read = list[int]()

    def items() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    batches = decoding(items(), batches=3)
    with batches:
        for number in range(20):
            batch = next(batches)
            assert batch.items == list(range(4 * number, 4 * number + 4))
            assert len(read) <= 4 * (number + 3)
            batches.release(batch)


def test_memory_is_allocated_once() -> None:
    batches = decoding(range(100), batches=3)
    with batches:
        addresses = set()
        for batch in batches:
            addresses.add(batch.memory.ctypes.data)
            batches.release(batch)
    assert len(addresses) <= 3


def test_stopping_early_does_not_wait() -> None:
    released = threading.Event()

    def decode(item: int) -> Pixels:
        if item >= 4:
            released.wait()
        return pixels(item)

    with decoding(itertools.count(), decode) as batches:
        assert next(batches).items == [0, 1, 2, 3]
    assert not released.is_set()  # three threads still hang, and the pool did not wait for them
    released.set()


def test_a_bug_is_raised_after_the_batches_before_it() -> None:
    def decode(item: int) -> Pixels:
        if item == 6:
            raise ZeroDivisionError("a bug")
        return pixels(item)

    with decoding(range(100), decode) as batches:
        assert next(batches).items == [0, 1, 2, 3]
        with pytest.raises(ZeroDivisionError, match="a bug"):
            next(batches)


def test_pixels_of_another_shape_are_a_bug() -> None:
    with (
        decoding(range(3), lambda _: np.zeros((1, 1, 3), dtype=np.uint8)) as batches,
        pytest.raises(ValueError, match="decoded to"),
    ):
        next(batches)


def test_an_error_of_the_input_is_raised_after_its_items() -> None:
    def items() -> Iterator[int]:
        yield from range(6)
        raise OSError("the archive ends early")

    with decoding(items()) as batches:
        assert next(batches).items == [0, 1, 2, 3]
        assert next(batches).items == [4, 5]
        for _ in range(2):
            with pytest.raises(OSError, match="the archive ends early"):
                next(batches)


def test_decoding_and_waiting_are_timed_separately() -> None:
    def decode(item: int) -> Pixels:
        time.sleep(0.01)
        return pixels(item)

    batches = decoding(range(8), decode, threads=2)
    collect(batches)
    assert batches.decode_seconds >= 0.08
    assert batches.wait_seconds >= 0.03


def test_a_deleted_iterator_ends_its_threads() -> None:
    def values() -> Iterator[int]:
        with decoding(itertools.count()) as batches:
            for batch in batches:
                yield from batch.items

    stream = values()
    assert next(stream) == 0
    del stream
    gc.collect()
