"""Projections stored as AWQ's int4: unpacking, and whole models made of it."""

import numpy as np
import pytest
import torch

import internvl_rt as ivr
from internvl_rt.awq import awq_unpack
from tiny_model import (
    FAMILIES,
    native,
    native_tensors,
    original,
    original_tensors,
    write_checkpoint,
)

# Which of eight outputs the nibbles of an int32 hold, the lowest first: AutoAWQ's "gemm" order.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 32


def pack(codes):
    """int [n, 8 * m] with values to 15 -> int32 [n, m], one nibble at a time."""
    packed = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for column in range(packed.shape[1]):
        for nibble, output in enumerate(ORDER):
            values = codes[:, 8 * column + output].astype(np.uint32)
            packed[:, column] |= values << np.uint32(4 * nibble)
    return torch.from_numpy(packed.view(np.int32))


def stored(N, K, group=GROUP, seed=0):
    """(tensors of a weight [N, K] as AWQ stores it, the weight they stand for in float64)."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (K, N))
    zeros = rng.integers(0, 16, (K // group, N))
    scales = rng.uniform(0.01, 0.1, (K // group, N)).astype(np.float16)
    weight = np.empty((N, K))
    for k in range(K):
        weight[:, k] = (codes[k] - zeros[k // group]) * scales[k // group].astype(np.float64)
    tensors = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": torch.from_numpy(scales)}
    return tensors, torch.from_numpy(weight)


@pytest.mark.parametrize(("N", "K", "group"), [(8, 32, 32), (24, 96, 32), (40, 256, 128)])
def test_unpack_is_exact(N, K, group):
    tensors, weight = stored(N, K, group)
    found = awq_unpack(*tensors.values())
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found.double(), weight)


def test_one_code_at_a_time():
    """Nibble i of an int32 is output ORDER[i]; the highest one is its sign."""
    for nibble, output in enumerate(ORDER):
        code = torch.tensor([[15 << 4 * nibble]]).to(torch.int32)
        zero, scale = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8).half()
        assert awq_unpack(code, zero, scale)[:, 0].tolist() == [
            15.0 * (j == output) for j in range(8)
        ]


def quantise(config, tensors, *, keep=()):
    """Every projection of the decoder's layers as AWQ stores it; and what it stands for."""
    text = config.get("llm_config", config.get("text_config"))
    text["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    packed, plain = {}, {}
    for i, (name, tensor) in enumerate(tensors.items()):
        root, _, kind = name.rpartition(".")
        whole = (
            kind == "weight"
            and tensor.dim() == 2
            and "layers." in name
            and "vision" not in name
            and not any(part in name for part in ("mlp.gate.", *keep))
        )
        if not whole:
            packed[name] = plain[name] = tensor
            continue
        parts, weight = stored(*tensor.shape, seed=i)
        packed |= {f"{root}.{part}": t for part, t in parts.items()}
        plain[name] = weight.float()
        assert torch.equal(plain[name].double(), weight)
    return packed, plain


def widened(config):
    """Widths that groups of 32 divide, for a model that can run."""
    for key in ("llm_config", "text_config"):
        if key in config:
            config[key] |= {"intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 8}
    return config


def tensors_of(config, family, layout):
    tensors = original_tensors(family, torch.float32)
    if layout == "native":
        tensors = native_tensors(family, newer=True, dtype=torch.float32)
    wide = {48: 64, 96: 128, 20: 32} | ({12: 8} if family.startswith("qwen3") else {})
    out = {}
    for name, tensor in tensors.items():
        if "layers." not in name or "vision" in name:
            out[name] = tensor
            continue
        attention = "self_attn" in name
        shape = [
            n * 8 // 12 if attention and n in (48, 24, 12) and 12 in wide else wide.get(n, n)
            for n in tensor.shape
        ]
        generator = torch.Generator().manual_seed(len(name))
        out[name] = torch.randn(shape, generator=generator)
    return out


CASES = [(f, "original") for f in FAMILIES if f != "gpt_oss"] + [("qwen2", "native")]


@pytest.mark.parametrize(("family", "layout"), CASES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_model_equals_that_of_the_dequantised_weights(tmp_path, family, layout, backend):
    config = widened(original(family) if layout == "original" else native(family))
    tensors = tensors_of(config, family, layout)
    packed, plain = quantise(config, tensors)
    assert sum(name.endswith(".qweight") for name in packed) >= 8
    quantised = write_checkpoint(tmp_path / "awq", config, packed)
    section = config.get("llm_config", config.get("text_config"))
    del section["quantization_config"]
    whole = write_checkpoint(tmp_path / "plain", config, plain)
    ids = torch.arange(12).view(1, -1) % 30
    for dtype in ("float32", "bfloat16"):
        one, other = (ivr.load(f, dtype=dtype, backend=backend) for f in (quantised, whole))
        assert one.config.text.awq_group == GROUP
        assert torch.equal(one.forward(ids), other.forward(ids))


def test_some_projections_may_be_left_out(tmp_path):
    """What has no codes is read as it is (modules_to_not_convert)."""
    config = widened(original())
    packed, plain = quantise(config, tensors_of(config, "qwen2", "original"), keep=("down_proj",))
    assert "language_model.model.layers.0.mlp.down_proj.weight" in packed
    quantised = ivr.load(write_checkpoint(tmp_path / "awq", config, packed), dtype="float32")
    del config["llm_config"]["quantization_config"]
    whole = ivr.load(write_checkpoint(tmp_path / "plain", config, plain), dtype="float32")
    ids = torch.arange(5).view(1, -1)
    assert torch.equal(quantised.forward(ids), whole.forward(ids))


def test_refused(tmp_path):
    config = widened(original())
    packed, _ = quantise(config, tensors_of(config, "qwen2", "original"))
    o = "language_model.model.layers.0.self_attn.o_proj"

    def refused(match, tensors, **changes):
        llm = config["llm_config"] | changes
        write_checkpoint(tmp_path, config | {"llm_config": llm}, tensors)
        with pytest.raises(ValueError, match=match) as error:
            ivr.load(tmp_path)
        assert "\n" not in str(error.value)

    def int32(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    narrow, halves = {f"{o}.qweight": int32(32, 3)}, torch.ones(2, 32).half()
    refused(r"qweight is \[32, 3\], expected \[32, 4\]", packed | narrow)
    refused(r"scales is \[2, 32\], expected \[1, 32\]", packed | {f"{o}.scales": halves})
    refused("scales is float32", packed | {f"{o}.scales": torch.ones(1, 32)})
    refused("qzeros is int64", packed | {f"{o}.qzeros": int32(1, 4).long()})
    refused("o_proj.qzeros.* missing", {k: v for k, v in packed.items() if k != f"{o}.qzeros"})
    wide = {"quant_method": "awq", "group_size": 64}
    refused("q_proj: AWQ stores .* and of 64 columns", packed, quantization_config=wide)
    refused("qweight.*unknown", packed, quantization_config=None)
