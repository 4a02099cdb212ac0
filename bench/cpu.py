"""Whole models beside Hugging Face transformers, on the same random weights, in the same run.

    python bench/cpu.py                    # InternVL3-1B's shape in bfloat16, all threads
    python bench/cpu.py --dtype f32 --rows vit-1,decode-320
    python bench/cpu.py --isa avx2         # all sides as on a CPU that has no more than that
    python bench/cpu.py --shape tiny       # seconds: tries the bench, its figures mean nothing

All sides read the same files (Transformers-native layout), use the same number of threads, and
take turns call by call, each first in every other round. The peer runs eagerly with its default
attention (scaled_dot_product_attention, the faster one of its two). OpenVINO and llama.cpp take
part in what they have graphs for, where they are installed. Before anything is timed all must agree
on picture features and logits. Load time and memory are measured in processes of their own, with
the files in the page cache.

    vit-T          T tiles of 448 x 448 through tower and projector
    prefill-N      a prompt of N tokens, logits of the last one, its argmax
    decode-N       the next token after a context of N; decode-BxN: of B sequences together
    decode-N-int8  with quantised weights; the peer, which has none, as in decode-N
    preprocess-4k  a picture of 3840 x 2160 to 13 tiles; the peer is Pillow, numpy and torch
    load           checkpoint to model; first-token: and 8 tokens of prompt to the next token
    memory         peak resident memory above that after the imports: load, 1 tile, 64 + 8 tokens

A row's floor is what the machine allows: the weights and the cache that a decode step reads, at the
rate of a plain read in four streams, or the operations, at the rate of multiply-adds on registers
alone (kernels/peak.h), whichever takes longer. The rates are measured before and after the row, for
a shared machine's memory is not as fast at all times; the better ones count. For the row `memory`
it is the size of the tensors. share is the floor over our median.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from make_checkpoint import IMAGE_SIZE, IMG_CONTEXT_ID, PATCH, SHAPES, UNSHUFFLE, Shape, make

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "f32": torch.float32,
    "float32": torch.float32,
}
# packed: ours with weights that are not read in place; peer: transformers.
SIDES = ("ours", "packed", "peer", "openvino", "llamacpp")
ROWS = (
    "vit-1",
    "vit-4",
    "prefill-320",
    "prefill-1088",
    "decode-320",
    "decode-2048",
    "decode-8x320",
    "decode-320-int8",
    "decode-320-int4",
    "preprocess-4k",
    "load",
    "first-token",
    "memory",
)
# Sides that are there where their packages are, and the rows that they take part in.
PACKAGES = {"openvino": ("openvino",), "llamacpp": ("xllamacpp", "gguf")}
TAKES = {
    "packed": ("prefill", "decode", "load", "first-token", "memory"),
    "openvino": ("vit", "prefill", "decode"),
    "llamacpp": ("prefill", "decode"),
}
QUANTISED = ("ours", "llamacpp")
# What holds the peers to an instruction set: read from the environment by torch, oneDNN and MKL as
# they are loaded. OpenVINO has a oneDNN of its own, which nothing shows to listen; llama.cpp's
# wheel uses AVX2 at most.
HELD = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
HELD_TO = {
    "portable": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512"),
}
HOLDS = {"peer": tuple(HELD_TO), "openvino": (), "llamacpp": ("avx2",)}
IN_PROCESSES = ("load", "first-token", "memory")
# Distance of the two sides' results, relative to their size (both root mean square), above which
# one of them computes something else. The bfloat16 bound allows for 24 layers of rounding.
AGREEMENT = {torch.bfloat16: 0.06, torch.float32: 1e-3}
TILE_TOKENS = 256
LEAST, MOST = 3, 50  # rounds of a row
PAUSE = 0.015  # seconds between calls: the others' threads stop spinning, libgomp's within 11 ms


class Ours:
    def __init__(self, model: Any) -> None:
        """model: an internvl_rt.Model."""
        self.model = model
        self._decoding: list[Any] = []

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, threads: int, quant: str | None = None, **how: Any
    ) -> Ours:
        """how: other options of internvl_rt.load."""
        import internvl_rt as ivr

        return cls(ivr.load(folder, dtype=dtype, device="cpu", threads=threads, quant=quant, **how))

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images(pixels)

    def logits(self, ids: Tensor) -> Tensor:
        return self.model.forward(ids)[:, -1]

    def prefill(self, ids: Tensor, pixels: Tensor | None = None) -> list[int]:
        rows = self.model.generate(ids, pixels, max_new_tokens=1, eos_token_id=-1)
        return [tokens[0] for tokens in rows]

    def decoder(self, ids: Tensor, steps: int) -> Callable[[], Any]:
        """A call runs one step of the engine: one token for each row."""
        from internvl_rt.runtime.request import Request, SamplingParams

        engine = self.model.engine
        # Rows whose prompts are done first decode while the others are still read.
        reading = len(ids) + ids.numel() // engine.prefill_chunk
        params = SamplingParams(max_new_tokens=steps + reading, stop_ids=frozenset())
        requests = [Request(row.tolist(), params) for row in ids]
        for request in requests:
            engine.submit(request)
        stream = engine.stream(requests[0])
        while not all(request.tokens for request in requests):
            next(stream)

        def step() -> None:
            before = len(requests[-1].tokens)
            next(stream)
            if len(requests[-1].tokens) != before + 1:
                raise RuntimeError("a step of the engine gave the last row no token")

        self._decoding = requests
        return step

    def end_decoding(self) -> None:
        for request in self._decoding:
            self.model.engine.cancel(request)


class Transformers:
    def __init__(self, model: Any) -> None:
        """model: an InternVLForConditionalGeneration."""
        self.model = model.eval()

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, threads: int) -> Transformers:
        from transformers import InternVLForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        return cls(InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype))

    def _here(self, ids: Tensor, pixels: Tensor | None = None) -> dict[str, Tensor]:
        named = {"input_ids": ids.to(self.model.device)}
        if pixels is not None:
            named["pixel_values"] = pixels.to(self.model.device, self.model.dtype)
        return named

    @property
    def attention(self) -> str:
        return self.model.config._attn_implementation

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.device, self.model.dtype)
        out = self.model.get_image_features(pixel_values=pixels)
        return out.pooler_output

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        return self.model(**self._here(ids), logits_to_keep=1).logits[:, -1]

    @torch.inference_mode()
    def prefill(self, ids: Tensor, pixels: Tensor | None = None) -> list[int]:
        out = self.model(**self._here(ids, pixels), logits_to_keep=1, use_cache=True)
        return out.logits[:, -1].argmax(-1).tolist()

    @torch.inference_mode()
    def decoder(self, ids: Tensor, steps: int) -> Callable[[], Any]:
        # The rows are alike: the first one's cache serves for all, and is built in a fraction of
        # the time.
        out = self.model(**self._here(ids[:1]), logits_to_keep=1, use_cache=True)
        state = [out.logits[:, -1].argmax(-1, keepdim=True).repeat(len(ids), 1)]
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(ids))

        @torch.inference_mode()
        def step() -> None:
            out = self.model(input_ids=state[0], past_key_values=cache, logits_to_keep=1)
            state[0] = out.logits[:, -1].argmax(-1, keepdim=True)

        return step

    def end_decoding(self) -> None:
        pass


def _openvino(folder: Path, dtype: torch.dtype, threads: int) -> Any:
    from openvino_peer import OpenVino

    return OpenVino.load(folder, dtype, threads)


def _llamacpp(folder: Path, dtype: torch.dtype, threads: int, quant: str | None = None) -> Any:
    from llamacpp_peer import LlamaCpp

    return LlamaCpp.load(folder, dtype, threads, quant)


KINDS = {
    "ours": Ours.load,
    "packed": functools.partial(Ours.load, pack=True),
    "peer": Transformers.load,
    "openvino": _openvino,
    "llamacpp": _llamacpp,
}


def available_sides() -> list[str]:
    return [s for s in SIDES if all(map(importlib.util.find_spec, PACKAGES.get(s, ())))]


def taking_part(row: str, sides: Iterable[str]) -> list[str]:
    """Those of the sides that have the row."""
    kind, _, quant = _parts(row)
    with_quant = ("peer", *QUANTISED)
    return [s for s in sides if kind in TAKES.get(s, (kind,)) and (not quant or s in with_quant)]


@dataclass(frozen=True)
class Limits:
    """What the machine does at most, with all threads."""

    read_bytes_per_s: float
    product_flops_per_s: float

    def raised(self, other: Limits) -> Limits:
        return Limits(
            max(self.read_bytes_per_s, other.read_bytes_per_s),
            max(self.product_flops_per_s, other.product_flops_per_s),
        )

    def seconds(self, bytes_read: float, flops: float) -> float:
        return max(bytes_read / self.read_bytes_per_s, flops / self.product_flops_per_s)


def measure_limits(dtype: torch.dtype, rounds: int = 200_000) -> Limits:
    """The best of several measurements: a limit is what nothing disturbs."""
    from internvl_rt import _C

    memory = torch.ones(1 << 27)  # 512 MiB: more than any cache
    read, product = 0.0, 0.0
    for _ in range(15):
        begin = time.perf_counter()
        _C.peak_read(memory)
        middle = time.perf_counter()
        operations = _C.peak_products(dtype == torch.bfloat16, rounds)
        read = max(read, memory.nbytes / (middle - begin))
        product = max(product, operations / (time.perf_counter() - middle))
    return Limits(read, product)


def floor(row: str, shape: Shape, dtype: torch.dtype, limits: Limits) -> float | None:
    """Seconds that a row takes at least; None where nothing is known."""
    kind, size, quant = _parts(row)
    width, layers = shape.width, shape.layers
    kv_width = 2 * shape.kv_heads * width // shape.heads
    layer = width * (2 * width + kv_width) + 3 * width * shape.inner
    if kind == "vit":
        wide, patches = shape.vision_width, (IMAGE_SIZE // PATCH) ** 2
        weights = shape.vision_layers * (4 * wide**2 + 2 * wide * shape.vision_inner)
        flops = (patches + 1) * (2 * weights + 4 * (patches + 1) * wide * shape.vision_layers)
        flops += 2 * patches * 3 * PATCH**2 * wide
        merged = UNSHUFFLE**2
        flops += 2 * patches // merged * (merged * wide * width + width**2)
        return limits.seconds(0, int(size) * flops)
    if kind == "prefill":
        n = int(size)
        flops = 2 * n * layers * layer + 2 * n**2 * width * layers + 2 * shape.vocab * width
        return limits.seconds(0, flops)
    if kind == "decode":
        batch, _, context = size.rpartition("x")
        rows, keys = int(batch or 1), int(context)
        head = shape.vocab * width
        # A group of 64 codes has a scale of two bytes; the head stays in int8 under int4.
        per_weight = {"int8": 66 / 64, "int4": 34 / 64}.get(quant, float(dtype.itemsize))
        read = layers * layer * per_weight + head * (max(per_weight, 66 / 64))
        read += rows * keys * layers * kv_width * dtype.itemsize
        flops = rows * (2 * (layers * layer + head) + 4 * keys * width * layers)
        return limits.seconds(read, flops)
    return None


def _parts(row: str) -> tuple[str, str, str | None]:
    """Kind, size and quantisation of a row's name."""
    kind, _, rest = row.partition("-")
    size, _, quant = rest.partition("-")
    return kind, size, quant or None


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    finish: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call over as many rounds as fit into the time, LEAST to MOST of them.

    finish: waits until what a call began is done; part of its time.
    Where rounds are so long that LEAST would take three times the time, fewer are enough.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for n in range(MOST):
        elapsed = time.perf_counter() - start
        if (n >= LEAST and elapsed >= seconds) or (n and elapsed >= 3 * max(seconds, 1.0)):
            break
        for name in sorted(calls, reverse=n % 2 == 1):
            time.sleep(PAUSE)
            begin = time.perf_counter()
            calls[name]()
            finish()
            samples[name].append(time.perf_counter() - begin)
    return samples


