"""What lets a GPU run without waiting for Python: recorded functions, and buffers mirrored in pinned memory.

On the CPU the same functions are called directly on the same buffers.
"""

from collections.abc import Callable

import torch


class Graphs:
    """Functions over static buffers, each recorded once as a CUDA graph and then replayed.

    Such a function takes numbers only (each combination is a graph of its own), touches tensors that outlive
    this object or that it makes itself, returns nothing, never waits for the device or copies from the host,
    and does twice what it does once. All graphs share one memory pool: none leaves a result in it.
    `enabled=False`, or another device than cuda, calls the functions instead.
    """

    def __init__(self, device: torch.device, enabled: bool = True):
        self.enabled = enabled and device.type == "cuda"
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        if self.enabled:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, function: Callable[..., None], *sizes: int) -> None:
        """`function(*sizes)`, on the current stream."""
        if not self.enabled:
            function(*sizes)
            return
        key = (function.__name__, *sizes)
        if key not in self._graphs:
            self._graphs[key] = self._record(function, *sizes)
        self._graphs[key].replay()

    def drop(self) -> None:
        """Forget every graph."""
        self._graphs.clear()

    def _record(self, function: Callable[..., None], *sizes: int) -> torch.cuda.CUDAGraph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # libraries choose kernels and take workspaces: not allowed while recording
                function(*sizes)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # other threads may call CUDA meanwhile, hence thread_local
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            function(*sizes)
        return graph


class Mirror:
    """A tensor on the device and its twin in pinned host memory; on the CPU they are one."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.device = self.host.to(device)  # the same tensor where the device is the CPU

    def upload(self, part: slice | tuple) -> None:
        """Start copying `part` to the device. The host must not change it before the device has caught up."""
        if self.device is not self.host:
            self.device[part].copy_(self.host[part], non_blocking=True)

    def download(self, part: slice | tuple) -> None:
        """Start copying `part` to the host, which may read it once the device has caught up."""
        if self.device is not self.host:
            self.host[part].copy_(self.device[part], non_blocking=True)

    @property
    def nbytes(self) -> int:
        return self.device.nbytes
