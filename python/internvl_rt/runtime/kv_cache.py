"""Keys and values in pages, and the allocator that lends the pages out."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

# A multiple of the attention kernels' vector widths and a divisor of their 256-key chunks.
PAGE_SIZE = 64


class KvCache:
    """One pair of tensors [pages, K, P, D] per layer.

    On the CPU the memory is reserved, not touched: a page costs memory when it is first written.
    """

    def __init__(
        self, layers: int, pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (pages, kv_heads, PAGE_SIZE, head_dim)
        self.k = [torch.empty(shape, dtype=dtype) for _ in range(layers)]
        self.v = [torch.empty(shape, dtype=dtype) for _ in range(layers)]
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