def agreement(sides: Mapping[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """Relative distances of features and logits to the peer's; ValueError for too large ones."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    ids = _ids(1, 64)
    found = {}
    for name, row, call in (
        ("features", "vit-1", lambda s: s.encode(pixels)),
        ("logits", "prefill-64", lambda s: s.logits(ids)),
    ):
        truth = call(sides["peer"]).double().cpu()
        for side in (s for s in taking_part(row, sides) if s != "peer"):
            a = call(sides[side]).double().cpu()
            distance = float(((a - truth).square().mean() / truth.square().mean()).sqrt())
            if not distance <= AGREEMENT[dtype]:
                raise ValueError(
                    f"{name} of {side} and peer are {distance:.3g} of their size apart"
                )
            found[name if side == "ours" else f"{name}, {side}"] = distance
    return found


def time_row(
    row: str,
    sides: Mapping[str, Any],
    seconds: float,
    finish: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """finish: as of take_turns."""
    kind, size, _ = _parts(row)
    if kind == "preprocess":
        return take_turns(_preprocess_calls(sides), seconds)
    if kind in ("vit", "ttft"):
        generator = torch.Generator().manual_seed(2)
        pixels = torch.randn(int(size), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        picture = torch.full((1, int(size) * TILE_TOKENS), IMG_CONTEXT_ID)
        ids = torch.cat((_ids(1, 32), picture, _ids(1, 32)), dim=1)
        encode = {n: lambda s=s: s.encode(pixels) for n, s in sides.items()}
        first = {n: lambda s=s: s.prefill(ids, pixels) for n, s in sides.items()}
        return take_turns(encode if kind == "vit" else first, seconds, finish)
    if kind == "prefill":
        ids = _ids(1, int(size))
        calls = {n: lambda s=s: s.prefill(ids) for n, s in sides.items()}
        return take_turns(calls, seconds, finish)
    batch, _, context = size.rpartition("x")
    ids = _ids(1, int(context)).repeat(int(batch or 1), 1)
    try:
        steps = {n: s.decoder(ids, steps=MOST + 2) for n, s in sides.items()}
        for step in steps.values():
            step()
        return take_turns(steps, seconds, finish)
    finally:
        for side in sides.values():
            side.end_decoding()


def _preprocess_calls(sides: Iterable[str]) -> dict[str, Callable[[], Any]]:
    from internvl_rt.ops import preprocess
    from peers import PEERS

    generator = torch.Generator().manual_seed(4)
    picture = torch.randint(0, 256, (2160, 3840, 3), dtype=torch.uint8, generator=generator)
    options = {"columns": 4, "rows": 3, "image_size": IMAGE_SIZE, "thumbnail": True}
    options |= {"dtype": torch.bfloat16}
    calls = {
        "ours": lambda: preprocess(picture, **options),
        "peer": PEERS["preprocess"][1](picture, **options),
    }
    return {name: calls[name] for name in sides}


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 500, (batch, length), generator=torch.Generator().manual_seed(3))


def child(side: str, folder: Path, dtype: torch.dtype, threads: int, *, work: bool) -> None:
    """Loads in a process of its own and prints seconds and kilobytes as JSON."""
    if side in ("ours", "packed"):
        import internvl_rt  # noqa: F401
    else:
        from transformers import InternVLForConditionalGeneration  # noqa: F401
    imported = _status_kb("VmRSS")
    start = time.perf_counter()
    model = KINDS[side](folder, dtype, threads)
    loaded = time.perf_counter() - start
    model.prefill(_ids(1, 8))
    first = time.perf_counter() - start
    if work:
        model.encode(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
        step = model.decoder(_ids(1, 64), 8)
        for _ in range(8):
            step()
    peak = _status_kb("VmHWM") - imported
    print(json.dumps({"load": loaded, "first-token": first, "memory": peak}))


def _status_kb(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def measure_processes(
    sides: Sequence[str], folder: Path, dtype: str, threads: int, isa: str | None = None
) -> dict[str, dict[str, list[float]]]:
    """{row: {side: samples}} of IN_PROCESSES; two loads, and one with work for the memory."""
    for file in folder.iterdir():
        with file.open("rb") as f:  # into the page cache
            while f.read(1 << 24):
                pass
    found: dict[str, dict[str, list[float]]] = {r: {s: [] for s in sides} for r in IN_PROCESSES}
    for n in range(3):
        for side in sides:
            command = [sys.executable, __file__, "--child", side, "--checkpoint", str(folder)]
            command += [
                "--dtype",
                dtype,
                "--threads",
                str(threads),
                *(["--work"] if n == 2 else []),
                *(["--isa", isa] if isa else []),
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                last = (result.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"loading with {side}: {last}")
            figures = json.loads(result.stdout.splitlines()[-1])
            for row in IN_PROCESSES:
                if row != "memory" or n == 2:
                    found[row][side].append(figures[row])
    return found


def summary(
    row: str, samples: Mapping[str, Sequence[float]], least: float | None = None
) -> dict[str, Any]:
    """A row of the result: medians, extremes, ratio, floor and our share of it; unit kB or seconds,
    and tokens a second."""
    out: dict[str, Any] = {"row": row, "unit": "kB" if row == "memory" else "s"}
    for side, values in samples.items():
        out[side] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "n": len(values),
        }
        if row.startswith("decode"):
            batch = int(_parts(row)[1].rpartition("x")[0] or 1)
            out[side]["tokens_per_s"] = batch / out[side]["median"]
    if "ours" in out:
        for side in (s for s in SIDES[1:] if s in out):
            out[_ratio_key(side)] = out[side]["median"] / out["ours"]["median"]
    if least is not None:
        out["floor"] = least
        if "ours" in out:
            out["share"] = least / out["ours"]["median"]
    return out


def _ratio_key(side: str) -> str:
    return "ratio" if side == "peer" else f"ratio_{side}"


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as text; ratio is a peer's figure over ours, above 1 is better."""
    rows = list(rows)
    peers = [s for s in SIDES[1:] if s == "peer" or any(s in row for row in rows)]
    line = f"{'row':<17}{'ours':>10} {'[min, max]':<17}"
    line += "".join(f"{side:>10} {'[min, max]':<17}{'ratio':>6}" for side in peers)
    lines = [f"{line}{'floor':>10}{'share':>7}"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['row']:<17}{row['error']}")
            continue
        line = f"{row['row']:<17}" + _cell(row, row.get("ours"))
        line += "".join(_cell(row, row.get(s)) + _ratio(row, _ratio_key(s)) for s in peers)
        if "floor" in row:
            line += f"{_measure(row, row['floor'], row['floor']):>10}"
            line += f"{row['share']:>7.0%}" if "share" in row else ""
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def _ratio(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:>6.2f}" if key in row else " " * 6


def _cell(row: Mapping[str, Any], figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return " " * 28
    typical = figures["median"]
    low, high = (_measure(row, figures[k], typical).split()[0] for k in ("min", "max"))
    return f"{_measure(row, typical, typical):>10} {f'[{low}, {high}]':<17}"


def _measure(row: Mapping[str, Any], value: float, typical: float) -> str:
    """The value with its unit, as fits figures of a typical size."""
    if row["unit"] == "kB":
        return f"{value / 1024:.0f} MiB"
    return f"{value:.2f} s" if typical >= 1 else f"{value * 1e3:.1f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.isa:
        hold_to(options.isa, arguments)
    dtype = DTYPES[options.dtype]
    if options.child:
        child(options.child, options.checkpoint, dtype, options.threads, work=options.work)
        return 0
    if options.checkpoint is not None:
        return bench(options, options.checkpoint, dtype)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch) / "checkpoint"
        print(f"writing random weights in the shape of {options.shape} ...", file=sys.stderr)
        make(folder, SHAPES[options.shape], layout="hf")
        return bench(options, folder, dtype)


def hold_to(isa: str, arguments: Sequence[str] | None) -> None:
    """Ours is forced to the instruction set; the script starts anew where the environment does not
    hold the peers to it yet, for their libraries look once."""
    from internvl_rt import _C

    held = dict(zip(HELD, HELD_TO[isa], strict=True))
    if any(os.environ.get(name) != value for name, value in held.items()):
        again = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments)]
        os.execve(sys.executable, again, os.environ | held)
    _C.force_isa(isa)


