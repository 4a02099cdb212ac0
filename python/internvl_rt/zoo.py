"""The published checkpoints of the family: what their config.json says, and what runs of them.

Shapes come from the checkpoints' configs where those are public and from the base models' where
not; a checkpoint's own config.json is always right. `internvl-rt models` prints the table.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from internvl_rt.config import ModelConfig, load_config
from internvl_rt.engine import DEFAULT_PREFILL_CHUNK
from internvl_rt.runtime.plan import GIB, make_plan


@dataclass(frozen=True, slots=True)
class Language:
    """A language model's part of config.json. heads: query heads, kv heads, head dim."""

    architecture: str
    model_type: str
    hidden: int
    layers: int
    heads: tuple[int, int, int]
    intermediate: int
    vocab: int
    theta: float
    positions: int
    more: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        heads, kv_heads, head_dim = self.heads
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "rope_theta": self.theta,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-6 if self.model_type.startswith("qwen") else 1e-5,
            "tie_word_embeddings": False,
            **self.more,
        }


_NTK = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def _llama(hidden: int, layers: int, heads: tuple[int, int], inner: int, vocab: int) -> Language:
    shape = (*heads, hidden // heads[0])
    return Language("LlamaForCausalLM", "llama", hidden, layers, shape, inner, vocab, 1e4, 4096)


def _internlm2(hidden: int, layers: int, heads: int, inner: int) -> Language:
    return Language(
        "InternLM2ForCausalLM",
        "internlm2",
        hidden,
        layers,
        (heads, 8, 128),
        inner,
        92553,
        1e6,
        32768,
        {"bias": False, **_NTK},
    )


def _qwen2(
    hidden: int, layers: int, heads: tuple[int, int, int], inner: int, vocab: int = 151674
) -> Language:
    return Language(
        "Qwen2ForCausalLM", "qwen2", hidden, layers, heads, inner, vocab, 1e6, 32768, _NTK
    )


def _qwen3(hidden: int, layers: int, heads: tuple[int, int], inner: int) -> Language:
    return Language(
        "Qwen3ForCausalLM", "qwen3", hidden, layers, (*heads, 128), inner, 151936, 1e6, 40960
    )


def _qwen3_moe(hidden: int, layers: int, heads: tuple[int, int], inner: int) -> Language:
    experts = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return Language(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        hidden,
        layers,
        (*heads, 128),
        3 * hidden,
        151936,
        1e6,
        40960,
        experts,
    )


LANGUAGES: Mapping[str, Language] = {
    "Vicuna-7B": _llama(4096, 32, (32, 32), 11008, 32000),
    "Vicuna-13B": _llama(5120, 40, (40, 40), 13824, 32000),
    "LLaMA2-13B": _llama(5120, 40, (40, 40), 13824, 32000),
    "Hermes-2-Yi-34B": Language(
        "LlamaForCausalLM", "llama", 7168, 60, (56, 8, 128), 20480, 64009, 5e6, 4096
    ),
    "Hermes-2-Llama-3-70B": Language(
        "LlamaForCausalLM", "llama", 8192, 80, (64, 8, 128), 28672, 128265, 5e5, 8192
    ),
    "InternLM2-1.8B": _internlm2(2048, 24, 16, 8192),
    "InternLM2.5-7B": _internlm2(4096, 32, 32, 14336),
    "InternLM2-20B": _internlm2(6144, 48, 48, 16384),
    # Advertised as InternLM3, published with InternLM2's code and tensors.
    "InternLM3-8B": Language(
        "InternLM2ForCausalLM",
        "internlm2",
        4096,
        48,
        (32, 2, 128),
        10240,
        128521,
        5e7,
        32768,
        {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 6.0}},
    ),
    "Phi-3-mini": Language(
        "Phi3ForCausalLM",
        "phi3",
        3072,
        32,
        (32, 32, 96),
        8192,
        32020,
        1e4,
        131072,
        {
            "original_max_position_embeddings": 4096,
            # Their number alone matters here, not the factors.
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
        },
    ),
    "Qwen2-0.5B": _qwen2(896, 24, (14, 2, 64), 4864, 151655),
    "Qwen2.5-0.5B": _qwen2(896, 24, (14, 2, 64), 4864),
    "Qwen2.5-1.5B": _qwen2(1536, 28, (12, 2, 128), 8960),
    "Qwen2.5-3B": _qwen2(2048, 36, (16, 2, 128), 11008),
    "Qwen2.5-7B": _qwen2(3584, 28, (28, 4, 128), 18944),
    "Qwen2.5-14B": _qwen2(5120, 48, (40, 8, 128), 13824),
    "Qwen2.5-32B": _qwen2(5120, 64, (40, 8, 128), 27648),
    "Qwen2.5-72B": _qwen2(8192, 80, (64, 8, 128), 29568),
    "Qwen3-0.6B": _qwen3(1024, 28, (16, 8), 3072),
    "Qwen3-1.7B": _qwen3(2048, 28, (16, 8), 6144),
    "Qwen3-4B": _qwen3(2560, 36, (32, 8), 9728),
    "Qwen3-8B": _qwen3(4096, 36, (32, 8), 12288),
    "Qwen3-14B": _qwen3(5120, 40, (40, 8), 17408),
    "Qwen3-32B": _qwen3(5120, 64, (64, 8), 25600),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 48, (32, 4), 768),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 94, (64, 4), 1536),
    "gpt-oss-20b": Language(
        "GptOssForCausalLM",
        "gpt_oss",
        2880,
        24,
        (64, 8, 64),
        2880,
        201088,
        1.5e5,
        131072,
        {
            "attention_bias": True,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "rope_scaling": _YARN,
            "swiglu_limit": 7.0,
        },
    ),
}


