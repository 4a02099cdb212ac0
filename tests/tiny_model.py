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
# Chat V1.0: the language model's keys stand at the top, the tower has a config of its own.
TOWER = "InternViT-6B-tiny"
LLAVA = {
    **TEXT,
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": f"OpenGVLab/{TOWER}",
    "use_mm_proj": True,
}
PREPROCESSOR = {
    "crop_to_patches": False,
    "min_patches": 1,
    "max_patches": 12,
    "size": {"height": 56, "width": 56},
}


# What the language models of the other families write; the rest is as in TEXT.
FAMILIES = {
    "qwen2": {},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 12,
        "attention_bias": False,
        "rope_scaling": None,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
    },
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
    },
    "internlm3": {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "bias": True,
        "qkv_bias": True,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": 262144,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    },
}
FAMILIES["qwen3_moe"] = FAMILIES["qwen3"] | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
FAMILIES["gpt_oss"] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
NATIVE_FAMILIES = ("qwen2", "qwen3", "llama", "phi3", "qwen3_moe", "gpt_oss")


def original(family: str = "qwen2") -> dict:
    config = copy.deepcopy(ORIGINAL)
    config["llm_config"] |= copy.deepcopy(FAMILIES[family])
    return config


def native(family: str = "qwen2") -> dict:
    config = copy.deepcopy(NATIVE)
    config["text_config"] |= copy.deepcopy(FAMILIES[family])
    return config


def llava() -> dict:
    return copy.deepcopy(LLAVA)


def write_config(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _fill(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def _layer_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """One layer: width 32, 4 query heads, 2 kv heads of 8 (Qwen3: 12), MLP 48; 3 experts."""
    if family == "internlm2":
        return {
            "attention_norm.weight": (32,),
            "attention.wqkv.weight": (64, 32),
            "attention.wo.weight": (32, 32),
            "ffn_norm.weight": (32,),
            "feed_forward.w1.weight": (48, 32),
            "feed_forward.w3.weight": (48, 32),
            "feed_forward.w2.weight": (32, 48),
        }
    D = 12 if family in ("qwen3", "qwen3_moe") else 8
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (32,),
        "self_attn.o_proj.weight": (32, 4 * D),
        "post_attention_layernorm.weight": (32,),
    }
    if family == "phi3":
        return shapes | {
            "self_attn.qkv_proj.weight": (64, 32),
            "mlp.gate_up_proj.weight": (96, 32),
            "mlp.down_proj.weight": (32, 48),
        }
    qkv = {"q": 4 * D, "k": 2 * D, "v": 2 * D}
    shapes |= {f"self_attn.{x}_proj.weight": (n, 32) for x, n in qkv.items()}
    shapes |= _mlp_shapes(family)
    if family in ("qwen2", "internlm3", "gpt_oss"):
        shapes |= {f"self_attn.{x}_proj.bias": (n,) for x, n in qkv.items()}
    if family == "internlm3":
        shapes |= {"self_attn.o_proj.bias": (32,), "mlp.down_proj.bias": (32,)}
        shapes |= {f"mlp.{x}_proj.bias": (48,) for x in ("gate", "up")}
    if family == "gpt_oss":
        shapes |= {"self_attn.o_proj.bias": (32,), "self_attn.sinks": (4,)}
    if D == 12:
        shapes |= {f"self_attn.{x}_norm.weight": (D,) for x in "qk"}
    return shapes


def _mlp_shapes(family: str) -> dict[str, tuple[int, ...]]:
    if family == "gpt_oss":
        return {
            "mlp.router.weight": (3, 32),
            "mlp.router.bias": (3,),
            "mlp.experts.gate_up_proj": (3, 32, 96),
            "mlp.experts.gate_up_proj_bias": (3, 96),
            "mlp.experts.down_proj": (3, 48, 32),
            "mlp.experts.down_proj_bias": (3, 32),
        }
    if family != "qwen3_moe":
        shapes = {f"mlp.{x}_proj.weight": (48, 32) for x in ("gate", "up")}
        return shapes | {"mlp.down_proj.weight": (32, 48)}
    shapes = {"mlp.gate.weight": (3, 32)}
    for e in range(3):
        at = f"mlp.experts.{e}."
        shapes |= {f"{at}{x}_proj.weight": (20, 32) for x in ("gate", "up")}
        shapes[f"{at}down_proj.weight"] = (32, 20)
    return shapes


def _decoder_shapes(root: str, family: str) -> dict[str, tuple[int, ...]]:
    embed = "tok_embeddings" if family == "internlm2" else "embed_tokens"
    shapes = {f"{root}{embed}.weight": (40, 32), f"{root}norm.weight": (32,)}
    for i in range(2):
        shapes |= {f"{root}layers.{i}.{n}": s for n, s in _layer_shapes(family).items()}
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


def original_tensors(family="qwen2", dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    head = "output" if family == "internlm2" else "lm_head"
    shapes: dict[str, tuple[int, ...]] = {
        "mlp1.0.weight": (64,),
        "mlp1.0.bias": (64,),
        "mlp1.1.weight": (32, 64),
        "mlp1.1.bias": (32,),
        "mlp1.3.weight": (32, 32),
        "mlp1.3.bias": (32,),
        f"language_model.{head}.weight": (40, 32),
    }
    shapes |= _decoder_shapes("language_model.model.", family)
    return original_vision(dtype=dtype) | _fill(shapes, dtype)


LLAVA_TOWER = "model.vision_tower.vision_tower."


def llava_tensors(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """Chat V1.0's, with the vision tower's."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.mm_projector.0.weight": (32, 16),
        "model.mm_projector.0.bias": (32,),
        "model.mm_projector.2.weight": (32, 32),
        "model.mm_projector.2.bias": (32,),
        "lm_head.weight": (40, 32),
    }
    shapes |= _decoder_shapes("model.", "llama")
    return original_vision(LLAVA_TOWER, dtype) | _fill(shapes, dtype)


def native_tensors(family="qwen2", *, newer: bool, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
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
    for name, tensor in original_tensors(family, dtype).items():
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
