"""Two layers at the widths of real checkpoints, against transformers and against the references.

The golden models are tiny; the kernels that matter run at head dims 64 and 128 and at 1025 tokens.
Weights come from a seed, are saved by transformers in its own layout, and read by us from there.
"""

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.internvl import InternVLVisionConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

import internvl_rt as ivr
from internvl_rt import _C
from isas import ISAS, runs, stand_in

IMAGE_TOKEN = 1000
TEXT = {
    # InternVL3-1B's decoder, and one with head dim 128.
    "qwen2_896": {"hidden_size": 896, "heads": 14, "kv_heads": 2, "intermediate_size": 4864},
    "qwen2_2048": {"hidden_size": 2048, "heads": 16, "kv_heads": 8, "intermediate_size": 5504},
}


def tower(**changes):
    """InternViT-300M's widths, two layers."""
    sizes = {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "attention_bias": True,
        "norm_type": "layer_norm",
        "use_qk_norm": False,
    }
    shape = {"num_hidden_layers": 2, "image_size": [448, 448], "patch_size": [14, 14]}
    return InternVLVisionConfig(**shape | sizes | changes)


def qwen2(name):
    shape = TEXT[name]
    return Qwen2Config(
        vocab_size=1024,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=2,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["intermediate_size"],
        rope_theta=1e6,
        tie_word_embeddings=False,
    )


# Other towers and decoders, whose MLPs are narrow here: it is the attention that is of a new shape.
WIDE = {
    "internvit_6b": lambda: (
        tower(
            hidden_size=3200,
            num_attention_heads=25,
            intermediate_size=3200,
            attention_bias=False,
            norm_type="rms_norm",
            use_qk_norm=True,
        ),
        qwen2("qwen2_896"),
    ),
    "phi3_3072": lambda: (
        tower(),
        Phi3Config(
            vocab_size=1024,
            hidden_size=3072,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=32,
            intermediate_size=1024,
            max_position_embeddings=4096,
            original_max_position_embeddings=32,  # below the tests' prompts: the long factors
            pad_token_id=0,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 48,
                "long_factor": [1 + 0.3 * j for j in range(48)],
            },
            tie_word_embeddings=False,
        ),
    ),
    "qwen3_moe_2048": lambda: (
        tower(),
        Qwen3MoeConfig(
            vocab_size=1024,
            hidden_size=2048,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=64,
            norm_topk_prob=True,
            rope_theta=1e6,
            tie_word_embeddings=False,
        ),
    ),
}


def build(name):
    vision, text = WIDE[name]() if name in WIDE else (tower(), qwen2(name))
    config = InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    model = InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-6:], "little"))
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if key.endswith(("norm.weight", "norm_before.weight", "norm_after.weight")):
                p.copy_(1 + 0.1 * noise)
            elif "lambda" in key:
                p.copy_(0.2 + 0.05 * noise)
            else:
                p.copy_(noise * (0.02 if p.dim() > 1 else 0.05))
            p.copy_(p.bfloat16())  # exact in both dtypes
    return model


def few_inputs(size=112):
    """Fewer tokens, and a position embedding that is resized."""
    ids, pixels = inputs(40)
    n = (size // 28) ** 2
    ids[0, 20:] = 7
    ids[0, 20 : 20 + n] = IMAGE_TOKEN
    return ids, pixels[:, :, :size, :size].contiguous()


@pytest.fixture(scope="module", params=TEXT)
def reference(request, tmp_path_factory):
    model = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def inputs(tokens=300):
    generator = torch.Generator().manual_seed(11)
    pixels = torch.randn(1, 3, 448, 448, generator=generator).bfloat16().float()
    ids = torch.randint(0, 999, (1, tokens), generator=generator)
    ids[0, 20:276] = IMAGE_TOKEN
    return ids, pixels


def relative(ours, truth):
    """Largest error over the standard deviation of the truth."""
    return float((ours.float() - truth.float()).abs().max() / truth.float().std())


def test_model_against_transformers_and_references(reference):
    model, folder = reference
    ids, pixels = inputs()
    with torch.no_grad():
        truth = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        half = model.to(torch.bfloat16)
        own = half(input_ids=ids, pixel_values=pixels.bfloat16(), use_cache=False).logits
        model.float()
    own_error = relative(own, truth)
    for dtype, bound in (("float32", 5e-4), ("bfloat16", 2 * own_error + 0.01)):
        native = ivr.load(folder, dtype=dtype)
        _C.kernel_counts(reset=True)
        logits = native.forward(ids, pixels)
        ran = _C.kernel_counts(reset=True)
        kind = "bf16" if dtype == "bfloat16" else "f32"
        isa = runs(_C.isa(), getattr(torch, dtype))
        kernels = (f"linear_{kind}", "flash_attention", "paged_attention")
        assert {f"{kernel}/{isa}" for kernel in kernels} <= set(ran)
        assert relative(logits, truth) <= bound
        plain_torch = ivr.load(folder, dtype=dtype, backend="reference").forward(ids, pixels)
        assert relative(logits, plain_torch) <= bound
        assert not _C.kernel_counts(reset=True), "the reference backend ran a kernel of ours"


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(reference, isa):
    """Fewer tokens (a resized position embedding): the slow sets run these widths too."""
    _, folder = reference
    ids, pixels = few_inputs()
    _C.force_isa(isa)
    try:
        for dtype, bound in (("float32", 5e-4), ("bfloat16", 0.1)):
            truth = ivr.load(folder, dtype="float32", backend="reference").forward(ids, pixels)
            native = ivr.load(folder, dtype=dtype)
            _C.kernel_counts(reset=True)
            logits = native.forward(ids, pixels)
            ran = {name.split("/")[1] for name in _C.kernel_counts(reset=True)}
            assert {stand_in(isa)} <= ran <= {isa, stand_in(isa)}
            assert isa in ran or dtype == "float32"
            assert relative(logits, truth) <= bound
    finally:
        _C.force_isa("")


@pytest.mark.parametrize("name", WIDE)
def test_other_widths(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    ids, pixels = few_inputs()
    with torch.no_grad():
        truth = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        model.to(torch.bfloat16)
        own = model(input_ids=ids, pixel_values=pixels.bfloat16(), use_cache=False).logits
    # A bfloat16 router chooses other experts where two are near: mixtures are judged in float32.
    bounds = {"float32": 5e-4, "bfloat16": 2 * relative(own, truth) + 0.01}
    for dtype in ("float32",) if "moe" in name else bounds:
        logits = ivr.load(tmp_path, dtype=dtype).forward(ids, pixels)
        assert relative(logits, truth) <= bounds[dtype]
        plain_torch = ivr.load(tmp_path, dtype=dtype, backend="reference").forward(ids, pixels)
        assert relative(logits, plain_torch) <= bounds[dtype]
