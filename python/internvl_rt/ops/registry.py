"""The op catalogue: one `Op` holds what an op is, its reference, its cases and its cost.

Declaring an `Op` is enough to be tested and benchmarked on every backend, dtype and instruction set
(tests/test_ops.py, bench/ops.py) and to appear in docs/ops.md.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C

BACKENDS = ("native", "cuda", "reference", "triton")
FLOATS = (torch.float32, torch.bfloat16)


class Inputs:
    """Makes a case's tensors. Seeded by the case's name, so that a failure repeats anywhere."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
        )

    def normal(
        self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        x = torch.randn(shape, generator=self._generator) * std + mean
        return x.to(dtype or self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self._generator) * (high - low) + low

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, dtype=dtype)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator)


@dataclass(frozen=True)
class Case:
    """One set of arguments. `build` gets `Inputs` and returns the op's keyword arguments."""

    name: str
    build: Callable[[Inputs], dict[str, Any]]
    dtypes: Sequence[torch.dtype] = FLOATS
    bench: bool = False  # a real-model shape that deserves a benchmark row
    slow: bool = False  # too large for interpreters and emulators
    cpu_only: bool = False  # what no CUDA kernel takes

    def arguments(self, op: str, dtype: torch.dtype) -> dict[str, Any]:
        return self.build(Inputs(f"{op}/{self.name}", dtype))


@dataclass(frozen=True)
class Cost:
    """What a call must move and compute at least: the roofline's two axes."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Tolerance:
    """|y - truth| <= factor * max|same-dtype reference - truth| + relative * max(|truth|, scale).

    truth is the reference in float64; scale is the root mean square of truth.
    """

    factor: float = 2.0
    relative: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 2e-6, torch.bfloat16: 8e-3}
    )
    exact: bool = False  # bit-equal to the same-dtype reference instead


def missing(backend: str) -> str | None:
    """What a backend would need that is not here; None where it can run."""
    if backend not in ("cuda", "triton"):
        return None
    if backend == "cuda" and not _C.has_cuda:
        return "this build has no CUDA kernels"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.is_available() or (backend == "triton" and _interpreted()):
        return None
    return "there is no CUDA device"


def _interpreted() -> bool:
    """Whether Triton's interpreter, which takes tensors on the CPU, stands in for the device."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def triton_kernel(module: str, launcher: str) -> Callable[..., None]:
    """The face of a launcher in internvl_rt._triton, which is imported with the first call."""

    def face(*arguments: Any) -> None:
        getattr(importlib.import_module(f"internvl_rt._triton.{module}"), launcher)(*arguments)

    return face