def bench(options: argparse.Namespace, folder: Path, dtype: torch.dtype) -> int:
    from internvl_rt import _C, num_threads, set_num_threads
    from internvl_rt.ops.bench import machine, machine_slug

    if options.threads:
        set_num_threads(options.threads)
    threads = num_threads()
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "machine": machine(),
        "isa": _C.isa(),
        "shape": options.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "limits": {},
        "rows": [],
    }
    out = options.out or Path(__file__).parent / "results" / machine_slug()
    out.mkdir(parents=True, exist_ok=True)
    forced = f"-{options.isa}" if options.isa else ""
    file = out / f"cpu-{options.shape}-{result['dtype']}{forced}.json"
    if options.isa:
        result["peer_isa"] = torch.backends.cpu.get_cpu_capability()
    limits = measure_limits(dtype)
    result["limits"] = asdict(limits)
    wanted = [r for r in options.rows if r in IN_PROCESSES]
    if wanted:
        loaded = [side for side in options.sides if side not in PACKAGES]
        found = measure_processes(loaded, folder, options.dtype, threads, options.isa)
        tensors = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        floors = {"memory": tensors / 1024}
        result["rows"] += [summary(row, found[row], floors.get(row)) for row in wanted]
        _write(file, result)
    wanted = [r for r in options.rows if r not in IN_PROCESSES]
    if wanted:
        sides = {name: KINDS[name](folder, dtype, threads) for name in options.sides}
        if "peer" in sides:
            import transformers

            result["peer"] = f"transformers {transformers.__version__}, eager, " + (
                f"{sides['peer'].attention} attention"
            )
        if "openvino" in sides:
            result["openvino"] = f"openvino {sides['openvino'].version}"
        if "llamacpp" in sides:
            result["llamacpp"] = f"llama.cpp of xllamacpp {sides['llamacpp'].version}"
        if "peer" in sides and len(sides) > 1:
            result["agreement"] = agreement(sides, dtype)
        for row in wanted:
            print(f"{row} ...", file=sys.stderr)
            try:
                taking = {side: sides[side] for side in taking_part(row, sides)}
                if quant := _parts(row)[2]:
                    for side in (s for s in QUANTISED if s in taking):
                        taking[side] = KINDS[side](folder, dtype, threads, quant)
                samples = time_row(row, taking, options.seconds)
                before, limits = limits, measure_limits(dtype)
                least = floor(row, SHAPES[options.shape], dtype, before.raised(limits))
                result["rows"].append(summary(row, samples, least))
            except Exception as error:
                # The other rows are worth having; the exit status says that one is missing.
                result["rows"].append({"row": row, "error": f"{type(error).__name__}: {error}"})
            _write(file, result)
    print(table(result["rows"]))
    print(f"written to {file}", file=sys.stderr)
    return 1 if any("error" in row for row in result["rows"]) else 0


