"""`internvl-rt selftest`: the demonstration model over a fixed set of pictures.

Every answer is compared with the truth and with what plain torch in float32 answered when the set
was made (tools/train_demo/make_selftest.py): an installation whose kernels are right repeats that.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from internvl_rt import _C
from internvl_rt.model import DEMO_MODEL, load

# bfloat16 may tip an answer that was nearly level; a wrong kernel changes most of them.
MAX_DIFFERENT = 0.05


@dataclass(frozen=True)
class Report:
    """accuracy: task to (right, asked). different: answers unlike the recorded ones, of `asked`."""

    accuracy: dict[str, tuple[int, int]]
    asked: int
    different: int
    tokens_per_second: float
    kernels: dict[str, int]

    @property
    def ok(self) -> bool:
        return self.different <= MAX_DIFFERENT * self.asked

    def text(self) -> str:
        lines = [f"{t:20} {right:3d} of {n:3d} right" for t, (right, n) in self.accuracy.items()]
        lines.append(f"{self.asked - self.different} of {self.asked} answers as recorded")
        speed = f"{self.tokens_per_second:.0f} tokens/s in one batch"
        lines.append(f"{speed}, pictures and prompts included")
        lines.append("kernels: " + ", ".join(sorted(self.kernels)))
        lines.append("ok" if self.ok else "WRONG: this installation computes something else")
        return "\n".join(lines)


def questions() -> list[tuple[np.ndarray, dict[str, str]]]:
    """Pictures uint8 [S, S, 3] with task, question, answer (the truth) and recorded."""
    entries = json.loads((DEMO_MODEL / "selftest.json").read_text(encoding="utf-8"))
    sheet = np.asarray(Image.open(DEMO_MODEL / "selftest.png").convert("RGB"))
    side = sheet.shape[1]
    return [(sheet[side * i : side * (i + 1)], entry) for i, entry in enumerate(entries)]


def run(
    device: str = "auto",
    dtype: str = "auto",
    backend: str | None = None,
    threads: int | None = None,
    quant: str | None = None,
) -> Report:
    """Asks every question once, all in one batch. Arguments as in `load`."""
    model = load(device=device, dtype=dtype, backend=backend, threads=threads, quant=quant)
    asked = questions()
    model.chat(asked[0][1]["question"], images=asked[0][0], max_new_tokens=1)  # warms up
    _C.kernel_counts(reset=True)
    requests = [{"question": entry["question"], "images": image} for image, entry in asked]
    begin = time.perf_counter()
    answers = model.batch_chat(requests, max_new_tokens=16)
    seconds = time.perf_counter() - begin
    counts = _C.kernel_counts(reset=True)
    # What ends an answer is one more.
    tokens = sum(len(model.tokenizer.encode_plain(answer)) + 1 for answer in answers)
    entries = [entry for _, entry in asked]
    total = Counter(entry["task"] for entry in entries)
    right = Counter(e["task"] for e, a in zip(entries, answers, strict=True) if a == e["answer"])
    return Report(
        accuracy={task: (right[task], n) for task, n in total.items()},
        asked=len(entries),
        different=sum(a != e["recorded"] for e, a in zip(entries, answers, strict=True)),
        tokens_per_second=tokens / seconds,
        kernels=counts,
    )
