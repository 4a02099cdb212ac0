"""bench/gpu_check.sh on the CPU: its steps, its files and what it does where a step fails."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fake_cuda
from internvl_rt import ops
from internvl_rt.ops.registry import outputs_of

BENCH = Path(__file__).parents[1] / "bench"
SCRIPT = BENCH / "gpu_check.sh"
NUMBER = (int, float)
ROW = {
    "op": str,
    "case": str,
    "dtype": str,
    "backend": str,
    "kernel": str,
    "median_us": NUMBER,
    "p5_us": NUMBER,
    "p95_us": NUMBER,
    "calls": int,
    "bytes": int,
    "flops": int,
    "gb_per_s": NUMBER,
    "gflop_per_s": NUMBER,
    "copy_gb_per_s": NUMBER,
    "roofline_share": NUMBER,
    "graph_us": (*NUMBER, type(None)),
}


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check

    for name in ("WARM_UP", "SECONDS", "_PRODUCT"):
        monkeypatch.setattr(gpu_check.bench, name, getattr(gpu_check.bench, name))
    yield gpu_check
    for name in ("gpu_check", "gpu_parts", "cpu", "make_checkpoint", "peers"):
        sys.modules.pop(name, None)


def run(*arguments, tools=()):
    """tools: folders of programs that come before all others."""
    paths = os.pathsep.join(p for p in sys.path if p)
    path = os.pathsep.join(map(str, (*tools, Path(sys.executable).parent, os.environ["PATH"])))
    environment = os.environ | {"PATH": path, "PYTHONPATH": paths}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_script_parses():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize(
    "arguments", [(), ("check",), ("test", "x"), ("check", "x", "--dry"), ("bench", "x", "", "y")]
)
def test_wrong_arguments(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == 2
    assert "usage: " in result.stderr
    assert not list(tmp_path.iterdir())


def test_dry_run_of_bench(tmp_path, gpu_check):
    result = run("bench", tmp_path / "out", "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bench.json", "bench.log"]
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert document["mode"] == "bench"
    assert document["machine"]["dry_run"] is True
    (model,) = document["models"]
    assert (model["shape"], model["device"]) == ("tiny", "cpu")
    assert [row["row"] for row in model["rows"]] == ["vit-1", "ttft-1", "decode-2x20"]
    assert all(row["ours"]["median"] > 0 for row in model["rows"])
    assert "tiny in bfloat16" in result.stdout
    assert [s["step"] for s in document["steps"]] == [
        "carried",
        "ready",
        "probes",
        "models tiny",
        *(f"bench {name}" for name in gpu_check.DRY_OPS),
        "bench peers",
    ]
    assert all(s["code"] == 0 and s["seconds"] >= 0 for s in document["steps"])
    assert list(document["probes"]) == list(gpu_check.PROBES)
    assert document["failed"] == []
    assert {row["op"] for row in document["rows"]} == set(gpu_check.DRY_OPS)
    assert {row["backend"] for row in document["rows"]} == {"cpu", "torch", "torch.compile"}
    labels = [(row["op"], row["case"], row["dtype"]) for row in document["rows"]]
    assert len([*itertools.groupby(labels)]) == len(set(labels)), "rows of a case stand apart"
    for row in document["rows"]:
        for key, kind in ROW.items():
            assert isinstance(row[key], kind), key
        assert row["max_error"] is None or 0 <= row["max_error"] < 0.1
    assert result.stdout.splitlines()[-1].startswith("bench peers")


# Says what it was asked for, but for the few steps that the script itself needs.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *gpu_parts.py* | *"gpu_check.py report"*) exec {real} "$@" ;;
  *"gpu_check.py names"*) printf 'rms_norm\nrope\nsample\n' ;;
  *"on_gpu[rope-"*) echo no such luck; exit 3 ;;
  *) echo "ran $*" ;;
esac
"""