def _write(file: Path, result: dict[str, Any]) -> None:
    """After every row: what is measured stays, whatever comes after it."""
    result["rows"].sort(key=lambda r: ROWS.index(r["row"]))
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            for name in names:
                if name not in known:
                    allowed = ", ".join(known)
                    raise argparse.ArgumentTypeError(f"{name!r}, allowed: {allowed}")
            return names

        return parse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="internvl3-1b")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--rows", type=some_of(ROWS), default=list(ROWS), help="comma-separated")
    others = [side for side in available_sides() if side != "packed"]
    parser.add_argument("--sides", type=some_of(SIDES), default=others)
    parser.add_argument("--threads", type=int, default=0, help="0: all of the machine's")
    parser.add_argument("--isa", help="hold all sides to this instruction set")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="a row is timed for about so long"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="one in the hf layout, instead of a new one"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the new checkpoint (2 GB)")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if missing := set(options.sides) - set(available_sides()):
        parser.error(f"--sides: {missing.pop()} is not installed")
    if options.isa is not None:
        from internvl_rt import _C

        here = [isa for isa in _C.supported_isas() if isa in HELD_TO]
        if options.isa not in here:
            parser.error(f"--isa: {options.isa!r}, allowed: {', '.join(here)}")
        held = [s for s in options.sides if options.isa in HOLDS.get(s, HELD_TO)]
        if not options.child and (free := set(options.sides) - set(held)):
            names = ", ".join(sorted(free))
            print(f"left out, cannot be held to {options.isa}: {names}", file=sys.stderr)
        options.sides = held
    return options


if __name__ == "__main__":
    sys.exit(main())
