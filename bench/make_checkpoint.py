"""Writes a checkpoint with random weights in the shape of a real one, for benchmarks and trials.

    python bench/make_checkpoint.py /tmp/internvl3-1b --tokenizer FOLDER_WITH_TOKENIZER_FILES

The weights mean nothing; shapes, names, files and the config's keys are those of the real model.
Both layouts get the same values from the same seed. Needs torch alone; memory stays at a few
megabytes a thread, because tensors are drawn and written piece by piece.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

IMAGE_SIZE = 448
PATCH = 14
UNSHUFFLE = 2
IMG_CONTEXT_ID = 151667  # of InternVL's Qwen2.5 tokenizer
END_OF_TEXT_ID = 151643
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_PIECE = 1 << 20  # elements drawn at a time


@dataclass(frozen=True)
class Shape:
    """InternViT-300M's kind of vision tower and Qwen2's kind of decoder."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_inner: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int


SHAPES = {
    "internvl3-1b": Shape(1024, 24, 16, 4096, 896, 24, 14, 2, 4864, 151674),
    "internvl2_5-4b": Shape(1024, 24, 16, 4096, 2048, 36, 16, 2, 11008, 151674),
    "internvl3-8b": Shape(1024, 24, 16, 4096, 3584, 28, 28, 4, 18944, 151674),
    "tiny": Shape(64, 2, 4, 128, 96, 2, 6, 2, 160, 151674),
    # As small as it gets, with a vocabulary of bytes that needs no tokenizer files.
    "bytes": Shape(64, 2, 4, 128, 96, 2, 6, 2, 160, 268),
}
BYTE_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)


@dataclass(frozen=True)
class Part:
    """A tensor as it is drawn: normal around mean, seeded by its name."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.02


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored: its parts one below the other."""

    name: str
    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def make(
    folder: Path,
    shape: Shape,
    *,
    layout: str = "original",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tokenizer: Path | None = None,
    shard_bytes: int = 512 << 20,
    threads: int = 2,
) -> int:
    """Writes the checkpoint into a new folder and returns the bytes of its tensors.

    layout: "original" (internvl_chat) or "hf" (Transformers-native). Raises OSError if the folder
    is there and not empty or a tokenizer file cannot be read, ValueError for sizes that do not fit.
    """
    _check(shape)
    copies = _tokenizer_files(tokenizer)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    for file in copies:
        shutil.copyfile(file, folder / file.name)
    if not copies and shape == SHAPES["bytes"]:
        _write_byte_tokenizer(folder)
    tensors = list(original(shape) if layout == "original" else native(shape))
    configs = original_config if layout == "original" else native_config
    for name, config in configs(shape, str(dtype).removeprefix("torch.")).items():
        _write_json(folder / name, config)
    shards = _shards(tensors, shard_bytes, dtype)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor(threads) as pool:
        list(
            pool.map(
                lambda name, shard: _write_shard(folder / name, shard, dtype, seed), names, shards
            )
        )
    total = sum(t.numel for t in tensors) * dtype.itemsize
    where = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    return total


def original(shape: Shape) -> Iterator[Stored]:
    """The tensors of the original layout."""
    for name, part in _vision(shape):
        if name.endswith((".q", ".k", ".v")):
            continue
        yield Stored(f"vision_model.{name}", (part,))
    for i in range(shape.vision_layers):
        for kind in ("weight", "bias"):
            parts = tuple(_vision_qkv(shape, i, x, kind) for x in "qkv")
            yield Stored(f"vision_model.encoder.layers.{i}.attn.qkv.{kind}", parts)
    for name, part in _projector(shape):
        yield Stored(f"mlp1.{name}", (part,))
    for name, part in _text(shape):
        yield Stored(f"language_model.{name}", (part,))


_NATIVE_VISION = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.": "patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}


def native(shape: Shape) -> Iterator[Stored]:
    """The same tensors under the names of the Transformers-native layout."""
    for name, part in _vision(shape):
        for old, new in _NATIVE_VISION.items():
            name = name.replace(old, new)
        yield Stored(f"model.vision_tower.{name}", (part,))
    for i in range(shape.vision_layers):
        for x in "qkv":
            for kind in ("weight", "bias"):
                name = f"model.vision_tower.encoder.layer.{i}.attention.{x}_proj.{kind}"
                yield Stored(name, (_vision_qkv(shape, i, x, kind),))
    names = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
    for name, part in _projector(shape):
        index, kind = name.split(".")
        yield Stored(f"model.multi_modal_projector.{names[index]}.{kind}", (part,))
    for name, part in _text(shape):
        found = name if name.startswith("lm_head") else f"model.language_{name}"
        yield Stored(found, (part,))


