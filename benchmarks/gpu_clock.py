"""Times of a card by its own clock: CUDA events around runs that follow each other without the host waiting between.

What is measured is the computing alone, with inputs and outputs in the device's memory: what shares of a card's peak
are made of. Where the CPU stands in a card's place, its clock is the host's.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clipret.hardware.cuda import call_driver, enter_context

__all__ = ["DeviceClock", "HostClock", "bound_run", "clock_of", "seconds_on"]


class HostClock:
    """Seconds of `count` runs, each complete when it returns."""

    def __init__(self) -> None:
        self.options: dict[str, str] = {}  # of onnxruntime's provider, so that it works where the clock looks

    def elapsed(self, run: Callable[[], object], count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            run()
        return time.perf_counter() - began


class DeviceClock(HostClock):
    """Two events in a stream of GPU `number`; sessions that are opened with `options` work in that stream."""

    def __init__(self, number: int) -> None:
        super().__init__()
        enter_context(number)
        self._number, self._stream = number, ctypes.c_void_p()
        self._begin, self._end = ctypes.c_void_p(), ctypes.c_void_p()
        call_driver("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(1))  # not blocked by the default stream
        for event in (self._begin, self._end):
            call_driver("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        self.options = {"user_compute_stream": str(self._stream.value)}

    def elapsed(self, run: Callable[[], object], count: int) -> float:
        enter_context(self._number)
        call_driver("cuEventRecord", self._begin, self._stream)
        for _ in range(count):
            run()
        call_driver("cuEventRecord", self._end, self._stream)
        call_driver("cuEventSynchronize", self._end)
        milliseconds = ctypes.c_float()
        call_driver("cuEventElapsedTime", ctypes.byref(milliseconds), self._begin, self._end)
        return milliseconds.value / 1000


def clock_of(device: str) -> HostClock:
    return HostClock() if device == "cpu" else DeviceClock(int(device.partition(":")[2] or 0))


def seconds_on(clock: HostClock, run: Callable[[], object], least: float) -> float:
    """The median of five groups of runs, `least` seconds in all; after three that do not count, of which onnxruntime
    needs two to record a graph."""
    clock.elapsed(run, 3)
    count = min(max(round(least / 5 / max(clock.elapsed(run, 1), 1e-6)), 1), 1000)
    return statistics.median(clock.elapsed(run, count) / count for _ in range(5))


def bound_run(session: Any, device: str, inputs: Mapping[str, np.ndarray], graph: int = 0) -> Callable[[], object]:
    """A run of an onnxruntime session with inputs and output at fixed places of the device, which on a GPU has only
    been started when it returns. `graph`: the number of a CUDA graph to record and replay; 0 without."""
    import onnxruntime

    kind, _, number = device.partition(":")
    place = (kind, int(number or 0))
    binding, output = session.io_binding(), session.get_outputs()[0].name
    held = [onnxruntime.OrtValue.ortvalue_from_numpy(array, *place) for array in inputs.values()]
    for name, value in zip(inputs, held, strict=True):
        binding.bind_ortvalue_input(name, value)
    options = onnxruntime.RunOptions()
    if kind != "cpu":
        options.add_run_config_entry("gpu_graph_id", "-1")  # which is never recorded
    binding.bind_output(output, *place)
    session.run_with_iobinding(binding, options)  # tells the output's shape
    binding.synchronize_outputs()
    held.append(binding.get_outputs()[0])
    binding.bind_ortvalue_output(output, held[-1])
    if kind != "cpu":
        options.add_run_config_entry("gpu_graph_id", str(graph or -1))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(_held: object = held) -> None:  # whose memory the binding does not keep alive
        session.run_with_iobinding(binding, options)

    return run
