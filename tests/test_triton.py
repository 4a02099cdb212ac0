"""The Triton kernels without a GPU: interpreted, and compiled ahead of time for two of them.

The interpreter has to be chosen before triton is imported, so it lives in a process of its own.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from batches import check_batches
from internvl_rt import ops
from internvl_rt.ops import registry
from internvl_rt.ops.registry import Case, Inputs, all_cases, check
from sass import LOAD, MATRIX, NARROW, STORE, read_kernels

pytest.importorskip("triton")

KERNELS = Path(__file__).resolve().parents[1] / "kernels" / "triton"
OPS = [op for op in ops.catalogue().values() if "triton" in op.faces]


def _checkout() -> types.ModuleType:
    """The package internvl_rt._triton from the sources of this checkout, whatever is installed."""
    package = types.ModuleType("internvl_rt._triton")
    package.__path__ = [str(KERNELS)]
    return package


# ---- the interpreter's process -----------------------------------------------------------------


def _start_interpreter() -> None:
    torch.set_num_threads(1)
    sys.modules["internvl_rt._triton"] = _checkout()
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    assert os.environ["TRITON_INTERPRET"] == "1"
    convert = interpreter._convert_float

    # Triton's own conversion truncates and drops the carry of a rounded-up mantissa.
    def rounding(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            wide = torch.from_numpy(np.ascontiguousarray(x.view(np.float32)))
            return wide.to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(x, source, target, mode)

    interpreter._convert_float = rounding
    dot = interpreter.InterpreterBuilder.create_dot

    # Triton's own product multiplies the bits of bfloat16 numbers.
    def widened(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        def wide(x: Any) -> Any:
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle(
                (x.data.astype(np.uint32) << 16).view(np.float32), tl.float32
            )

        return dot(self, wide(a), wide(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = widened


def _interpret(op: str, case: str, dtype: torch.dtype) -> None:
    o = ops.catalogue()[op]
    check(o, next(c for c in o.cases if c.name == case), dtype, "triton")


def _call(op: str, arguments: dict[str, Any]) -> None:
    ops.catalogue()[op].function(**arguments, backend="triton")


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, metadata.version(package).split(".")[:2]))


@pytest.fixture(scope="module")
def interpreter():
    """run(f, *arguments) in a process where kernels are interpreted."""
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs NumPy before 2.4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_interpreter) as pool:
            # The process starts with the first task.
            pool.submit(os.getpid).result()
            patch.undo()
            yield lambda f, *arguments: pool.submit(f, *arguments).result()


def _id(value: object) -> str:
    return getattr(value, "name", str(value).removeprefix("torch."))


CATALOGUE = [(o, c, d) for o, c, d in all_cases() if o in OPS and not c.slow]


@pytest.mark.parametrize(("op", "case", "dtype"), CATALOGUE, ids=_id)
def test_catalogue(op, case, dtype, interpreter):
    interpreter(_interpret, op.name, case.name, dtype)


def _check_batches(op: str, dtype: torch.dtype) -> None:
    check_batches(ops.catalogue()[op], None, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
@pytest.mark.parametrize("op", OPS, ids=_id)
def test_bits_do_not_depend_on_the_batch(op, dtype, interpreter):
    # Both phases have one kernel here.
    interpreter(_check_batches, op.name, dtype)


def test_every_triton_source_is_an_op():
    modules = {path.stem for path in KERNELS.glob("*.py")} - {
        "__init__",
        "attention",
        "check",
        "rows",
    }
    assert modules == {op.name for op in OPS}


def test_importing_the_library_leaves_triton_out():
    code = "import sys, internvl_rt, internvl_rt.ops; sys.exit('triton' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# ---- rms_norm: what the catalogue leaves out ---------------------------------------------------


def _rms_norm_in_place(C: int, dtype: torch.dtype) -> None:
    make = Inputs(f"triton_in_place/{C}", dtype)
    x, h, weight = make.normal(2, C), make.normal(2, C), make.normal(C)
    arguments = {"weight": weight, "eps": 1e-6, "backend": "triton"}
    y, h_out = ops.rms_norm(x, residual=h, **arguments)
    assert torch.equal(h_out, x + h)
    ops.rms_norm(x, residual=h, out=(x, h), **arguments)
    assert torch.equal(x, y)
    assert torch.equal(h, h_out)


@pytest.mark.parametrize("C", [64, 895, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_rms_norm_in_place(C, dtype, interpreter):
    interpreter(_rms_norm_in_place, C, dtype)


def _rms_norm_streamed(dtype: torch.dtype) -> None:
    def build(make: Inputs) -> dict[str, Any]:
        x = make.normal(2, 20003)[:, 1:20001]
        return {"x": x, "weight": make.normal(20000), "residual": make.normal(2, 20000), "eps": 0.1}

    check(ops.catalogue()["rms_norm"], Case("streamed", build), dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_rms_norm_streamed(dtype, interpreter):
    interpreter(_rms_norm_streamed, dtype)


def _rms_norm_rounding(weight_in_fp32: bool) -> None:
    x = torch.tensor([1.0, 7.0]).repeat(64).bfloat16().view(1, 128)
    weight = (1 + torch.arange(128) / 128).bfloat16()
    once = (x.double() * 0.2 * weight.double()).bfloat16()
    twice = (x.double() * 0.2).bfloat16() * weight
    assert not torch.equal(once, twice)
    y = ops.rms_norm(x, weight, eps=0.0, weight_in_fp32=weight_in_fp32, backend="triton")
    assert torch.equal(y, once if weight_in_fp32 else twice)


@pytest.mark.parametrize("weight_in_fp32", [False, True])
def test_rms_norm_rounds_where_the_contract_says(weight_in_fp32, interpreter):
    interpreter(_rms_norm_rounding, weight_in_fp32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight has shape \[7\], expected \[C=8\] \(C from x \["),
        ({"weight": torch.ones(8).half()}, "weight is float16, expected float32"),
        ({"x": torch.ones(2, 8).double()}, "x is float64, expected float32 or bfloat16"),
        ({"x": torch.ones(8, 2).T}, r"x must be contiguous in its last dimension \(stride 2\)"),
        ({"eps": float("nan")}, "eps is negative or NaN"),
        ({"residual": torch.ones(3, 8)}, r"residual has shape \[3, 1, 8\], expected \[T=2, H=1"),
    ],
)
def test_rms_norm_refuses(change, message, interpreter):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": 1e-6} | change
    with pytest.raises(ValueError, match=f"^rms_norm: {message}"):
        interpreter(_call, "rms_norm", arguments)


# ---- ahead of time -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """A kernel as the launcher would specialise it for aligned operands."""

    kernel: str
    types: dict[str, str]  # of runtime arguments; *T and the names in `divisible` by 16
    constants: dict[str, Any]
    num_warps: int
    registers: int
    narrow: int | None  # accesses of less than 16 bytes; None: tables of words are read too
    divisible: tuple[str, ...]
    num_stages: int


BF16, F32, I32, I64 = "*bf16", "*fp32", "*i32", "*i64"


def _build(
    kernel: str,
    pointers: dict[str, str],
    integers: str,
    constants: dict[str, Any],
    num_warps: int,
    registers: int,
    narrow: int | None = 0,
    floats: str = "",
    odd: str = "",
    num_stages: int = 3,  # Triton's own choice
) -> Build:
    """Every pointer and integer is divisible by 16 but those named in `odd`."""
    types = (
        pointers | dict.fromkeys(integers.split(), "i32") | dict.fromkeys(floats.split(), "fp32")
    )
    divisible = [n for n in (*pointers, *integers.split()) if n not in odd.split()]
    return Build(
        *(kernel, types, constants, num_warps, registers, narrow, tuple(divisible)), num_stages
    )


def _rms_norm_build(
    module: types.ModuleType, C: int, dtype: str, registers: int, narrow: int
) -> Build:
    c = module.config(C)
    names = ("x", "weight", "residual", "y", "residual_out")
    return _build(
        "_rms_norm",
        dict.fromkeys(names, f"*{dtype}"),
        "T H C x_t x_h residual_t residual_h y_t y_h residual_out_t residual_out_h",
        {
            "HAS_RESIDUAL": True,
            "WEIGHT_IN_FP32": False,
            "ROWS": c.ROWS,
            "BLOCK": c.BLOCK,
            "STREAM": c.STREAM,
        },
        c.num_warps,
        registers,
        narrow,
        floats="eps",
        odd="T H",
    )


def _layer_norm_build(module: types.ModuleType, C: int, dtype: str, registers: int) -> Build:
    c = module.config(C)
    return _build(
        "_layer_norm",
        dict.fromkeys(("x", "weight", "bias", "y"), f"*{dtype}"),
        "T C x_t y_t",
        {"ROWS": c.ROWS, "BLOCK": c.BLOCK, "STREAM": c.STREAM},
        c.num_warps,
        registers,
        floats="eps",
        odd="T",
    )


def _gated_activation_build(module: types.ModuleType, gpt_oss: bool) -> Build:
    constants = {"GPT_OSS": gpt_oss, "BLOCK": module.BLOCK}
    pointers = {"x": BF16, "y": BF16}
    return _build("_gated_activation", pointers, "I x_t y_t", constants, 4, 48)


def _pixel_unshuffle_mlp_build(module: types.ModuleType, r: int, C: int) -> Build:
    c = module.config(r, C)
    return _build(
        "_pixel_unshuffle_norm",
        dict.fromkeys(("x", "weight", "bias", "y"), BF16),
        "h w r C x_t x_cell y_row",
        {"BY_COLUMNS": False, "CELLS": c.CELLS, "BLOCK": c.BLOCK},
        c.num_warps,
        128,
        floats="eps",
        odd="r",
    )


def _rope_build(module: types.ModuleType) -> Build:
    floats, tokens = ("positions", "inv_freq", "scale"), {"sequence": I32, "slots": I64}
    cached = ("q", "k", "v", "k_cache", "v_cache", "out")
    return _build(
        "_rope",
        dict.fromkeys(cached, BF16) | dict.fromkeys(floats, F32) | tokens,
        "H K P D half B places q_t q_h k_t k_h v_t v_h inv_freq_b out_t out_h "
        "k_page k_cache_h k_p v_page v_cache_h v_p",
        {"BLOCK": 32},
        1,
        128,
        None,
        odd="H K B places",
    )


def _flash_attention_build(module: types.ModuleType, D: int, causal: bool, registers: int) -> Build:
    c = module.config(D, torch.bfloat16)
    offsets = dict.fromkeys(("cu_q", "cu_kv", "prefix"), I32)
    return _build(
        "_flash_attention",
        dict.fromkeys(("q", "k", "v", "sinks", "out"), BF16) | offsets,
        "B D group window q_t q_h k_t k_h v_t v_h out_t out_h",
        {
            "CAUSAL": causal,
            "HAS_SINKS": False,
            "HAS_PREFIX": False,
            "ROWS": c.ROWS,
            "KEYS": c.KEYS,
            "DIM": c.DIM,
        },
        c.num_warps,
        registers,
        None,
        floats="scale",
        odd="B group window",
        num_stages=c.num_stages,
    )


def _paged_attention_build(module: types.ModuleType, D: int) -> Build:
    c = module.config(D, torch.bfloat16)
    tables = dict.fromkeys(("page_table", "cu_q", "kv_lens", "prefix"), I32)
    results = dict.fromkeys(("partial", "statistics"), F32)
    return _build(
        "_paged_attention",
        dict.fromkeys(("q", "k_cache", "v_cache"), BF16) | tables | results,
        "B H D group pages max_pages window q_t q_h page_table_b k_page k_h k_p v_page v_h v_p",
        {
            "P": 64,
            "HAS_PREFIX": False,
            "CHUNK": module.CHUNK,
            "ROWS": c.ROWS,
            "KEYS": c.KEYS,
            "DIM": c.DIM,
        },
        c.num_warps,
        255,
        None,
        floats="scale",
        odd="B H group pages max_pages window page_table_b",
    )


# rms_norm: C, dtype, registers, narrow: head dim (one weight element a thread), hidden sizes,
# streamed. The others likewise: their configuration, and registers where they differ.
BUILDS = [
    pytest.param(op, build, arguments, id="-".join(map(str, (op, *arguments[:2]))))
    for op, build, arguments in (
        ("rms_norm", _rms_norm_build, (128, "bf16", 48, 1)),
        ("rms_norm", _rms_norm_build, (3200, "bf16", 96, 0)),
        ("rms_norm", _rms_norm_build, (3584, "fp32", 96, 0)),
        ("rms_norm", _rms_norm_build, (32768, "bf16", 128, 0)),
        ("layer_norm", _layer_norm_build, (1024, "bf16", 96)),
        ("layer_norm", _layer_norm_build, (32768, "bf16", 128)),
        ("gated_activation", _gated_activation_build, (False,)),
        ("gated_activation", _gated_activation_build, (True,)),
        ("pixel_unshuffle_mlp", _pixel_unshuffle_mlp_build, (2, 1024)),
        ("rope", _rope_build, ()),
        ("flash_attention", _flash_attention_build, (64, False, 168)),
        ("flash_attention", _flash_attention_build, (128, True, 255)),
        ("paged_attention", _paged_attention_build, (64,)),
    )
]


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(name): a module of this checkout, whose kernels are compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "internvl_rt._triton", _checkout())
    for name in [n for n in sys.modules if n.startswith("internvl_rt._triton.")]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: importlib.import_module(f"internvl_rt._triton.{name}")


class AbsentDevice:
    """What Triton asks its driver before it compiles for a launch."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


