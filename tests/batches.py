"""The same rows in batches of many sizes: a row's bits may not depend on the size.

A row is what somebody else's request could stand beside: a token, a sequence, a tile of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internvl_rt import ops
from internvl_rt.ops.registry import Inputs, Op, on_device, outputs_of

SIZES = (1, 2, 7, 16, 17, 33)
ROWS = max(SIZES)

Arguments = dict[str, Any]
# Of an op's arguments those of rows [begin, end).
Take = Callable[[Arguments, slice], Arguments]


@dataclass(frozen=True)
class Batches:
    """build: arguments of ROWS rows; outputs: how many of the op's have a row per row."""

    build: Callable[[Inputs], Arguments]
    take: Take
    phases: tuple[str | None, ...] = (None,)
    outputs: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def _rows(*names: str) -> Take:
    """The arguments that have a row per row."""
    return lambda arguments, rows: arguments | {n: arguments[n][rows] for n in names}


PHASES = ("decode", "prefill")


def _rms_norm(make: Inputs) -> Arguments:
    x, weight, h = make.normal(ROWS, 264), make.normal(264), make.normal(ROWS, 264)
    return {"x": x, "weight": weight, "residual": h, "eps": 1e-6}


def _layer_norm(make: Inputs) -> Arguments:
    weight, bias = make.normal(264), make.normal(264)
    return {"x": make.normal(ROWS, 264), "weight": weight, "bias": bias, "eps": 1e-6}


def _gated_activation(make: Inputs) -> Arguments:
    return {"x": make.normal(ROWS, 144)}


def _embed_scatter(make: Inputs) -> Arguments:
    table, image = make.normal(50, 40), make.normal(9, 40)
    ids, row = make.integers(0, 50, ROWS), make.integers(-9, 9, ROWS)
    return {"ids": ids, "table": table, "image": image, "image_row": row}


def _linear(make: Inputs) -> Arguments:
    return {
        "x": make.normal(ROWS, 296),
        "weight": ops.pack(make.normal(72, 296)),
        "bias": make.normal(72),
        "scale": make.normal(72),
        "residual": make.normal(ROWS, 72),
        "activation": "gelu",
    }


def _gated_linear(make: Inputs) -> Arguments:
    return {"x": make.normal(ROWS, 296), "weight": ops.pack(make.normal(144, 296))}


def _grouped_linear(make: Inputs) -> Arguments:
    counts = (0, 20, 1, 0, 10, 2)
    return {
        "x": make.normal(11, 296),
        "weight": ops.pack_experts(make.normal(len(counts), 72, 296)),
        "offsets": torch.tensor((0, *counts)).cumsum(0, dtype=torch.int32),
        "rows": make.integers(0, 11, ROWS, dtype=torch.int32),
        "bias": make.normal(len(counts), 72),
    }


def _grouped_gated_linear(make: Inputs) -> Arguments:
    weight = ops.pack_experts(make.normal(6, 96, 296), gated=True)
    return _grouped_linear(make) | {"weight": weight, "bias": make.normal(6, 96)}


def _grouped_rows(arguments: Arguments, rows: slice) -> Arguments:
    offsets = arguments["offsets"].clamp(rows.start, rows.stop) - rows.start
    return arguments | {"offsets": offsets, "rows": arguments["rows"][rows]}


def _moe_route(make: Inputs) -> Arguments:
    return {"logits": make.normal(ROWS, 40), "top_k": 3, "normalize": False}


def _moe_combine(make: Inputs) -> Arguments:
    places = make.permutation(3 * ROWS).int().view(ROWS, 3)
    weights, residual = make.uniform(ROWS, 3), make.normal(ROWS, 72)
    return {
        "x": make.normal(3 * ROWS, 72),
        "weights": weights,
        "places": places,
        "residual": residual,
    }


def _mxfp4_unpack(make: Inputs) -> Arguments:
    blocks = make.integers(0, 256, ROWS, 3, 16, dtype=torch.uint8)
    return {"blocks": blocks, "scales": make.integers(100, 140, ROWS, 3, dtype=torch.uint8)}