def _linear(at: str, rows: int, columns: int, *, bias: bool = True) -> Iterator[tuple[str, Part]]:
    yield f"{at}.weight", Part(f"{at}.weight", (rows, columns))
    if bias:
        yield f"{at}.bias", Part(f"{at}.bias", (rows,))


def _norm(at: str, width: int, *, bias: bool) -> Iterator[tuple[str, Part]]:
    yield f"{at}.weight", Part(f"{at}.weight", (width,), mean=1.0)
    if bias:
        yield f"{at}.bias", Part(f"{at}.bias", (width,))


def _vision(s: Shape) -> Iterator[tuple[str, Part]]:
    """All but the attention's q, k and v."""
    C, n = s.vision_width, (IMAGE_SIZE // PATCH) ** 2
    yield "embeddings.class_embedding", Part("vit.cls", (1, 1, C))
    yield "embeddings.position_embedding", Part("vit.pos", (1, 1 + n, C))
    patch = "embeddings.patch_embedding"
    yield f"{patch}.weight", Part(f"{patch}.weight", (C, 3, PATCH, PATCH))
    yield f"{patch}.bias", Part(f"{patch}.bias", (C,))
    for i in range(s.vision_layers):
        at = f"encoder.layers.{i}"
        yield from _linear(f"{at}.attn.proj", C, C)
        yield from _linear(f"{at}.mlp.fc1", s.vision_inner, C)
        yield from _linear(f"{at}.mlp.fc2", C, s.vision_inner)
        for k in (1, 2):
            yield from _norm(f"{at}.norm{k}", C, bias=True)
            yield f"{at}.ls{k}", Part(f"{at}.ls{k}", (C,), mean=0.1, std=0.01)


def _vision_qkv(s: Shape, i: int, x: str, kind: str) -> Part:
    C = s.vision_width
    return Part(f"vit.{i}.{x}.{kind}", (C, C) if kind == "weight" else (C,))


def _projector(s: Shape) -> Iterator[tuple[str, Part]]:
    wide = s.vision_width * UNSHUFFLE**2
    layers = (_norm("0", wide, bias=True), _linear("1", s.width, wide))
    for layer in (*layers, _linear("3", s.width, s.width)):
        for name, part in layer:
            yield name, dataclasses.replace(part, name=f"mlp1.{name}")


def _text(s: Shape) -> Iterator[tuple[str, Part]]:
    D = s.width // s.heads
    yield from _linear("model.embed_tokens", s.vocab, s.width, bias=False)
    for i in range(s.layers):
        at = f"model.layers.{i}"
        yield from _norm(f"{at}.input_layernorm", s.width, bias=False)
        for x, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            yield from _linear(f"{at}.self_attn.{x}_proj", heads * D, s.width)
        yield from _linear(f"{at}.self_attn.o_proj", s.width, s.heads * D, bias=False)
        yield from _norm(f"{at}.post_attention_layernorm", s.width, bias=False)
        for x in ("gate", "up"):
            yield from _linear(f"{at}.mlp.{x}_proj", s.inner, s.width, bias=False)
        yield from _linear(f"{at}.mlp.down_proj", s.width, s.inner, bias=False)
    yield from _norm("model.norm", s.width, bias=False)
    yield from _linear("lm_head", s.vocab, s.width, bias=False)


def original_config(s: Shape, dtype: str) -> dict[str, Any]:
    """File name -> content, original layout."""
    vision = {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": s.vision_width,
        "image_size": IMAGE_SIZE,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "intermediate_size": s.vision_inner,
        "layer_norm_eps": 1e-6,
        "model_type": "intern_vit_6b",
        "norm_type": "layer_norm",
        "num_attention_heads": s.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": s.vision_layers,
        "patch_size": PATCH,
        "qk_normalization": False,
        "qkv_bias": True,
        "torch_dtype": dtype,
        "use_bfloat16": True,
        "use_flash_attn": True,
    }
    top = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 1 / UNSHUFFLE,
        "dynamic_image_size": True,
        "force_image_size": IMAGE_SIZE,
        "llm_config": _text_config(s, dtype),
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision,
    }
    return {"config.json": top}


