"""Accuracy of the demonstration model per task, for every dtype, quantisation and backend.

    python bench/accuracy.py                                  # 200 pictures a task
    python bench/accuracy.py --runs f32:reference,int8:native --count 50
    python bench/accuracy.py --sets square --out bench/results/cpu-zen4/accuracy.json  # the gate
    python bench/accuracy.py --model /tmp/demo/export --out bench/results/accuracy.json

The pictures are drawn with seeds and fonts that training never saw (tools/train_demo), one question
a picture, but for the task that asks a second one after the model's own answer. `square` are 224 x
224 pixels, one tile; `foreign` are 320 to 640 pixels, of any shape, light, written by other code,
and run as several tiles and a thumbnail. The first run is the yardstick that the others are
compared with, answer by answer. int8 and int4 are the language model's weights quantised at load,
over bfloat16; the exit status is 1 where one of them loses more of the yardstick's accuracy over
all tasks than GATE allows.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import internvl_rt as ivr
from internvl_rt import _C
from internvl_rt.prompt import with_placeholders

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "train_demo"))

import data
import world

FORMATS = {
    "f32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quant": "int8"},
    "int4": {"dtype": "bfloat16", "quant": "int4"},
}
RUNS = "f32:reference,f32:native,bf16:native,bf16:reference,int8:native,int4:native"
GATE = {"int8": 0.5, "int4": 2.0}  # points


@dataclass(frozen=True)
class Question:
    """asked_before: the question whose answer, the model's own, comes before this one."""

    task: str
    images: list[np.ndarray]
    question: str
    answer: str
    asked_before: str | None = None


def square(count: int) -> list[Question]:
    return [
        Question(
            task,
            [x.pixels for x in (p.first, p) if x is not None],
            *p.turns[0][1:],
            p.turns[1][1] if task == "second turn" else None,
        )
        for task in world.TASKS
        for p in data.exam(task, 224, count, held_out=True, seed=11)
    ]


_PLAIN = {
    "red": "#d01f1f", "orange": "#ff8c00", "yellow": "#f5d800", "green": "#1f9d3a",
    "blue": "#2050d8", "purple": "#7d2fb0", "pink": "#ff80b0", "brown": "#6b4015",
    "black": "#111111",
}  # fmt: skip


def _plain_shape(draw: ImageDraw.ImageDraw, noun: str, box: tuple[int, ...], fill: str) -> None:
    x0, y0, x1, y1 = box
    cx, cy, r = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    if noun == "circle":
        draw.ellipse(box, fill=fill)
    elif noun == "ring":
        draw.ellipse(box, outline=fill, width=max(2, round(r / 3)))
    elif noun == "square":
        draw.rectangle(box, fill=fill)
    elif noun == "triangle":
        draw.polygon([(cx, y0), (x1, y1), (x0, y1)], fill=fill)
    elif noun == "diamond":
        draw.polygon([(cx, y0), (x1, cy), (cx, y1), (x0, cy)], fill=fill)
    elif noun == "star":
        turns = [np.pi * (i / 5 - 0.5) for i in range(10)]
        radii = [r * (1, 0.42)[i % 2] for i in range(10)]
        points = [
            (cx + q * np.cos(t), cy + q * np.sin(t)) for q, t in zip(radii, turns, strict=True)
        ]
        draw.polygon(points, fill=fill)
    else:
        raise KeyError(noun)


def _places(
    rng: np.random.Generator, size: tuple[int, int], sides: list[int]
) -> list[tuple[int, ...]]:
    while True:
        boxes: list[tuple[int, ...]] = []
        for side in sides:
            x, y = (int(rng.integers(8, n - side - 8)) for n in size)
            boxes.append((x, y, x + side, y + side))
        apart = all(
            a[2] + 10 < b[0] or b[2] + 10 < a[0] or a[3] + 10 < b[1] or b[3] + 10 < a[1]
            for i, a in enumerate(boxes)
            for b in boxes[:i]
        )
        if apart:
            return boxes


