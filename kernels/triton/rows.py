"""How rows of C elements are cut into programs: by C alone, so that a row's bits do not depend on
its batch."""

from __future__ import annotations

from dataclasses import dataclass

import triton

MAX_BLOCK = 16384


@dataclass(frozen=True)
class Config:
    ROWS: int  # of a program
    BLOCK: int  # columns held at a time
    STREAM: bool  # a row has more than BLOCK columns and is read once per pass
    num_warps: int


def config(C: int) -> Config:
    block = min(triton.next_power_of_2(C), MAX_BLOCK)
    rows = max(1, 1024 // block)
    return Config(rows, block, block < C, min(max(rows * block // 1024, 4), 16))