# Sizes of 1, no key, nothing to rotate, odd strides.
SPECIAL = [
    (op, case, case.dtypes[-1])
    for op in OPS
    for case in op.cases
    if case.name in ("one", "empty_keys_sinks", "empty_rotation", "ratio_1", "odd", "odd_20")
]


@pytest.mark.parametrize(("op", "case", "dtype"), SPECIAL, ids=_id)
def test_a_launch_compiles_what_it_specialises(op, case, dtype, compiler, monkeypatch):
    """Integers of 1 become constants and pointers tell their alignment: a device gets neither the
    source that is interpreted nor the one that is compiled ahead of time."""
    import triton
    from triton.runtime.jit import JITFunction

    compiled = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentDevice())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(compiler("check"), "interpreted", lambda: True)  # tensors of the CPU
    monkeypatch.setattr(registry, "missing", lambda backend: None)
    op.function(**case.arguments(op.name, dtype), backend="triton")
    assert compiled
    assert all(kernel.asm["cubin"] for kernel in compiled)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("op", "build", "arguments"), BUILDS)
def test_ahead_of_time(op, build, arguments, arch, compiler, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = compiler(op)
    b = build(module, *arguments)
    kernel = getattr(module, b.kernel)
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: b.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in b.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in b.divisible},
    )
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": b.num_warps, "num_stages": b.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=target, options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    (name, found), *others = read_kernels(cubin).items()
    assert not others
    found.check_local_memory(name)
    assert found.registers <= b.registers, f"{name}: {found.registers} registers"
    if b.narrow is not None:
        assert found.count(LOAD) > 0, f"{name}: no 16-byte load"
        assert found.count(STORE) > 0, f"{name}: no 16-byte store"
        assert found.count(NARROW) == b.narrow, f"{name}: {found.count(NARROW)} narrow accesses"
    if "attention" in op:
        assert found.count(MATRIX) > 0, f"{name}: no matrix instruction"
        assert found.count(r"\bLDG(STS)?\.E.*\b128\b") > 0, f"{name}: no 16-byte load"
