"""The CUDA sources, compiled by a C++ compiler and run thread by thread: kernels/cuda/emu.

The emulator checks order, barriers, shared and global memory; its own tests are kernels with one
planted bug each.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
from batches import ALONE, BATCHES, TABLE, check_batches
from emulator import SOURCES, Emulator, Finding, compile_units, link
from internvl_rt import _C, ops
from internvl_rt.ops.flash_attention import _case as attention_case
from internvl_rt.ops.registry import Case, Inputs, all_cases, check

SEEDS = (0, 1, 2)


# ---- ops ---------------------------------------------------------------------------------------

# Ops that take seconds here: one seed, and no slow cases.
HEAVY = {"flash_attention", "grouped_linear", "linear", "paged_attention"}


@pytest.fixture(autouse=True)
def packed_weights(monkeypatch):
    """The face of linear gets weights packed, on every CPU: `emulated.linear` unpacks them."""
    monkeypatch.setattr(_C, "reads_rows", lambda _: False)


@pytest.fixture
def emulate(emulator, monkeypatch):
    """check(op, case, dtype) on the emulator under one seed; returns the launch configuration."""

    def run(op: Any, case: Case, dtype: torch.dtype, seed: int, capability: int = 80) -> str:
        configs: list[str] = []

        def face(*arguments: Any, **named: Any) -> None:
            params = emulated.PARAMS[op.name](*arguments, **named)
            configs.append(emulator.run(op.name, params, seed, capability=capability))

        monkeypatch.setitem(op.faces, "emulated", face)
        check(op, case, dtype, "emulated")
        return configs[0]

    return run


def _id(value: object) -> str:
    return getattr(value, "name", str(value).removeprefix("torch."))


TOO_LARGE = ("uhd_3840x2160",)  # half a minute each
CATALOGUE = [
    (o, c, d)
    for o, c, d in all_cases()
    if o.name in emulated.PARAMS
    and c.name not in TOO_LARGE
    and not c.cpu_only
    and not (o.name in HEAVY and (c.slow or (c.bench and d == torch.float32)))
]


@pytest.mark.parametrize(("op", "case", "dtype"), CATALOGUE, ids=_id)
def test_catalogue(op, case, dtype, emulate):
    for seed in SEEDS[: 1 if case.slow or op.name in {*HEAVY, "sample"} else None]:
        emulate(op, case, dtype, seed)


def test_every_cuda_source_is_emulated(emulator):
    sources = {path.stem for path in SOURCES.glob("*.cu")}
    gemms = {path.stem for path in (SOURCES / "cutlass").glob("*.cuh")}
    assert sources | gemms == set(emulator.ops()) == set(emulated.PARAMS)
    assert sources <= set(ops.catalogue())


# ---- bits depend on the row alone ---------------------------------------------------------------


# gated_linear is emulated in test_gemm.py.
EMULATED = [(*row, 80) for row in TABLE if row[0] in emulated.PARAMS]
# Ops with kernels of their own on sm_90a, and how these name themselves.
HOPPER = {"flash_attention": "wgmma"}
ON_HOPPER = [(*row, 90) for row in TABLE if row[0] in HOPPER and row[2] == torch.bfloat16]


@pytest.mark.parametrize(("op", "phase", "dtype", "capability"), EMULATED + ON_HOPPER, ids=_id)
def test_bits_do_not_depend_on_the_batch(op, phase, dtype, capability, emulator, monkeypatch):
    op = ops.catalogue()[op]
    params = emulated.PARAMS[op.name]
    if (op.name, phase) == ("paged_attention", "decode"):
        params = _decode_params

    def face(*arguments: Any, **named: Any) -> None:
        config = emulator.run(op.name, params(*arguments, **named), seed=2, capability=capability)
        assert capability == 80 or config.startswith(HOPPER[op.name])

    monkeypatch.setitem(op.faces, "emulated", face)
    check_batches(op, phase, dtype, "emulated")


def test_every_op_on_a_gpu_has_batches():
    on_gpu = {op.name for op in ops.catalogue().values() if {"cuda", "triton"} & set(op.faces)}
    assert on_gpu == set(BATCHES) | ALONE


# ---- attention on sm_90a: warpgroups and bulk tensor copies ------------------------------------

FLASH = ops.catalogue()["flash_attention"]


@pytest.mark.parametrize(
    "case", [c for o, c, d in CATALOGUE if o is FLASH and d == torch.bfloat16], ids=_id
)
def test_flash_attention_on_sm_90a(case, emulate):
    q = case.build(Inputs(case.name, torch.bfloat16))["q"]
    config = emulate(FLASH, case, torch.bfloat16, seed=2, capability=90)
    expected = "wgmma" if q.shape[2] in (64, 128) else "plain"
    assert config.split()[0] == (expected if len(q) else "empty")


# Last tiles of 1 to 16, 17 to 64 and more keys, alone and behind others; one and two warpgroups.
WGMMA_CASES = [
    attention_case("one_query", [1], (3, 1), 64, kv_lens=[7]),
    attention_case("tails", [65, 64, 128], (2, 2), 64, kv_lens=[144, 40, 260]),
    attention_case("tails_128", [129, 1, 3], (2, 1), 128, kv_lens=[17, 130, 256]),
    attention_case("ring_128", [40], (1, 1), 128, kv_lens=[1100]),
    attention_case("causal_128", [70, 9], (7, 1), 128, kv_lens=[200, 9], causal=True),
    attention_case("window_128", [150], (3, 1), 128, causal=True, window=40, sinks=True),
    attention_case("prefix_128", [90], (2, 1), 128, causal=True, prefix=[33]),
]


@pytest.mark.parametrize("case", WGMMA_CASES, ids=_id)
def test_flash_attention_tiles_of_sm_90a(case, emulate):
    for seed in SEEDS[:2]:
        assert "wgmma" in emulate(FLASH, case, torch.bfloat16, seed, capability=90)


def _flash(emulator: Emulator, capability: int, arguments: dict[str, Any]) -> tuple[str, Tensor]:
    names = ("q", "k", "v", "cu_q", "cu_kv", "scale", "causal", "window", "sinks", "prefix")
    out = torch.full_like(arguments["q"], float("nan"), memory_format=torch.contiguous_format)
    params = emulated.flash_attention(*(arguments.get(n) for n in names), out)
    return emulator.run("flash_attention", params, capability=capability), out


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("group", [1, 3])
def test_flash_attention_variant_follows_the_device(emulator, D, group):
    make = Inputs(f"variant/{D}", torch.bfloat16)
    # Keys whose heads lie behind each other's tokens, and one whose strides are never used.
    k, v = (make.normal(2, 90, D).transpose(0, 1) for _ in range(2))
    q = make.normal(90, 2 * group, D)
    cu = torch.tensor([0, 90], dtype=torch.int32)
    many = {"q": q, "k": k, "v": v, "cu_q": cu, "cu_kv": cu, "scale": D**-0.5, "causal": True}
    odd = [torch.as_strided(make.normal(2 * D), (1, 1, D), (D + 1, D + 3, 1)) for _ in range(2)]
    one = many | {"k": odd[0], "v": odd[1], "cu_kv": torch.tensor([0, 1], dtype=torch.int32)}
    none = many | {"k": k[:0], "v": v[:0], "cu_kv": torch.tensor([0, 0], dtype=torch.int32)}
    for arguments, on_hopper in ((many, "wgmma"), (one, "wgmma"), (none, "mma")):
        config, hopper = _flash(emulator, 90, arguments)
        assert config.startswith(f"{on_hopper} head_dim={D} rows=")
        config, other = _flash(emulator, 80, arguments)
        assert config.startswith(f"mma head_dim={D} rows=")
        assert torch.allclose(hopper.float(), other.float(), atol=0.02)


@pytest.mark.parametrize("D", [64, 128])
def test_flash_attention_bits_on_sm_90a_depend_on_the_row_alone(emulator, D):
    # Alone, in company and in chunks: other row blocks, other last tiles.
    make = Inputs(f"wgmma/{D}", torch.bfloat16)
    q, k, v = make.normal(300, 3, D), make.normal(300, 1, D), make.normal(300, 1, D)
    lengths = (37, 213, 50)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    options = {"scale": D**-0.5, "causal": True, "window": 190}
    together = {"q": q, "k": k, "v": v, "cu_q": cu, "cu_kv": cu} | options
    y = _flash(emulator, 90, together)[1]
    for begin, end in ((0, 213), (0, 100), (100, 130), (212, 213)):
        rows = slice(37 + begin, 37 + end)
        chunk = {"q": q[rows], "k": k[37 : 37 + end], "v": v[37 : 37 + end]}
        chunk["cu_q"] = torch.tensor([0, end - begin], dtype=torch.int32)
        chunk["cu_kv"] = torch.tensor([0, end], dtype=torch.int32)
        assert torch.equal(_flash(emulator, 90, chunk | options)[1], y[rows])


@pytest.mark.parametrize("keys", [1, 16, 17, 63, 128, 129])
@pytest.mark.parametrize("D", [64, 128])
def test_another_sequence_cannot_spoil_a_tile_of_sm_90a(emulator, D, keys):
    # Bulk copies fetch what lies behind a sequence, here infinities and NaN.
    make = Inputs(f"spoiled/{D}", torch.bfloat16)
    k, v = make.normal(keys + 40, 1, D), make.normal(keys + 40, 1, D)
    cu_q = torch.tensor([0, 20, 21], dtype=torch.int32)
    cu_kv = torch.tensor([0, keys, keys + 40], dtype=torch.int32)
    arguments = {"q": make.normal(21, 1, D), "k": k, "v": v, "cu_q": cu_q, "cu_kv": cu_kv}
    arguments |= {"scale": D**-0.5, "causal": False}
    y = _flash(emulator, 90, arguments)[1]
    k[keys:], v[keys:] = float("inf"), float("nan")
    spoiled = _flash(emulator, 90, arguments)[1]
    assert torch.equal(spoiled[:20], y[:20])
    assert bool(y.isfinite().all())
    assert bool(spoiled[20].isnan().all())


@pytest.mark.parametrize("D", [64, 128])
def test_flash_attention_on_sm_90a_in_place(emulator, D):
    make = Inputs(f"wgmma_in_place/{D}", torch.bfloat16)
    q, k, v = make.normal(150, 2, D), make.normal(140, 2, D), make.normal(140, 2, D)
    cu_q, cu_kv = (torch.tensor([0, n], dtype=torch.int32) for n in (150, 140))
    given = (q, k, v, cu_q, cu_kv, D**-0.5, False, None, None, None)
    arguments = dict(zip(("q", "k", "v", "cu_q", "cu_kv", "scale", "causal"), given, strict=False))
    y = _flash(emulator, 90, arguments)[1]
    emulator.run("flash_attention", emulated.flash_attention(*given, q), capability=90)
    assert torch.equal(q, y)


# ---- attention: decode, broken page tables, who shares the batch --------------------------------

PAGED = ops.catalogue()["paged_attention"]
DECODE = [
    c
    for c in PAGED.cases
    if not c.slow and c.build(Inputs(c.name, torch.bfloat16))["q"].shape[2] in (64, 128)
]


def _workspace(q: Tensor, k_cache: Tensor, page_table: Tensor) -> Tensor:
    T, H, D = q.shape
    splits = max(1, -(-page_table.shape[1] * k_cache.shape[2] // (16384 // D)))
    return torch.full((max(splits * T * H * (D + 2), 4),), float("nan"))


def _decode_params(*arguments: Any) -> ctypes.Structure:
    *given, _, out = arguments
    return emulated.paged_attention(*given, _workspace(given[0], given[1], given[3]), out)


@pytest.mark.parametrize("case", DECODE, ids=_id)
def test_paged_attention_splits(case, emulate, monkeypatch):
    monkeypatch.setitem(emulated.PARAMS, "paged_attention", _decode_params)
    config = emulate(PAGED, case, torch.bfloat16, seed=1)
    assert config == "empty" or "splits=0" not in config


def _attend(
    emulator: Emulator, arguments: dict[str, Any], params: Any = emulated.paged_attention
) -> Tensor:
    names = ("q", "k_cache", "v_cache", "page_table", "cu_q", "kv_lens", "scale")
    names += ("window", "sinks", "prefix")
    out = torch.full_like(arguments["q"], float("nan"), memory_format=torch.contiguous_format)
    emulator.run("paged_attention", params(*(arguments.get(n) for n in names), None, out))
    return out


PHASES = {"prefill": emulated.paged_attention, "decode": _decode_params}
# D, group, dtype, phase: every kernel of paged_attention.
KERNELS = [
    (64, 7, torch.bfloat16, "prefill"),
    (64, 7, torch.bfloat16, "decode"),
    (128, 3, torch.bfloat16, "prefill"),
    (128, 3, torch.bfloat16, "decode"),
    (20, 2, torch.bfloat16, "prefill"),
    (64, 2, torch.float32, "prefill"),
]


@pytest.mark.parametrize(("D", "group", "dtype", "phase"), KERNELS, ids=_id)
def test_paged_attention_bits_depend_on_the_sequence_alone(emulator, D, group, dtype, phase):
    # Alone and with a short table, or in company, in chunks, at other pages of a wider table.
    make = Inputs(f"alone/{D}", dtype)
    lengths, P = (200, 330, 1), 16
    q = make.normal(6, 2 * group, D)
    table = make.permutation(200)[: 3 * 50].int().view(3, 50)
    caches = {n: make.normal(200, 2, P, D) for n in ("k_cache", "v_cache")}
    together = {
        "q": q,
        **caches,
        "page_table": table,
        "cu_q": torch.tensor([0, 1, 5, 6], dtype=torch.int32),
        "kv_lens": torch.tensor(lengths, dtype=torch.int32),
        "scale": D**-0.5,
        "window": 290,
    }
    y = _attend(emulator, together, PHASES[phase])
    for rows, length in (((0, 1), 200), ((1, 2), 327), ((2, 5), 330), ((5, 6), 1)):
        sequence = 0 if rows[0] == 0 else 2 if rows[0] == 5 else 1
        pages = -(-length // P)
        alone = together | {
            "q": q[slice(*rows)],
            "page_table": table[sequence : sequence + 1, :pages].clone(),
            "cu_q": torch.tensor([0, rows[1] - rows[0]], dtype=torch.int32),
            "kv_lens": torch.tensor([length], dtype=torch.int32),
        }
        assert torch.equal(_attend(emulator, alone, PHASES[phase]), y[slice(*rows)])


@pytest.mark.parametrize("page", [-1, 200, 2**31 - 1, "behind the table"])
@pytest.mark.parametrize(("D", "group", "dtype", "phase"), KERNELS, ids=_id)
def test_a_broken_page_table_harms_its_own_sequence(emulator, D, group, dtype, phase, page):
    make = Inputs(f"broken/{D}", dtype)
    table = make.permutation(200)[: 2 * 20].int().view(2, 20)
    arguments = {
        "q": make.normal(2, 2 * group, D),
        "k_cache": make.normal(200, 2, 16, D),
        "v_cache": make.normal(200, 2, 16, D),
        "page_table": table,
        "cu_q": torch.tensor([0, 1, 2], dtype=torch.int32),
        "kv_lens": torch.tensor([300, 290], dtype=torch.int32),
        "scale": D**-0.5,
    }
    good = _attend(emulator, arguments, PHASES[phase])
    assert bool(good.isfinite().all())
    if page == "behind the table":
        arguments["kv_lens"] = torch.tensor([20 * 16 + 1, 290], dtype=torch.int32)
    else:
        arguments["page_table"] = table.index_put(
            (torch.tensor(0), torch.tensor(7)), torch.tensor(page, dtype=torch.int32)
        )
    broken = _attend(emulator, arguments, PHASES[phase])
    assert bool(broken[0].isnan().all())
    assert torch.equal(broken[1], good[1])


# ---- linear: every kernel, and what a row's bits depend on --------------------------------------

LINEAR = ops.catalogue()["linear"]


def _linear_case(M: int, N: int, K: int, offset: int = 0, **options: Any) -> Case:
    """All of the epilogue; x starts `offset` elements behind an aligned address."""

    def build(make: Inputs) -> dict[str, Any]:
        return {
            "x": make.normal(M, K + 8)[:, offset : offset + K],
            "weight": make.normal(N, K, std=K**-0.5),
            "bias": make.normal(N),
            "scale": make.normal(N),
            "residual": make.normal(M, N),
            "activation": "silu",
        } | options

    return Case(f"{M}x{N}x{K}+{offset}", build)


# (case, phase, expected configuration) in bfloat16.
LINEARS = [
    (_linear_case(1, 40, 264), "decode", "rows 16x8 aligned=1 grid=5x1"),
    (_linear_case(17, 40, 520), "decode", "rows 64x8 aligned=1 grid=5x1"),
    (_linear_case(65, 24, 40), "decode", "rows 64x8 aligned=1 grid=3x2"),
    (_linear_case(3, 4096, 32), "decode", "rows 16x32 aligned=1 grid=128x1"),
    (_linear_case(20, 4100, 24), "decode", "rows 64x32 aligned=1 grid=129x1"),
    (_linear_case(18, 41, 264), "decode", "rows 16x8 aligned=0 grid=6x2"),
    (_linear_case(18, 40, 264, 1), "decode", "rows 16x8 aligned=0 grid=5x2"),
    (_linear_case(70, 130, 136), "prefill", "tiles 64x64 aligned=1 grid=3x2"),
    (_linear_case(70, 130, 137), "prefill", "tiles 64x64 aligned=0 grid=3x2"),
    (_linear_case(1, 6, 8), "prefill", "tiles 64x64 aligned=1 grid=1x1"),
    (_linear_case(129, 64 * 128, 72), "prefill", "tiles 128x128 aligned=1 grid=64x2"),
]


@pytest.mark.parametrize(("case", "phase", "config"), LINEARS, ids=_id)
def test_linear_configurations(case, phase, config, emulator, monkeypatch):
    def face(*arguments: Any) -> None:
        assert emulator.run("linear", emulated.linear(*arguments), seed=3) == config

    monkeypatch.setitem(LINEAR.faces, "emulated", face)
    phased = functools.partial(LINEAR.function, phase=phase)
    check(dataclasses.replace(LINEAR, function=phased), case, torch.bfloat16, "emulated")


def test_linear_adds_float32_in_pieces(emulate):
    # One chain over so many k would miss the tolerance.
    assert "plain" in emulate(LINEAR, _linear_case(3, 40, 4096), torch.float32, seed=4)


def _linear(emulator: Emulator, x: Tensor, weight: ops.PackedWeight, *, decode: bool) -> Tensor:
    out = torch.full((len(x), weight.n), float("nan"), dtype=x.dtype)
    arguments = (weight.data, weight.n, weight.k, weight.format, None, 0, None, None, decode, out)
    emulator.run("linear", emulated.linear(x, *arguments))
    return out


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(("N", "K"), [(72, 328), (4104, 40), (33, 77)])
def test_linear_bits_depend_on_the_row_alone(emulator, N, K, decode):
    make = Inputs(f"rows/{N}", torch.bfloat16)
    x, weight = make.normal(80, K), ops.pack(make.normal(N, K))
    y = _linear(emulator, x, weight, decode=decode)
    for rows in (slice(0, 1), slice(79, 80), slice(5, 22)):
        assert torch.equal(_linear(emulator, x[rows], weight, decode=decode), y[rows])
    # Nor on how operands are fetched.
    shifted = make.normal(80, K + 9)
    shifted[:, 1 : K + 1] = x
    assert torch.equal(_linear(emulator, shifted[:, 1 : K + 1], weight, decode=decode), y)


# ---- mixture of experts: every kernel, linear's bits, what nobody has checked -------------------

GROUPED = ops.catalogue()["grouped_linear"]


def _grouped_case(counts: tuple[int, ...], N: int, K: int, offset: int = 0) -> Case:
    """x starts `offset` elements behind an aligned address."""

    def build(make: Inputs) -> dict[str, Any]:
        return {
            "x": make.normal(9, K + 8)[:, offset : offset + K],
            "weight": make.normal(len(counts), N, K, std=K**-0.5),
            "offsets": torch.tensor((0, *counts)).cumsum(0, dtype=torch.int32),
            "rows": make.integers(0, 9, sum(counts), dtype=torch.int32),
            "bias": make.normal(len(counts), N),
        }

    return Case(f"{counts}x{N}x{K}+{offset}", build)


FEW, MANY, FULL = (1, 0, 3, 0, 1), (0, 40, 0, 17, 1, 64), (128, 100, 200)
# (case, phase, expected configuration) in bfloat16.
GROUPS = [
    (_grouped_case(FEW, 40, 264), "decode", "rows 16x8 aligned=1 grid=5x5"),
    (_grouped_case(FEW, 1024, 40), "decode", "rows 16x32 aligned=1 grid=32x5"),
    (_grouped_case(MANY, 40, 520), "decode", "rows 64x8 aligned=1 grid=5x7"),
    (_grouped_case(MANY, 1024, 40), "decode", "rows 64x32 aligned=1 grid=32x7"),
    (_grouped_case(MANY, 41, 264), "decode", "rows 16x8 aligned=0 grid=6x13"),
    (_grouped_case(MANY, 40, 264, 1), "decode", "rows 16x8 aligned=0 grid=5x13"),
    (_grouped_case(MANY, 130, 136), "prefill", "tiles 64x64 aligned=1 grid=3x7"),
    (_grouped_case(MANY, 130, 137), "prefill", "tiles 64x64 aligned=0 grid=3x7"),
    (_grouped_case(FULL, 2816, 72), "prefill", "tiles 128x128 aligned=1 grid=22x6"),
]


@pytest.mark.parametrize(("case", "phase", "config"), GROUPS, ids=_id)
def test_grouped_linear_configurations(case, phase, config, emulator, monkeypatch):
    def face(*arguments: Any) -> None:
        assert emulator.run("grouped_linear", emulated.grouped_linear(*arguments), 3) == config

    monkeypatch.setitem(GROUPED.faces, "emulated", face)
    phased = functools.partial(GROUPED.function, phase=phase)
    check(dataclasses.replace(GROUPED, function=phased), case, torch.bfloat16, "emulated")


def _grouped(
    emulator: Emulator,
    x: Tensor,
    experts: ops.PackedExperts,
    offsets: Tensor,
    rows: Tensor | None,
    *,
    decode: bool,
) -> Tensor:
    M = len(x) if rows is None else len(rows)
    out = torch.full((M, experts.n), 7.0, dtype=x.dtype)
    held = (experts.data, *experts.shape, experts.format)
    arguments = (x, *held, offsets, rows, None, None, decode, out)
    _emulate(emulator, "grouped_linear", *arguments)
    return out


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
@pytest.mark.parametrize(("N", "K"), [(72, 328), (33, 77)])
def test_grouped_linear_has_the_bits_of_linear(emulator, N, K, dtype, decode):
    make = Inputs(f"experts/{N}", dtype)
    x, experts = make.normal(90, K), ops.pack_experts(make.normal(4, N, K))
    bounds = (0, 70, 70, 73, 90)
    offsets = torch.tensor(bounds, dtype=torch.int32)
    y = _grouped(emulator, x, experts, offsets, None, decode=decode)
    for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = _linear(emulator, x[begin:end], experts[e], decode=decode) if begin < end else None
        assert alone is None or torch.equal(alone, y[begin:end])
    order = make.permutation(90)
    sources = order.argsort().int()
    assert torch.equal(_grouped(emulator, x[order], experts, offsets, sources, decode=decode), y)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_grouped_linear_marks_rows_out_of_range(emulator, dtype, decode):
    make = Inputs("experts/range", dtype)
    x, experts = make.normal(5, 40), ops.pack_experts(make.normal(3, 24, 40))
    offsets = torch.tensor([0, 20, 20, 24], dtype=torch.int32)
    rows = make.integers(0, 5, 24, dtype=torch.int32)
    good = _grouped(emulator, x, experts, offsets, rows, decode=decode)
    rows[[0, 17, 23]] = torch.tensor([-1, 5, 2**31 - 1], dtype=torch.int32)
    broken = _grouped(emulator, x, experts, offsets, rows, decode=decode)
    marked = torch.zeros(24, dtype=torch.bool)
    marked[[0, 17, 23]] = True
    assert bool(broken[marked].isnan().all())
    assert torch.equal(broken[~marked], good[~marked])
    # Offsets that do not fit: the expert in question has no rows.
    for change, spared in (((-1, 20, 20, 24), range(20)), ((0, 20, 20, 25), range(20, 24))):
        offsets = torch.tensor(change, dtype=torch.int32)
        y = _grouped(emulator, x, experts, offsets, rows.clamp(0, 4), decode=decode)
        assert (y == 7.0).all(1).nonzero().flatten().tolist() == [*spared]


def test_moe_combine_marks_places_out_of_range(emulator):
    x, residual = torch.randn(4, 40), torch.randn(3, 40)
    weights = torch.rand(3, 2)
    places = torch.tensor([[0, 3], [4, 1], [-1, 2]], dtype=torch.int32)
    out = torch.zeros(3, 40)
    _emulate(emulator, "moe_combine", x, weights, places, residual, out)
    assert out.isnan().all(1).tolist() == [False, True, True]
    expected = residual[0] + weights[0, 0] * x[0] + weights[0, 1] * x[3]
    torch.testing.assert_close(out[0], expected)
    alone = torch.zeros(1, 40)
    good = (weights[:1], places[:1], residual[:1])
    _emulate(emulator, "moe_combine", x, *good, alone)
    _emulate(emulator, "moe_combine", x, *good, residual[:1])
    assert torch.equal(alone, out[:1])
    assert torch.equal(residual[:1], out[:1])


def _route(emulator: Emulator, logits: Tensor, k: int, *, normalize: bool) -> ops.Routing:
    T, E = logits.shape
    shapes = ((T, k), (T, k), (T * k,), (T, k), (E + 1,))
    out = [torch.full(shape, -7, dtype=torch.int32) for shape in shapes]
    out[1] = torch.full((T, k), float("nan"))
    _emulate(emulator, "moe_route", logits, k, normalize, *out)
    return ops.Routing(*out)


@pytest.mark.parametrize("T", [7, 40])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_moe_route_breaks_broken_rows_alone(emulator, dtype, normalize, T):
    # One launch, or two.
    logits = Inputs("route/broken", dtype).normal(T, 37)
    clean = _route(emulator, logits, 5, normalize=normalize)
    logits[1, [30, 36]] = torch.tensor([float("nan"), -float("nan")], dtype=dtype)
    logits[3, 2] = float("inf")
    logits[5] = -float("inf")
    r = _route(emulator, logits, 5, normalize=normalize)
    expected = ops.moe_route(logits, top_k=5, normalize=normalize, backend="reference")
    for name in ("ids", "tokens", "places", "offsets"):
        assert torch.equal(getattr(r, name), getattr(expected, name)), name
    assert bool(r.weights[[1, 5]].isnan().all())
    keep = [t for t in range(T) if t not in (1, 3, 5)]
    assert torch.equal(r.weights[keep], clean.weights[keep])


@pytest.mark.parametrize("offset", [0, 1])
def test_mxfp4_unpack_at_its_ends(emulator, offset):
    # -6 and -0 in turn, wherever the bytes lie.
    blocks = torch.full((4 * 16 + 4,), 0x8F, dtype=torch.uint8)[offset : offset + 64].view(4, 16)
    scales = torch.tensor([0, 252, 254, 255], dtype=torch.uint8)
    out = torch.zeros(4, 32, dtype=torch.bfloat16)
    config = _emulate(emulator, "mxfp4_unpack", blocks, scales, out)
    assert config == f"aligned={1 - offset} grid=1"
    values = out.double()
    assert values[:3, 0].tolist() == [-6 * 2.0**-127, -6 * 2.0**125, -float("inf")]
    assert values[:3, 1].tolist() == [0.0, 0.0, 0.0]
    assert bool(values[:3, 1].signbit().all())
    assert bool(values[3].isnan().all())


# ---- rms_norm: what the catalogue's shapes leave out -------------------------------------------


def _rms_norm_case(T: int, C: int, offset: int = 0, residual: bool = False) -> Case:
    """Rows that start `offset` elements behind an aligned address."""

    def build(make: Inputs) -> dict[str, Any]:
        x, h = make.normal(T, C + 8), make.normal(T, C + 8)
        arguments = {"x": x[:, offset : offset + C], "weight": make.normal(C), "eps": 1e-5}
        return arguments | ({"residual": h[:, offset : offset + C]} if residual else {})

    return Case(f"{T}x{C}+{offset}{'r' * residual}", build)


# (case, dtype, expected configuration): every kernel of the table, at the edges of its range.
RMS_NORM = [
    (_rms_norm_case(5, 256), torch.bfloat16, "vectors=1 aligned=1 block=32x4 grid=2"),
    (_rms_norm_case(5, 256, 1), torch.bfloat16, "vectors=0 aligned=0 block=32x4 grid=2"),
    (_rms_norm_case(70, 8), torch.bfloat16, "vectors=1 aligned=1 block=1x128 grid=1"),
    (_rms_norm_case(5, 128, 1, True), torch.float32, "vectors=0 aligned=0 block=32x4 grid=2"),
    (_rms_norm_case(5, 264), torch.bfloat16, "vectors=4 aligned=1 block=32x4 grid=2"),
    (_rms_norm_case(3, 1024), torch.bfloat16, "vectors=4 aligned=1 block=32x4 grid=1"),
    (_rms_norm_case(3, 1032, 0, True), torch.bfloat16, "vectors=4 aligned=1 block=64x1 grid=3"),
    (_rms_norm_case(2, 4096, 0, True), torch.bfloat16, "vectors=4 aligned=1 block=128x1 grid=2"),
    (_rms_norm_case(2, 4096), torch.float32, "vectors=4 aligned=1 block=256x1 grid=2"),
    (_rms_norm_case(2, 8191, 3, True), torch.float32, "vectors=0 aligned=0 block=512x1 grid=2"),
    (_rms_norm_case(1, 32768), torch.bfloat16, "vectors=4 aligned=1 block=1024x1 grid=1"),
    (_rms_norm_case(1, 32776, 0, True), torch.bfloat16, "vectors=0 aligned=1 block=1024x1 grid=1"),
    (_rms_norm_case(1, 16391, 1, True), torch.float32, "vectors=0 aligned=0 block=1024x1 grid=1"),
]


@pytest.mark.parametrize(("case", "dtype", "config"), RMS_NORM, ids=_id)
def test_rms_norm_configurations(case, dtype, config, emulate):
    # The outputs are contiguous: with an odd C they are misaligned from the second row on.
    assert emulate(ops.catalogue()["rms_norm"], case, dtype, seed=3) == config


def _rms_norm(emulator: Emulator, x: Tensor, weight: Tensor, y: Tensor, **options: Any) -> str:
    residual, residual_out = options.get("residual"), options.get("residual_out")
    return emulator.run(
        "rms_norm",
        emulated.rms_norm(
            x.unsqueeze(1),
            weight,
            None if residual is None else residual.unsqueeze(1),
            y.unsqueeze(1),
            None if residual_out is None else residual_out.unsqueeze(1),
            1e-6,
            False,
        ),
    )


@pytest.mark.parametrize("C", [64, 895, 896, 2048, 33000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_rms_norm_in_place(emulator, C, dtype):
    make = Inputs(f"in_place/{C}", dtype)
    x, h, weight = make.normal(2, C), make.normal(2, C), make.normal(C)
    y, h_out = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    _rms_norm(emulator, x, weight, y, residual=h, residual_out=h_out)
    assert torch.equal(h_out, x + h)
    _rms_norm(emulator, x, weight, x, residual=h, residual_out=h)
    assert torch.equal(x, y)
    assert torch.equal(h, h_out)


@pytest.mark.parametrize("C", [64, 895, 2048, 33000])
def test_rms_norm_bits_depend_on_the_row_alone(emulator, C):
    make = Inputs(f"bits/{C}", torch.bfloat16)
    packed, weight = make.normal(7, C + 9), make.normal(C)
    x = packed[:, 1 : C + 1]
    y = torch.full((7, C), float("nan"), dtype=x.dtype)
    assert "aligned=0" in _rms_norm(emulator, x, weight, y)
    for i in range(7):
        alone = torch.full((1, C), float("nan"), dtype=x.dtype)
        config = _rms_norm(emulator, x[i : i + 1].clone(), weight, alone)
        assert f"aligned={int(C % 8 == 0)}" in config
        assert torch.equal(alone[0], y[i])


@pytest.mark.parametrize("weight_in_fp32", [False, True])
def test_rms_norm_rounds_where_the_contract_says(emulator, weight_in_fp32):
    # The mean square is 25, so both roundings are known in bits.
    x = torch.tensor([1.0, 7.0]).repeat(64).bfloat16().view(1, 1, 128)
    weight = (1 + torch.arange(128) / 128).bfloat16()
    y = torch.full_like(x, float("nan"))
    emulator.run("rms_norm", emulated.rms_norm(x, weight, None, y, None, 0.0, weight_in_fp32))
    once = (x.double() * 0.2 * weight.double()).bfloat16()
    twice = (x.double() * 0.2).bfloat16() * weight
    assert not torch.equal(once, twice)
    assert torch.equal(y, once if weight_in_fp32 else twice)


# ---- the other ops: in place, at the edges, with ids that nobody has checked --------------------


def _emulate(emulator: Emulator, op: str, *arguments: Any, **named: Any) -> str:
    return emulator.run(op, emulated.PARAMS[op](*arguments, **named))


# (T, C, offset of x, dtype, expected configuration)
LAYER_NORM = [
    (5, 256, 0, torch.bfloat16, "vectors=1 aligned=1 block=32x4 grid=2"),
    (5, 256, 1, torch.bfloat16, "vectors=0 aligned=0 block=32x4 grid=2"),
    (3, 1024, 0, torch.bfloat16, "vectors=4 aligned=1 block=32x4 grid=1"),
    (2, 3200, 0, torch.bfloat16, "vectors=4 aligned=1 block=128x1 grid=2"),
    (2, 8191, 3, torch.float32, "vectors=0 aligned=0 block=512x1 grid=2"),
    (1, 32776, 0, torch.bfloat16, "vectors=0 aligned=1 block=1024x1 grid=1"),
]


@pytest.mark.parametrize(("T", "C", "offset", "dtype", "config"), LAYER_NORM, ids=_id)
def test_layer_norm_configurations(T, C, offset, dtype, config, emulate):
    def build(make: Inputs) -> dict[str, Any]:
        x = make.normal(T, C + 8, mean=2.0)[:, offset : offset + C]
        return {"x": x, "weight": make.normal(C), "bias": make.normal(C), "eps": 1e-5}

    case = Case(f"{T}x{C}+{offset}", build)
    assert emulate(ops.catalogue()["layer_norm"], case, dtype, seed=3) == config


@pytest.mark.parametrize("C", [64, 1024, 2048, 33000])
def test_layer_norm_bits_depend_on_the_row_alone(emulator, C):
    make = Inputs(f"layer_norm/{C}", torch.bfloat16)
    x, weight, bias = make.normal(3, C + 9)[:, 1 : C + 1], make.normal(C), make.normal(C)
    y = torch.full((3, C), float("nan"), dtype=x.dtype)
    alone = torch.full((1, C), float("nan"), dtype=x.dtype)
    assert "aligned=0" in _emulate(emulator, "layer_norm", x, weight, bias, y, 1e-6)
    for i in range(3):
        row = x[i : i + 1].clone()
        assert "aligned=1" in _emulate(emulator, "layer_norm", row, weight, bias, alone, 1e-6)
        assert torch.equal(alone[0], y[i])
    _emulate(emulator, "layer_norm", x, weight, bias, x, 1e-6)
    assert torch.equal(x, y)


@pytest.mark.parametrize("width", [37, 96])
def test_gated_activation_in_place(emulator, width):
    x = Inputs("gated/in_place", torch.bfloat16).normal(3, 2 * width)
    y = torch.full((3, width), float("nan"), dtype=x.dtype)
    _emulate(emulator, "gated_activation", x, y, 0)
    _emulate(emulator, "gated_activation", x, x[:, :width], 0)
    assert torch.equal(x[:, :width], y)


def test_embed_scatter_marks_ids_out_of_range(emulator):
    table, image = torch.randn(4, 8), torch.randn(2, 8)
    ids = torch.tensor([0, -1, 3, 4, 7, 2**40])
    row = torch.tensor([-1, -1, -1, -1, 1, 2])
    out = torch.zeros(6, 8)
    _emulate(emulator, "embed_scatter", ids, table, image, row, out)
    assert out.isnan().all(1).tolist() == [False, True, False, True, False, True]
    assert torch.equal(out[[0, 2, 4]], torch.stack((table[0], table[3], image[1])))


def test_rope_marks_sequences_and_slots_out_of_range(emulator):
    make = Inputs("rope/range", torch.float32)
    q, k, v = make.normal(4, 2, 8), make.normal(4, 1, 8), make.normal(4, 1, 8)
    cache = torch.zeros(2, 2, 1, 4, 8)  # K and V, pages, K, P, D
    out = torch.zeros_like(q)
    sequence = torch.tensor([0, 1, -1, 0], dtype=torch.int32)
    slots = torch.tensor([2, 3, 4, 8])
    angles = torch.zeros(4), torch.ones(1, 4), torch.ones(1)
    _emulate(emulator, "rope", q, k, v, *angles, sequence, *cache, slots, out)
    assert torch.equal(out[[0, 3]], q[[0, 3]])
    assert out[1:3].isnan().all()
    stored = cache.transpose(2, 3).flatten(1, 2)  # [2, slots, K, D]
    assert torch.equal(stored[0, 2], k[0])
    assert stored[0, 3:5].isnan().all()
    assert torch.equal(stored[1, 2:5], v[:3])
    assert not stored[:, [0, 1, 5, 6, 7]].any()


def _sample(emulator: Emulator, logits: Tensor, **parameters: Tensor) -> list[int]:
    names = [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "history",
        "cu_history",
        "seed",
        "index",
    ]
    B, V = logits.shape
    out, workspace = torch.full((B,), -7), torch.full((B, -(-V // 4) * 4), float("nan"))
    everything = dict.fromkeys(names) | parameters
    _emulate(emulator, "sample", logits, **everything, workspace=workspace, out=out)
    return out.tolist()


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"temperature": 1.0, "min_p": -0.1},
        {"temperature": 1.0, "top_k": -1},
        {"repetition_penalty": 0.0},
    ],
)
def test_sample_marks_parameters_out_of_range(parameters, emulator):
    dtypes = {"top_k": torch.int32}
    rows = {n: torch.tensor([v], dtype=dtypes.get(n)) for n, v in parameters.items()}
    assert _sample(emulator, torch.ones(1, 5), **rows) == [-1]


def test_sample_marks_rows_that_have_no_answer(emulator):
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, -0.0], [-0.0, 0.0], [-inf, 3.0], [-inf, -inf], [nan, 1.0], [1.0, inf], [2.0, 2.0]]
    logits = torch.tensor(rows).repeat(1, 3)[:, :6]
    assert _sample(emulator, logits) == [0, 0, 1, -1, -1, -1, 0]
    hot = {"temperature": torch.full((7,), 0.5), "seed": torch.arange(7)}
    answers = _sample(emulator, logits, **hot)
    assert [a == -1 for a in answers] == [False, False, False, True, True, True, False]
    bad = {"history": torch.tensor([6]), "cu_history": torch.tensor([0, 1], dtype=torch.int32)}
    bad["repetition_penalty"] = torch.tensor([2.0])
    assert _sample(emulator, logits[:1], **bad) == [-1]


@pytest.mark.parametrize("top_p", [0.01, 0.5])
@pytest.mark.parametrize("top_k", [0, 7])
def test_sample_rejects_until_a_kept_token_is_drawn(top_p, top_k, emulator):
    # Nearly flat: most first draws lie outside of what top-p and top-k keep. Some values tie.
    logits = Inputs("sample/flat", torch.float32).integers(0, 9, 12, 203).float() / 50
    rows = {
        "temperature": torch.ones(12),
        "top_p": torch.full((12,), top_p),
        "top_k": torch.full((12,), top_k, dtype=torch.int32),
        "seed": torch.arange(12),
    }
    expected = ops.sample(logits, **rows, backend="reference")
    assert _sample(emulator, logits, **rows) == expected.tolist()


# ---- the emulator itself -----------------------------------------------------------------------


class PlantedParams(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


def _planted(emulator: Emulator, name: str, x: Tensor, seed: int = 0) -> Tensor:
    y = torch.full_like(x, float("nan"))
    params = PlantedParams(x.data_ptr(), y.data_ptr(), *x.shape)
    emulator.run(f"planted/{name}", params, seed)
    return y


FINDINGS = {
    "missing_barrier": r"race: thread \d+ reads shared memory that thread \d+ wrote"
    r"|read of shared memory that no thread has written",
    "reused_scratch": r"race: thread \d+ writes shared memory that another thread reads"
    r"|race: thread \d+ reads shared memory that thread \d+ wrote",
    "unwritten_shared": r"read of shared memory that no thread has written",
    "shared_overrun": r"out-of-bounds write of 4 bytes of shared memory: offset 16 of an array of "
    r"16 bytes",
    "read_past_row": r"out-of-bounds read of 4 bytes at 0x\w+: x\[\d\] \+ 400, which has 400",
    "write_past_row": r"out-of-bounds write of 4 bytes at 0x\w+: y\[\d\] \+ 400, which has 400",
    "misaligned": r"misaligned read of 16 bytes at 0x",
    "divergent_barrier": r"deadlock in block \(\d, 0, 0\): 32 threads at __syncthreads, 0 in a warp"
    r" collective, 96 exited",
    "two_barriers": r"divergent barrier: thread 0 waits at planted.cpp:\d+, thread 32 at planted",
    "wrong_mask": r"__shfl_xor_sync: mask 0000ffff leaves out the calling lane \d+",
    "missing_lane": r"lane \d+ calls __shfl_xor_sync with mask|deadlock in block",
    "exited_lane": r"__shfl_xor_sync: mask ffffffff names lane \d+, which has exited",
    "wrong_lane": r"__shfl_xor_sync: lane \d+ reads lane \d+, which mask 0000ffff leaves out",
    "async_no_wait": r"read of shared memory that an asynchronous copy of thread \d+ has not",
    "async_wrong_wait": r"read of shared memory that an asynchronous copy of thread \d+ has not",
    "async_missing_barrier": r"read of shared memory that (an asynchronous copy|no thread)"
    r"|race: thread \d+ reads shared memory that thread \d+ wrote",
    "async_early_reuse": r"race: thread \d+ writes shared memory that another thread reads"
    r"|read of shared memory that an asynchronous copy of thread \d+ has not",
    "async_past_row": r"out-of-bounds read of 16 bytes at 0x\w+: x\[\d\] \+ 4096, which has 4096",
    "async_misaligned": r"misaligned read of 16 bytes at 0x",
    "bulk_no_wait": r"read of shared memory that (an asynchronous copy|no thread)",
    "bulk_wrong_phase": r"read of shared memory that (an asynchronous copy|no thread)",
    "bulk_wrong_bytes": r"deadlock in block .* 128 at an mbarrier",
    "bulk_early_reuse": r"race: thread 0 writes shared memory that another thread reads"
    r"|read of shared memory that an asynchronous copy of thread 0 has not reached",
    "bulk_missing_arrival": r"deadlock in block .* at an mbarrier",
    "bulk_extra_arrival": r"race: thread 0 writes shared memory|deadlock|more than 128 arrivals"
    r"|read of shared memory that an asynchronous copy of thread 0 has not reached",
    "bulk_unknown_barrier": r"mbarrier used before|race: thread \d+ reads shared memory that thread"
    r"|read of shared memory that no thread has written",
    "bulk_past_row": r"out-of-bounds read of 2048 bytes at 0x",
    "bulk_unawaited": r"block \(\d, 0, 0\) ends with a bulk copy on its way",
    "tile_row_off_by_one": r"out-of-bounds read of 2 bytes of shared memory: offset 512 of an",
    "tile_uncommitted": r"read of shared memory that an asynchronous copy of thread \d+ has not",
    "tile_unsynchronised": r"race: thread \d+ reads shared memory that thread \d+ wrote",
    "tile_misaligned": r"ldmatrix: row of lane \d+ is misaligned",
    "tile_divergent": r"lane \d+ calls mma.sync with mask|mma.sync: mask ffffffff names lane \d+",
    "tile_mixed_transposition": r"ldmatrix: lanes differ in .trans",
    "box_no_wait": r"read of shared memory that (an asynchronous copy|no thread)",
    "box_more_bytes": r"deadlock in block .* 128 at an mbarrier",
    "box_fewer_bytes": r"deadlock in block .* 128 at an mbarrier",
    "box_row_too_many": r"out-of-bounds write of 16 bytes of shared memory: offset 2048 of an",
    "box_misplaced_tile": r"tensor copy to offset \d+, no multiple of 1024",
    "box_wrong_stride": r"out-of-bounds read of \d+ bytes at 0x",
    "box_narrow_stride": r"tensor copy: the map has a wrong stride",
    "wgmma_wrong_wait": r"wgmma_wait: accumulators are used that are still in flight",
    "wgmma_no_proxy_fence": r"memory that thread \d+ has stored, without fence_async_reads",
    "wgmma_no_barrier": r"race: thread \d+ reads shared|read of shared memory that no thread",
    "wgmma_no_fence": r"wgmma: the last wgmma_fence has not seen these accumulators",
    "wgmma_late_write": r"wgmma: the last wgmma_fence has not seen these accumulators",
    "wgmma_missing_warp": r"warp 2 issues 3 wgmma, warp 0 of its warpgroup 4",
    "wgmma_other_operand": r"wgmma 3 of warp \d differs from that of another warp",
    "wgmma_uncommitted": r"wgmma_wait: accumulators are used that are still in flight",
    "wgmma_early_use": r"wgmma: accumulators were changed before the wait",
    "wgmma_early_reuse": r"write of shared memory that a wgmma in flight reads"
    r"|race: thread 5 writes shared memory that another thread reads",
    "wgmma_no_wait": r"ends with a wgmma in flight",
    "wgmma_off_by_one": r"wgmma: a matrix starts at offset \d+, inside of its swizzle's pattern",
    "wgmma_a_not_fenced": r"wgmma: the last wgmma_fence has not seen these registers of a",
    "wgmma_a_changed": r"wgmma: registers of a were changed before the wait",
    "tensor_no_wait": r"read of shared memory that (an asynchronous copy|no thread)",
    "tensor_wrong_bytes": r"deadlock in block .* at an mbarrier|more than 1 arrivals"
    r"|read of shared memory that an asynchronous copy of thread 0 has not reached",
    "tensor_early_reuse": r"race: thread 0 writes shared memory that another thread reads"
    r"|write of shared memory that an asynchronous copy of thread 0|more than 1 arrivals",
    "tensor_early_release": r"write of shared memory that a wgmma in flight reads",
    "tensor_row_too_many": r"deadlock|race: thread 0 writes|write of shared memory that an asynch",
    "named_missing": r"race: thread \d+ reads|read of shared memory that no thread has written",
    "named_wrong_id": r"deadlock in block .* 128 at a named barrier",
    "named_wrong_count": r"named barrier 1 is for \d+ threads, and for \d+ to others",
    "named_unawaited": r"ends with 128 threads at named barrier 3",
    "registers_too_many": r"setmaxnreg asks for 66560 registers, there are 65536",
    "registers_one_warp": r"the threads of a warpgroup differ in setmaxnreg",
}
# Shapes of x by the kernels' families; else 3 x 100.
SHAPES = {
    "async": (3, 1024),
    "bulk": (3, 2048),
    "tile": (32, 16),
    "box": (20, 40),
    "wgmma": (192, 128),
    "tensor": (128, 128),
    "named": (1, 128),
    "registers": (1, 128),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", FINDINGS)
def test_planted_bug_is_found(emulator, name, seed):
    x = torch.ones(SHAPES.get(name.split("_")[0], (3, 100)))
    with pytest.raises(Finding) as finding:
        _planted(emulator, name, x, seed)
    assert re.search(FINDINGS[name], str(finding.value)), finding.value


@pytest.mark.parametrize("seed", range(5))
def test_correct_sum_is_accepted(emulator, seed):
    x = Inputs("sum", torch.float32).integers(-50, 50, 3, 300).float()
    assert torch.equal(
        _planted(emulator, "row_sum", x, seed), x.sum(1, keepdim=True).expand(3, 300)
    )


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_shared_memory(emulator, seed):
    x = Inputs("reverse", torch.float32).normal(4, 126)
    swapped = x.flip(1).unflatten(1, (63, 2)).flip(2).flatten(1)
    assert torch.equal(_planted(emulator, "dynamic_shared", x, seed), swapped)


@pytest.mark.parametrize("seed", range(5))
def test_collectives(emulator, seed):
    x = Inputs("collectives", torch.float32).normal(8, 32)
    y = _planted(emulator, "collectives", x, seed)
    lane = torch.arange(32)
    segment = lane // 8 * 8
    assert torch.equal(y[0], x[0, 5].expand(32))
    assert torch.equal(y[1], x[1, segment + (lane + 1) % 8])
    assert torch.equal(y[2], x[2, torch.where(lane < 3, lane, lane - 3)])
    assert torch.equal(y[3], x[3, torch.where(lane % 16 < 14, lane + 2, lane)])
    assert torch.equal(y[4], x[4, lane ^ 9])
    ballot = sum(1 << i for i in range(0, 32, 3))
    assert y[5].tolist() == [ballot >> s & 255 for s in segment.tolist()]
    assert torch.equal(y[6], torch.where(lane < 16, x[6, lane ^ 1], torch.tensor(1.0)))
    assert torch.equal(y[7], torch.where(lane < 16, x[7, lane ^ 16], x[7, 2]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["async_copy", "bulk_copy"])
def test_asynchronous_copies(emulator, name, seed):
    x = Inputs("async", torch.float32).normal(3, 2048)
    y = _planted(emulator, name, x, seed)
    assert torch.equal(y, x.unflatten(1, (4, 512)).flip(2).flatten(1))


@pytest.mark.parametrize("seed", range(5))
def test_tensor_core_tiles(emulator, seed):
    x = Inputs("tile", torch.bfloat16).integers(-9, 9, 32, 16).float()
    product = x[:16] @ x[16:]
    assert torch.equal(_planted(emulator, "tile_product", x, seed)[:16], product)
    # Fragments of the wrong place give numbers, and wrong ones.
    for name, wrong in (
        ("tile_swapped_matrices", x[:16].roll(8, 1) @ x[16:]),
        ("tile_not_transposed", None),
    ):
        y = _planted(emulator, name, x, seed)[:16]
        assert not torch.equal(y, product)
        assert wrong is None or torch.equal(y, wrong)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_of_tensors(emulator, seed):
    x = Inputs("box", torch.float32).normal(20, 40)
    moved = torch.nn.functional.pad(x, (3, 0, 2, 0))[:20, :40]
    assert torch.equal(_planted(emulator, "box_copy", x, seed), moved)
    assert not torch.equal(_planted(emulator, "box_wrong_swizzle", x, seed), moved)
    x = Inputs("planes", torch.float32).normal(12, 32)
    planes = x.unflatten(0, (2, 6)).transpose(0, 1).flatten(0, 1)
    assert torch.equal(_planted(emulator, "box_planes", x, seed), planes)
    cubes = x.unflatten(0, (2, 2, 3)).transpose(1, 2).flatten(0, 2)
    assert torch.equal(_planted(emulator, "box_cubes", x, seed), cubes)


@pytest.mark.parametrize("seed", range(3))
def test_products_of_a_warpgroup(emulator, seed):
    x = Inputs("wgmma", torch.bfloat16).integers(-9, 9, 192, 128).float()
    a, b = x[:64, :64], x[64:, :64]
    for n in (16, 64, 128):
        y = _planted(emulator, f"wgmma_{n}", x, seed)
        assert torch.equal(y[:64, :n], a @ b[:n].T)
        assert y[:64, n:].isnan().all()
    y = _planted(emulator, "wgmma_groups", x, seed)
    assert torch.equal(y[:64, :64], a @ b[:64].T)
    assert torch.equal(y[64:128, :64], a @ b[64:].T)
    product = a @ x[64:128]
    assert torch.equal(_planted(emulator, "wgmma_registers", x, seed)[:64], product)
    # Matrices of the wrong place give numbers, and wrong ones.
    for name in ("wgmma_wrong_stride", "wgmma_wrong_swizzle", "wgmma_wrong_major"):
        assert not torch.equal(_planted(emulator, name, x, seed)[:64, :64], a @ b[:64].T)
    y = _planted(emulator, "wgmma_wrong_leading", x, seed)[:64]
    assert torch.equal(y[:, :64], product[:, :64])
    assert not torch.equal(y[:, 64:], product[:, 64:])


@pytest.mark.parametrize("seed", range(3))
def test_products_of_boxes(emulator, seed):
    rows = Inputs("tensor", torch.bfloat16).integers(-9, 9, 128, 256).bfloat16()
    x = rows.view(torch.float32)
    product = rows[:64].float() @ rows[64:].float().T
    assert torch.equal(_planted(emulator, "tensor_product", x, seed)[:64, :64], product)
    assert not torch.equal(_planted(emulator, "tensor_wrong_swizzle", x, seed)[:64, :64], product)


@pytest.mark.parametrize("seed", range(3))
def test_named_barriers_and_registers(emulator, seed):
    x = Inputs("named", torch.float32).normal(1, 128)
    assert torch.equal(_planted(emulator, "named_barrier", x, seed), x.flip(1))
    _planted(emulator, "registers_set", x, seed)


def test_every_planted_kernel_is_tested():
    # Those without a finding are compared with what they should, or should not, have computed.
    header = (SOURCES / "emu" / "planted.h").read_text()
    body = re.search(r"enum class Planted \{(.*?)\};", header, re.DOTALL)[1]
    names = set(re.findall(r"^ +(\w+),", body, re.MULTILINE))
    here = Path(__file__).read_text() + "wgmma_16 wgmma_64 wgmma_128"
    assert names >= set(FINDINGS)
    assert not [n for n in names if not re.search(rf"\b{n}\b", here)]


def test_portable_switch(objects, tmp_path):
    # What machines other than x86-64 use to change stacks.
    runtime = compile_units([SOURCES / "emu" / "simt.cpp"], tmp_path, "-DIVR_EMU_UCONTEXT")
    rest = [o for o in objects if o.stem != "simt"]
    emulator = link(runtime + rest, tmp_path / "portable.so")
    x = torch.arange(600.0).view(2, 300)
    assert torch.equal(_planted(emulator, "row_sum", x), x.sum(1, keepdim=True).expand(2, 300))
    with pytest.raises(Finding, match="deadlock"):
        _planted(emulator, "divergent_barrier", x)
