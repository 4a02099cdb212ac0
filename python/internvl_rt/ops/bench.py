"""Timing of single ops beside each other and beside the machine's limits: `internvl-rt bench`.

What a row means:
- time: one call of the public function with `out` given. On the CPU Python is included and caches
  are warm. On a GPU it is the time between two events on the current stream, with a cold L2: a
  buffer is overwritten before the first event, which takes longer than Python needs to launch the
  call, so that the stream does not wait for Python between the events. The backends of a case
  take turns, call by call.
- roofline: the time that the op's least bytes take at the rate of a plain copy (on the CPU of as
  many bytes, on a GPU of _GPU_COPY), or that its operations take at the rate of torch's matrix
  product, whichever is longer; share is this time over the median. Both rates are measured in the
  same run with the same number of threads.
- error: the largest distance to the reference in float64, or for ops that are exact to the
  reference itself.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Cost, Inputs, Op, catalogue, on_device, outputs_of

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "f32": torch.float32,
    "float32": torch.float32,
}
# Name on the command line -> (backend of the op, device).
BACKENDS = {
    "cpu": ("native", "cpu"),
    "cuda": ("cuda", "cuda"),
    "triton": ("triton", "cuda"),
    "reference": ("reference", "cpu"),
}

WARM_UP = 0.05  # seconds a row runs before it is timed
SECONDS = 0.3  # at least so long is it timed
LIMIT = 5.0  # and at most so long, unless MIN_CALLS take longer
MIN_CALLS = 7
MAX_CALLS = 20_000
_PRODUCT = 1024  # side of the matrix product that gives the compute rate
_GPU_PRODUCT = 8192
_GPU_COPY = 1 << 31  # bytes that the copy which gives a GPU's memory rate reads and writes
_ERASER = 1 << 29  # bytes overwritten before a call on a GPU: several times any L2


def run(
    op: str,
    shape: str | None = None,
    dtypes: Sequence[str] | None = None,
    backends: Sequence[str] = ("cpu",),
) -> list[dict[str, Any]]:
    """Times one op and returns a row (of plain JSON values) per case, dtype and backend.

    shape: sizes such as "4096x896" in the order of the op's `shape_help`; None for the op's
        real-model cases.
    dtypes: of DTYPES; None for all that the cases have. backends: of BACKENDS.
    Raises ValueError for anything unknown, unavailable or without a case.
    """
    found = catalogue().get(op)
    if found is None:
        raise ValueError(f"no op named {op!r}; ops: {', '.join(sorted(catalogue()))}")
    for name in backends:
        _require_backend(found, name)
    wanted = None if dtypes is None else [_dtype(name) for name in dtypes]
    work = _work(found, shape, wanted, gpu=any(BACKENDS[b][1] == "cuda" for b in backends))
    rows = []
    with same_threads():
        rates = Rates()
        for case, dtype, build in work:
            rows += time_case(found, case, dtype, build, backends, rates)
    return rows if shape is None else [row | {"shape": shape} for row in rows]


def document(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows with what they were measured on, for a JSON file."""
    return {"machine": machine(), "rows": list(rows)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text in columns."""
    head = ("op", "case", "shape", "dtype", "backend", "kernel", "threads", "us", "p5", "p95")
    head = (*head, "GB/s", "GFLOP/s", "roofline", "max error")
    lines = [
        (
            *(str(row[k]) for k in ("op", "case", "shape", "dtype", "backend", "kernel")),
            str(row["threads"]),
            *(f"{row[k]:.2f}" for k in ("median_us", "p5_us", "p95_us")),
            *(f"{row[k]:.1f}" for k in ("gb_per_s", "gflop_per_s")),
            f"{row['roofline_share']:.0%}",
            "" if row["max_error"] is None else f"{row['max_error']:.2g}",
        )
        for row in rows
    ]
    return columns(head, lines, numbers_from=6)


def columns(head: Sequence[str], lines: Sequence[Sequence[str]], numbers_from: int) -> str:
    """Aligned columns; those from numbers_from on are flush right."""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            f"{cell:>{w}}" if i >= numbers_from else f"{cell:<{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


def machine() -> dict[str, Any]:
    """The hardware and versions that figures depend on."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": _C.isa(),
        "threads": _C.num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def machine_slug() -> str:
    """A name for a folder of results: processor, instruction set and number of threads."""
    text = f"{_cpu_model()} {_C.isa()} {_C.num_threads()}t"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def summarise(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, 5th and 95th percentile in microseconds, and how many calls they are of."""
    us = torch.tensor(seconds, dtype=torch.float64) * 1e6
    p5, median, p95 = us.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {"median_us": median, "p5_us": p5, "p95_us": p95, "calls": len(seconds)}


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    timer: Mapping[str, Callable[[Callable[[], Any]], float]] | None = None,
    *,
    seconds: float = SECONDS,
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns, so that a disturbed machine disturbs all alike.

    timer: another clock than the CPU's, by name.
    """
    clocks = {name: (timer or {}).get(name, on_cpu) for name in calls}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        start = time.perf_counter()
        while time.perf_counter() - start < min(WARM_UP, seconds):
            clocks[name](call)
    start = time.perf_counter()
    for n in range(MAX_CALLS):
        elapsed = time.perf_counter() - start
        if n >= MIN_CALLS and elapsed >= min(seconds * len(calls), LIMIT):
            break
        for name, call in calls.items():
            samples[name].append(clocks[name](call))
    return samples


def on_cpu(call: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) * 1e-9


def on_gpu(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _eraser().zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


@functools.cache
def _eraser() -> Tensor:
    return torch.empty(_ERASER, dtype=torch.uint8, device="cuda")


@contextlib.contextmanager
def same_threads() -> Iterator[None]:
    """torch with as many threads as our pool, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(_C.num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Rates:
    """What the device does at most, measured when first asked for and kept."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], float] = {}

    def bytes_per_s(self, size: int, device: str) -> float:
        """Of a copy that reads and writes `size` bytes together, rounded up to a power of four;
        on a GPU of one large copy, whatever the size."""
        exponent = max(12, math.ceil(math.log2(max(size, 1)) / 2) * 2)
        size = _GPU_COPY if device == "cuda" else 1 << min(exponent, 28)

        def measure() -> float:
            # Written before it is read: pages of untouched zeros are all the same page.
            source = torch.ones(size // 2, dtype=torch.uint8, device=device)
            target = torch.zeros_like(source)
            return size / _best(lambda: target.copy_(source), device)

        return self._keep(("copy", size, device), measure)

    def flops_per_s(self, dtype: torch.dtype, device: str) -> float:
        """Of a matrix product in float32, or in the dtype where that is faster."""

        def measure(kind: torch.dtype) -> float:
            n = _GPU_PRODUCT if device == "cuda" else _PRODUCT
            # Random: a GPU's clock holds longer on operands that toggle few bits.
            a = torch.randn(n, n, device=device).to(kind)
            out = torch.empty_like(a)
            return 2 * n**3 / _best(lambda: torch.mm(a, a, out=out), device)

        kinds = {torch.float32, dtype} & {torch.float32, torch.bfloat16}
        return max(self._keep(("product", k, device), lambda k=k: measure(k)) for k in kinds)

    def _keep(self, key: tuple[Any, ...], measure: Callable[[], float]) -> float:
        if key not in self._kept:
            self._kept[key] = measure()
        return self._kept[key]


def _best(call: Callable[[], Any], device: str) -> float:
    """The shortest of many: a limit is what the device reaches when nothing disturbs it."""
    clock = on_gpu if device == "cuda" else on_cpu
    return min(take_turns({"": call}, {"": clock}, seconds=0.1)[""])


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"bench: dtype is {name!r}, allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


def _require_backend(op: Op, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"bench: backend is {name!r}, allowed: {', '.join(BACKENDS)}")
    op.face(BACKENDS[name][0])


Build = Callable[[torch.dtype], dict[str, Any]]
Work = tuple[str, torch.dtype, Build]  # case or shape, dtype, arguments


def _work(
    op: Op, shape: str | None, dtypes: Sequence[torch.dtype] | None, *, gpu: bool
) -> list[Work]:
    cases = [case for case in (op.gpu_cases if gpu else op.cases) if case.bench]
    known = list(dict.fromkeys(dtype for case in cases for dtype in case.dtypes))
    for dtype in dtypes or ():
        if dtype not in known:
            raise ValueError(
                f"{op.name}: dtype is {_name(dtype)}, the op has {', '.join(map(_name, known))}"
            )
    wanted = known if dtypes is None else list(dict.fromkeys(dtypes))
    if shape is None:
        return [
            (case.name, dtype, lambda d, c=case: c.arguments(op.name, d))
            for case in cases
            for dtype in wanted
            if dtype in case.dtypes
        ]
    if op.shaped is None:
        raise ValueError(f"{op.name}: takes no shape, leave it out for its real-model cases")
    sizes, shaped = _sizes(op, shape), op.shaped

    def build(dtype: torch.dtype) -> dict[str, Any]:
        try:
            arguments = shaped(Inputs(f"{op.name}/{shape}", dtype), sizes)
            # Sizes that do not fit each other are refused by the op's own checks, in its words.
            op.function(**{k: on_device(v, "cpu") for k, v in arguments.items()})
            return arguments
        except RuntimeError as error:  # how torch reports that memory is not to be had
            raise ValueError(f"{op.name}: shape {shape}: {str(error).splitlines()[0]}") from None

    return [(shape, dtype, build) for dtype in wanted]


def _sizes(op: Op, shape: str) -> tuple[int, ...]:
    wrong = ValueError(
        f"{op.name}: shape is {shape!r}, expected sizes of 1 or more as {op.shape_help}"
    )
    if not re.fullmatch(r"[0-9]{1,12}(x[0-9]{1,12})*", shape):
        raise wrong
    sizes = tuple(map(int, shape.split("x")))
    if 0 in sizes or len(sizes) != len(op.shape_help.split("x")):
        raise wrong
    return sizes


def time_case(
    op: Op,
    case: str,
    dtype: torch.dtype,
    build: Build,
    backends: Sequence[str],
    rates: Rates,
    peers: Mapping[str, Callable[..., Callable[[], Any]]] | None = None,
    peer_device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row per backend, and per peer: another implementation, peers[name](**arguments)().

    A peer's calls take their turns with ours; all peers run on peer_device.
    """
    arguments = build(dtype)
    cost, shape = op.cost(**arguments), _shape(arguments)
    same = outputs_of(op.reference(**arguments))
    truth = same
    if not op.tolerance.exact:
        truth = outputs_of(op.reference(**{k: _double(v) for k, v in arguments.items()}))

    calls, devices, facts = {}, {}, {}
    for name in backends:
        backend, devices[name] = BACKENDS[name]
        # Arguments of its own: an op that updates a cache must not feed the next one.
        mine = {k: on_device(v, devices[name]) for k, v in arguments.items()}
        _C.kernel_counts(reset=True)
        out = op.function(**mine, backend=backend)
        ran = sorted(_C.kernel_counts(reset=True))
        produced = (*outputs_of(out), *(mine[m] for m in op.mutates))
        facts[name] = {
            "kernel": "+".join(ran) or ("torch" if backend == "reference" else name),
            "max_error": _error(produced, truth),
        }
        calls[name] = _call(op, mine, out, backend)
    for name, prepare in (peers or {}).items():
        devices[name] = peer_device
        calls[name] = prepare(**{k: on_device(v, peer_device) for k, v in arguments.items()})
        error = _error(outputs_of(calls[name]()), truth[: len(same) - len(op.mutates)])
        facts[name] = {"kernel": name, "max_error": error}

    clocks = {name: on_gpu if device == "cuda" else on_cpu for name, device in devices.items()}
    head = {"op": op.name, "case": case, "shape": shape, "dtype": _name(dtype)}
    return [
        head
        | {"backend": name, "threads": _C.num_threads() if devices[name] == "cpu" else 1}
        | _figures(samples, cost, dtype, devices[name], rates)
        | facts[name]
        for name, samples in take_turns(calls, clocks).items()
    ]


def _figures(
    samples: Sequence[float], cost: Cost, dtype: torch.dtype, device: str, rates: Rates
) -> dict[str, Any]:
    times = summarise(samples)
    seconds = times["median_us"] * 1e-6
    copy = rates.bytes_per_s(cost.bytes, device)
    product = rates.flops_per_s(dtype, device) if cost.flops else None
    floor = max(cost.bytes / copy, cost.flops / product if product else 0.0)
    return times | {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_per_s": cost.bytes / seconds * 1e-9,
        "gflop_per_s": cost.flops / seconds * 1e-9,
        "copy_gb_per_s": copy * 1e-9,
        "product_gflop_per_s": product and product * 1e-9,
        "roofline_share": floor / seconds,
    }


def _call(op: Op, arguments: dict[str, Any], out: Any, backend: str) -> Callable[[], Any]:
    return lambda: op.function(**arguments, out=out, backend=backend)


def _error(produced: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest distance; infinite where one is NaN or infinite and the other is not the same."""
    worst = 0.0
    for y, t in zip(produced, truth, strict=True):
        y, t = y.cpu().double(), t.double()
        off = torch.where(y == t, torch.zeros_like(t), (y - t).abs())
        if off.numel():
            worst = max(worst, float(off.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return worst


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _shape(arguments: Mapping[str, Any]) -> str:
    """Those of the first two inputs: "320x896,4864x896"."""
    shapes = [v.shape for v in arguments.values() if hasattr(v, "shape")]
    return ",".join("x".join(map(str, shape)) for shape in shapes[:2])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