def _on_cuda(op: str, face: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    for x in (*arguments, *named.values()):
        if isinstance(x, Tensor) and not x.is_cuda:
            raise ValueError(f"{op}: backend is 'cuda', but a tensor is on {x.device}")
    return face(*arguments, **named)


@dataclass(frozen=True)
class Op:
    """One operation in all its faces.

    function: the public function, `f(inputs..., params..., out=None, backend=None)`; its signature
        and docstring are the op's documentation.
    reference: pure torch, same arguments without out and backend; never changes its arguments and
        computes in float64 when given float64.
    faces: backend name -> implementation. "native" is the C++ extension, which takes the kernel of
        the device that its tensors are on; "cuda" is the same entry point where it has a CUDA
        kernel, for callers who want an error instead of the CPU.
    mutates: names of arguments that the op updates in place (caches); the reference returns their
        new values after its outputs.
    shaped: arguments for a shape that somebody wants timed, sizes in the order of shape_help
        ("TxC"); None where no few numbers describe the op.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    faces: Mapping[str, Callable[..., Any]]
    cases: Sequence[Case]
    cost: Callable[..., Cost]
    dims: str
    tolerance: Tolerance = Tolerance()
    mutates: tuple[str, ...] = ()
    shaped: Callable[[Inputs, tuple[int, ...]], dict[str, Any]] | None = None
    shape_help: str = ""

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(b for b in BACKENDS if b == "reference" or b in self.faces)

    @property
    def gpu_cases(self) -> tuple[Case, ...]:
        """The cases that a kernel for a GPU takes."""
        return tuple(case for case in self.cases if not case.cpu_only)

    @property
    def signature(self) -> str:
        return f"{self.name}{inspect.signature(self.function)}"

    def face(self, backend: str | None) -> Callable[..., Any] | None:
        """The implementation for a backend, None for the reference; ValueError if there is none, or
        if this machine or build cannot run it."""
        name = "native" if backend is None else backend
        if name == "reference":
            return None
        lacks = missing(name) if name in self.faces else ""
        if lacks is not None:
            there = [b for b in self.backends if missing(b) is None]
            why = f", but {lacks};" if lacks else ","
            raise ValueError(
                f"{self.name}: backend is {backend!r}{why} available: {', '.join(there)}"
            )
        face = self.faces[name]
        return functools.partial(_on_cuda, self.name, face) if name == "cuda" else face


_catalogue: dict[str, Op] = {}


def register(op: Op) -> Op:
    if op.name in _catalogue:
        raise ValueError(f"op {op.name} is declared twice")
    _catalogue[op.name] = op
    return op


def catalogue() -> Mapping[str, Op]:
    """All ops by name."""
    return _catalogue


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """An op's result as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def give(op: str, result: Any, out: Any) -> Any:
    """Returns a reference's result, through `out` where the caller gave one."""
    if out is None:
        return result
    for source, target in zip(outputs_of(result), outputs_of(out), strict=True):
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(
                f"{op}: out is {target.dtype} {list(target.shape)}, "
                f"expected {source.dtype} {list(source.shape)}"
            )
        target.copy_(source)
    return out


class OpSet:
    """The ops of one backend as attributes: `ops = OpSet("native"); ops.rms_norm(...)`.

    overrides names single ops that take another backend: a wrong result can be bisected to one op
    with `OpSet("native", {"linear": "reference"})`. "triton" stands for Triton's kernels where an
    op has one, and for the native ones elsewhere.
    device: the type of the device that tensors are on, "cpu" or "cuda".
    """

    def __init__(
        self,
        backend: str | None = None,
        overrides: Mapping[str, str] | None = None,
        device: str = "cpu",
    ) -> None:
        overrides, self.device = dict(overrides or {}), device
        self.backend = "native" if backend is None else backend
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, allowed: {', '.join(BACKENDS)}")
        unknown = sorted(set(overrides) - set(_catalogue))
        if unknown:
            raise ValueError(f"no op named {unknown[0]!r}; ops: {', '.join(sorted(_catalogue))}")
        usual = {name: self._usual(op) for name, op in _catalogue.items()}
        self._choices = usual | overrides
        for name, choice in self._choices.items():
            op = _catalogue[name]
            op.face(choice)
            setattr(self, name, functools.partial(op.function, backend=choice))

    def choice(self, name: str) -> str:
        """The backend that an op of this set runs on."""
        return self._choices[name]

    @property
    def has_reference(self) -> bool:
        """Whether an op of this set is plain torch, which may look at values on the host."""
        return "reference" in self._choices.values()

    def require(self, *names: str) -> None:
        """Raises ValueError for the first of these ops that has no kernel for the device."""
        for name in names:
            op = _catalogue[name]
            if self.device == "cuda" and self.choice(name) == "native" and "cuda" not in op.faces:
                raise ValueError(
                    f"{name}: no CUDA kernel yet; available on a GPU: backend 'reference'"
                )

    def _usual(self, op: Op) -> str:
        lacks = self.backend == "triton" and "triton" not in op.faces
        return "native" if lacks else self.backend


# Checking: used by the generated tests and by bench.


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _results(op: Op, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return outputs_of(op.reference(**arguments))


@functools.lru_cache(maxsize=1)  # a case is checked on every instruction set in turn
def _expected(
    name: str, case: Case, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The reference's results in the same dtype and in float64."""
    op = _catalogue[name]
    arguments = case.arguments(name, dtype)
    same = _results(op, arguments)
    if op.tolerance.exact:
        return same, same  # nothing is rounded: no float64 form to compare with
    return same, _results(op, {k: _to(v, torch.float64) for k, v in arguments.items()})


def on_device(value: Any, device: str) -> Any:
    """A copy of an argument on a device; a view keeps its strides and its offset, and with them
    its alignment."""
    if not isinstance(value, Tensor):
        return value.to(device) if hasattr(value, "to") else value
    storage = value.untyped_storage()
    flat = torch.empty(0, dtype=value.dtype, device=value.device)
    flat.set_(storage, 0, (storage.nbytes() // value.element_size(),))
    moved = flat.to(device, copy=True)
    return moved.as_strided(value.shape, value.stride(), value.storage_offset())


def check(op: Op, case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Runs one case on a backend and a device; raises AssertionError where a law is broken.

    Outputs are pre-filled with NaN inside guard bands, inputs must come back unchanged, and every
    element must lie within the op's tolerance of the float64 truth.
    """
    arguments = case.arguments(op.name, dtype)
    same, truth = _expected(op.name, case, dtype)
    if device != "cpu":
        arguments = {k: on_device(v, device) for k, v in arguments.items()}
    kept = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    n_out = len(same) - len(op.mutates)
    guarded = [_Guarded(t, device) for t in same[:n_out]]
    out = tuple(g.tensor for g in guarded)
    op.function(**arguments, out=out if n_out > 1 else out[0], backend=backend)
    produced = (*out, *(arguments[m] for m in op.mutates))
    where = f"{op.name}/{case.name} {dtype} {backend}"
    for g in guarded:
        assert g.intact(), f"{where}: wrote outside its output"
    for name, before in kept.items():
        if name not in op.mutates:
            assert _same_bits(before, arguments[name]), f"{where}: changed its input {name}"
    for i, (y, s, t) in enumerate(zip(produced, same, truth, strict=True)):
        _compare(f"{where} output {i}", y.cpu(), s, t, op.tolerance, dtype)


def _compare(
    where: str, y: Tensor, same: Tensor, truth: Tensor, law: Tolerance, dtype: torch.dtype
) -> None:
    if y.numel() == 0:
        return
    if law.exact or not y.is_floating_point():
        wrong = int((~_equal(y, same)).sum())
        assert wrong == 0, f"{where}: {wrong} of {y.numel()} elements differ"
        return
    truth, value, other = truth.double(), y.double(), same.double()
    finite = torch.isfinite(truth)
    assert bool(torch.equal(value[~finite], truth[~finite])), f"{where}: wrong infinities or NaN"
    value, truth, other = value[finite], truth[finite], other[finite]
    if truth.numel() == 0:
        return
    scale = truth.square().mean().sqrt()
    bound = law.factor * (other - truth).abs().max() + law.relative[dtype] * torch.maximum(
        truth.abs(), scale
    )
    error = (value - truth).abs()
    bad = ~(error <= bound)  # NaN compares false and is bad
    assert not bool(bad.any()), (
        f"{where}: {int(bad.sum())} of {y.numel()} elements off, worst error "
        f"{float(error.nan_to_num(float('inf')).max()):.3g}, bound {float(bound.min()):.3g}, "
        f"scale {float(scale):.3g}"
    )


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) if not a.is_floating_point() else (a == b) & ~a.isnan()


def bits(x: Tensor) -> Tensor:
    """The bits of x as integers, so that NaN equals itself."""
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(view)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


class _Guarded:
    """A tensor like `like` on a device, filled with NaN, between two guard bands."""

    BAND = 64

    def __init__(self, like: Tensor, device: str) -> None:
        n = like.numel()
        self._fill = float("nan") if like.is_floating_point() else 113
        self._buffer = torch.full((n + 2 * self.BAND,), self._fill).to(device, like.dtype)
        self._before = self._buffer.clone()
        self.tensor = self._buffer[self.BAND : self.BAND + n].view(like.shape)

    def intact(self) -> bool:
        head, tail = self._buffer[: self.BAND], self._buffer[-self.BAND :]
        return _same_bits(head, self._before[: self.BAND]) and _same_bits(
            tail, self._before[-self.BAND :]
        )


def all_cases() -> list[tuple[Op, Case, torch.dtype]]:
    """Every (op, case, dtype) of the catalogue."""
    return [
        (o, case, dtype) for o in _catalogue.values() for case in o.cases for dtype in case.dtypes
    ]
