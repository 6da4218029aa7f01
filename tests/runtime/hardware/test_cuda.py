"""The calls of the CUDA driver, on a fake driver and, on machines without a GPU, without one."""

import gc
from typing import Any

import numpy as np
import pytest

from clipret.errors import ClipretError
from clipret.hardware import cuda


def test_properties_of_a_gpu(driver: Any) -> None:
    assert (cuda.gpu_count(), cuda.device_name(0), cuda.gpu_arch()) == (1, "a card", "sm_120")
    assert cuda.free_memory(0) == 5
    with pytest.raises(ClipretError, match="cuDeviceGet failed with error 101"):
        cuda.gpu_arch(1)
    driver.fails = 2
    with pytest.raises(ClipretError, match="cuCtxSetCurrent failed with error 2"):
        cuda.free_memory(0)
    assert cuda.gpu_count() == 0


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_bytes_are_copied_to_the_device_and_back(driver: Any, kind: str) -> None:
    copies = cuda.Copies(0) if kind == "cuda" else cuda.HostCopies()
    buffer = copies.buffer(8)
    buffer.host[:] = range(8)
    copies.to_device(buffer, 8)
    buffer.host[:] = 0
    copies.to_host(buffer, 5)
    copies.wait()
    assert buffer.host.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    view: np.ndarray = buffer.host[:2]
    del copies, buffer
    gc.collect()
    assert (driver.streams, driver.device) == (0, {})
    assert len(driver.pinned) == (kind == "cuda")  # an array still views it
    assert view.tolist() == [0, 1]
    del view
    assert driver.pinned == {}


def test_without_a_driver_an_error_says_so() -> None:
    if cuda.gpu_count():
        pytest.skip("this machine has a GPU")
    for function in (cuda.device_name, cuda.gpu_arch, cuda.free_memory, cuda.Copies):
        with pytest.raises(ClipretError, match=r"use --device cpu|nvidia-smi"):
            function(0)
