"""What one family of language models has that another has not: the only per-family table.

There is one decoder (`decoder.py`); a row of FAMILIES says which of its flags a family sets, what
the family's config class leaves out of config.json, and what its tensors are called. A backbone
with known maths is one more row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """One way to store a layer's experts; `{e}` where each has tensors of its own.

    form: "plain" [N, K], "columns" [K, N], or "mxfp4", blocks and scales of [N, K], of which
    `suffixes` are the ends of the names. alternating: rows of gate and up take turns.
    """

    gate_up: tuple[str, ...]
    down: str
    suffixes: tuple[str, ...] = ("",)
    form: str = "plain"
    alternating: bool = False


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Stored names, without layout prefix and `.weight` or `.bias`.

    From norm1 on they stand behind `layers.{i}.`. qkv and gate_up are the stored tensors whose
    rows, one after the other, make the joint projection: one where the family packs them itself.
    """

    embed: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    norm1: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    grouped_qkv: bool = False  # one tensor: for each kv head its query heads, its key, its value
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    norm2: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    sinks: str = "self_attn.sinks"
    router: str = ""
    experts: tuple[ExpertNames, ...] = ()  # in place of gate_up and down; the usual way first


LLAMA = TensorNames()
INTERNLM2 = TensorNames(
    embed="tok_embeddings",
    head="output",
    norm1="attention_norm",
    qkv=("attention.wqkv",),
    grouped_qkv=True,
    o="attention.wo",
    norm2="ffn_norm",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
)
PHI3 = replace(LLAMA, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
_STACKED = ExpertNames(("mlp.experts.gate_up_proj",), "mlp.experts.down_proj")
QWEN3_MOE = replace(
    LLAMA,
    router="mlp.gate",
    experts=(
        ExpertNames(
            ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
            "mlp.experts.{e}.down_proj",
            (".weight",),
        ),
        _STACKED,
    ),
)
GPT_OSS = replace(
    LLAMA,
    router="mlp.router",
    experts=(
        replace(_STACKED, form="columns", alternating=True),
        replace(_STACKED, form="mxfp4", alternating=True, suffixes=("_blocks", "_scales")),
    ),
)


@dataclass(frozen=True, slots=True)
class Bias:
    """Whether a projection has a bias: as `key` of the config says, `default` without it."""

    key: str | None
    default: bool


ALWAYS, NEVER = Bias(None, True), Bias(None, False)


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """Keys of the config that describe a mixture of experts; normalize None: always.

    count: newer versions of Transformers write num_local_experts for every family.
    dense_layers: decoder_sparse_step and mlp_only_layers name layers that have none.
    """

    count: str
    width: str
    normalize: str | None
    dense_layers: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One row. `rope_types` maps the rescalings that a config may name to the ones computed."""

    model_type: str
    architecture: str
    rope_types: Mapping[str, str]
    defaults: Mapping[str, Any]  # of the config class that wrote the file
    names: TensorNames = LLAMA
    qkv_bias: Bias = NEVER
    o_bias: Bias = NEVER
    mlp_bias: Bias = NEVER
    quantizations: tuple[str, ...] = ("awq",)  # of the projections or the experts, as stored
    layer_types: tuple[str, ...] = ("full_attention",)  # that take turns where none are named
    window_without_flag: bool = False  # sliding_window acts without use_sliding_window
    sinks: bool = False  # one more logit per head that takes weight but has no value
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotation
    norm_weight_in_fp32: bool = False  # norms multiply by their weight before they round
    gate: str = "silu"  # kind of ops.gated_activation
    experts: ExpertKeys | None = None


def _defaults(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    kv_heads: int | None,
    positions: int,
    eps: float,
    **more: Any,
) -> Mapping[str, Any]:
    """Class defaults; most families share 32 layers, 32 heads and the base 10000."""
    return MappingProxyType(
        {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": positions,
            "rms_norm_eps": eps,
            "rope_theta": 1e4,
            **more,
        }
    )


def _same(*types: str) -> Mapping[str, str]:
    return MappingProxyType({t: t for t in types})


_ROPE_TYPES = _same("linear", "dynamic", "llama3", "yarn")  # of Transformers, for every model


_ATTENTION_BIAS = Bias("attention_bias", False)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family(
                model_type="qwen2",
                architecture="Qwen2ForCausalLM",
                rope_types=_ROPE_TYPES,
                defaults=_defaults(151936, 4096, 22016, kv_heads=32, positions=32768, eps=1e-6),
                qkv_bias=ALWAYS,
            ),
            Family(
                model_type="qwen3",
                architecture="Qwen3ForCausalLM",
                rope_types=_ROPE_TYPES,
                defaults=_defaults(
                    151936, 4096, 22016, kv_heads=32, positions=32768, eps=1e-6, head_dim=128
                ),
                qkv_bias=_ATTENTION_BIAS,
                o_bias=_ATTENTION_BIAS,
                qk_norm=True,
            ),
            Family(
                model_type="llama",
                architecture="LlamaForCausalLM",
                rope_types=_ROPE_TYPES,
                defaults=_defaults(32000, 4096, 11008, kv_heads=None, positions=2048, eps=1e-6),
                qkv_bias=_ATTENTION_BIAS,
                o_bias=_ATTENTION_BIAS,
                mlp_bias=Bias("mlp_bias", False),
            ),
            Family(
                model_type="internlm2",
                architecture="InternLM2ForCausalLM",
                rope_types=_same("linear", "dynamic"),
                defaults=_defaults(103168, 4096, 11008, kv_heads=None, positions=2048, eps=1e-6),
                names=INTERNLM2,
                qkv_bias=Bias("bias", True),
                o_bias=Bias("bias", True),
            ),
            Family(
                model_type="internlm3",
                architecture="InternLM3ForCausalLM",
                rope_types=_same("linear", "dynamic"),
                defaults=_defaults(128512, 4096, 11008, kv_heads=None, positions=32768, eps=1e-6),
                qkv_bias=Bias("qkv_bias", False),
                o_bias=Bias("bias", False),
                mlp_bias=Bias("bias", False),
            ),
            Family(
                model_type="phi3",
                architecture="Phi3ForCausalLM",
                # What is now called longrope was called su; its own yarn differs by one factor.
                rope_types=MappingProxyType(
                    {"su": "longrope", "longrope": "longrope", "yarn": "longrope"}
                ),
                defaults=_defaults(
                    32064,
                    3072,
                    8192,
                    kv_heads=None,
                    positions=4096,
                    eps=1e-5,
                    original_max_position_embeddings=4096,
                ),
                names=PHI3,
                window_without_flag=True,
            ),
            Family(
                model_type="qwen3_moe",
                architecture="Qwen3MoeForCausalLM",
                rope_types=_ROPE_TYPES,
                defaults=_defaults(
                    151936,
                    2048,
                    6144,
                    kv_heads=4,
                    positions=32768,
                    eps=1e-6,
                    num_hidden_layers=24,
                    num_experts=128,
                    num_experts_per_tok=8,
                    moe_intermediate_size=768,
                ),
                names=QWEN3_MOE,
                qkv_bias=_ATTENTION_BIAS,
                o_bias=_ATTENTION_BIAS,
                qk_norm=True,
                experts=ExpertKeys(
                    "num_experts", "moe_intermediate_size", "norm_topk_prob", dense_layers=True
                ),
            ),
            Family(
                model_type="gpt_oss",
                architecture="GptOssForCausalLM",
                rope_types=_same("yarn"),
                defaults=_defaults(
                    201088,
                    2880,
                    2880,
                    kv_heads=8,
                    positions=131072,
                    eps=1e-5,
                    num_hidden_layers=36,
                    num_attention_heads=64,
                    head_dim=64,
                    rope_theta=150000.0,
                    rope_scaling={
                        "rope_type": "yarn",
                        "factor": 32.0,
                        "beta_fast": 32.0,
                        "beta_slow": 1.0,
                        "truncate": False,
                        "original_max_position_embeddings": 4096,
                    },
                    sliding_window=128,
                    num_local_experts=128,
                    num_experts_per_tok=4,
                ),
                names=GPT_OSS,
                qkv_bias=Bias("attention_bias", True),
                o_bias=Bias("attention_bias", True),
                mlp_bias=ALWAYS,
                quantizations=("mxfp4",),
                layer_types=("sliding_attention", "full_attention"),
                sinks=True,
                norm_weight_in_fp32=True,
                gate="gpt_oss",
                experts=ExpertKeys("num_local_experts", "intermediate_size", None),
            ),
        )
    }
)
