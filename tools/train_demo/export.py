"""Writes a training state as a checkpoint in InternVL3's layout.

python tools/train_demo/export.py /tmp/demo/state.pt python/internvl_rt/demo_model
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import world
from model import PATCH, Sizes
from tokens import MARKERS, SPECIAL, TEMPLATE, make_tokenizer


def write(masters: dict[str, torch.Tensor], folder: Path, sizes: Sizes) -> None:
    """masters: the training's parameters by name; the checkpoint's are stored as bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(sizes.vocab)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    for name, content in configs(sizes, ids).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    kept = {n: t.bfloat16() for n, t in masters.items() if not n.startswith("dense.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def configs(s: Sizes, ids: dict[str, int]) -> dict[str, dict[str, Any]]:
    """File name to content. ids: token name to id."""
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    vision = {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": s.vision_width,
        "image_size": s.image_size,
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
        "torch_dtype": "bfloat16",
        "use_flash_attn": False,
    }
    text = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": pad,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": s.width,
        "intermediate_size": s.inner,
        "max_position_embeddings": 4096,
        "max_window_layers": s.layers,
        "model_type": "qwen2",
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "pad_token_id": pad,
        "rms_norm_eps": 1e-6,
        "rope_theta": s.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": s.vocab,
    }
    top = {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": s.image_size,
        "llm_config": text,
        "max_dynamic_patch": world.MAX_TILES,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": world.SYSTEM_MESSAGE,
        "template": TEMPLATE,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision,
    }
    tokenizer = {
        "add_bos_token": False,
        "additional_special_tokens": [*SPECIAL[1:], *MARKERS],
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": pad, "do_sample": False, "eos_token_id": end, "pad_token_id": pad}
    return {
        "config.json": top,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("state", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    masters = torch.load(given.state, map_location="cpu")["masters"]
    write(masters, given.folder, Sizes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