def _vit_6b(layers: int) -> dict[str, Any]:
    return {
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": layers,
        "num_attention_heads": 25,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
    }


VISIONS: Mapping[str, Mapping[str, Any]] = {
    "300M": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
    },
    "6B, 48 layers": _vit_6b(48),
    "6B": _vit_6b(45),
}

_SINGLE_TILE = {"dynamic_image_size": False, "use_thumbnail": False, "ps_version": "v1"}
_TILES = {"dynamic_image_size": True, "use_thumbnail": True, "ps_version": "v2"}


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint and those that differ from it in their weights alone (`also`).

    tower: of Chat V1.0, whose vision tower is named and not described.
    """

    name: str
    vision: str
    language: str
    template: str
    also: str = ""
    top: Mapping[str, Any] = field(default_factory=dict)
    tower: str = ""

    def config(self) -> dict[str, Any]:
        """Its config.json as far as a runtime reads it."""
        if self.tower:
            return self._llava()
        vision = {
            "model_type": "intern_vit_6b",
            "patch_size": 14,
            "image_size": 448,
            "layer_norm_eps": 1e-6,
            **VISIONS[self.vision],
        }
        return {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "torch_dtype": "bfloat16",
            "template": self.template,
            "force_image_size": 448,
            "downsample_ratio": 0.5,
            "select_layer": -1,
            "min_dynamic_patch": 1,
            "max_dynamic_patch": 12,
            **_TILES,
            **self.top,
            "vision_config": vision,
            "llm_config": LANGUAGES[self.language].config(),
        }

    def _llava(self) -> dict[str, Any]:
        return {
            **LANGUAGES[self.language].config(),
            "model_type": "llava",
            "architectures": ["LlavaLlamaForCausalLM"],
            "torch_dtype": "bfloat16",
            "image_aspect_ratio": "pad",
            "mm_hidden_size": VISIONS[self.vision]["hidden_size"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -4,
            "mm_vision_tower": self.tower,
        }


def _rows(
    prefix: str, template: str, sizes: Mapping[str, tuple[str, str]], also: str = ""
) -> Iterator[Published]:
    for size, (vision, language) in sizes.items():
        yield Published(f"{prefix}-{size}", vision, language, template, also)


def _chat_v1_0(size: str, tower: str, suffix: str = "") -> Published:
    name, language = f"InternVL-Chat-ViT-6B-Vicuna-{size}{suffix}", f"Vicuna-{size}"
    return Published(name, "6B, 48 layers", language, "vicuna_v1", tower=tower)


ZOO: tuple[Published, ...] = (
    _chat_v1_0("7B", "OpenGVLab/InternViT-6B-224px"),
    _chat_v1_0("13B", "OpenGVLab/InternViT-6B-224px"),
    _chat_v1_0("13B", "OpenGVLab/InternViT-6B-448px", "-448px"),
    Published(
        "InternVL-Chat-V1-1",
        "6B, 48 layers",
        "LLaMA2-13B",
        "internvl_zh",
        top=_SINGLE_TILE | {"select_layer": -4},
    ),
    Published("InternVL-Chat-V1-2", "6B", "Hermes-2-Yi-34B", "Hermes-2", "-Plus", _SINGLE_TILE),
    Published("InternVL-Chat-V1-5", "6B", "InternLM2-20B", "internlm2-chat"),
    Published("Mini-InternVL-Chat-2B-V1-5", "300M", "InternLM2-1.8B", "internlm2-chat"),
    Published("Mini-InternVL-Chat-4B-V1-5", "300M", "Phi-3-mini", "phi3-chat"),
    Published("InternVL2-1B", "300M", "Qwen2-0.5B", "Hermes-2"),
    Published("InternVL2-2B", "300M", "InternLM2-1.8B", "internlm2-chat"),
    Published("InternVL2-4B", "300M", "Phi-3-mini", "phi3-chat"),
    Published("InternVL2-8B", "300M", "InternLM2.5-7B", "internlm2-chat", "-MPO"),
    Published("InternVL2-26B", "6B", "InternLM2-20B", "internlm2-chat"),
    Published("InternVL2-40B", "6B", "Hermes-2-Yi-34B", "Hermes-2"),
    Published("InternVL2-Llama3-76B", "6B", "Hermes-2-Llama-3-70B", "internlm2-chat"),
    *_rows(
        "InternVL2_5",
        "internvl2_5",
        {
            "1B": ("300M", "Qwen2.5-0.5B"),
            "2B": ("300M", "InternLM2-1.8B"),
            "4B": ("300M", "Qwen2.5-3B"),
            "8B": ("300M", "InternLM2.5-7B"),
            "26B": ("6B", "InternLM2-20B"),
            "38B": ("6B", "Qwen2.5-32B"),
            "78B": ("6B", "Qwen2.5-72B"),
        },
        "-MPO",
    ),
    *_rows(
        "InternVL3",
        "internvl2_5",
        {
            "1B": ("300M", "Qwen2.5-0.5B"),
            "2B": ("300M", "Qwen2.5-1.5B"),
            "8B": ("300M", "Qwen2.5-7B"),
            "9B": ("300M", "InternLM3-8B"),
            "14B": ("300M", "Qwen2.5-14B"),
            "38B": ("6B", "Qwen2.5-32B"),
            "78B": ("6B", "Qwen2.5-72B"),
        },
        "-Pretrained, -Instruct, -hf",
    ),
    *_rows(
        "InternVL3_5",
        "internvl2_5",
        {
            "1B": ("300M", "Qwen3-0.6B"),
            "2B": ("300M", "Qwen3-1.7B"),
            "4B": ("300M", "Qwen3-4B"),
            "8B": ("300M", "Qwen3-8B"),
            "14B": ("300M", "Qwen3-14B"),
            "38B": ("6B", "Qwen3-32B"),
            "30B-A3B": ("300M", "Qwen3-30B-A3B"),
            "241B-A28B": ("6B", "Qwen3-235B-A22B"),
        },
        "-Pretrained, -Instruct, -MPO, -HF",
    ),
    Published("InternVL3_5-GPT-OSS-20B-A4B-Preview", "300M", "gpt-oss-20b", "internvl3_5_gpt_oss"),
    Published("VisualPRM-8B", "300M", "InternLM2.5-7B", "internvl2_5", "-v1_1; as a chat model"),
)

# What of the family does not run at all, and why.
REFUSED: Mapping[str, str] = {
    "InternVL-14B-224px": "compares pictures with texts and has no chat: `load_vision` runs its "
    "tower (verified on the original's outputs, off by 2e-6), QLLaMA and its projectors do not run",
    "-Int8": "bitsandbytes' int8 (quantise on loading instead: `quant`)",
    "InternVL3_5-*-Flash": "tiles of 64 tokens, chosen by a router",
}

# The cases of tests/golden that hold the original implementation's outputs for a part.
VERIFIED: Mapping[str, str] = {
    "qwen2": "internvl3-qwen2_5",
    "internlm2": "internvl2-internlm2",
    "phi3": "internvl2-phi3",
    "llama": "chat-v1_1-llama",
    "qwen3": "internvl3_5-qwen3",
    "qwen3_moe": "internvl3_5-qwen3moe",
    "gpt_oss": "internvl3_5-gptoss",
    "300M": "internvl3-qwen2_5",
    "6B": "chat-v1_1-llama",
}


def published(name: str) -> Published | None:
    """The row of the checkpoint of that name."""
    return next((row for row in ZOO if row.name == name), None)


def load_published(row: Published) -> ModelConfig:
    """Its configuration; ValueError where it cannot be run."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(row.config()), encoding="utf-8")
        return load_config(Path(folder))