def _pixel_unshuffle_mlp(make: Inputs) -> Arguments:
    C = 64
    return {
        "x": make.normal(ROWS, 4, C // 4),
        "ln_weight": make.normal(C),
        "ln_bias": make.normal(C),
        "w1": make.normal(8, C),
        "b1": make.normal(8),
        "w2": make.normal(8, 8),
        "b2": make.normal(8),
        "grid": (2, 2),
    }


def _rope(make: Inputs) -> Arguments:
    return {
        "q": make.normal(ROWS, 4, 16),
        "k": make.normal(ROWS, 2, 16),
        "v": make.normal(ROWS, 2, 16),
        "positions": make.uniform(ROWS, high=500.0),
        "inv_freq": make.uniform(3, 8),
        "scale": make.uniform(3),
        "sequence": make.integers(0, 3, ROWS, dtype=torch.int32),
        "k_cache": torch.zeros(10, 2, 4, 16, dtype=make.dtype),
        "v_cache": torch.zeros(10, 2, 4, 16, dtype=make.dtype),
        "slots": make.permutation(40)[:ROWS],
    }


def _sample(make: Inputs) -> Arguments:
    return {
        "logits": make.normal(ROWS, 203, std=3.0, dtype=torch.float32),
        # Most rows greedy: they cost the emulator little.
        "temperature": make.integers(0, 5, ROWS).eq(0) * make.uniform(ROWS, low=0.5, high=1.5),
        "top_k": make.integers(0, 20, ROWS, dtype=torch.int32),
        "top_p": make.uniform(ROWS, low=0.3),
        "seed": make.integers(0, 1000, ROWS),
        "index": make.integers(0, 1000, ROWS),
    }


def _ends(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _flash_attention(make: Inputs) -> Arguments:
    queries = make.integers(1, 4, ROWS)
    keys = queries + make.integers(0, 40, ROWS)
    return {
        "q": make.normal(int(queries.sum()), 2, 64),
        "k": make.normal(int(keys.sum()), 1, 64),
        "v": make.normal(int(keys.sum()), 1, 64),
        "cu_q": _ends(queries),
        "cu_kv": _ends(keys),
        "scale": 0.125,
        "causal": True,
    }


def _flash_sequences(arguments: Arguments, rows: slice) -> Arguments:
    taken = {}
    for cu, names in (("cu_q", ("q",)), ("cu_kv", ("k", "v"))):
        ends = arguments[cu][rows.start : rows.stop + 1]
        taken[cu] = ends - ends[0]
        taken |= {n: arguments[n][int(ends[0]) : int(ends[-1])] for n in names}
    return arguments | taken


def _paged_attention(make: Inputs) -> Arguments:
    lengths = make.integers(1, 60, ROWS, dtype=torch.int32)
    lengths[[0, -1]] = torch.tensor([257, 270], dtype=torch.int32)  # two splits
    table = make.integers(0, 40, ROWS, 17, dtype=torch.int32)
    return {
        "q": make.normal(ROWS, 2, 64),
        "k_cache": make.normal(40, 1, 16, 64),
        "v_cache": make.normal(40, 1, 16, 64),
        "page_table": table,
        "cu_q": torch.arange(ROWS + 1, dtype=torch.int32),
        "kv_lens": lengths,
        "scale": 0.125,
    }


def _paged_sequences(arguments: Arguments, rows: slice) -> Arguments:
    taken = _rows("q", "page_table", "kv_lens")(arguments, rows)
    return taken | {"cu_q": torch.arange(len(taken["q"]) + 1, dtype=torch.int32)}


BATCHES = {
    "embed_scatter": Batches(_embed_scatter, _rows("ids", "image_row")),
    "flash_attention": Batches(_flash_attention, _flash_sequences),
    "gated_activation": Batches(_gated_activation, _rows("x")),
    "gated_linear": Batches(_gated_linear, _rows("x"), PHASES),
    "grouped_gated_linear": Batches(_grouped_gated_linear, _grouped_rows, PHASES),
    "grouped_linear": Batches(_grouped_linear, _grouped_rows, PHASES),
    "layer_norm": Batches(_layer_norm, _rows("x")),
    "linear": Batches(_linear, _rows("x", "residual"), PHASES),
    "moe_combine": Batches(_moe_combine, _rows("weights", "places", "residual")),
    "moe_route": Batches(_moe_route, _rows("logits"), outputs=2),
    "mxfp4_unpack": Batches(_mxfp4_unpack, _rows("blocks", "scales"), dtypes=(torch.bfloat16,)),
    "paged_attention": Batches(_paged_attention, _paged_sequences, PHASES),
    "pixel_unshuffle_mlp": Batches(_pixel_unshuffle_mlp, _rows("x")),
    "rms_norm": Batches(_rms_norm, _rows("x", "residual"), outputs=2),
    "rope": Batches(_rope, _rows("q", "k", "v", "positions", "sequence", "slots")),
    "sample": Batches(
        _sample,
        _rows("logits", "temperature", "top_k", "top_p", "seed", "index"),
        dtypes=(torch.float32,),
    ),
}
# Takes one picture a call.
ALONE = {"preprocess"}

# What pytest runs: op, phase, dtype.
TABLE = [(n, p, d) for n, b in BATCHES.items() for p in b.phases for d in b.dtypes]


def check_batches(
    op: Op, phase: str | None, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Every batch of SIZES, at the end of the largest one, has the bits of the largest one."""
    batches = BATCHES[op.name]
    arguments = batches.build(Inputs(f"batches/{op.name}", dtype))
    if device != "cpu":
        arguments = {k: on_device(v, device) for k, v in arguments.items()}
    options = {"backend": backend} | ({} if phase is None else {"phase": phase})

    def run(rows: slice) -> tuple[Tensor, ...]:
        taken = batches.take(arguments, rows) | {n: arguments[n].clone() for n in op.mutates}
        return outputs_of(op.function(**taken, **options))[: batches.outputs]

    whole = run(slice(0, ROWS))
    assert all(bool(y.isfinite().all()) for y in whole)
    for size in SIZES[:-1]:
        part = run(slice(ROWS - size, ROWS))
        for y, z in zip(whole, part, strict=True):
            # A row per row, or several where rows are sequences.
            assert torch.equal(y[len(y) - len(z) :], z), f"{op.name}: {size} rows"
