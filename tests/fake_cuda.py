"""A CUDA device that is none: the engine's code for GPUs, with emulated kernels and strict rules.

Device tensors are `OnDevice`, which say that they are on cuda:0 and keep their values in a tensor
of the CPU. What a real device would refuse, or would make the host wait for, is an error here:
- an op on tensors of the host and of the device together; device memory outside a scope;
- reading a value of the device on the host but through `fetch`; copies that are not from or to
  pinned memory; pinned memory that changes while a copy from it may be on its way;
- anything but kernels while a graph is captured.
Fresh device memory holds NaN. A replayed graph repeats the calls that were captured, on the same
memory: what the host decided then stays as it was.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import emulated
from emulator import Emulator
from internvl_rt import _C
from internvl_rt.ops import catalogue
from internvl_rt.runtime.platform import CudaPlatform

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)


class OnDevice(Tensor):
    """A tensor on the fake device; `inner` has its values."""

    inner: Tensor
    machine: Machine
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, machine: Machine) -> OnDevice:
        like = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        made = Tensor._make_subclass(
            cls, like, False, dispatch_device=True, device_for_backend_keys=DEVICE
        )
        made.inner, made.machine = inner, machine
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    is_cuda = True

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def cpu(self) -> Tensor:
        assert not self.machine.depth, "the host waits for a device's tensor"
        return self.inner.clone()

    def tolist(self) -> Any:
        assert self.machine.reads, "the host reads a device's values"
        return self.inner.tolist()

    def record_stream(self, stream: Any) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        (machine, *_) = (
            x.machine for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnDevice)
        )
        return machine.run(func, args, kwargs or {})


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def _poison(x: Tensor) -> None:
    x.fill_(float("nan") if x.is_floating_point() else 113)


class Machine(TorchDispatchMode):
    """Sees every call of torch within a scope, and those on device tensors anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.tape: list[Callable[[], None]] | None = None  # while a graph is captured
        self.pinned: dict[int, Tensor] = {}
        self.in_flight: list[tuple[Tensor, Tensor]] = []
        self.landing: list[tuple[Tensor, Tensor]] = []
        self.waits = self.copies = self.captures = self.replays = 0
        self.launches: list[str] = []
        self.reads = False  # whether the host may look at values: plain torch does

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, OnDevice)]
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted).type
        if not here and wanted != "cuda":
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")  # for the guards of torch itself
        if func is aten._local_scalar_dense.default:
            assert self.reads, "the host reads a device's value"
            return func(args[0].inner)
        if func in COPIES and (len(here) < len(tensors) or wanted == "cpu"):
            return self._copy(func, args, kwargs)
        host = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
        assert not host, f"{func}: tensors of the host and of the device"
        assert wanted in (None, "cuda"), f"{func}: to {wanted}"
        schema = func._schema
        fresh = not any(r.alias_info for r in schema.returns)
        assert self.depth or not fresh, f"{func}: device work outside a scope"
        args, named = tree_map(_inner, (args, {k: v for k, v in kwargs.items() if k != "device"}))
        found = func(*args, **named)
        if any(r.alias_info and r.alias_info.is_write for r in schema.returns):
            if self.tape is not None:
                self.tape.append(lambda: func(*args, **named))
            return next(x for x in tensors if x.inner is found)
        if "empty" in schema.name:
            _poison(found)
        if self.tape is not None and fresh:
            self.tape.append(lambda: self._again(func, args, named, found))
        return tree_map(lambda x: OnDevice(x, self) if isinstance(x, Tensor) else x, found)

    @staticmethod
    def _again(func: Any, args: Any, named: Any, found: Any) -> None:
        again = func(*args, **named)
        for old, new in zip(tree_flatten(found)[0], tree_flatten(again)[0], strict=True):
            _poison(old) if "empty" in func._schema.name else old.copy_(new)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Between the host and the device: pinned, in one direction or the other, and not waited
        for. What arrives on the host does so with the next wait."""
        if self.reads and func is aten._to_copy.default and not isinstance(args[0], OnDevice):
            return OnDevice(args[0].clone(), self)
        assert self.tape is None, "a copy between host and device in a graph"
        assert func is aten.copy_.default, f"{func}: a copy that the host waits for"
        to, source, *flag = args
        assert flag == [True] or kwargs.get("non_blocking"), "a copy that the host waits for"
        host = source if isinstance(to, OnDevice) else to
        assert host.untyped_storage().data_ptr() in self.pinned, "a copy of pageable memory"
        assert to.dtype == source.dtype, "a copy between host and device converts"
        self.copies += 1
        if isinstance(to, OnDevice):
            to.inner.copy_(source)
            self.in_flight.append((source, source.clone()))
        else:
            _poison(to)
            self.landing.append((to, source.inner.clone()))
        return to

    def wait(self) -> None:
        for pinned, before in self.in_flight:
            same = torch.equal(pinned.view(torch.uint8), before.view(torch.uint8))
            assert same, "pinned memory changed under a copy"
        for to, value in self.landing:
            to.copy_(value)
        self.in_flight, self.landing = [], []

    def launch(self, name: str, kernel: Callable[[], None]) -> None:
        assert self.depth, f"{name}: launched outside a scope"
        self.launches.append(name)
        kernel()
        if self.tape is not None:
            self.tape.append(kernel)


class _Graph:
    def __init__(self, machine: Machine, work: Callable[[], Any]) -> None:
        self._machine, self._tape = machine, []
        assert machine.tape is None, "a capture within a capture"
        machine.tape = self._tape
        try:
            self.outputs = work()
        finally:
            machine.tape = None
        for x in tree_flatten(self.outputs)[0]:
            _poison(x.inner)  # to capture is not to run

    def replay(self) -> None:
        assert self._machine.depth, "a graph is replayed outside a scope"
        self._machine.replays += 1
        with torch.utils._python_dispatch._disable_current_modes():
            for call in self._tape:
                call()


class FakeCuda(CudaPlatform):
    """CudaPlatform without CUDA: its memory, stream and graphs are the machine's."""

    def __init__(self, free: int = 1 << 28) -> None:
        self.device, self.machine, self.free = DEVICE, Machine(), free
        self.lock, self._outer = threading.RLock(), None

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if not self.machine.depth:
                stack.enter_context(self.machine)
            self.machine.depth += 1
            try:
                yield
            finally:
                self.machine.depth -= 1

    def capture(self, work: Callable[[], Any]) -> _Graph:
        self.machine.captures += 1
        return _Graph(self.machine, work)

    def available_memory(self) -> int:
        return self.free

    def pinned(self, shape: Any, dtype: torch.dtype) -> Tensor:
        assert self.machine.tape is None, "memory of the host is pinned in a graph"
        host = torch.empty(shape, dtype=dtype)
        self.machine.pinned[host.untyped_storage().data_ptr()] = host
        return host

    def wait(self) -> None:
        assert self.machine.tape is None, "the host waits in a graph"
        self.machine.waits += 1
        self.machine.wait()


