"""AWQ's "gemm" storage: int4 codes in groups of columns (Lin et al., 2023, "AWQ")."""

from __future__ import annotations

import torch
from torch import Tensor

# An int32 holds the codes of eight rows of the weight; its nibbles, the lowest first, are those of
# rows 0, 2, 4, 6, 1, 3, 5, 7. Here: which nibble a row has.
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


def awq_unpack(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """The weight, float32 [N, K]: (code - zero) * scale, exact, for groups of K's columns.

    codes: int32 [K, N / 8], transposed and packed. zeros: int32 [G, N / 8], packed alike. scales:
    float16 [G, N]. Each group is of K / G columns.
    """
    K, N = codes.shape[0], scales.shape[1]
    G = len(scales)
    q = _nibbles(codes).view(G, K // G, N).float()
    q -= _nibbles(zeros).view(G, 1, N)
    q *= scales.unsqueeze(1)
    return q.view(K, N).T.contiguous()


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [n, 8 * m], in the order of the weight's rows, from int32 [n, m]."""
    n, m = packed.shape
    pairs = packed.contiguous().view(torch.uint8).view(n, m, 4)  # little-endian
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(2)  # [n, m, 8]
    return nibbles[:, :, list(_NIBBLE)].flatten(1)