def test_the_steps_of_a_check(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("nvidia-smi", "compute-sanitizer"):
        (tools / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*"\n')
    (tools / "python3").write_text(PYTHON.format(real=sys.executable))
    for program in tools.iterdir():
        program.chmod(0o755)
    result = run("check", tmp_path / "out", tools=[tools])
    assert result.returncode == 1, result.stdout + result.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["check.json", "check.log"]
    steps = json.loads((tmp_path / "out" / "check.json").read_text())["steps"]
    names = [s["step"] for s in steps]
    beside = {f"test {n}" for n in ("models", "rms_norm", "rope", "sample", "variants", "products")}
    begin, end = names.index("probes") + 1, names.index("repeats")
    assert names[begin - 3 : begin] == ["build", "ready", "probes"]
    assert set(names[begin:end]) == beside | {"selftest"}
    assert len(names[begin:end]) == len(beside) + 1
    assert names[end:] == ["repeats", "memcheck", "racecheck"]
    assert [s["step"] for s in steps if s["code"]] == ["test rope"]
    log = (tmp_path / "out" / "check.log").read_text()
    assert "== test rope\nno such luck\n== test rope: exit code 3\n" in log
    assert re.search(
        r"== test sample\nran -m pytest .* tests/test_ops.py -k on_gpu\[sample-\n", log
    )
    assert "compute-sanitizer --tool racecheck" in log


@pytest.fixture
def checkout(tmp_path):
    """A folder with what bench/carried.py looks at, and a wheel with the headers."""
    name = Path("kernels/cuda/cutlass/headers.cmake")
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text((BENCH.parent / name).read_text())
    (tmp_path / ".whl").mkdir()
    return tmp_path


def add_wheel(checkout, name, member, size=10):
    with zipfile.ZipFile(checkout / ".whl" / name, "w") as wheel:
        wheel.writestr(member, b"x" * size)


def test_what_is_carried(checkout, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import carried

    name = carried.headers_wheel(checkout)
    assert carried.main(["--dry-run"], checkout) == 0
    assert carried.main([], checkout) == 1
    assert ".whl has no nvidia_cutlass-" in capsys.readouterr().err
    (checkout / ".whl" / "ninja-1.whl").touch()
    assert carried.main(["--dry-run"], checkout) == 1
    add_wheel(checkout, name, "something/else.h")
    assert carried.main(["--dry-run"], checkout) == 1
    assert f"has no {carried.HEADER}" in capsys.readouterr().err
    add_wheel(checkout, name, carried.HEADER)
    assert carried.main([], checkout) == 0
    add_wheel(checkout, name, carried.HEADER, size=65 << 20)
    assert carried.main(["--dry-run"], checkout) == 1
    assert re.fullmatch(r"65\.0 MiB travel, allowed: 64\n", capsys.readouterr().err)
    assert carried.tree_bytes(BENCH.parent) > 1 << 20 or not (BENCH.parent / ".git").exists()
    (checkout / ".git").mkdir()  # git does not know it
    assert carried.tree_bytes(checkout) == 0
    assert "not a git repository" in capsys.readouterr().out


def test_a_failing_step_is_named_and_stops_nothing(tmp_path, gpu_check, capsys):
    steps = "build\t1\t3\ntest rms_norm\t124\t75\nprobes\t0\t2\n"
    (tmp_path / "steps.tsv").write_text(steps)
    assert gpu_check.main(["report", "check", "--parts", str(tmp_path), "--out", str(tmp_path)])
    last = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[-2] for line in last] == ["(1)", "time", "ok"]
    written = json.loads((tmp_path / "check.json").read_text())
    assert [s["code"] for s in written["steps"]] == [1, 124, 0]
    (tmp_path / "steps.tsv").write_text("probes\t0\t2\n")
    assert not gpu_check.main(["report", "check", "--parts", str(tmp_path), "--out", str(tmp_path)])


def test_the_table_of_a_bench(gpu_check):
    def row(case, backend, us, **others):
        figures = {"gb_per_s": 1.0, "gflop_per_s": 2e3, "roofline_share": 0.5, "max_error": None}
        named = {"op": "linear", "case": case, "dtype": "bfloat16", "backend": backend}
        return named | figures | {"median_us": us, "graph_us": None} | others

    rows = [row("a", "cuda", 2.0, graph_us=1.5), row("a", "torch", 3.0), row("a", "sdpa", 4.0)]
    rows += [row("b", "cuda", 5.0), row("c", "torch", 1.0)]
    refused = [{"op": "linear", "case": c, "dtype": "f", "peer": "p", "why": "so"} for c in "ab"]
    document = {"mode": "bench", "rows": rows, "refused": refused, "models": [], "probes": {}}
    document |= {"failed": [{"op": "linear", "why": "no"}], "steps": []}
    lines = [" ".join(line.split()) for line in gpu_check.text(document).splitlines()]
    assert lines[1:5] == [
        "linear a bf16 cuda 2.0 1.5 1 2.0 50% torch 1.50",
        "linear b bf16 cuda 5.0 1 2.0 50%",
        "refused: linear by p, 2 cases",
        "failed: linear no",
    ]


def test_a_failing_probe_leaves_the_others(tmp_path, gpu_check, monkeypatch):
    def broken(place):
        raise RuntimeError("no such luck\nat all")

    monkeypatch.setitem(gpu_check.PROBES, "dlpack", broken)
    assert gpu_check.main(["probes", "--dry-run", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "probes.json").read_text())
    assert found["dlpack"] == {"error": "RuntimeError: no such luck"}
    assert found["graph"] == {"replayed": False}


def test_a_failing_case_and_a_refusing_peer_are_listed(tmp_path, gpu_check, monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("no kernel")

    def broken(*arguments, **named):
        raise ValueError("broken")

    monkeypatch.setitem(gpu_check.PEERS, "rms_norm", ("torch", refuse))
    assert gpu_check.main(["ops", "rms_norm", "--dry-run", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "ops-rms_norm.json").read_text())
    assert {entry["why"] for entry in found["refused"]} == {"RuntimeError: no kernel"}
    assert len(found["rows"]) == len(found["refused"]) == 2
    monkeypatch.setattr(gpu_check.bench, "time_case", broken)
    assert gpu_check.main(["ops", "rms_norm", "--dry-run", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "ops-rms_norm.json").read_text())
    assert [entry["why"] for entry in found["failed"]] == ["ValueError: broken"] * 2


class CompilationError(Exception):
    """Neither a RuntimeError nor a ValueError, as Triton's."""


def test_a_failing_backend_leaves_the_rows_of_the_others(tmp_path, gpu_check, monkeypatch):
    def broken(*arguments):
        raise CompilationError("no")

    op = gpu_check.catalogue()["rms_norm"]
    monkeypatch.setitem(op.faces, "broken", broken)
    monkeypatch.setitem(gpu_check.bench.BACKENDS, "broken", ("broken", "cpu"))
    place = dataclasses.replace(gpu_check.DRY, backends=("broken", "cpu"))
    assert not gpu_check.time_op(op, place, tmp_path)
    found = json.loads((tmp_path / "ops-rms_norm.json").read_text())
    assert [row["backend"] for row in found["rows"]] == ["cpu", "torch"] * 2
    assert [e["backend"] for e in found["failed"]] == ["broken"] * 2
    assert {e["why"] for e in found["failed"]} == {"CompilationError: no"}


def test_a_graph_that_fails_leaves_its_row(tmp_path, gpu_check, monkeypatch):
    def broken(*arguments):
        raise CompilationError("no graph")

    monkeypatch.setattr(gpu_check, "_graph_us", broken)
    monkeypatch.setattr(gpu_check, "GPU_PEERS", {})
    for name in ("synchronize", "current_device"):
        monkeypatch.setattr(gpu_check.torch.cuda, name, lambda: 0)
    cases = [("odd", torch.float32, lambda d: op.cases[2].arguments(op.name, d))]
    op = gpu_check.catalogue()["rms_norm"]
    monkeypatch.setattr(gpu_check, "work", lambda op, place: cases)
    place = dataclasses.replace(gpu_check.DRY, dry=False)
    assert not gpu_check.time_op(op, place, tmp_path)
    found = json.loads((tmp_path / "ops-rms_norm.json").read_text())
    assert [row["graph_us"] for row in found["rows"]] == [None, None]
    assert [(e["graph"], e["why"]) for e in found["failed"]] == [
        ("cpu", "CompilationError: no graph")
    ]


def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path, gpu_check):
    parts, out = tmp_path / "parts", tmp_path / "out"
    for folder in (parts, out):
        folder.mkdir()
    (parts / "steps.tsv").write_text("ready\t0\t1\nbench rms_norm\t137\t90\n")
    row = {"op": "rms_norm", "case": "odd", "dtype": "float32", "backend": "cuda"}
    rows = [row, row | {"case": "even"}]
    for name, content in (
        ("machine", {"gpu": "one"}),
        ("ops-rms_norm", {"rows": rows, "failed": [], "refused": []}),
        ("peers", {"rows": [row | {"backend": "torch.compile"}], "failed": [], "refused": []}),
    ):
        (parts / f"{name}.json").write_text(json.dumps(content))
    script = BENCH / "gpu_parts.py"
    subprocess.run([sys.executable, "-I", "-S", script, "bench", parts, out], check=True)
    document = json.loads((out / "bench.json").read_text())
    assert document["machine"] == {"gpu": "one"}
    assert [s["code"] for s in document["steps"]] == [0, 137]
    assert [(r["case"], r["backend"]) for r in document["rows"]] == [
        ("odd", "cuda"),
        ("odd", "torch.compile"),
        ("even", "cuda"),
    ]
    assert sorted(p.name for p in out.iterdir()) == ["bench.json"]
    # Written as a whole, or not at all.
    gpu_check.gpu_parts.write(out / "bench.json", {"new": 1})
    with pytest.raises(TypeError):
        gpu_check.gpu_parts.write(out / "bench.json", {"new": object()})
    assert json.loads((out / "bench.json").read_text()) == {"new": 1}


def test_slow_peers_have_a_time_to_end(tmp_path, gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "PEER_SECONDS", 0.0)
    assert gpu_check.main(["peers", "--dry-run", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "peers.json").read_text())
    assert found["rows"] == []
    assert [(e["peer"], e["why"]) for e in found["refused"]] == [("torch.compile", "no time left")]


def test_the_small_cases(gpu_check, capsys, monkeypatch):
    assert gpu_check.main(["small", "--dry-run"]) == 0
    ran = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert ran == {op.name for op in gpu_check.on_gpu_ops()}

    def broken(op, case, *where):
        if op.name == "rms_norm":
            raise CompilationError("no")

    monkeypatch.setattr(gpu_check, "check", broken)
    assert gpu_check.main(["small", "--dry-run"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "failed rms_norm cpu odd CompilationError: no" in lines
    assert {line.split()[0] for line in lines} == ran | {"failed"}


def test_a_result_that_changes_is_found(gpu_check, capsys, monkeypatch):
    assert gpu_check.main(["repeat", "--dry-run"]) == 0
    ran = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert ran == {op.name for op in gpu_check.on_gpu_ops()}
    op, calls = gpu_check.catalogue()["rms_norm"], itertools.count()
    native = op.faces["native"]

    def racing(x, weight, residual, y, *options):
        native(x, weight, residual, y, *options)
        if next(calls) % 16 == 5:
            y[0, 0, 0] += 1

    monkeypatch.setitem(op.faces, "native", racing)
    assert gpu_check.main(["repeat", "--dry-run"]) == 1
    last = [x for x in capsys.readouterr().out.splitlines() if x.startswith("failed")]
    assert last[0].endswith("2 of 30 calls gave other bits")
    assert {line.split()[1] for line in last} == {"rms_norm"}


def test_the_grid_barrier_is_built_and_says_what_is_wrong(gpu_check, tmp_path, monkeypatch):
    if shutil.which("nvcc") is None:
        with pytest.raises(RuntimeError, match="no nvcc"):
            gpu_check.build_grid_barrier(tmp_path, "sm_90")
        return
    library = gpu_check.build_grid_barrier(tmp_path, "sm_90")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA: "):
            gpu_check.call_grid_barrier(library, 0, 100)
    with pytest.raises(RuntimeError, match=r"nvcc: .*sm_1"):
        gpu_check.build_grid_barrier(tmp_path, "sm_1")


def test_every_op_has_something_to_time(gpu_check):
    for op in gpu_check.on_gpu_ops():
        timed = {name for name, *_ in gpu_check.work(op, gpu_check.GPU)}
        assert timed, op.name
        assert not timed & {case.name for case in op.cases if case.cpu_only}
    for name, shapes in gpu_check.SHAPES.items():
        op = ops.catalogue()[name]
        assert all(shape.count("x") == op.shape_help.count("x") for shape in shapes)


def test_a_machine_without_a_gpu_is_not_ready(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "missing", lambda backend: f"no {backend} here")
    with pytest.raises(RuntimeError, match="cuda: no cuda here"):
        gpu_check.main(["ready", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "machine.json").read_text())["dry_run"] is False


def test_small_cases_reach_tensor_cores(gpu_check):
    for name, wanted in gpu_check.TENSOR_CORES.items():
        small = [case.name for case in gpu_check.small_cases(ops.catalogue()[name])]
        assert set(wanted) < set(small), f"{name}: {small}"
        assert len(small) == len(wanted) + gpu_check.SMALL


@pytest.mark.parametrize(
    "op", [op for op in ops.catalogue().values() if "cuda" in op.faces], ids=lambda op: op.name
)
def test_what_a_graph_can_hold(op, gpu_check, emulator, monkeypatch):
    """Captured, an op must not copy from the host: the bench knows which one does."""
    fake_cuda.install(monkeypatch, emulator)
    platform = fake_cuda.FakeCuda()
    case = gpu_check.small_cases(op)[0]
    arguments = {
        name: fake_cuda.OnDevice(x, platform.machine) if isinstance(x, torch.Tensor) else x
        for name, x in case.arguments(op.name, case.dtypes[0]).items()
    }
    call = lambda: op.function(**arguments)  # noqa: E731
    with platform.lock, platform.scope():
        if op.name in gpu_check.FROM_HOST:
            with pytest.raises(AssertionError, match="in a graph"):
                platform.capture(call)
            return
        eager = outputs_of(call())
        graph = platform.capture(call)
        graph.replay()
    for x, y in zip(eager, outputs_of(graph.outputs), strict=True):
        assert torch.equal(x.inner, y.inner)
