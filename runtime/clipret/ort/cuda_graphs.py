"""A session of onnxruntime's on a device: staged copies, fixed addresses, CUDA graphs for the shapes that come often.

A CUDA graph is a recording of every kernel of a run, its shapes and addresses included; replayed, it costs one launch
instead of hundreds. It is only right for the very shape and the very addresses, hence: a lane's input and output
lie where they lay; a shape gets a graph of its own number once it has come several times; every other shape runs
with the number -1, which onnxruntime never records. The first embeddings of a graph are compared with those of a plain
run.
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


_OFTEN = 3  # times a shape has come before it gets a graph: a recording is two runs
_MOST = 8  # graphs of a lane: each holds some device memory
_ALIKE = (
    1e-3  # of a component of a unit embedding, between a graph and a plain run: half precision differs by its last bit
)
_NUMBERS = itertools.count(1)  # of graphs, each once in a process: two lanes of a session must not share any
_GRAPH = "gpu_graph_id"  # onnxruntime's name for the number of a recording in its run options


class BoundSession:
    """A session with its input and output in memory of a device ("cuda", or "cpu" where there is none) at fixed
    addresses, and pinned memory that batches are staged in. One thread at a time.

    `graphs`: the session records CUDA graphs (`enable_cuda_graph`). `submit(run)` calls run() and waits for it, in the
    one thread that all graphs of the session belong to.
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
        self._records = self._graphs = graphs  # what a session does, what we ask for
        self._submit = submit or (lambda run: run())
        self._seen = Counter[tuple[int, ...]]()
        self.recorded: dict[tuple[int, ...], int] = {}  # the number of each shape's graph
        self._batch = self._embeddings = self._copies.buffer(1)

    def run(self, batch: npt.NDArray[Any]) -> Embeddings:
        """As `Tower.run`."""
        shape = batch.shape
        embeddings = np.empty((shape[0], self._dim), np.float32)
        self._reserve(batch.nbytes, embeddings.nbytes)
        self._batch.host[: batch.nbytes].view(batch.dtype).reshape(shape)[...] = batch
        self._copies.to_device(self._batch, batch.nbytes)
        self._copies.wait()  # the session computes in another stream
        self._seen[shape] += 1
        number = self.recorded.get(shape, -1)
        self._compute(batch.dtype, shape, number)
        self._take(embeddings)
        if number < 0 and self._graphs and self._seen[shape] >= _OFTEN and len(self.recorded) < _MOST:
            self._record(batch.dtype, shape, embeddings)
        return embeddings

    def _record(self, dtype: Any, shape: tuple[int, ...], expected: Embeddings) -> None:
        """A graph of this shape, if it gives the embeddings that the plain run gave; else no graphs any more."""
        number = next(_NUMBERS)
        embeddings = np.empty_like(expected)
        try:
            for _ in range(2):  # onnxruntime records in the first or the second run; the last is a replay
                self._compute(dtype, shape, number)
            self._take(embeddings)
            problem = "" if np.allclose(embeddings, expected, rtol=0, atol=_ALIKE) else "its embeddings differ"
        except Exception as error:  # onnxruntime raises a dozen types of its own, all unexported
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
        if self._records:
            options.add_run_config_entry(_GRAPH, str(number))

        def run() -> None:
            self._session.run_with_iobinding(self._binding, options)
            self._binding.synchronize_outputs()  # the copy that follows is in another stream

        self._submit(run)

    def _take(self, embeddings: Embeddings) -> None:
        self._copies.to_host(self._embeddings, embeddings.nbytes)
        self._copies.wait()
        embeddings[...] = self._embeddings.host[: embeddings.nbytes].view(np.float32).reshape(embeddings.shape)

    def _reserve(self, batch: int, embeddings: int) -> None:
        """Buffers of at least so many bytes. New ones have new addresses: graphs of the old ones are given up."""
        if batch > self._batch.size or embeddings > self._embeddings.size:
            # In the thread that records: beside a recording CUDA lets nobody allocate.
            self._submit(lambda: self._grow(max(batch, self._batch.size), max(embeddings, self._embeddings.size)))

    def _grow(self, batch: int, embeddings: int) -> None:
        if release := getattr(self._session, "release_captured_graph", None):  # onnxruntime from 1.30 on
            for number in self.recorded.values():
                release(number)
        self.recorded.clear()
        self._batch, self._embeddings = self._copies.buffer(batch), self._copies.buffer(embeddings)