def install(monkeypatch: Any, emulator: Emulator) -> None:
    """Native faces run device tensors through the emulated CUDA kernels."""
    if torch.cuda.is_available():
        torch.cuda.init()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(_C, "has_cuda", True)
    monkeypatch.setattr(_C, "paged_attention_workspace", _workspace)
    for name, op in catalogue().items():
        monkeypatch.setitem(op.faces, "native", _face(name, op.faces["native"], emulator))


def _face(name: str, native: Callable[..., Any], emulator: Emulator) -> Callable[..., Any]:
    def face(*arguments: Any, **named: Any) -> Any:
        tensors = [x for x in tree_flatten((arguments, named))[0] if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, OnDevice)]
        if not here:
            return native(*arguments, **named)
        assert len(here) == len(tensors), f"{name}: tensors of the host and of the device"
        if name == "gated_linear":
            return False  # one kernel on Hopper alone, and this is none
        assert name in emulated.PARAMS, f"{name}: no CUDA kernel"
        machine = here[0].machine
        with torch.utils._python_dispatch._disable_current_modes():
            machine.depth += 1  # views of the arguments
            params = emulated.PARAMS[name](*arguments, **named)
            machine.depth -= 1
            machine.launch(name, lambda: emulator.run(name, params))

    return face


def _workspace(q: Tensor, k_cache: Tensor, page_table: Tensor) -> int:
    T, H, D = q.shape
    if q.dtype != torch.bfloat16 or D not in (64, 128):
        return 0
    splits = max(1, -(-page_table.shape[1] * k_cache.shape[2] // (16384 // D)))
    return splits * T * H * (D + 2)
