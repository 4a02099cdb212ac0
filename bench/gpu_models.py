"""Whole models on a GPU beside Hugging Face transformers: the end-to-end part of gpu_check.sh.

    python bench/gpu_models.py internvl3-1b --out DIR   # DIR/models-internvl3-1b.json
    python bench/gpu_models.py internvl3-8b --out DIR
    python bench/gpu_models.py tiny --out DIR --dry-run  # on the CPU: tries the script

bfloat16, random weights in real shapes. Both sides read one checkpoint, and must agree, where
writing it takes little time; of the 8B each draws its own where it stands. Rows as in cpu.py;
ttft-T is the time from T tiles and 64 tokens of text to the first token, picture included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gpu_parts
import internvl_rt as ivr
from cpu import Ours, Transformers, agreement, summary, table, time_row
from internvl_rt.config import load_config
from internvl_rt.engine import Engine
from internvl_rt.models.internvl import InternVL
from internvl_rt.ops import OpSet
from internvl_rt.runtime.platform import platform_for
from make_checkpoint import IMG_CONTEXT_ID, SHAPES, make, native_config
from random_weights import RandomWeights

IN_PLACE = ("internvl3-8b",)  # too large to write
ROWS = (
    "vit-1",
    "vit-4",
    "vit-13",
    "ttft-1",
    "ttft-13",
    "prefill-1088",
    "decode-320",
    "decode-2048",
    "decode-8x320",
    "decode-64x320",
)
DRY_ROWS = ("vit-1", "ttft-1", "decode-2x20")
KV_TOKENS = 1 << 16  # the other side needs memory too
SECONDS = 2.0


def drawn(folder: Path, device: str, peer: bool) -> dict[str, Any]:
    """Both sides with weights of their own, drawn on the device; folder has a config.json."""
    sides: dict[str, Any] = {}
    if peer:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        with torch.device(device):
            config = InternVLConfig.from_pretrained(folder)
            config.dtype = torch.bfloat16
            model = InternVLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        sides["peer"] = Transformers(model)
    ours, platform = load_config(folder), platform_for(device)
    opset = OpSet(device=platform.device.type)
    with platform.lock, platform.scope():
        weights = RandomWeights(ours, torch.bfloat16, platform)
        core = InternVL(ours, weights, opset, torch.bfloat16)
        engine = Engine(core, kv_tokens=KV_TOKENS)
    model = ivr.Model(folder, ours, core, engine, IMG_CONTEXT_ID)
    return {"ours": Ours(model)} | sides


def read(folder: Path, device: str, peer: bool) -> dict[str, Any]:
    """Both sides with the weights of a checkpoint."""
    sides: dict[str, Any] = {}
    if peer:
        sides["peer"] = Transformers.load(folder, torch.bfloat16, torch.get_num_threads())
        sides["peer"].model.to(device)
    begin = time.perf_counter()
    model = ivr.load(
        folder, device=device, dtype="bfloat16", image_token_id=IMG_CONTEXT_ID, kv_tokens=KV_TOKENS
    )
    print(f"loaded in {time.perf_counter() - begin:.2f} s")
    return {"ours": Ours(model)} | sides


def measure(shape: str, out: Path, *, dry: bool) -> bool:
    """Writes the rows after each; False where one failed."""
    device = "cpu" if dry else "cuda"
    finish: Callable[[], Any] = (lambda: None) if dry else torch.cuda.synchronize
    peer = importlib.util.find_spec("transformers") is not None and not dry
    file = out / f"models-{shape}.json"
    found: dict[str, Any] = {"shape": shape, "dtype": "bfloat16", "device": device, "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        if shape in IN_PLACE or dry:
            folder.mkdir()
            for name, config in native_config(SHAPES[shape], "bfloat16").items():
                (folder / name).write_text(json.dumps(config))
            sides = drawn(folder, device, peer)
        else:
            make(folder, SHAPES[shape], layout="hf", threads=16)
            sides = read(folder, device, peer)
            if peer:
                found["agreement"] = agreement(sides, torch.bfloat16)
    for row in DRY_ROWS if dry else ROWS:
        print(row, flush=True)
        try:
            samples = time_row(row, sides, 0.0 if dry else SECONDS, finish)
            found["rows"].append(summary(row, samples))
        except (RuntimeError, ValueError, MemoryError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            found["rows"].append({"row": row, "error": why})
        gpu_parts.write(file, found)
    print(table(found["rows"]))
    return not any("error" in row for row in found["rows"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    return 0 if measure(options.shape, options.out, dry=options.dry_run) else 1


if __name__ == "__main__":
    sys.exit(main())
