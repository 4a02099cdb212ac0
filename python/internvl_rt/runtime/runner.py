"""Runs what the engine has scheduled: as one batch, or on a GPU as one per phase, and samples.

A decode step of few rows on the CPU, or of any number on a GPU, is captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.models.internvl import InternVL
from internvl_rt.runtime.batch import Batch, Chunk, make_batch
from internvl_rt.runtime.kv_cache import PAGE_SIZE, KvCache
from internvl_rt.runtime.platform import Graph, Shape
from internvl_rt.runtime.request import Request, SamplingParams

MAX_BATCH = 64
# What a table of pages has room for only decides how many blocks of a GPU find nothing to do.
FIRST_TABLE, TABLE_GROWTH = 16, 4  # pages

# Columns of ops.sample that hold one number of SamplingParams per row.
_COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
}


@dataclass(frozen=True, slots=True)
class Part:
    """What a step does for a request: `count` of its tokens, from position `start` on."""

    request: Request
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def decodes(self) -> bool:
        return self.start >= len(self.request.prompt)

    @property
    def samples(self) -> bool:
        """Whether it ends with the next token."""
        return self.end >= len(self.request.prompt)

    def chunk(self) -> Chunk:
        request, start, end = self.request, self.start, self.end
        assert request.pages is not None
        if self.decodes:
            return Chunk(torch.tensor(request.tokens[-1:]), start, request.pages, "last")
        row = None if request.image_row is None else request.image_row[start:end]
        return Chunk(
            ids=request.prompt[start:end],
            start=start,
            pages=request.pages,
            logits="last" if self.samples else "none",
            image=request.image,
            image_row=row,
            rope_len=len(request.prompt),
        )


class Runner:
    def __init__(self, model: InternVL, cache: KvCache) -> None:
        self.model, self.cache, self.platform = model, cache, model.platform
        self._graphs: dict[tuple[str, int, int], _DecodeGraph] = {}
        if self.model.capturable:
            for tensor in (*cache.k, *cache.v):
                tensor[cache.scratch].zero_()

    def __call__(self, parts: Sequence[Part]) -> list[tuple[Part, int | None]]:
        """The parts and the next tokens of those that sample one; -1 for logits with NaN."""
        groups = {"prefill": list(parts)}
        if self.platform.phased or all(p.decodes for p in parts):
            groups = {
                "decode": [p for p in parts if p.decodes],
                "prefill": [p for p in parts if not p.decodes],
            }
        found = [self._run(group, phase) for phase, group in groups.items() if group]
        sampled = [p for group in groups.values() for p in group if p.samples]
        others = [(p, None) for p in parts if not p.samples]
        ids = [x for x in found if x is not None]
        if not ids:
            return others
        joined = self.platform.fetch(ids[0] if len(ids) == 1 else torch.cat(ids))
        return [*others, *zip(sampled, joined.tolist(), strict=True)]

    def _run(self, parts: list[Part], phase: str) -> Tensor | None:
        """int64 ids, on the device."""
        most = self.platform.decode_graphs[-1]
        if phase == "decode" and self.model.capturable and len(parts) <= most:
            return self._replay(parts)
        requests = [p.request for p in parts if p.samples]
        batch = make_batch([p.chunk() for p in parts], self.model.decoder.rotary, phase)
        metadata, options = batch.metadata(), sampling(requests, self.model.config.text.vocab_size)
        moved = self.platform.upload([*metadata.values(), *options.values()])
        batch = batch.on_device(moved[: len(metadata)])
        options = dict(zip(options, moved[len(metadata) :], strict=True))
        logits = self.model.decoder(batch, self.cache)
        return None if logits is None else self._sample(logits, options)

    def _sample(self, logits: Tensor, options: dict[str, Tensor]) -> Tensor:
        forbidden = options.pop("forbidden", None)
        if forbidden is not None:
            logits.view(-1).index_fill_(0, forbidden, -torch.inf)
        return self.model.ops.sample(logits, **options)

    def _replay(self, parts: list[Part]) -> Tensor:
        size = next(n for n in self.platform.decode_graphs if n >= len(parts))
        keys = max(p.start for p in parts) + 1
        pages = table_width(KvCache.pages_for(keys), self.cache.capacity)
        key = (_C.isa(), size, pages)  # an instruction set's calls are not another one's
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = _DecodeGraph(self.model, self.cache, size, pages)
        logits, ids = graph(parts)
        requests = [p.request for p in parts]
        if not any(_looks_back(r) for r in requests):
            return ids[: len(parts)]
        # As many tokens as an answer has are not for a graph: the step's second copy.
        options = sampling(requests, logits.shape[1])
        moved = self.platform.upload(list(options.values()))
        return self._sample(logits[: len(parts)], dict(zip(options, moved, strict=True)))


def _looks_back(request: Request) -> bool:
    """Whether the next token depends on those before it other than through the logits."""
    params = request.params
    return params.repetition_penalty != 1 or len(request.tokens) < params.min_new_tokens


def table_width(pages: int, capacity: int) -> int:
    """Room of a page table for so many pages: one of few widths."""
    width = FIRST_TABLE
    while width < pages:
        width *= TABLE_GROWTH
    return min(width, max(capacity, pages))


def sampling(requests: Sequence[Request], vocabulary: int) -> dict[str, Tensor]:
    """The options of ops.sample for the next tokens, on the CPU; none where all is greedy.

    forbidden: places in the flat logits of tokens that would end an answer too early.
    """
    params = [r.params for r in requests]
    options = {}
    if any(p.temperature > 0 for p in params):
        options = {
            name: torch.tensor([getattr(p, name) for p in params], dtype=dtype)
            for name, dtype in _COLUMNS.items()
        }
        options["index"] = torch.tensor([len(r.tokens) for r in requests])
    if any(p.repetition_penalty != 1 for p in params):
        # Prompt and answer are penalised, as is usual.
        seen = [torch.cat((r.prompt, torch.tensor(r.tokens).long())) for r in requests]
        penalty = torch.tensor([p.repetition_penalty for p in params], dtype=torch.float32)
        options["repetition_penalty"] = penalty
        options["history"] = torch.cat(seen)
        options["cu_history"] = torch.tensor([0, *map(len, seen)]).cumsum(0).int()
    early = [
        row * vocabulary + token
        for row, r in enumerate(requests)
        if len(r.tokens) < r.params.min_new_tokens
        for token in sorted(r.params.stop_ids)
    ]
    if early:
        options["forbidden"] = torch.tensor(early)
    return options


class _DecodeGraph:
    """A decode step of up to B sequences whose pages are among the first `width` of a table's row.

    Rows that no request fills take token 0 and the scratch page.
    """

    def __init__(self, model: InternVL, cache: KvCache, B: int, width: int) -> None:
        self._model, self._cache, self._B = model, cache, B
        half = model.decoder.rotary([1])[0].shape[1]
        shapes: dict[str, Shape] = {
            "ids": ((B,), torch.int64),
            "positions": ((B,), torch.float32),
            "sequence": ((B,), torch.int32),
            "slots": ((B,), torch.int64),
            "cu_q": ((B + 1,), torch.int32),
            "kv_lens": ((B,), torch.int32),
            "inv_freq": ((B, half), torch.float32),
            "scale": ((B,), torch.float32),
            "page_table": ((B, width), torch.int32),
        }
        columns: dict[str, Shape] = {name: ((B,), dtype) for name, dtype in _COLUMNS.items()}
        columns["index"] = ((B,), torch.int64)
        self._mirror = model.platform.mirror(shapes | columns)
        host, there = self._mirror.host, self._mirror.device
        for tensor in host.values():
            tensor.zero_()
        host["sequence"].copy_(torch.arange(B))
        host["cu_q"].copy_(torch.arange(B + 1))
        metadata = {name: there[name] for name in shapes}
        self._batch = Batch(
            **metadata, image=None, image_row=None, logits_rows=None, phase="decode"
        )
        self._options = {name: there[name] for name in columns}
        self._graph: Graph | None = None
        # Who has a row: what stays the same from step to step is written when that changes. A row
        # is nobody's while it is written, so that Ctrl-C leaves none half another request's.
        self._seated: dict[int, Request | None] = {}
        self._pages: list[list[int]] = [[]] * B

    def __call__(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """float32 logits [B, V] and int64 ids [B], of which the first len(parts) count."""
        self._fill(parts)
        self._mirror.push()
        if self._graph is None:
            self._graph = self._model.platform.capture(self._step)
        self._graph.replay()
        return self._graph.outputs

    def _step(self) -> tuple[Tensor, Tensor]:
        logits = self._model.decoder(self._batch, self._cache)
        assert logits is not None
        return logits, self._model.ops.sample(logits, **self._options)

    def _fill(self, parts: Sequence[Part]) -> None:
        requests = [p.request for p in parts]
        for b, request in enumerate((*requests, *[None] * (self._B - len(parts)))):
            if b not in self._seated or request is not self._seated[b]:
                self._seat(b, request)
        # Slots of a call differ: unused rows have places of their own in the scratch page.
        starts = [*(p.start for p in parts), *range(len(parts), self._B)]
        lengths = [start + 1 for start in starts]
        unused = [0] * (self._B - len(parts))
        columns = {
            "ids": [r.tokens[-1] for r in requests] + unused,
            "index": [len(r.tokens) for r in requests] + unused,
            "positions": starts,
            "kv_lens": lengths,
            "slots": [
                pages[start // PAGE_SIZE] * PAGE_SIZE + start % PAGE_SIZE
                for pages, start in zip(self._pages, starts, strict=True)
            ],
        }
        for name, values in columns.items():
            self._mirror.host[name].copy_(torch.tensor(values))
        inv_freq, scale = self._model.decoder.rotary(lengths)
        self._mirror.host["inv_freq"].copy_(inv_freq)
        self._mirror.host["scale"].copy_(scale)

    def _seat(self, b: int, request: Request | None) -> None:
        host, params = self._mirror.host, SamplingParams() if request is None else request.params
        pages = torch.tensor([self._cache.scratch])
        if request is not None:
            assert request.pages is not None
            pages = request.pages
        self._seated.pop(b, None)
        for name in _COLUMNS:
            host[name][b] = getattr(params, name)
        row = host["page_table"][b]
        row[: len(pages)].copy_(pages[: len(row)])
        self._pages[b] = pages.tolist()
        self._seated[b] = request
