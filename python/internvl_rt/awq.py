"""AWQ's "gemm" storage: int4 codes in groups of columns (Lin et al., 2023, "AWQ")."""

from __future__ import annotations

import torch
from torch import Tensor

# An int32 holds the codes of eight rows of the weight; its nibbles, the lowest first, are those of
# rows 0, 2, 4, 6, 1, 3, 5, 7. Here: where a row's begins.
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def awq_unpack(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """The weight, float32 [N, K]: (code - zero) * scale, exact, for groups of K's columns.

    codes: int32 [K, N / 8], transposed and packed. zeros: int32 [G, N / 8], packed alike. scales:
    float16 [G, N]. Each group is of K / G columns.
    """
    K, (G, N) = len(codes), scales.shape
    out = torch.empty(N, K)
    zero, scale = _rows(zeros), scales.T.float()  # [N, G]
    for g in range(G):  # one after the other: unpacked codes are as large as the weight
        columns = slice(g * (K // G), (g + 1) * (K // G))
        out[:, columns] = (_rows(codes[columns]) - zero[:, g, None]) * scale[:, g, None]
    return out


def _rows(packed: Tensor) -> Tensor:
    """Codes in the order of the weight's rows: int32 [n, m] -> int32 [8 * m, n]."""
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32)
    return ((packed.T.contiguous().unsqueeze(1) >> shifts[:, None]) & 15).flatten(0, 1)
