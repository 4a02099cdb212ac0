"""Keys and values in pages, and the allocator that lends the pages out."""

from __future__ import annotations

import heapq

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
        self.scratch = pages
        shape = (pages + 1, config.num_kv_heads, PAGE_SIZE, config.head_dim)

        def each_layer() -> list[Tensor]:
            return [
                torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]

        self.k, self.v = each_layer(), each_layer()
        self.allocator = PageAllocator(pages)

    @staticmethod
    def pages_for(tokens: int) -> int:
        return -(-tokens // PAGE_SIZE)


class PageAllocator:
    """Lends the lowest free pages first, so that touched memory is used again before new memory."""

    def __init__(self, pages: int) -> None:
        self.capacity = pages
        self._free = list(range(pages))  # sorted: a heap

    @property
    def available(self) -> int:
        return len(self._free)

    def take(self, n: int) -> Tensor:
        """int64 [n] page numbers. The caller has checked `available`."""
        return torch.tensor([heapq.heappop(self._free) for _ in range(n)], dtype=torch.int64)

    def give_back(self, pages: Tensor) -> None:
        for page in pages.tolist():
            heapq.heappush(self._free, page)
