"""The memory plan: what a model will need, computed before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from internvl_rt.config import ModelConfig
from internvl_rt.models.decoder import require_quantisable, weight_format
from internvl_rt.ops.linear import packed_size
from internvl_rt.runtime.kv_cache import PAGE_SIZE
from internvl_rt.runtime.memory import GIB
from internvl_rt.runtime.platform import CPU, Platform
from internvl_rt.runtime.runner import MAX_BATCH
from internvl_rt.weights import tensor_shapes

# Requests of full context that the KV cache is reserved for. On the CPU reserved memory is not used
# memory: a page costs something when a token is first written to it.
CONTEXTS = 8
# Of what is left: on the CPU the rest of the process needs memory too; on a GPU graphs hold some.
CACHE_SHARE = {"cpu": 0.5, "cuda": 0.9}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes, but for kv_tokens."""

    weights: int  # packed, or read in place from the file: page cache then
    mapped: int  # the embedding table: read from the file row by row
    kv_per_token: int
    kv_tokens: int  # capacity of the cache
    activations: int  # peak of the vision tower and of a prefill chunk
    available: int

    @property
    def needed(self) -> int:
        """Without the cache, which is taken from what is left."""
        return self.weights + self.activations

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= PAGE_SIZE

    def require_fit(self) -> None:
        if not self.fits:
            raise MemoryError(
                f"the model needs {self.needed / GIB:.2f} GiB (weights "
                f"{self.weights / GIB:.2f}, activations {self.activations / GIB:.2f}) and a KV "
                f"cache, {self.available / GIB:.2f} GiB are available"
            )


def table(plans: Mapping[str, MemoryPlan]) -> str:
    """The plans side by side, under their names."""

    def gib(size: float) -> str:
        return f"{size / GIB:.3f} GiB"

    rows = (
        ("weights, packed", lambda plan: gib(plan.weights)),
        ("embedding, mapped from the file", lambda plan: gib(plan.mapped)),
        ("activations, peak", lambda plan: gib(plan.activations)),
        ("KV cache per token", lambda plan: f"{plan.kv_per_token / 1024:.1f} KiB"),
        ("KV cache per 1000 tokens", lambda plan: gib(plan.kv_per_token * 1000)),
        ("KV cache capacity", lambda plan: f"{plan.kv_tokens} tokens"),
        ("memory available", lambda plan: gib(plan.available)),
        ("fits", lambda plan: "yes" if plan.fits else "no"),
    )
    cells = [("", *plans), *((name, *map(show, plans.values())) for name, show in rows)]
    return "\n".join(f"{name:<33}" + "".join(f"{c:>16}" for c in line) for name, *line in cells)


def make_plan(
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    prefill_chunk: int,
    quant: str | None = None,
    platform: Platform = CPU,
) -> MemoryPlan:
    """The plan for a model in dtype on this machine.

    quant: "int8" or "int4" for the language model's weights. Raises ValueError where it has none.
    """
    require_quantisable(config.text, quant)
    size = dtype.itemsize
    shapes = dict(tensor_shapes(config))
    embed = math.prod(shapes.pop("llm.embed.weight")) * size
    # Packed, the head is memory of its own, also where the file has one tensor for both.
    shapes["llm.head.weight"] = (config.text.vocab_size, config.text.hidden_size)
    weights = sum(_weight_bytes(name, shape, dtype, quant) for name, shape in shapes.items())
    text = config.text
    kv_per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * size
    activations = max(_vision_peak(config, platform), _text_peak(config, prefill_chunk)) * size
    if platform.tile_graphs:
        activations += _vision_peak(config, platform) * size + _decode_peak(config)
    if platform.device.type != "cpu":
        weights, embed = weights + embed, 0
    available = platform.available_memory()
    spare = max(0, available - weights - activations) * CACHE_SHARE[platform.device.type]
    capacity = min(int(spare) // kv_per_token, CONTEXTS * text.context)
    return MemoryPlan(
        weights=weights,
        mapped=embed,
        kv_per_token=kv_per_token,
        kv_tokens=capacity // PAGE_SIZE * PAGE_SIZE,
        activations=activations,
        available=available,
    )


def _weight_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, quant: str | None) -> int:
    layer, kind = name.rsplit(".", 1)
    packed = weight_format(layer, quant) if layer.startswith("llm.") and kind == "weight" else None
    return math.prod(shape) * dtype.itemsize if packed is None else packed_size(*shape, packed)


def _vision_peak(config: ModelConfig, platform: Platform) -> int:
    """Elements alive at the widest place of a layer: x, its norm, fc1's output and scratch."""
    v = config.vision
    tokens = platform.micro_batches[0] * (1 + (config.image_size // v.patch_size) ** 2)
    return tokens * (2 * v.hidden_size + 2 * max(3 * v.hidden_size, v.intermediate_size))


def _text_peak(config: ModelConfig, chunk: int) -> int:
    t = config.text
    heads = (t.num_heads + 2 * t.num_kv_heads) * t.head_dim
    mlp = 0 if all(t.mixtures) else 3 * t.intermediate_size
    if t.experts:
        mlp = max(mlp, t.experts.top_k * (3 * t.experts.width + t.hidden_size))
    return chunk * (2 * t.hidden_size + 2 * max(heads, mlp)) + 2 * t.vocab_size


def _decode_peak(config: ModelConfig) -> int:
    """Bytes of the largest decode graph: partial results of attention, logits and sampling."""
    t = config.text
    splits = -(-t.context * t.head_dim // 16384)  # of 64 KB of keys and values
    attention = splits * t.num_heads * (t.head_dim + 2)
    return MAX_BATCH * 4 * (attention + 3 * t.vocab_size)
