"""What CUDA's driver is asked, on a pretended driver and, where a machine has none, without."""

import gc
from typing import Any

import numpy as np
import pytest

from clipret.errors import ClipretError
from clipret.hardware import cuda


def test_what_the_gpu_is(driver: Any) -> None:
    assert (cuda.gpu_count(), cuda.device_name(0), cuda.gpu_arch()) == (1, "a card", "sm_120")
    assert cuda.free_memory(0) == 5
    with pytest.raises(ClipretError, match="cuDeviceGet failed with error 101"):
        cuda.gpu_arch(1)
    driver.fails = 2
    with pytest.raises(ClipretError, match="cuCtxSetCurrent failed with error 2"):
        cuda.free_memory(0)
    assert cuda.gpu_count() == 0


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_bytes_go_there_and_back(driver: Any, kind: str) -> None:
    copies = cuda.Copies(0) if kind == "cuda" else cuda.HostCopies()
    buffer = copies.buffer(8)
    buffer.host[:] = range(8)
    copies.to_device(buffer, 8)
    buffer.host[:] = 0
    copies.to_host(buffer, 5)
    copies.wait()
    assert buffer.host.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    kept: np.ndarray = buffer.host[:2]
    del copies, buffer
    gc.collect()
    assert (driver.streams, driver.device) == (0, {})
    assert len(driver.pinned) == (kind == "cuda")  # an array of it is still there
    assert kept.tolist() == [0, 1]
    del kept
    assert driver.pinned == {}


def test_without_a_driver_it_says_so() -> None:
    if cuda.gpu_count():
        pytest.skip("there is a GPU")
    for ask in (cuda.device_name, cuda.gpu_arch, cuda.free_memory, cuda.Copies):
        with pytest.raises(ClipretError, match=r"use --device cpu|nvidia-smi"):
            ask(0)
