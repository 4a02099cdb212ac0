"""Batches of pictures and conversations, drawn in a process of their own."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import draw
import world
from internvl_rt.grounding import parse
from internvl_rt.image import tile_grid
from model import Sizes
from tokens import Conversation, Writer, make_tokenizer, pad, together

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
_TALKED_ABOUT = ("number", "shape and colour", "count", "emoji")  # in an exam of second turns
SECOND_TURN = 0.2  # how often a turn follows another instead of standing alone
# A task joins the mixture when this share of the stage is over: circuits form faster alone.
JOINS = {
    "number": 0.0,
    "shape and colour": 0.1,
    "emoji": 0.2,
    "relation": 0.3,
    "count": 0.45,
    "outside": 0.9,
}
# Share of a task in the mixture: more of what is learned more slowly.
WEIGHTS = {
    "number": 2.4,
    "shape and colour": 0.6,
    "emoji": 1.6,
    "relation": 0.4,
    "count": 2.2,
    "outside": 0.3,
}


@dataclass(frozen=True)
class Source:
    """Pictures of one kind in a batch.

    kind: "page" (nothing is asked); "scene", square; "thumbnail", a larger scene of any shape,
    squeezed into a square; "tiles", the same as tiles and thumbnail, all of one grid; "pair", two
    square ones with one thing each.
    """

    kind: str
    side: int
    count: int


@dataclass(frozen=True)
class Plan:
    """What a stage is fed: its sources take turns; tasks join one after the other if `staged`.

    weights: share of a task in the mixture. room: tokens after a picture, for as many conversations
    about it as they hold, the exam's task first. boxes: how often places are asked for at all;
    their answers are long.
    """

    name: str
    sources: tuple[Source, ...]
    staged: bool = False
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    room: int = 90
    boxes: float = 0.3
    vocab: int = 0
    seed: int = 0


def batch(plan: Plan, writer: Writer, index: int, progress: float) -> dict[str, Any]:
    """Arrays of one batch: pixels, `Picture.labels`, and for scenes the fields of Conversation.

    pixels uint8 [B, S, S, 3]; where there is more than one tile also tiles [B, t, S, S, 3], those
    that come before it: all but the thumbnail, or the first of two pictures.
    """
    rng = np.random.default_rng([plan.seed, *plan.name.encode(), index])
    source = plan.sources[index % len(plan.sources)]
    if source.kind == "page":
        return _arrays([draw.page(rng, source.side) for _ in range(source.count)])
    tasks = [t for t, start in JOINS.items() if progress >= start or not plan.staged]
    weights = np.array([plan.weights[t] for t in tasks])
    chosen = [str(t) for t in rng.choice(tasks, source.count, p=weights / weights.sum())]
    drawn = _draw(rng, source, chosen)
    squares = [p if p.pixels.shape[0] == source.side else p.resized(source.side) for p in drawn]
    arrays = _arrays(squares)
    if source.kind == "pair":
        arrays["tiles"] = np.stack([p.first.pixels[None] for p in drawn])
    if source.kind == "tiles":
        tiles = np.stack([tiles_of(p.pixels, source.side) for p in drawn])
        if tiles.shape[1] > 0:  # else one tile does, and it is the thumbnail
            arrays["tiles"] = tiles
    n, more = tokens_of(source.side), arrays["tiles"].shape[1] if "tiles" in arrays else 0
    each = (n, n) if source.kind == "pair" else (n + more * n,)
    whole = source.side == Sizes.image_size  # a smaller one does not know what part it sees
    located = [whole and rng.random() < plan.boxes for _ in drawn]
    talks = [
        _talks(rng, p, each, [t for t in p.turns if yes or t[0] != "box"], writer, plan.room)
        for p, yes in zip(drawn, located, strict=True)
    ]
    arrays["before"] = np.array([t.before for t in talks])
    arrays["after"] = pad([t.after for t in talks], 0)
    arrays["weights"] = pad([t.weights for t in talks], 0.0)
    arrays["branch"] = pad([t.branch for t in talks], -1)
    arrays["position"] = pad([t.position for t in talks], 0)
    arrays["named"] = np.full((*arrays["after"].shape, 4), np.nan, np.float32)
    if whole:
        for row, talk, picture in zip(arrays["named"], talks, squares, strict=True):
            for at, name in enumerate(talk.names):
                if name:
                    row[at] = picture.box(name) / draw.PATCH
    return arrays


def _talks(
    rng: np.random.Generator,
    picture: draw.Picture,
    tokens: tuple[int, ...],
    turns: list[tuple],
    writer: Writer,
    room: int,
) -> Conversation:
    """Conversations of one or two turns about a picture, the first turn surely among them."""
    groups: list[list[tuple[str, str]]] = []
    for i in [0, *(1 + rng.permutation(len(turns) - 1))]:
        if groups and len(groups[-1]) == 1 and rng.random() < SECOND_TURN:
            groups[-1].insert(int(rng.integers(2)), turns[i][1:])
        else:
            groups.append([turns[i][1:]])
    talks = [writer.conversation(g, tokens=tokens, named=picture.named) for g in groups]
    lengths = np.cumsum([len(t.after) for t in talks])
    return together(talks[: max(1, int((lengths <= room).sum()))])


def _draw(rng: np.random.Generator, source: Source, tasks: list[str]) -> list[draw.Picture]:
    if source.kind == "pair":
        return [draw.pair(rng, source.side) for _ in tasks]
    if source.kind == "scene":
        return [draw.scene(rng, task, source.side, source.side) for task in tasks]
    low, high = 5 * source.side // 4, 3 * source.side
    size = rng.integers(low, high, 2)  # shared: all of a batch have one grid
    if source.kind == "tiles":
        return [draw.scene(rng, task, *size.tolist()) for task in tasks]
    drawn = []
    for task in tasks:
        width = int(rng.integers(low, high))
        height = int(np.clip(width * rng.uniform(0.6, 1.67), low, high))
        drawn.append(draw.scene(rng, task, width, height).resized(source.side))
    return drawn


def tokens_of(side: int) -> int:
    """Of a square picture."""
    return (side // (2 * draw.PATCH)) ** 2


def tiles_of(pixels: np.ndarray, side: int) -> np.ndarray:
    """The tiles of InternVL's dynamic tiling without the thumbnail, uint8 [t, side, side, 3]."""
    height, width = pixels.shape[:2]
    columns, rows = tile_grid(width, height, world.MAX_TILES, side)
    if columns * rows == 1:
        return np.empty((0, side, side, 3), np.uint8)
    image = Image.fromarray(pixels).resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    grid = np.asarray(image).reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * columns, side, side, 3)