def _foreign(rng: np.random.Generator, task: str) -> Question:
    if task == "two pictures":
        kind = str(rng.choice(["number", "shape and colour", "emoji"]))
        both, which = [_foreign(rng, kind) for _ in range(2)], int(rng.integers(2))
        where = world.ORDINALS[0][which]
        noun = kind.split()[0]
        answer = both[which].answer.split()[-1] if noun == "shape" else both[which].answer
        images = [image for part in both for image in part.images]
        return Question(task, images, f"What {noun} is in {where}?", answer)
    if task == "second turn":
        first = _foreign(rng, "shape and colour")
        colour, noun = first.answer.split()
        turns = [("What shape is it?", noun), (f"What colour is the {noun}?", colour)]
        (before, _), (question, answer) = (turns[i] for i in rng.permutation(2))
        return Question(task, first.images, question, answer, before)
    size = tuple(int(v) for v in rng.integers(320, 641, 2))
    least = min(size)
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(235, 256, 3)))
    draw = ImageDraw.Draw(image)
    nouns = ("circle", "ring", "square", "triangle", "diamond", "star")
    noun, colour = str(rng.choice(nouns)), str(rng.choice(list(_PLAIN)))
    if task == "number":
        text = str(rng.integers(0, 10 ** int(rng.integers(1, 5))))
        file = world.fonts(held_out=True)[rng.integers(len(world.fonts(held_out=True)))]
        face = ImageFont.truetype(str(file), int(least * rng.uniform(0.2, 0.34)))
        draw.text((size[0] / 2, size[1] / 2), text, font=face, fill=_PLAIN[colour], anchor="mm")
        return Question(task, [np.asarray(image)], "What number is written here?", text)
    if task == "shape and colour":
        (box,) = _places(rng, size, [int(least * rng.uniform(0.25, 0.7))])
        _plain_shape(draw, noun, box, _PLAIN[colour])
        question, answer = "What shape is it and what colour?", f"{colour} {noun}"
    elif task in ("count", "count to nine"):
        few = task == "count"
        count = int(rng.integers(1, 6 if few else 10))
        reach = (0.14, 0.2) if few else (0.12, 0.16)
        for box in _places(rng, size, [int(least * rng.uniform(*reach))] * count):
            _plain_shape(draw, noun, box, _PLAIN[colour])
        question, answer = f"How many {world.plural(noun)} are there?", str(count)
    elif task == "relation":
        other = str(rng.choice([n for n in nouns if n != noun]))
        side, along = int(least * rng.uniform(0.16, 0.24)), int(rng.integers(2))
        while True:
            boxes = _places(rng, size, [side, side])
            gap = [boxes[1][i] - boxes[0][i] for i in (0, 1)]
            if abs(gap[along]) > 1.3 * side and abs(gap[1 - along]) < 0.4 * side:
                break
        for name, box in zip((noun, other), boxes, strict=True):
            _plain_shape(draw, name, box, _PLAIN[str(rng.choice(list(_PLAIN)))])
        words = (("left", "right"), ("above", "below"))[along]
        question = f"Is the {noun} {' or '.join(words)} {('of ', '')[along]}the {other}?"
        answer = words[int(gap[along] < 0)]
    elif task == "box":
        other = str(rng.choice([n for n in nouns if n != noun]))
        boxes = _places(rng, size, [int(least * rng.uniform(0.16, 0.4)) for _ in range(2)])
        for name, box in zip((noun, other), boxes, strict=True):
            _plain_shape(draw, name, box, _PLAIN[str(rng.choice(list(_PLAIN)))])
        corners = [round(999 * v / n) for v, n in zip(boxes[0], 2 * size, strict=True)]
        question, answer = f"Where is the {noun}?", f"<ref>{noun}</ref><box>[{corners}]</box>"
    else:
        names, sprites = world.emoji()
        index, side = int(rng.integers(len(names))), int(least * rng.uniform(0.3, 0.8))
        sprite = Image.fromarray(sprites[index]).resize((side, side), Image.Resampling.LANCZOS)
        (box,) = _places(rng, size, [side])
        image.paste(sprite, box[:2], sprite)
        question, answer = "What emoji is this?", names[index]
    return Question(task, [np.asarray(image)], question, answer)