def native_config(s: Shape, dtype: str) -> dict[str, Any]:
    """File name -> content, Transformers-native layout."""
    vision = {
        "architectures": ["InternVisionModel"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": s.vision_width,
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "intermediate_size": s.vision_inner,
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 0.1,
        "model_type": "internvl_vision",
        "norm_type": "layer_norm",
        "num_attention_heads": s.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": s.vision_layers,
        "patch_size": [PATCH, PATCH],
        "torch_dtype": dtype,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": False,
    }
    top = {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 1 / UNSHUFFLE,
        "image_seq_length": (IMAGE_SIZE // PATCH // UNSHUFFLE) ** 2,
        "image_token_id": min(IMG_CONTEXT_ID, s.vocab - 1),
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": _text_config(s, dtype),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": vision,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    processor = {
        "crop_to_patches": True,
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "max_patches": 12,
        "min_patches": 1,
        "processor_class": "InternVLProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    return {"config.json": top, "preprocessor_config.json": processor}


def _text_config(s: Shape, dtype: str) -> dict[str, Any]:
    end = min(END_OF_TEXT_ID, s.vocab - 1)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": s.width,
        "initializer_range": 0.02,
        "intermediate_size": s.inner,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": s.vocab,
    }


def _check(s: Shape) -> None:
    for field in dataclasses.fields(s):
        if getattr(s, field.name) < 1:
            raise ValueError(f"{field.name} is {getattr(s, field.name)}, expected at least 1")
    for width, heads in ((s.vision_width, s.vision_heads), (s.width, s.heads)):
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
    if s.heads % s.kv_heads:
        raise ValueError(f"{s.heads} heads are not a multiple of {s.kv_heads} kv heads")


def _tokenizer_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: none of {', '.join(TOKENIZER_FILES)}")
    return found


def _write_byte_tokenizer(folder: Path) -> None:
    """A token for each byte, in the alphabet of byte-level vocabularies, then InternVL's own."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = sorted([*map(chr, printable), *(chr(256 + i) for i in range(len(others)))])
    _write_json(folder / "vocab.json", {letter: i for i, letter in enumerate(letters)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    _write_json(folder / "added_tokens.json", {t: 256 + i for i, t in enumerate(BYTE_TOKENS)})


def _shards(tensors: Sequence[Stored], limit: int, dtype: torch.dtype) -> list[list[Stored]]:
    shards: list[list[Stored]] = []
    size = limit
    for tensor in tensors:
        bytes_ = tensor.numel * dtype.itemsize
        if size + bytes_ > limit and (size or not shards):
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += bytes_
    return shards


def _write_shard(path: Path, tensors: Sequence[Stored], dtype: torch.dtype, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        end = at + t.numel * dtype.itemsize
        offsets = [at, end]
        kind = SAFETENSORS_DTYPES[dtype]
        header[t.name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": offsets}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            for part in t.parts:
                _write_part(file, part, dtype, seed)


def _write_part(file: BinaryIO, part: Part, dtype: torch.dtype, seed: int) -> None:
    digest = hashlib.sha256(f"{seed}/{part.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
    left = math.prod(part.shape)
    while left:
        n = min(left, _PIECE)
        piece = torch.randn(n, generator=generator).mul_(part.std).add_(part.mean).to(dtype)
        file.write(piece.view(torch.uint8).numpy())
        left -= n


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint with random weights in the shape of a real one."
    )
    parser.add_argument("folder", type=Path, help="new folder to write into")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="internvl3-1b")
    parser.add_argument("--vision-layers", type=int, help="instead of the shape's")
    parser.add_argument("--text-layers", type=int, help="instead of the shape's")
    parser.add_argument("--vocab", type=int, help="instead of the shape's 151674")
    parser.add_argument("--layout", choices=("original", "hf"), default="original")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy its tokenizer files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-mb", type=int, default=512, help="size of a file, MiB")
    options = parser.parse_args(arguments)
    given = {
        "vision_layers": options.vision_layers,
        "layers": options.text_layers,
        "vocab": options.vocab,
    }
    shape = dataclasses.replace(
        SHAPES[options.shape], **{k: v for k, v in given.items() if v is not None}
    )
    try:
        total = make(
            options.folder,
            shape,
            layout=options.layout,
            dtype=getattr(torch, options.dtype),
            seed=options.seed,
            tokenizer=options.tokenizer,
            shard_bytes=options.shard_mb << 20,
        )
    except (ValueError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: {total / 1e9:.2f} GB of {options.dtype}, {options.layout} layout")
    return 0


if __name__ == "__main__":
    sys.exit(main())