def _cells(row: Published) -> list[str]:
    name = f"{row.name} ({row.also})" if row.also else row.name
    parts = [name, row.vision, row.language, row.template]
    try:
        config = load_published(row)
    except ValueError as error:
        reason = str(error).removeprefix("config.json: ")
        return [*parts, f"does not run: {reason}", *[""] * 5]
    half, whole = (
        make_plan(config, dtype, prefill_chunk=DEFAULT_PREFILL_CHUNK)
        for dtype in (torch.bfloat16, torch.float32)
    )
    parts_run = (row.vision.partition(",")[0], config.text.backbone)
    cases = [VERIFIED.get(part, f"{part}: unverified") for part in parts_run]
    if row.tower:
        cases.append("layout unverified")
    return [
        *parts,
        "runs",
        f"{half.weights / GIB:.2f}",
        f"{whole.weights / GIB:.2f}",
        f"{half.mapped / GIB:.2f}",
        f"{half.kv_per_token * 1000 / GIB:.3f}",
        f"{half.activations / GIB:.2f}",
        ", ".join(dict.fromkeys(cases)),
    ]


_HEADER = (
    "checkpoint",
    "vision",
    "language",
    "template",
    "status",
    "weights bf16",
    "weights f32",
    "embedding bf16",
    "KV per 1000 tokens bf16",
    "activations bf16",
    "verified on",
)
_ABOUT = f"""# Checkpoints

Made by `internvl-rt models --markdown`. Memory in GiB, computed as `internvl-rt info --plan NAME`
does, with a prefill chunk of {DEFAULT_PREFILL_CHUNK} tokens: packed weights; the embedding table,
which stays in the mapped file; the KV cache; the peak of activations. KV cache and activations take
twice as much in float32.

**No published weights were at hand: every row is unverified on real weights.** "verified on" names
the cases of `tests/golden` with the same kinds of vision tower and decoder: tiny random weights in
the published layout, whose features, logits and greedy tokens equal the original implementation's.
Shapes come from published configs where there are some, from the base models otherwise; a
checkpoint's own config.json decides.

**Chat V1.0** (`-ViT-6B-Vicuna-`) is in LLaVA's layout. No outputs of the original were at hand:
layout, padding, prompt and tokens are verified against Transformers' Llama on checkpoints made from
its published code (`tests/test_llava.py`). Its repositories hold `.bin` files, which are not read:
convert them to safetensors first. The vision tower is taken from the checkpoint
(`model.vision_tower.vision_tower.*`) or else from the folder of its name beside it.

**-AWQ** checkpoints of every row but GPT-OSS's run (int4 in groups of 32 to 128, version gemm):
their weights are dequantised as they are loaded, exactly, and then rounded to the dtype, so they
take the memory of the table. Unverified on published weights.

"""


def as_markdown() -> str:
    """The text of docs/models.md."""
    lines = [_HEADER, ["---"] * len(_HEADER), *(_cells(row) for row in ZOO)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    refused = "".join(f"| {name} | {reason} |\n" for name, reason in REFUSED.items())
    return f"{_ABOUT}{table}\n| does not run | why |\n| --- | --- |\n{refused}"


def as_text() -> str:
    rows = [_HEADER[:10], *(_cells(row)[:10] for row in ZOO)]
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(10)]
    widths[4] = max(len("status"), len("does not run"))
    lines = ("  ".join(c[:w].ljust(w) for c, w in zip(r, widths, strict=False)) for r in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)
