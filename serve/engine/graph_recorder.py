"""Recording launches and repeating them: the seam to CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Recording(Protocol):
    """A body that was recorded. output: what the latest replay gave, in the same memory every time."""

    @property
    def output(self) -> Tensor: ...

    def replay(self) -> None:
        """Do again what the body did, over what its inputs hold by now. Does not wait for the device."""


class Recorder(Protocol):
    """Makes recordings. nbytes: of device memory that those so far have taken."""

    @property
    def nbytes(self) -> int: ...

    def record(self, body: Callable[[], Tensor]) -> Recording:
        """Run the body, which reads and writes the same memory every time, and keep what it launched. Raises whatever
        cannot be recorded: a body that waits for the device, say."""


class CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph, self.output = graph, output

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """CUDA graphs that share one pool of memory: only one of them runs at a time, and its output is taken at once."""

    def __init__(self, device: torch.device) -> None:
        self.nbytes = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, body: Callable[[], Tensor]) -> CudaRecording:
        """The body runs once before it is captured: kernels compile, and what is made once a batch is made."""
        before, _ = torch.cuda.mem_get_info(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            body()
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that copy adapters go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = body()
        current.wait_stream(self._stream)
        self.nbytes += max(0, before - torch.cuda.mem_get_info(self._device)[0])
        return CudaRecording(graph, output)