def foreign(count: int) -> list[Question]:
    found = []
    for task in world.TASKS:
        rng = np.random.default_rng([12, *task.encode()])
        found += [_foreign(rng, task) for _ in range(count)]
    return found


SETS = {"square": square, "foreign": foreign}


def run(model: ivr.Model, questions: list[Question], batch: int) -> list[str]:
    answers: list[str] = []
    for i in range(0, len(questions), batch):
        part = questions[i : i + batch]
        again = [n for n, q in enumerate(part) if q.asked_before]
        earlier = [{"question": part[n].asked_before, "images": part[n].images} for n in again]
        requests = [{"question": q.question, "images": q.images} for q in part]
        for n, said in zip(again, model.batch_chat(earlier, max_new_tokens=40), strict=True):
            asked = with_placeholders(part[n].asked_before, None, num_images=len(part[n].images))
            requests[n]["history"] = [(asked, said)]
        answers += model.batch_chat(requests, max_new_tokens=40)
    return answers


def score(questions: list[Question], answers: list[str]) -> dict[str, float]:
    """Per cent right per task, and over all questions."""
    right: dict[str, list[bool]] = {task: [] for task in (*world.TASKS, "all")}
    for asked, answer in zip(questions, answers, strict=True):
        hit = data.right(answer, asked.answer)
        right[asked.task].append(hit)
        right["all"].append(hit)
    return {task: round(100 * float(np.mean(found)), 1) for task, found in right.items() if found}


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each run that its gate does not let pass; the first row is the yardstick."""
    full = rows[0]["accuracy"]["all"]
    lines = []
    for row in rows:
        kind = row["run"].split(":")[0]
        lost = full - row["accuracy"]["all"]
        if kind in GATE and not lost <= GATE[kind]:
            lines.append(f"{row['set']} {kind}: {lost:.1f} points lost, allowed: {GATE[kind]}")
    return lines


def measure(
    model: str | None, name: str, runs: list[str], count: int, batch: int
) -> list[dict[str, Any]]:
    """A row per run over one set; the first run is the yardstick."""
    questions = SETS[name](count)
    rows: list[dict[str, Any]] = []
    yardstick: list[str] = []
    for spec in runs:
        kind, backend = spec.split(":")
        loaded = ivr.load(model, **FORMATS[kind], backend=backend)
        begin = time.perf_counter()
        answers = run(loaded, questions, batch)
        seconds = time.perf_counter() - begin
        yardstick = yardstick or answers
        differ = sum(a != b for a, b in zip(answers, yardstick, strict=True))
        row = {"set": name, "run": spec, "accuracy": score(questions, answers)}
        row |= {"different": differ, "of": len(questions), "seconds": round(seconds, 1)}
        rows.append(row)
        figures = "  ".join(f"{t} {v:5.1f}" for t, v in row["accuracy"].items())
        print(f"{name:8} {spec:15} {figures}  {differ} differ", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint; without it the one in the package")
    parser.add_argument(
        "--runs", default=RUNS, help=f"{', '.join(FORMATS)}:backend, comma-separated"
    )
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--count", type=int, default=200, help="pictures a task")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON")
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    lost: list[str] = []
    for name in given.sets.split(","):
        found = measure(given.model, name, given.runs.split(","), given.count, given.batch)
        rows += found
        lost += losses(found)
    if given.out:
        about = {"isa": _C.isa(), "threads": _C.num_threads(), "torch": torch.__version__}
        about |= {"machine": platform.processor() or platform.machine(), "count": given.count}
        given.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("\n".join(lost), end="\n" if lost else "")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
