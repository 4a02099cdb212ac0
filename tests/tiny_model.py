"""Configs and tensors of tiny checkpoints in every layout, written out by hand for the tests."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VISION = {
    "model_type": "intern_vit_6b",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 56,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
    "use_flash_attn": True,
}
TEXT = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 38,
    "pad_token_id": 39,
}
ORIGINAL = {
    "model_type": "internvl_chat",
    "architectures": ["InternVLChatModel"],
    "torch_dtype": "bfloat16",
    "vision_config": VISION,
    "llm_config": TEXT,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "pad2square": False,
    "select_layer": -1,
    "force_image_size": 56,
    "downsample_ratio": 0.5,
    "template": "internvl2_5",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "ps_version": "v2",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "system_message": None,
}
_RENAMED = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
NATIVE = {
    "model_type": "internvl",
    "architectures": ["InternVLForConditionalGeneration"],
    "torch_dtype": "bfloat16",
    "downsample_ratio": 0.5,
    "image_seq_length": 4,
    "image_token_id": 37,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_config": {_RENAMED.get(k, k): v for k, v in VISION.items()}
    | {"model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]},
    "text_config": TEXT,
}
PREPROCESSOR = {
    "crop_to_patches": False,
    "min_patches": 1,
    "max_patches": 12,
    "size": {"height": 56, "width": 56},
}


def original() -> dict:
    return copy.deepcopy(ORIGINAL)


def native() -> dict:
    return copy.deepcopy(NATIVE)


def write_config(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _fill(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def _decoder_shapes(root: str) -> dict[str, tuple[int, ...]]:
    shapes = {f"{root}embed_tokens.weight": (40, 32), f"{root}norm.weight": (32,)}
    for i in range(2):
        at = f"{root}layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (32,),
            f"{at}self_attn.q_proj.weight": (32, 32),
            f"{at}self_attn.q_proj.bias": (32,),
            f"{at}self_attn.k_proj.weight": (16, 32),
            f"{at}self_attn.k_proj.bias": (16,),
            f"{at}self_attn.v_proj.weight": (16, 32),
            f"{at}self_attn.v_proj.bias": (16,),
            f"{at}self_attn.o_proj.weight": (32, 32),
            f"{at}post_attention_layernorm.weight": (32,),
            f"{at}mlp.gate_proj.weight": (48, 32),
            f"{at}mlp.up_proj.weight": (48, 32),
            f"{at}mlp.down_proj.weight": (32, 48),
        }
    return shapes


def original_vision(root: str = "vision_model.", dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}embeddings.class_embedding": (1, 1, 16),
        f"{root}embeddings.position_embedding": (1, 17, 16),
        f"{root}embeddings.patch_embedding.weight": (16, 3, 14, 14),
        f"{root}embeddings.patch_embedding.bias": (16,),
    }
    for i in range(2):
        at = f"{root}encoder.layers.{i}."
        shapes |= {f"{at}{n}": (16,) for n in ("ls1", "ls2", "norm1.weight", "norm1.bias")}
        shapes |= {
            f"{at}norm2.weight": (16,),
            f"{at}norm2.bias": (16,),
            f"{at}attn.qkv.weight": (48, 16),
            f"{at}attn.qkv.bias": (48,),
            f"{at}attn.proj.weight": (16, 16),
            f"{at}attn.proj.bias": (16,),
            f"{at}mlp.fc1.weight": (24, 16),
            f"{at}mlp.fc1.bias": (24,),
            f"{at}mlp.fc2.weight": (16, 24),
            f"{at}mlp.fc2.bias": (16,),
        }
    return _fill(shapes, dtype)


def original_tensors(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "mlp1.0.weight": (64,),
        "mlp1.0.bias": (64,),
        "mlp1.1.weight": (32, 64),
        "mlp1.1.bias": (32,),
        "mlp1.3.weight": (32, 32),
        "mlp1.3.bias": (32,),
        "language_model.lm_head.weight": (40, 32),
    }
    shapes |= _decoder_shapes("language_model.model.")
    return original_vision(dtype=dtype) | _fill(shapes, dtype)


def native_tensors(*, newer: bool, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """The tensors of `original_tensors` under the native names, the older or newer spelling."""
    head = "model." if newer else ""
    renamed = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.position_embedding": "embeddings.position_embeddings",
        "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
        "encoder.layers.": "encoder.layer.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".ls1": ".lambda_1",
        ".ls2": ".lambda_2",
        ".attn.proj.": ".attention.projection_layer.",
        "vision_model.": f"{head}vision_tower.",
        "mlp1.0": f"{head}multi_modal_projector.layer_norm",
        "mlp1.1": f"{head}multi_modal_projector.linear_1",
        "mlp1.3": f"{head}multi_modal_projector.linear_2",
    }
    if newer:
        renamed |= {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
        }
    tensors = {}
    for name, tensor in original_tensors(dtype).items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            for x, part in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("attn.qkv", f"attention.{x}_proj")] = part.contiguous()
        else:
            tensors[name] = tensor
    return tensors


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return write_config(folder, config)
