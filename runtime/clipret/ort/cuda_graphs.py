"""An onnxruntime session on a device: staged copies, fixed addresses, CUDA graphs for frequent shapes.

A CUDA graph is a recording of every kernel of a run, including shapes and addresses. A replay costs one launch instead
of hundreds, but is valid for exactly these shapes and addresses. The input and output of a lane therefore keep their
addresses. A shape gets a graph with its own number once it has occurred several times; all other shapes run with the
number -1, which onnxruntime never records. The first embeddings of a graph are compared with those of a run without it.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from clipret.arrays import Embeddings
from clipret.errors import BackendWarning, one_line, require
from clipret.hardware.cuda import Copies, HostCopies

__all__ = ["BoundSession"]

_MIN_OCCURRENCES = 3  # of a shape before its graph is recorded, which takes two runs
_MAX_GRAPHS = 8  # per lane: each uses some device memory
_TOLERANCE = 1e-3  # per component, between runs with and without a graph: float16 differs in its last bit
_NUMBERS = itertools.count(1)  # numbers of graphs, unique in a process: lanes of a session must not share a graph
_GRAPH = "gpu_graph_id"  # onnxruntime's name for the number of a recording in its run options


class BoundSession:
    """A session with input and output at fixed addresses of a device, and pinned memory to stage batches in.

    Not thread-safe.

    Args:
        session: The onnxruntime.InferenceSession, with one input and one output.
        kind: "cuda", or "cpu" for machines without a GPU.
        number: Number of the GPU.
        graphs: Whether the session records CUDA graphs (`enable_cuda_graph`).
        submit: Runs a function in the thread that records all graphs of the session, and waits for it; default: the
            calling thread.
    """

    def __init__(
        self,
        session: Any,
        kind: str,
        number: int,
        *,
        graphs: bool = False,
        submit: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._ort = require("onnxruntime", "gpu" if kind == "cuda" else "cpu")
        self._session, self._device = session, (kind, number)
        self._binding = session.io_binding()
        self._input, self._output = session.get_inputs()[0].name, session.get_outputs()[0].name
        self._dim = int(session.get_outputs()[0].shape[-1])
        self._copies = Copies(number) if kind == "cuda" else HostCopies()
        self._session_records = self._graphs = graphs  # fixed for the session; off after a graph has failed
        self._submit = submit or (lambda run: run())
        self._occurrences = Counter[tuple[int, ...]]()
        self.recorded: dict[tuple[int, ...], int] = {}  # number of the graph of each shape
        self._batch = self._embeddings = self._copies.buffer(1)

    def run(self, batch: npt.NDArray[Any]) -> Embeddings:
        """Run a batch; see `Tower.run`."""
        shape = batch.shape
        embeddings = np.empty((shape[0], self._dim), np.float32)
        self._reserve(batch.nbytes, embeddings.nbytes)
        self._batch.host[: batch.nbytes].view(batch.dtype).reshape(shape)[...] = batch
        self._copies.to_device(self._batch, batch.nbytes)
        self._copies.wait()  # the session computes in another stream
        self._occurrences[shape] += 1
        number = self.recorded.get(shape, -1)
        self._compute(batch.dtype, shape, number)
        self._fetch(embeddings)
        frequent = self._occurrences[shape] >= _MIN_OCCURRENCES
        if number < 0 and self._graphs and frequent and len(self.recorded) < _MAX_GRAPHS:
            self._record(batch.dtype, shape, embeddings)
        return embeddings

    def _record(self, dtype: Any, shape: tuple[int, ...], expected: Embeddings) -> None:
        """Record a graph of this shape. If its embeddings differ from the expected ones, turn graphs off."""
        number = next(_NUMBERS)
        embeddings = np.empty_like(expected)
        try:
            for _ in range(2):  # onnxruntime records in the first or the second run; the last one is a replay
                self._compute(dtype, shape, number)
            self._fetch(embeddings)
            problem = "" if np.allclose(embeddings, expected, rtol=0, atol=_TOLERANCE) else "its embeddings differ"
        except Exception as error:  # onnxruntime raises a dozen types of its own and exports none
            problem = one_line(error)
        if problem:
            self._graphs = False
            warnings.warn(f"no CUDA graphs: {problem}", BackendWarning, stacklevel=4)
        else:
            self.recorded[shape] = number

    def _compute(self, dtype: Any, shape: tuple[int, ...], number: int) -> None:
        self._binding.bind_input(self._input, *self._device, dtype.type, shape, self._batch.address)
        self._binding.bind_output(
            self._output, *self._device, np.float32, (shape[0], self._dim), self._embeddings.address
        )
        options = self._ort.RunOptions()
        if self._session_records:
            options.add_run_config_entry(_GRAPH, str(number))

        def run() -> None:
            self._session.run_with_iobinding(self._binding, options)
            self._binding.synchronize_outputs()  # the copy that follows runs in another stream

        self._submit(run)

    def _fetch(self, embeddings: Embeddings) -> None:
        self._copies.to_host(self._embeddings, embeddings.nbytes)
        self._copies.wait()
        embeddings[...] = self._embeddings.host[: embeddings.nbytes].view(np.float32).reshape(embeddings.shape)

    def _reserve(self, batch: int, embeddings: int) -> None:
        """Ensure buffers of at least these sizes. New buffers have new addresses, which invalidates all graphs."""
        if batch > self._batch.size or embeddings > self._embeddings.size:
            # In the recording thread: CUDA allows no allocation during a recording.
            self._submit(lambda: self._grow(max(batch, self._batch.size), max(embeddings, self._embeddings.size)))

    def _grow(self, batch: int, embeddings: int) -> None:
        if release := getattr(self._session, "release_captured_graph", None):  # onnxruntime from 1.30 on
            for number in self.recorded.values():
                release(number)
        self.recorded.clear()
        self._batch, self._embeddings = self._copies.buffer(batch), self._copies.buffer(embeddings)
