"""The Python part of bench/gpu_check.sh: a subcommand is a step, in a process of its own.

    python bench/gpu_check.py names                   # the ops with a kernel for a GPU
    python bench/gpu_check.py ready --out DIR         # machine.json; fails where tests would skip
    python bench/gpu_check.py small                   # few small cases, for compute-sanitizer
    python bench/gpu_check.py repeat                  # real shapes, whose bits may not change
    python bench/gpu_check.py probes --out DIR        # the device and its rates: DIR/probes.json
    python bench/gpu_check.py ops rms_norm --out DIR  # DIR/ops-rms_norm.json
    python bench/gpu_check.py peers --out DIR         # what compiles or may be missing: peers.json
    python bench/gpu_check.py report check --parts DIR --out DIR2  # DIR2/check.json and the table

--dry-run takes the CPU instead, with small cases: the same code on the native kernels. The rows are
those of python/internvl_rt/ops/bench.py with graph_us: one call's share of a CUDA graph of GRAPH
calls, replayed on a warm L2, null where there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cpu
import gpu_parts
from internvl_rt.ops import bench, catalogue
from internvl_rt.ops.flash_attention import offsets
from internvl_rt.ops.registry import (
    Case,
    Inputs,
    Op,
    bits,
    check,
    missing,
    on_device,
    outputs_of,
)
from peers import GPU_PEERS, OTHER_DRAWS, PEERS, slow_peers

BACKENDS = ("cuda", "triton")
GRAPH = 20  # calls in a graph
FIRST = ("linear", "gated_linear", "flash_attention", "paged_attention")
SMALL = 2  # cases of an op under compute-sanitizer, beside those of TENSOR_CORES
DRY_OPS = ("flash_attention", "rms_norm")
OURS = (*bench.BACKENDS, "ours-mma")
SECONDS = 0.15  # a row is timed so long: some 500 calls, and a run has about 200 rows
PEER_SECONDS = 80.0  # no further peer is compiled or sought after so long
BARRIERS = 10_000  # rounds of the grid barrier

# Small cases that reach what the first ones of an op do not: tensor cores, bulk copies, splits.
TENSOR_CORES = {
    "flash_attention": ("tail_257", "wide_128", "prefix"),
    "gated_linear": ("aligned",),
    "linear": ("aligned_bias", "aligned_gelu", "aligned_residual", "aligned_residual_wide"),
    "paged_attention": ("decode_128", "window", "prefix"),
}
REPEATS = 30  # of a call
REPEATED = 4  # real shapes of an op
# Ops that copy from the host in every call, which no graph can hold.
FROM_HOST = ("preprocess",)

# Shapes whose time docs/performance.md predicts and the catalogue leaves out; bfloat16.
SHAPES = {
    "gated_linear": ("1088x9728x896", "1088x37888x3584"),
    "layer_norm": ("13325x1024",),
    "linear": (
        "1x1152x896",
        "1x896x4864",
        "1x9728x896",
        "1x151674x896",
        "64x9728x896",
        "1025x3072x1024",
        "4100x3072x1024",
        "13325x3072x1024",
        "13325x4096x1024",
        "13325x1024x4096",
        "1088x1152x896",
        "1088x3584x18944",
    ),
    "paged_attention": ("64x2048x14x2x64", "64x2048x28x4x128"),
}


@dataclass(frozen=True)
class Place:
    """Where the steps run, and what of the catalogue they take there."""

    device: str
    backends: tuple[str, ...]  # names of bench.BACKENDS
    dry: bool

    def backends_of(self, op: Op) -> list[str]:
        return [b for b in self.backends if bench.BACKENDS[b][0] in op.faces]


GPU = Place("cuda", BACKENDS, dry=False)
DRY = Place("cpu", ("cpu",), dry=True)


def on_gpu_ops() -> list[Op]:
    """What takes a model's time comes first: a run may end before the others."""
    ops = catalogue()
    names = (*FIRST, *(name for name in ops if name not in FIRST))
    return [ops[name] for name in names if any(b in ops[name].faces for b in BACKENDS)]


def simple_first() -> list[Op]:
    """For steps that run all ops in one process: a fault on the device takes those behind it."""
    return on_gpu_ops()[::-1]


# ---- check -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _noted(failures: list[dict[str, str]], label: dict[str, str]) -> Iterator[None]:
    """Whatever kernels, compilers and drivers raise becomes an entry, and the run goes on."""
    try:
        yield
    except Exception as error:
        failures.append(label | {"why": _first_line(error)})
        print("failed", *failures[-1].values(), flush=True)


