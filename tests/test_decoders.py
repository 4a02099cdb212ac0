"""Decoders that no case of tests/golden has, against transformers.

InternLM3's layout, and mixtures in which some layers have an MLP instead.
"""

import pytest
import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.internvl import InternVLVisionConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

import internvl_rt as ivr
from internvl_rt.config import load_config
from tiny_model import original, original_tensors, write_checkpoint, write_config

LAYERS = {
    "every second": ({"decoder_sparse_step": 2}, (False, True, False, True)),
    "but two": ({"mlp_only_layers": [0, 2]}, (False, True, False, True)),
    "both": ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (False, True, False, False)),
    "none": ({"decoder_sparse_step": 5}, (False,) * 4),
    "all": ({}, (True,) * 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_which_layers(tmp_path, name):
    keys, mixtures = LAYERS[name]
    config = original("qwen3_moe")
    config["llm_config"] |= keys | {"num_hidden_layers": 4}
    text = load_config(write_config(tmp_path, config)).text
    assert text.mixtures == mixtures
    assert (text.experts is None) == (not any(mixtures))
    config["llm_config"]["num_experts_per_tok"] = ""  # read, also where no layer is a mixture
    with pytest.raises(ValueError, match="num_experts_per_tok is ''"):
        load_config(write_config(tmp_path, config))


@pytest.mark.parametrize("name", LAYERS)
def test_against_transformers(tmp_path, name):
    keys, _ = LAYERS[name]
    text = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        **keys,
    )
    vision = InternVLVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = InternVLConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), tie_word_embeddings=False
    )
    model = InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 1))
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (1, 24), generator=generator)
    with torch.no_grad():
        truth = model(input_ids=ids, use_cache=False).logits
    for backend in ("native", "reference"):
        logits = ivr.load(tmp_path, dtype="float32", backend=backend).forward(ids)
        assert float((logits - truth).abs().max()) <= 5e-4 * float(truth.std())


@pytest.mark.parametrize("tokens", [20, 90])
@pytest.mark.parametrize("biases", [(True, True), (False, False)], ids=["biases", "none"])
def test_internlm3_is_llama(tmp_path, biases, tokens):
    """With its biases all on or all off; beyond the trained length the base grows."""
    config = original("internlm3")
    config["llm_config"] |= {
        "qkv_bias": biases[0],
        "bias": biases[1],
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        "head_dim": 12,
    }
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            attention_bias=biases[0],
            mlp_bias=biases[1],
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "dynamic", "factor": 6.0, "rope_theta": 1e6},
            tie_word_embeddings=False,
        )
    ).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in llama.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() > 1 else 1))
    tensors = {
        name: t
        for name, t in original_tensors(dtype=torch.float32).items()
        if not name.startswith("language_model.")
    }
    tensors |= {f"language_model.{name}": t for name, t in llama.state_dict().items()}
    write_checkpoint(tmp_path, config, tensors)
    ids = torch.randint(0, 40, (1, tokens), generator=generator)
    with torch.no_grad():
        truth = llama(ids, use_cache=False).logits
    for backend in ("native", "reference"):
        logits = ivr.load(tmp_path, dtype="float32", backend=backend).forward(ids)
        assert float((logits - truth).abs().max()) <= 5e-4 * float(truth.std())
