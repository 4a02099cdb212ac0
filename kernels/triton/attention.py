"""What flash_attention and paged_attention have in common in Triton.

A program's rows, the keys that a query sees, a step of online softmax, checks.
"""

# ruff: noqa: ANN001, ANN201 (arguments of jitted functions are typed by the call)

from __future__ import annotations

import math

import torch
from torch import Tensor

import triton
import triton.language as tl
from internvl_rt._triton.check import Checker

NO_WINDOW = 2**30  # half the range: a position minus it does not overflow
MAX_HEAD_DIM = 256


@triton.jit
def find_block(cu_q, B, block, group, ROWS: tl.constexpr):
    """(sequence, first row in it) of a block of ROWS rows, group rows per query; sequence -1 behind
    the last block. Done here, so that no length ever visits the host."""
    sequence, start, first = -1, 0, 0
    for b in range(B):
        rows = (tl.load(cu_q + b + 1) - tl.load(cu_q + b)) * group
        blocks = tl.cdiv(rows, ROWS)
        here = (block >= first) & (block < first + blocks)
        sequence = tl.where(here, b, sequence)
        start = tl.where(here, (block - first) * ROWS, start)
        first += blocks
    return sequence, start


@triton.jit
def visible(position, key, kv_len, window, prefix, CAUSAL: tl.constexpr):
    """[ROWS, KEYS]: whether the query at `position` sees `key`."""
    seen = (key < kv_len)[None, :] & (position == position)[:, None]
    if CAUSAL:
        near = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        seen = seen & (near | (key < prefix)[None, :])
    return seen


@triton.jit
def merge(m, l, acc, scores, v):  # noqa: E741
    """One step of online softmax: scores [ROWS, KEYS], -inf for what is not seen; v [KEYS, D]."""
    highest = tl.maximum(m, tl.max(scores, axis=1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)  # no key seen so far
    weights = tl.exp(scores - safe[:, None])
    shrink = tl.exp(m - safe)
    l = l * shrink + tl.sum(weights, axis=1)  # noqa: E741
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return highest, l, acc


@triton.jit
def finish(m, l, acc, sink):  # noqa: E741
    """The output rows; sink [ROWS]: a logit that takes weight and gives no value, or -inf."""
    highest = tl.maximum(m, sink)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp(m - safe)
    total = l * shrink + tl.exp(sink - safe)
    # A row that sees no key is zero.
    return acc * (shrink / tl.where(total > 0.0, total, 1.0))[:, None]


def check_options(
    check: Checker,
    q: Tensor,
    cu_q: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: Tensor | None,
    prefix: Tensor | None,
    out: Tensor,
) -> None:
    """For q, k and v (T, H, K, D) that have been checked."""
    check.tensor("out", out, [q.dtype], "T H D")
    check.tensor("cu_q", cu_q, [torch.int32], "B+1")
    check.require(len(cu_q) >= 1, "cu_q is empty, expected B+1 >= 1 offsets")
    check.bind("B", len(cu_q) - 1, "cu_q")
    D, H, K = check["D"], check["H"], check["K"]
    check.require(
        D % 4 == 0 and 4 <= D <= MAX_HEAD_DIM,
        f"head dim D is {D}, allowed: multiples of 4 from 4 to {MAX_HEAD_DIM}",
    )
    check.require(K >= 1 and H % K == 0, f"H = {H} query heads is no multiple of K = {K} kv heads")
    check.require(
        math.isfinite(scale) and scale > 0, f"scale is {scale}, expected a finite number > 0"
    )
    check.require(window is None or causal, "window is given, but causal is false")
    check.require(window is None or window >= 1, f"window is {window}, expected at least 1 or None")
    check.require(prefix is None or causal, "prefix is given, but causal is false")
    if sinks is not None:
        check.tensor("sinks", sinks, [torch.float32, q.dtype], "H")
    if prefix is not None:
        check.tensor("prefix", prefix, [torch.int32], "B")