def ready(place: Place, out: Path) -> None:
    gpu_parts.write(out / "machine.json", bench.machine() | {"dry_run": place.dry})
    for backend in () if place.dry else BACKENDS:
        why = missing(backend)
        if why is not None:
            raise RuntimeError(f"{backend}: {why}")


def small_cases(op: Op) -> list[Case]:
    """The first ones, and those of TENSOR_CORES."""
    names = TENSOR_CORES.get(op.name, ())
    cases = [c for c in op.gpu_cases if not c.slow and not c.name.startswith("empty")]
    return cases[:SMALL] + [c for c in cases[SMALL:] if c.name in names]


def small(place: Place) -> bool:
    """A few cases of every op against the catalogue's law; False where one broke it."""
    failed: list[dict[str, str]] = []
    for op in simple_first():
        for backend in place.backends_of(op):
            for case in small_cases(op):
                for dtype in case.dtypes:
                    print(op.name, backend, case.name, dtype, flush=True)
                    label = {"op": op.name, "backend": backend, "case": case.name}
                    with _noted(failed, label):
                        check(op, case, dtype, bench.BACKENDS[backend][0], place.device)
    return not failed


def repeat(place: Place) -> bool:
    """Real shapes again and again into poisoned outputs; False where bits changed, which is a race,
    or where a call failed."""
    failed: list[dict[str, str]] = []
    for op in simple_first():
        for case, dtype, build in work(op, place)[:REPEATED]:
            arguments = build(dtype)
            for backend in place.backends_of(op):
                print(op.name, backend, case, flush=True)
                with _noted(failed, {"op": op.name, "backend": backend, "case": case}):
                    changed = _repeated(op, arguments, backend, place)
                    assert not changed, f"{changed} of {REPEATS} calls gave other bits"
    return not failed


def _repeated(op: Op, arguments: dict[str, Any], backend: str, place: Place) -> int:
    """How many calls did not repeat the first one's bits."""
    mine = {k: on_device(v, place.device) for k, v in arguments.items()}
    face = bench.BACKENDS[backend][0]
    out = op.function(**mine, backend=face)
    written = (*outputs_of(out), *(mine[name] for name in op.mutates))
    first, changed = [bits(t).clone() for t in written], 0
    for _ in range(REPEATS):
        for t in outputs_of(out):
            t.fill_(float("nan") if t.is_floating_point() else 113)
        op.function(**mine, out=out, backend=face)
        changed += not all(torch.equal(bits(t), f) for t, f in zip(written, first, strict=True))
    return changed


def _device(place: Place) -> dict[str, Any]:
    if place.dry:
        return {"name": "cpu"}
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "cuda": torch.version.cuda,
    }


def _rms_norm(place: Place) -> tuple[Callable[[], Any], torch.Tensor, torch.Tensor]:
    """A call of our kernel, what it writes and what it should write."""
    make = Inputs("gpu_check/rms_norm", torch.bfloat16)
    x, weight = make.normal(64, 896), make.normal(896)
    op = catalogue()["rms_norm"]
    expected = op.reference(x, weight, eps=1e-6)
    x, weight = (on_device(t, place.device) for t in (x, weight))
    out = torch.full_like(x, float("nan"))
    backend = bench.BACKENDS[place.backends[0]][0]
    return (
        lambda: op.function(x, weight, eps=1e-6, out=out, backend=backend),
        out,
        on_device(expected, place.device),
    )


