"""What a step of the decoder is told about its tokens. Metadata is an argument, never a global."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from internvl_rt.runtime.kv_cache import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: a part of its prompt, or the token sampled last."""

    ids: Tensor  # int64 [n]
    start: int  # position of ids[0]
    pages: Tensor  # int64: the sequence's pages, in order
    logits: str  # rows of logits wanted: "none" | "last" | "all"
    image: Tensor | None = None  # [N, hidden]: features of the sequence's pictures
    image_row: Tensor | None = None  # int64 [n]: row of `image`, -1 for text
    # Length that the rotary angles follow: the whole prompt's for every part of it, so that they
    # do not depend on how it is cut; None: the keys so far.
    rope_len: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of B sequences, back to back."""

    ids: Tensor  # int64 [T]
    image: Tensor | None  # [N, hidden]
    image_row: Tensor | None  # int64 [T]
    positions: Tensor  # float32 [T]
    sequence: Tensor  # int32 [T], the sequence of a token
    slots: Tensor  # int64 [T], where its key and value go: page * P + offset
    cu_q: Tensor  # int32 [B+1]
    kv_lens: Tensor  # int32 [B], keys that the last token of a sequence sees
    inv_freq: Tensor  # float32 [B, D/2], rotary frequencies
    scale: Tensor  # float32 [B], of rotated queries and keys
    page_table: Tensor  # int32 [B, pages of the longest]
    logits_rows: Tensor | None  # int64 [R], None: all rows
    # "prefill" or "decode", where every sequence has one token: on a GPU they have kernels of their
    # own, on the CPU nothing depends on it.
    phase: str

    def metadata(self) -> dict[str, Tensor]:
        """All but the picture features, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "image"}
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}

    def on_device(self, metadata: Sequence[Tensor]) -> Batch:
        """The batch with other tensors in the places of `metadata`, in its order."""
        return replace(self, **dict(zip(self.metadata(), metadata, strict=True)))


def make_batch(
    chunks: Sequence[Chunk],
    rotary: Callable[[Sequence[int]], tuple[Tensor, Tensor]],
    phase: str = "prefill",
) -> Batch:
    """Lays chunks of different sequences back to back, on the CPU.

    rotary: inv_freq and scale of sequences whose angles follow these lengths.
    """
    lengths = [len(c.ids) for c in chunks]
    positions = [torch.arange(c.start, c.start + n) for c, n in zip(chunks, lengths, strict=True)]
    slots = [
        c.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE
        for c, p in zip(chunks, positions, strict=True)
    ]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    table = torch.zeros(len(chunks), max(len(c.pages) for c in chunks), dtype=torch.int32)
    for b, c in enumerate(chunks):
        table[b, : len(c.pages)] = c.pages
    image, image_row = _join_images(chunks, lengths)
    inv_freq, scale = rotary(
        [
            c.start + n if c.rope_len is None else c.rope_len
            for c, n in zip(chunks, lengths, strict=True)
        ]
    )
    return Batch(
        ids=torch.cat([c.ids for c in chunks]),
        image=image,
        image_row=image_row,
        positions=torch.cat(positions).float(),
        sequence=torch.repeat_interleave(
            torch.arange(len(chunks), dtype=torch.int32), torch.tensor(lengths)
        ),
        slots=torch.cat(slots),
        cu_q=cu.int(),
        kv_lens=torch.tensor(
            [c.start + n for c, n in zip(chunks, lengths, strict=True)], dtype=torch.int32
        ),
        inv_freq=inv_freq,
        scale=scale,
        page_table=table,
        logits_rows=_logits_rows(chunks, cu.tolist()),
        phase=phase,
    )


def _join_images(
    chunks: Sequence[Chunk], lengths: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    parts, rows, offset = [], [], 0
    for c, n in zip(chunks, lengths, strict=True):
        if c.image is None or c.image_row is None:
            rows.append(torch.full((n,), -1))
            continue
        rows.append(torch.where(c.image_row >= 0, c.image_row + offset, c.image_row))
        parts.append(c.image)
        offset += len(c.image)
    if not parts:
        return None, None
    return parts[0] if len(parts) == 1 else torch.cat(parts), torch.cat(rows)


def _logits_rows(chunks: Sequence[Chunk], cu: Sequence[int]) -> Tensor | None:
    if all(c.logits == "all" for c in chunks):
        return None
    rows: list[int] = []
    for b, c in enumerate(chunks):
        if c.logits == "last":
            rows.append(cu[b + 1] - 1)
        elif c.logits == "all":
            rows.extend(range(cu[b], cu[b + 1]))
    return torch.tensor(rows, dtype=torch.int64)
