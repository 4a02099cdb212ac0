"""Rotary frequencies against transformers' own, and their independence of the batch."""

import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from internvl_rt.config import RopeScaling, load_config
from internvl_rt.models.rotary import Rotary, inverse_frequencies
from tiny_model import original, write_config

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "short_factor": tuple(1 + 0.1 * j for j in range(16)),
    "long_factor": tuple(1 + 0.7 * j for j in range(16)),
    "original_max_position_embeddings": 96,
}
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "dynamic": RopeScaling("dynamic", 3.0),
    "llama3": RopeScaling("llama3", 8.0, **LLAMA3),
    "longrope": RopeScaling("longrope", 32.0, attention_factor=1.25, **LONGROPE),
    "yarn": RopeScaling("yarn", 32.0, attention_factor=1.3465735903, **YARN),
    "yarn_truncated": RopeScaling("yarn", 32.0, **YARN | {"truncate": True}),
}
LENGTHS = (1, 95, 96, 97, 1023, 1024, 1025, 5000)


@pytest.fixture
def text(tmp_path):
    config = load_config(write_config(tmp_path, original("llama"))).text
    return dataclasses.replace(config, head_dim=32, max_position_embeddings=1024, rope_theta=1e5)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_against_transformers(text, kind, length):
    scaling = SCALINGS[kind]
    ours = inverse_frequencies(dataclasses.replace(text, rope_scaling=scaling), length)
    kind = scaling.type
    parameters = {"rope_type": kind, "rope_theta": 1e5, "factor": scaling.factor}
    parameters |= {"llama3": LLAMA3, "longrope": LONGROPE, "yarn": YARN}.get(kind, {})
    if kind == "yarn":
        parameters["truncate"] = scaling.truncate
    reference = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=1024,
        rope_parameters={k: list(v) if isinstance(v, tuple) else v for k, v in parameters.items()},
    )
    theirs, _ = ROPE_INIT_FUNCTIONS[kind](reference, "cpu", seq_len=length)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_plain(text):
    expected = [1e5 ** (-2 * j / 32) for j in range(16)]
    ours = inverse_frequencies(text, 1)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_sequence_is_alone_in_its_table(text, kind):
    rotary = Rotary(dataclasses.replace(text, rope_scaling=SCALINGS[kind]))
    table, scale = rotary(LENGTHS)
    assert scale.tolist() == pytest.approx([SCALINGS[kind].attention_factor] * len(LENGTHS))
    for row, n in zip(table, LENGTHS, strict=True):
        assert torch.equal(row, rotary([n])[0][0])
    changes = len({tuple(row.tolist()) for row in table})
    assert changes == {"dynamic": 3, "longrope": 2}.get(kind, 1)


def test_the_dynamic_table_is_continuous_at_the_limit(text):
    rotary = Rotary(dataclasses.replace(text, rope_scaling=SCALINGS["dynamic"]))
    at, beyond = rotary([1024, 1025])[0]
    assert not torch.equal(at, beyond)
    assert float((at / beyond).log().abs().max()) < 3.0 * math.log(1025 / 1024) * 1.1


CONFIGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn_stretched": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn_mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn_one_mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.8},
    "yarn_attention": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.1},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_against_transformers(tmp_path, family, kind):
    """From rope_scaling of a config.json to angles: no family has a way of its own."""
    scaling = CONFIGS[kind]
    config = original(family)
    more = {"head_dim": 32, "max_position_embeddings": 1024, "rope_theta": 1e5}
    config["llm_config"] |= more | {"rope_scaling": scaling}
    text = load_config(write_config(tmp_path, config)).text
    reference = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=1024,
        rope_parameters=scaling | {"rope_theta": 1e5},
    )
    for length in LENGTHS:
        table, scale = Rotary(text)([length])
        theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference, "cpu", length)
        torch.testing.assert_close(table[0], theirs, rtol=1e-6, atol=0)
        assert float(scale[0]) == pytest.approx(factor, rel=1e-6)
    stretch = 1 if kind in ("llama3", "yarn_stretched") else scaling["factor"]
    assert text.context == 1024 * stretch