def _arrays(pictures: list[draw.Picture]) -> dict[str, np.ndarray]:
    labels = [p.labels() for p in pictures]
    arrays = {key: np.stack([x[key] for x in labels]) for key in labels[0]}
    return arrays | {"pixels": np.stack([p.pixels for p in pictures])}


def exam(task: str, side: int, count: int, *, held_out: bool, seed: int) -> list[draw.Picture]:
    """Fresh pictures for one task (or "outside"); turns[0] is the one to ask.

    Of "second turn" it is the one to ask after turns[1].
    """
    rng = np.random.default_rng([seed, *f"exam {task} {side}".encode()])
    pictures = []
    while len(pictures) < count:
        if task == "two pictures":
            pictures.append(draw.pair(rng, side, held_out))
            continue
        about = "relation" if task == "box" else task
        if task == "second turn":
            about = str(rng.choice(_TALKED_ABOUT))
        picture = draw.scene(rng, about, side, side, held_out)
        if task == "box":
            picture.turns = [turn for turn in picture.turns if turn[0] == task]
        if task == "second turn":
            plain = [turn for turn in picture.turns if turn[0] != "box"]
            first, second = (plain[i] for i in rng.permutation(len(plain))[:2])
            picture.turns = [(task, *second[1:]), first]
        if picture.turns[0][0] == task:  # "count" has another task for six to nine
            pictures.append(picture)
    return pictures


def right(answer: str, truth: str) -> bool:
    """Is it the same; a box may differ: intersection over union of at least one half."""
    if "<box>" not in truth:
        return answer == truth
    found, wanted = (parse(text, 1000, 1000) for text in (answer, truth))
    if len(found) != 1 or found[0].label != wanted[0].label:
        return False
    a, b = (np.array(r[0].box).reshape(2, 2) for r in (found, wanted))
    shared = np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None).prod()
    return bool(2 * shared >= (a[1] - a[0]).prod() + (b[1] - b[0]).prod() - shared)


def normalise(pixels: np.ndarray | Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """uint8 [B, S, S, 3] -> [B, 3, S, S]."""
    x = torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 255
    return ((x - _MEAN) / _STD).to(device, dtype)


class Loader:
    """Batches of a plan, drawn ahead by worker processes; `progress` is told to them."""

    def __init__(self, plan: Plan, workers: int) -> None:
        context = mp.get_context("spawn")
        self.progress = context.Value("d", 0.0)
        self._queues = [context.Queue(4) for _ in range(workers)]
        self._workers = [
            context.Process(target=_work, args=(plan, q, self.progress, i, workers), daemon=True)
            for i, q in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = 0
        while True:
            yield self._queues[index % len(self._queues)].get()
            index += 1

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()


def _work(plan: Plan, queue: Any, progress: Any, first: int, step: int) -> None:
    writer = Writer(make_tokenizer(plan.vocab)) if plan.vocab else None
    index = first
    while True:
        queue.put(batch(plan, writer, index, progress.value))
        index += step
