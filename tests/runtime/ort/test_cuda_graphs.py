"""Sessions with fixed addresses, staged copies and recorded graphs: the logic for GPUs, on the CPU provider."""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from clipret.errors import BackendWarning
from clipret.hardware import cuda
from clipret.inference.tower import OnnxTower
from clipret.ort.cuda_graphs import _MAX_GRAPHS, _MIN_OCCURRENCES, BoundSession


def opened(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def images(count: int, session: Any, seed: int = 0) -> np.ndarray:
    side = session.get_inputs()[0].shape[1]
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_embeddings_are_those_of_a_plain_run_in_any_batch(tiny_bundle: Path) -> None:
    session = opened(tiny_bundle / "image.onnx")
    bound = BoundSession(session, "cpu", 0)
    for size in (1, 3, 2, 7, 7, 1):  # growing and shrinking
        batch = images(size, session, size)
        [expected] = session.run(None, {session.get_inputs()[0].name: batch})
        embeddings = bound.run(batch)
        np.testing.assert_allclose(embeddings, expected, atol=1e-6)
        bound.run(images(size, session, 99))
        np.testing.assert_allclose(embeddings, expected, atol=1e-6)  # they belong to the caller and are not the buffer
    assert not bound.recorded


def test_texts_of_several_lengths(tiny_bundle: Path) -> None:
    session = opened(tiny_bundle / "text.onnx")
    bound = BoundSession(session, "cpu", 0)
    for shape in ((2, 5), (4, 3), (1, 8)):
        batch = np.random.default_rng(0).integers(1, 5, shape)
        [expected] = session.run(None, {session.get_inputs()[0].name: batch})
        np.testing.assert_allclose(bound.run(batch), expected, atol=1e-6)


class Session:
    """A real session that records the graph number of each run. With `lose` a replay writes nothing, like a graph
    that was recorded for other addresses."""

    def __init__(self, path: Path, lose: bool = False) -> None:
        self.real, self.lose = opened(path), lose
        self.numbers: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.numbers.append(int(options.get_run_config_entry("gpu_graph_id")))
        if self.numbers[-1] < 0 or not self.lose:
            self.real.run_with_iobinding(binding, options)


def test_only_a_shape_that_comes_often_goes_through_a_graph(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle / "image.onnx")
    bound = BoundSession(session, "cpu", 0, graphs=True)
    large, small = images(5, session), images(2, session)
    for _ in range(_MIN_OCCURRENCES):
        bound.run(large)
    bound.run(small)
    assert set(bound.recorded) == {large.shape}
    number = bound.recorded[large.shape]
    assert session.numbers == [-1] * _MIN_OCCURRENCES + [number, number] + [-1]
    bound.run(large)
    assert session.numbers[-1] == number
    # A larger batch moves the buffers: the graph has the old addresses and is dropped.
    bound.run(images(6, session))
    assert not bound.recorded
    assert session.numbers[-1] == -1
    for size in range(1, 2 * _MAX_GRAPHS):
        for _ in range(_MIN_OCCURRENCES + 1):
            bound.run(images(min(size, 6), session))
    assert len(bound.recorded) <= _MAX_GRAPHS


def test_two_lanes_share_no_graph(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle / "image.onnx")
    one, two = (BoundSession(session, "cpu", 0, graphs=True) for _ in range(2))
    for _ in range(_MIN_OCCURRENCES):
        one.run(images(2, session))
        two.run(images(2, session))
    assert set(one.recorded.values()).isdisjoint(two.recorded.values())


def test_a_graph_with_other_embeddings_is_never_used(tiny_bundle: Path) -> None:
    session = Session(tiny_bundle / "image.onnx", lose=True)
    bound = BoundSession(session, "cpu", 0, graphs=True)
    batch = images(3, session)
    [expected] = session.real.run(None, {session.get_inputs()[0].name: batch})

    def spoil(run: Any) -> None:  # clear the output before a run
        ctypes.memset(bound._embeddings.address, 0, bound._embeddings.size)
        run()

    bound._submit = spoil
    with pytest.warns(BackendWarning, match="no CUDA graphs: its embeddings differ"):  # noqa: PT031
        for _ in range(_MIN_OCCURRENCES):
            embeddings = bound.run(batch)
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)
    np.testing.assert_allclose(bound.run(batch), expected, atol=1e-6)
    assert not bound.recorded


def test_graphs_are_for_gpus_alone(tiny_bundle: Path) -> None:
    tower = OnnxTower(tiny_bundle / "image.onnx", "cpu", 1, graphs=True)  # no warning: a CPU has no graphs
    assert tower.lanes == 1


def test_a_batch_goes_through_pinned_memory(driver: Any, tiny_bundle: Path) -> None:
    session = opened(tiny_bundle / "image.onnx")
    bound = BoundSession(session, "cpu", 0)
    bound._copies = cuda.Copies(0)
    batch = images(3, session)
    [expected] = session.run(None, {session.get_inputs()[0].name: batch})
    np.testing.assert_allclose(bound.run(batch), expected, atol=1e-6)
    assert (len(driver.pinned), len(driver.device)) == (2, 2)
    bound.run(images(4, session))  # larger buffers; the old ones are freed
    assert (len(driver.pinned), len(driver.device)) == (2, 2)
    del bound
    assert (driver.pinned, driver.device, driver.streams) == ({}, {}, 0)


def test_a_buffer_grows_in_the_thread_that_records(tiny_bundle: Path) -> None:
    session = opened(tiny_bundle / "image.onnx")
    with ThreadPoolExecutor(1) as recorder:
        bound = BoundSession(session, "cpu", 0, submit=lambda run: recorder.submit(run).result())
        threads = list[int]()
        plain = bound._copies.buffer
        bound._copies.buffer = lambda size: threads.append(threading.get_ident()) or plain(size)  # type: ignore[method-assign,func-returns-value]
        bound.run(images(3, session))
        assert threads == [recorder.submit(threading.get_ident).result()] * 2
