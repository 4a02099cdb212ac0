"""Where a model runs: the CPU, or one CUDA device with its stream, pinned copies and graphs.

Models and the engine ask a platform for everything that is not an op, so they have one code path.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.runtime.memory import GIB, available_memory

Shape = tuple[Sequence[int], torch.dtype]
# Of tensors that share a buffer: as torch's own allocations, more than any kernel's vectors want.
_ALIGNMENT = 256
# Weights go through pieces of pinned memory of this size: large enough for the bus, small enough
# that reading the file and sending overlap.
_STAGED_BYTES = 1 << 26


class Platform(Protocol):
    """What models and the engine need of a machine.

    phased: decode steps and prefill have kernels of their own, so a batch is one or the other.
    micro_batches: numbers of tiles that run through the vision tower together, largest first.
    decode_graphs: a decode step is captured, and replayed, with as many rows as the next larger of
        these; one with more rows than the last is not.
    tile_graphs: whether micro-batches of tiles are captured too.
    lock: what `with platform.lock, platform.scope():` takes around all work. The scope does not
        take it itself, as a lock is sure to be let go, whenever Ctrl-C comes, by its own `with`.
    """

    device: torch.device
    phased: bool
    micro_batches: tuple[int, ...]
    decode_graphs: tuple[int, ...]
    tile_graphs: bool
    lock: contextlib.AbstractContextManager[Any]

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Within it, work goes to this platform, in order. The caller holds the lock."""

    def load(self, stored: Tensor) -> Tensor:
        """A tensor of a mapped file where kernels read it; on the CPU it stays in the file."""

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the host on the device, by one copy that the host does not wait for."""

    def receive(self, x: Tensor) -> Tensor:
        """A caller's tensor on the device."""

    def fetch(self, x: Tensor) -> Tensor:
        """x on the host, when it is there."""

    def hand_out(self, x: Tensor) -> Tensor:
        """x for the caller of the scope, whose stream may be another one."""

    def mirror(self, shapes: Mapping[str, Shape]) -> Mirror:
        """Buffers that stay in place, for graphs."""

    def capture(self, work: Callable[[], Any]) -> Graph:
        """Captures work, which reads and writes buffers that stay in place."""

    def available_memory(self) -> int:
        """Bytes that a model may take."""


class Graph(Protocol):
    """Captured work. outputs: what it returned, written anew by every replay."""

    outputs: Any

    def replay(self) -> None: ...


class CpuPlatform:
    device = torch.device("cpu")
    phased = False
    # Enough rows for the matrix products, and a peak that does not grow with the number of tiles.
    micro_batches = (4, 3, 2, 1)
    # What Python adds to a step of few rows is a tenth of it. A size of its own for each: no row is
    # padded. The largest tape keeps 5 MB of logits.
    decode_graphs = tuple(range(1, 9))
    tile_graphs = False
    lock = _scope = contextlib.nullcontext()

    def scope(self) -> contextlib.AbstractContextManager[None]:
        return self._scope

    def load(self, stored: Tensor) -> Tensor:
        return stored

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def receive(self, x: Tensor) -> Tensor:
        return x

    def fetch(self, x: Tensor) -> Tensor:
        return x

    def hand_out(self, x: Tensor) -> Tensor:
        return x

    def mirror(self, shapes: Mapping[str, Shape]) -> Mirror:
        return Mirror(self, shapes)

    def capture(self, work: Callable[[], Any]) -> Graph:
        return _Tape(work)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def available_memory(self) -> int:
        return available_memory()


