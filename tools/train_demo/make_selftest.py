"""Draws the pictures of `internvl-rt selftest` and records what plain torch answers to them.

python tools/train_demo/make_selftest.py python/internvl_rt/demo_model
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import data
import draw
import internvl_rt as ivr

TASKS = ("number", "shape and colour", "count", "relation", "emoji")  # one picture, one right word
SIDE = 224
EACH = 8  # pictures of a task
MAX_PNG_BYTES = 12_000  # without noise: the set travels in the package


def small(picture: draw.Picture) -> bool:
    file = io.BytesIO()
    Image.fromarray(picture.pixels).save(file, "PNG", optimize=True)
    return file.tell() <= MAX_PNG_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the checkpoint; the files are put beside it")
    folder = parser.parse_args().folder
    chosen = [
        (task, picture)
        for task in TASKS
        for picture in list(filter(small, data.exam(task, SIDE, 6 * EACH, held_out=True, seed=99)))[
            :EACH
        ]
    ]
    model = ivr.load(folder, dtype="float32", backend="reference")
    requests = [{"question": p.turns[0][1], "images": p.pixels} for _, p in chosen]
    recorded = model.batch_chat(requests, max_new_tokens=16)
    entries = [
        {"task": task, "question": p.turns[0][1], "answer": p.turns[0][2], "recorded": answer}
        for (task, p), answer in zip(chosen, recorded, strict=True)
    ]
    sheet = Image.fromarray(np.concatenate([p.pixels for _, p in chosen]))
    sheet.save(folder / "selftest.png", optimize=True)
    text = "[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in entries) + "\n]\n"
    (folder / "selftest.json").write_text(text, encoding="utf-8")
    right = sum(e["answer"] == e["recorded"] for e in entries)
    print(f"{folder}: {len(entries)} questions, {right} answered right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
