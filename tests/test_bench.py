"""`internvl-rt bench`: what it times, what it refuses, what it writes. No figure is asserted."""

import json
import math

import pytest
import torch

from internvl_rt import _C, ops
from internvl_rt.__main__ import main
from internvl_rt.ops import bench
from internvl_rt.ops.registry import Inputs
from isas import stand_in


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 0.0)
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "_PRODUCT", 32)


def test_a_shape():
    threads = torch.get_num_threads()
    rows = bench.run("rms_norm", "7x33", ["bf16", "f32"], ["cpu", "reference"])
    assert [(r["dtype"], r["backend"]) for r in rows] == [
        ("bfloat16", "cpu"),
        ("bfloat16", "reference"),
        ("float32", "cpu"),
        ("float32", "reference"),
    ]
    for row in rows:
        assert row["op"] == "rms_norm"
        assert row["shape"] == "7x33"
        assert row["calls"] >= bench.MIN_CALLS
        assert 0 < row["p5_us"] <= row["median_us"] <= row["p95_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] * 1e-3)
        assert row["gflop_per_s"] == pytest.approx(row["flops"] / row["median_us"] * 1e-3)
        assert math.isfinite(row["roofline_share"])
        assert row["roofline_share"] > 0
        assert 0 < row["max_error"] < (0.1 if row["dtype"] == "bfloat16" else 1e-5)
        native = row["backend"] == "cpu"
        assert row["kernel"] == (f"rms_norm/{stand_in(_C.isa())}" if native else "torch")
        assert row["threads"] == _C.num_threads()
    assert torch.get_num_threads() == threads


def test_the_forced_instruction_set_is_named():
    _C.force_isa("portable")
    try:
        (row,) = bench.run("rms_norm", "2x8", ["f32"])
    finally:
        _C.force_isa("")
    assert row["kernel"] == "rms_norm/portable"


def test_real_cases_without_a_shape():
    rows = bench.run("embed_scatter")
    op = ops.catalogue()["embed_scatter"]
    cases = [(c.name, str(d)) for c in op.cases if c.bench for d in c.dtypes]
    assert [(r["case"], f"torch.{r['dtype']}") for r in rows] == cases
    assert all(r["max_error"] == 0 for r in rows)


@pytest.mark.parametrize(
    "op", [o for o in ops.catalogue().values() if o.shaped], ids=lambda op: op.name
)
def test_every_shape_help_is_true(op):
    shape = (8,) * len(op.shape_help.split("x"))
    for dtype in {d for c in op.cases if c.bench for d in c.dtypes}:
        arguments = op.shaped(Inputs(op.name, dtype), shape)
        op.function(**arguments)
        op.reference(**arguments)


def test_error_sees_everything():
    nan, inf = math.nan, math.inf
    a = torch.tensor([1.0, 2.0, inf])
    assert bench._error([a], [a]) == 0
    assert bench._error([torch.tensor([1.0, 2.5, inf])], [a]) == 0.5
    assert bench._error([torch.tensor([1.0, nan, inf])], [a]) == inf
    assert bench._error([torch.tensor([1.0, 2.0, -inf])], [a]) == inf
    assert bench._error([torch.empty(0)], [torch.empty(0)]) == 0


def test_a_table_has_a_line_per_row():
    rows = bench.run("rms_norm", "2x8", ["bf16", "f32"])
    lines = bench.table(rows).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:3] == ["op", "case", "shape"]
    assert "rms_norm" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "no op named 'nope'; ops: .*rms_norm"),
        (("rms_norm", "4096"), "rms_norm: shape is '4096', expected .* TxC"),
        (("rms_norm", "4x0"), "rms_norm: shape is '4x0'"),
        (("rms_norm", "4x-1"), "rms_norm: shape is '4x-1'"),
        (("rms_norm", "4xé"), "rms_norm: shape is '4xé'"),
        (("rms_norm", ""), "rms_norm: shape is ''"),
        (("rms_norm", "999999999999x999999999999"), "rms_norm: shape 9"),
        (("flash_attention", "7x20x3x64"), "flash_attention: H = 20 query heads is no multiple of"),
        (("paged_attention", "2x9x4x2x7"), "paged_attention: head dim D is 7, allowed"),
        (("gated_linear", "4x7x16"), "gated_linear: weight has N=7, expected an even number"),
        (("rope", "5x1x1x3"), "rope: inv_freq has R/2 = 2 columns, at most D/2 = 1 allowed"),
        (("rms_norm", "2x8", ["f16"]), "bench: dtype is 'f16', allowed: bf16"),
        (("sample", None, ["bf16"]), "sample: dtype is bfloat16, the op has float32"),
        (("rms_norm", "2x8", ["f32"], ["gpu"]), "bench: backend is 'gpu', allowed: cpu, cuda"),
        (("sample", None, None, ["triton"]), "sample: backend is 'triton', available: native"),
    ],
)
def test_refusals_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        bench.run(*arguments)
    assert "\n" not in str(caught.value)


def test_a_missing_gpu_is_an_error_not_a_gap(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backend in ("cuda", "triton"):
        with pytest.raises(
            ValueError, match=f"rms_norm: backend is '{backend}', but .*; available: "
        ):
            bench.run("rms_norm", "2x8", ["f32"], ["cpu", backend])


def test_command_line(tmp_path, capsys):
    file = tmp_path / "rows.json"
    command = ["bench", "--op", "rms_norm", "--shape", "3x16", "--dtype", "bf16,f32"]
    assert main([*command, "--backend", "cpu,reference", "--json", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    written = json.loads(file.read_text())
    assert len(written["rows"]) == 4
    for key in ("cpu", "isa", "threads", "python", "torch", "date"):
        assert written["machine"][key]
    assert main([*command, "--backend", "gpu"]) == 2
    assert capsys.readouterr().err == (
        "internvl-rt: bench: backend is 'gpu', allowed: cpu, cuda, triton, reference\n"
    )
