"""Keys and values in pages, which are lent out to requests."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from internvl_rt.config import TextConfig

# A multiple of the attention kernels' vector widths and a divisor of their 256-key chunks.
PAGE_SIZE = 64


class KvCache:
    """One pair of tensors [pages + 1, K, P, D] per layer.

    On the CPU the memory is reserved, not touched: a page costs memory when it is first written.
    scratch: the last page, which is not lent out: rows that fill up a batch use it.
    """

    def __init__(
        self,
        config: TextConfig,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = self.scratch = pages
        shape = (pages + 1, config.num_kv_heads, PAGE_SIZE, config.head_dim)

        def each_layer() -> list[Tensor]:
            return [
                torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]

        self.k, self.v = each_layer(), each_layer()

    @staticmethod
    def pages_for(tokens: int) -> int:
        return -(-tokens // PAGE_SIZE)

    def free(self, held: Iterable[Tensor]) -> Tensor:
        """int64: the pages that are in none of `held`.

        The lowest come first, so that touched memory is used again before new memory.
        """
        free = torch.ones(self.capacity, dtype=torch.bool)
        for pages in held:
            free[pages] = False
        return free.nonzero().flatten()