class _Tape:
    """The calls of kernels in some work, without the Python around them.

    What torch itself does in it, other than views and empty tensors, is not done again.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        tape, self.outputs = _C.record(work)
        self.replay = tape.replay


class CudaPlatform:
    """One CUDA device. All work of a model goes to one stream of its own, never the null stream."""

    phased = True
    # By default a picture has at most 12 tiles and a thumbnail.
    micro_batches = (13, 7, 4, 2, 1)
    # So that few graphs serve all; the last is the engine's largest batch.
    decode_graphs = (1, 2, 4, 8, 16, 32, 64)
    tile_graphs = True

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream(self.device)
        self._capturing = torch.cuda.Stream(self.device)
        self._pool: Any = None
        self._outer = self.stream
        # While one thread captures or has the stream's order in mind, others wait.
        self.lock = threading.RLock()

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            outer = torch.cuda.current_stream()
            if outer == self.stream:
                yield
                return
            self._outer = outer
            self.stream.wait_stream(outer)
            try:
                with torch.cuda.stream(self.stream):
                    yield
            except torch.OutOfMemoryError as error:
                raise out_of_memory(self.device, error, self.available_memory()) from None
            finally:
                outer.wait_stream(self.stream)

    def load(self, stored: Tensor) -> Tensor:
        out = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
        row = max(stored[:1].numel() * stored.element_size(), 1)
        step = max(_STAGED_BYTES // row, 1)
        for source, target in zip(stored.split(step), out.split(step), strict=True):
            staged = self.pinned(source.shape, source.dtype)
            target.copy_(staged.copy_(source), non_blocking=True)
        return out

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        shapes = [(t.shape, t.dtype) for t in tensors]
        host = self.pinned([_size(shapes)], torch.uint8)
        for view, tensor in zip(_views(host, shapes), tensors, strict=True):
            view.copy_(tensor)
        there = torch.empty(host.shape, dtype=torch.uint8, device=self.device)
        return _views(there.copy_(host, non_blocking=True), shapes)

    def receive(self, x: Tensor) -> Tensor:
        return x if x.device == self.device else self.upload([x])[0]

    def fetch(self, x: Tensor) -> Tensor:
        host = self.pinned(x.shape, x.dtype).copy_(x, non_blocking=True)
        self.wait()
        return host

    def hand_out(self, x: Tensor) -> Tensor:
        x.record_stream(self._outer)
        return x

    def mirror(self, shapes: Mapping[str, Shape]) -> Mirror:
        return Mirror(self, shapes)

    def capture(self, work: Callable[[], Any]) -> Graph:
        work()  # what happens once, as the loading of kernels, cannot be captured
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return _CudaGraph(work, self._pool, self._capturing)

    def available_memory(self) -> int:
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + cached

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device copies from and to by itself.

        torch lends it out again only when copies that were on their way are done.
        """
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def wait(self) -> None:
        """Until the work so far is done; other threads run meanwhile."""
        done = torch.cuda.Event()
        done.record()
        done.synchronize()


class _CudaGraph:
    def __init__(self, work: Callable[[], Any], pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on other models' streams is none of its business.
        with torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            self.outputs = work()

    def replay(self) -> None:
        self._graph.replay()


class Mirror:
    """Named tensors that stay in place, on the host and on the device; one copy for all."""

    def __init__(self, platform: Any, shapes: Mapping[str, Shape]) -> None:
        size = [_size(shapes.values())]
        self._host = platform.pinned(size, torch.uint8)
        self._device = torch.empty(size, dtype=torch.uint8, device=platform.device)
        self.host = dict(zip(shapes, _views(self._host, shapes.values()), strict=True))
        self.device = dict(zip(shapes, _views(self._device, shapes.values()), strict=True))

    def push(self) -> None:
        """host to device. The host's side must stay as it is until the copy is done."""
        self._device.copy_(self._host, non_blocking=True)


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _size(shapes: Any) -> int:
    return sum(_bytes(*s) for s in shapes)


def _views(buffer: Tensor, shapes: Any) -> list[Tensor]:
    """Tensors that lie one behind the other in a buffer of bytes."""
    out, at = [], 0
    for shape, dtype in shapes:
        size = math.prod(shape) * dtype.itemsize
        out.append(buffer[at : at + size].view(dtype).view(shape))
        at += _bytes(shape, dtype)
    return out


def out_of_memory(device: torch.device, error: Exception, free: int) -> MemoryError:
    wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
    return MemoryError(
        f"{device} is out of memory: {wanted[1] if wanted else 'more'} wanted, "
        f"{free / GIB:.2f} GiB are free"
    )


CPU = CpuPlatform()


def platform_for(device: str | torch.device) -> Platform:
    """The platform of "cpu", "cuda", "cuda:N" or "auto", which is the CPU.

    Raises ValueError for another name, and where there is no such device.
    """
    if isinstance(device, torch.device):
        device = str(device)
    if not isinstance(device, str):
        raise TypeError(f"device is {type(device).__name__}, expected 'cpu', 'cuda' or 'auto'")
    if device in ("auto", "cpu"):
        return CPU
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if named is None:
        raise ValueError(f"device is {device!r}, allowed: cpu, cuda, cuda:N, auto")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError(f"device is {device!r}, but there is no CUDA device; available: cpu")
    index = int(named[1]) if named[1] else torch.cuda.current_device()
    if index >= count:
        raise ValueError(f"device is {device!r}, available: cpu, cuda:0 to cuda:{count - 1}")
    return CudaPlatform(index)