def _close(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def _dlpack(place: Place) -> dict[str, Any]:
    """Tensors and the current stream through the exchange API: what a call on any other stream
    wrote would be wiped out at the end of the wait."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        raise RuntimeError(f"torch {torch.__version__} has no __dlpack_c_exchange_api__")
    call, out, expected = _rms_norm(place)
    call()
    if not place.dry:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            out.fill_(float("nan"))
            call()
        torch.cuda.synchronize()
    _close(out, expected)
    return {"torch": torch.__version__}


def _copy(place: Place) -> dict[str, Any]:
    return {"gb_per_s": bench.Rates().bytes_per_s(1 << 20, place.device) * 1e-9}


def _product(place: Place) -> dict[str, Any]:
    rate = bench.Rates().flops_per_s(torch.bfloat16, place.device)
    return {"tflop_per_s": rate * 1e-12}


def _empty(place: Place) -> dict[str, Any]:
    """What an event pair measures with nothing, and with a launch that does nothing, in between."""
    clock = bench.on_cpu if place.dry else bench.on_gpu
    x = torch.zeros(1, device=place.device)
    calls = {"nothing_us": lambda: None, "launch_us": lambda: x.zero_()}
    samples = bench.take_turns(calls, dict.fromkeys(calls, clock), seconds=0.05)
    return {name: statistics.median(s) * 1e6 for name, s in samples.items()}


def _graph(place: Place) -> dict[str, Any]:
    """Our kernel in a CUDA graph: captured without running, right when replayed."""
    call, out, expected = _rms_norm(place)
    if place.dry:
        call()
    else:
        graph = _captured(call, 1)
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
    _close(out, expected)
    return {"replayed": not place.dry}


def build_grid_barrier(folder: Path, arch: str) -> Path:
    """bench/grid_barrier.cu as a shared library."""
    source, library = Path(__file__).with_name("grid_barrier.cu"), folder / "grid_barrier.so"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc")
    command = [nvcc, "-std=c++20", "-O3", "-shared", "-Xcompiler=-fPIC", f"-arch={arch}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"nvcc: {done.stdout}{done.stderr}")
    return library


def call_grid_barrier(library: Path, device: int, rounds: int) -> dict[str, Any]:
    """Microseconds that a barrier over all multiprocessors takes: that of cooperative groups, and
    one counter in global memory."""
    barrier = ctypes.CDLL(str(library)).grid_barrier
    barrier.restype = ctypes.c_char_p
    cooperative, counting, blocks = ctypes.c_float(), ctypes.c_float(), ctypes.c_int()
    results = (ctypes.byref(r) for r in (cooperative, counting, blocks))
    error = barrier(device, rounds, *results)
    if error is not None:
        raise RuntimeError(f"CUDA: {error.decode()}")
    found = {"cooperative_us": cooperative.value, "counting_us": counting.value}
    for name, us in found.items():
        if us < 0:
            raise RuntimeError(
                f"{name.removesuffix('_us')}: a block read before another had written"
            )
    return found | {"blocks": blocks.value}


def _grid_barrier(place: Place) -> dict[str, Any]:
    if place.dry:
        return {"measured": False}
    device = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(device)
    with tempfile.TemporaryDirectory() as folder:
        library = build_grid_barrier(Path(folder), f"sm_{major}{minor}")
        return call_grid_barrier(library, device, BARRIERS)


PROBES = {
    "device": _device,
    "dlpack": _dlpack,
    "copy": _copy,
    "product_bf16": _product,
    "empty": _empty,
    "graph": _graph,
    # Last: blocks that wait for each other could wait forever.
    "grid_barrier": _grid_barrier,
}


def probes(place: Place, out: Path) -> bool:
    """Writes what every probe found; False where one failed."""
    found: dict[str, Any] = {}
    for name, probe in PROBES.items():
        failures: list[dict[str, str]] = []
        with _noted(failures, {"probe": name}):
            found[name] = probe(place)
        if failures:
            found[name] = {"error": failures[0]["why"]}
        print(name, found[name], flush=True)
        gpu_parts.write(out / "probes.json", found)
    return not any("error" in value for value in found.values())


# ---- bench -------------------------------------------------------------------------------------

Build = Callable[[torch.dtype], dict[str, Any]]


def work(op: Op, place: Place) -> list[tuple[str, torch.dtype, Build]]:
    """Cases and shapes of an op, with their arguments. On a GPU float32 is there to be right, not
    fast: only cases that have no other dtype are timed in it."""
    found: list[tuple[str, torch.dtype, Build]] = [
        (case.name, dtype, lambda d, c=case: c.arguments(op.name, d))
        for case in op.gpu_cases
        if (case.name.startswith("odd") if place.dry else case.bench)
        for dtype in case.dtypes
        if place.dry or dtype == torch.bfloat16 or torch.bfloat16 not in case.dtypes
    ]
    for shape in () if place.dry else SHAPES.get(op.name, ()):
        sizes = tuple(map(int, shape.split("x")))
        found.append((shape, torch.bfloat16, _shaped(op, shape, sizes)))
    if op.name == "flash_attention" and not place.dry:
        found.append(("internvit_300m_13_tiles", torch.bfloat16, _vit_13_tiles))
    return found


def _shaped(op: Op, shape: str, sizes: tuple[int, ...]) -> Build:
    assert op.shaped is not None
    shaped = op.shaped
    return lambda d: shaped(Inputs(f"{op.name}/{shape}", d), sizes)


def _vit_13_tiles(dtype: torch.dtype) -> dict[str, Any]:
    shaped = catalogue()["flash_attention"].shaped
    assert shaped is not None
    arguments = shaped(Inputs("flash_attention/13 tiles", dtype), (13 * 1025, 16, 16, 64))
    return arguments | {"cu_q": offsets([1025] * 13), "cu_kv": offsets([1025] * 13)}


def time_op(op: Op, place: Place, out: Path) -> bool:
    """Times an op's cases and writes them after each; False where one of ours failed."""
    rates = bench.Rates()
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "refused": [], "failed": []}
    for case, dtype, build in work(op, place):
        label = {"op": op.name, "case": case, "dtype": str(dtype).removeprefix("torch.")}
        print(*label.values(), flush=True)
        with _noted(found["failed"], label):
            arguments = build(dtype)
            backends = _running(op, arguments, place, label, found["failed"])
            peers = _peers(_known_peers(op, place), arguments, place, label, found["refused"])
            # Every backend and peer copies these; to make them again would cost more than to time.
            rows = bench.time_case(
                *(op, case, dtype, lambda d, a=arguments: a, backends, rates),
                *(peers, place.device),
            )
            found["rows"] += rows
            for row in rows:
                ours = row["backend"] in place.backends
                if op.name in OTHER_DRAWS and not ours:
                    row["max_error"] = None
                row["graph_us"] = None
                if ours and not place.dry and op.name not in FROM_HOST:
                    with _noted(found["failed"], label | {"graph": row["backend"]}):
                        row["graph_us"] = _graph_us(op, arguments, row["backend"], place)
        gpu_parts.write(out / f"ops-{op.name}.json", found)
    return not found["failed"]


def _running(
    op: Op,
    arguments: dict[str, Any],
    place: Place,
    label: dict[str, str],
    failed: list[dict[str, str]],
) -> list[str]:
    """Our backends that take these arguments: one that fails does not take the others' rows."""
    running = []
    for name in place.backends_of(op):
        with _noted(failed, label | {"backend": name}):
            backend, device = bench.BACKENDS[name]
            op.function(**{k: on_device(v, device) for k, v in arguments.items()}, backend=backend)
            if not place.dry:
                torch.cuda.synchronize()
            running.append(name)
    return running


def _known_peers(op: Op, place: Place) -> dict[str, Callable[..., Any]]:
    known = GPU_PEERS.get(op.name, {}) if not place.dry else {}
    if op.name in PEERS:
        name, prepare = PEERS[op.name]
        known = {name: prepare} | known
    return known


def _peers(
    known: dict[str, Callable[..., Any]],
    arguments: dict[str, Any],
    place: Place,
    label: dict[str, str],
    refused: list[dict[str, str]],
) -> dict[str, Callable[..., Any]]:
    """The peers that take these arguments; those that refuse a call are listed with the reason."""
    usable = {}
    for name, prepare in known.items():
        with _noted(refused, label | {"peer": name}):
            call = prepare(**{k: on_device(v, place.device) for k, v in arguments.items()})
            if call is None:
                continue
            call()
            usable[name] = prepare
    return usable


def time_slow_peers(place: Place, out: Path) -> bool:
    """Times what compiles with its first call, and packages that few machines have, on real shapes
    in bfloat16, and writes the rows after each. What they refuse is listed and no failure of ours;
    nothing is begun after PEER_SECONDS."""
    rates, began = bench.Rates(), time.perf_counter()
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "refused": [], "failed": []}
    chosen = [op for op in on_gpu_ops() if op.name in DRY_OPS or not place.dry]
    each = [[(op, *item) for item in work(op, place)] for op in chosen]
    # The first case of every op before the second of any.
    for item in itertools.chain.from_iterable(itertools.zip_longest(*each)):
        if item is None or item[2] != torch.bfloat16:
            continue
        op, case, dtype, build = item
        known = slow_peers(op.name, compiler="eager" if place.dry else "inductor")
        if not known:
            continue
        label = {"op": op.name, "case": case, "dtype": "bfloat16"}
        print(*label.values(), flush=True)
        if time.perf_counter() - began > PEER_SECONDS:
            found["refused"] += [label | {"peer": name, "why": "no time left"} for name in known]
        else:
            with _noted(found["refused"], label | {"peer": "any"}):
                arguments = build(dtype)
                peers = _peers(known, arguments, place, label, found["refused"])
                rows = bench.time_case(
                    *(op, case, dtype, lambda d, a=arguments: a, (), rates), *(peers, place.device)
                )
                found["rows"] += [row | {"graph_us": None} for row in rows]
        gpu_parts.write(out / "peers.json", found)
    return not found["failed"]


def _graph_us(op: Op, arguments: dict[str, Any], backend: str, place: Place) -> float:
    mine = {k: on_device(v, place.device) for k, v in arguments.items()}
    face = bench.BACKENDS[backend][0]
    out = op.function(**mine, backend=face)
    graph = _captured(lambda: op.function(**mine, out=out, backend=face), GRAPH)
    eager = [t.clone() for t in outputs_of(out)]
    times = []
    for _ in range(bench.MIN_CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / GRAPH)
    for t, e in zip(outputs_of(out), eager, strict=True):
        assert torch.equal(t, e), f"{backend}: another result in a graph"
    return statistics.median(times)


def _captured(call: Callable[[], Any], times: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph


# ---- report ------------------------------------------------------------------------------------


def report(mode: str, parts: Path, out: Path) -> bool:
    """Joins the parts into one file and prints the table; False where a step failed."""
    document = gpu_parts.join(mode, parts)
    out.mkdir(parents=True, exist_ok=True)
    gpu_parts.write(out / f"{mode}.json", document)
    print(text(document))
    return all(step["code"] == 0 for step in document["steps"])


def text(document: dict[str, Any]) -> str:
    """The table that a person reads; the file has more."""
    lines = []
    if document["mode"] == "bench":
        lines += [_rows(document["rows"])]
        refused = Counter((entry["op"], entry["peer"]) for entry in document["refused"])
        lines += [f"refused: {op} by {peer}, {n} cases" for (op, peer), n in refused.items()]
        lines += ["failed: " + " ".join(map(str, e.values())) for e in document["failed"]]
        for model in document["models"]:
            lines += [f"{model['shape']} in {model['dtype']}", cpu.table(model["rows"])]
    lines += [f"{name}: {_values(value)}" for name, value in document["probes"].items()]
    head = ("step", "result", "s")
    results = {0: "ok", 124: "out of time", 137: "killed"}
    steps = [
        (s["step"], results.get(s["code"], f"failed ({s['code']})"), str(s["seconds"]))
        for s in document["steps"]
    ]
    return "\n".join((*lines, bench.columns(head, steps, numbers_from=2)))


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    """Our rows, each beside the fastest peer of its case; ratio: of its time to ours."""
    head = ("op", "case", "dtype", "by", "us", "graph us", "GB/s", "TFLOP/s", "roofline", "error")
    head = (*head, "fastest peer", "ratio")
    lines = []
    for _, group in itertools.groupby(rows, key=gpu_parts.label):
        case = list(group)
        peers = [row for row in case if row["backend"] not in OURS]
        best = min(peers, key=lambda row: row["median_us"], default=None)
        lines += [_line(row, best) for row in case if row["backend"] in OURS]
    return bench.columns(head, lines, numbers_from=4)


def _line(row: dict[str, Any], peer: dict[str, Any] | None) -> tuple[str, ...]:
    beside = ("", "")
    if peer is not None:
        beside = (peer["backend"], f"{peer['median_us'] / row['median_us']:.2f}")
    return (
        *(row["op"], row["case"], row["dtype"].replace("float", "f"), row["backend"]),
        f"{row['median_us']:.1f}",
        "" if row["graph_us"] is None else f"{row['graph_us']:.1f}",
        f"{row['gb_per_s']:.0f}",
        f"{row['gflop_per_s'] * 1e-3:.1f}",
        f"{row['roofline_share']:.0%}",
        "" if row["max_error"] is None else f"{row['max_error']:.1g}",
        *beside,
    )


def _values(value: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("names", "ready", "small", "repeat", "probes", "ops", "peers", "report"):
        command = commands.add_parser(name)
        command.add_argument("--dry-run", action="store_true")
        if name == "ops":
            command.add_argument("op", choices=sorted(op.name for op in on_gpu_ops()))
        if name == "report":
            command.add_argument("mode", choices=("check", "bench"))
            command.add_argument("--parts", type=Path, required=True)
        if name not in ("names", "small", "repeat"):
            command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    place = DRY if options.dry_run else GPU
    bench.WARM_UP, bench.SECONDS = (0.0, 0.0) if place.dry else (bench.WARM_UP, SECONDS)
    bench._PRODUCT = 64 if place.dry else bench._PRODUCT
    good = True
    if options.command == "names":
        ops = [op.name for op in on_gpu_ops() if op.name in DRY_OPS or not place.dry]
        print("\n".join(ops))
    elif options.command == "ready":
        ready(place, options.out)
    elif options.command == "small":
        good = small(place)
    elif options.command == "repeat":
        good = repeat(place)
    elif options.command == "probes":
        good = probes(place, options.out)
    elif options.command == "ops":
        good = time_op(catalogue()[options.op], place, options.out)
    elif options.command == "peers":
        good = time_slow_peers(place, options.out)
    else:
        good = report(options.mode, options.parts, options.out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
