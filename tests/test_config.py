"""config.json: what is read, what is defaulted, what is refused and in which words."""

import json
import os

import pytest

import fuzz
from internvl_rt import config as reader
from internvl_rt import image
from internvl_rt.config import (
    ExpertsConfig,
    RopeScaling,
    load_config,
    load_vision_config,
)
from internvl_rt.json_file import MAX_JSON_BYTES, show
from tiny_model import FAMILIES, NATIVE_FAMILIES, PREPROCESSOR, native, original, write_config


def _at(config, path):
    *parents, last = path.split(".")
    for key in parents:
        config = config[key]
    return config, last


def _set(config, path, value):
    parent, key = _at(config, path)
    parent[key] = value
    return config


def _drop(config, path):
    parent, key = _at(config, path)
    parent.pop(key, None)
    return config


def _one_line(error):
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_original(tmp_path):
    config = load_config(write_config(tmp_path, original()))
    vision, text = config.vision, config.text
    assert (vision.hidden_size, vision.intermediate_size, vision.num_layers) == (16, 24, 2)
    assert (vision.num_heads, vision.head_dim, vision.grid) == (2, 8, 4)
    assert (vision.norm_type, vision.qkv_bias, vision.qk_norm) == ("layer_norm", True, False)
    assert (text.backbone, text.vocab_size, text.hidden_size) == ("qwen2", 40, 32)
    assert (text.num_heads, text.num_kv_heads, text.head_dim) == (4, 2, 8)
    assert text.rope_theta == 1e6
    assert text.rope_scaling == RopeScaling("dynamic", 2.0)
    assert text.qkv_bias
    assert config.layout == "original"
    assert config.template == "internvl2_5"
    assert config.system_message is None
    assert (config.image_size, config.downsample_ratio, config.unshuffle) == (56, 0.5, 2)
    assert config.tokens_per_tile == 4
    assert (config.select_layer, config.vision_layers_used) == (-1, 2)
    assert (config.min_dynamic_patch, config.max_dynamic_patch) == (1, 12)
    assert config.use_thumbnail
    assert config.dynamic_image_size
    assert config.image_token_id is None
    assert config.torch_dtype == "bfloat16"
    assert config.eos_token_ids == (38,)


def test_native(tmp_path):
    write_config(tmp_path, native())
    bare = load_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR | {"max_patches": 7}), encoding="utf-8"
    )
    config = load_config(tmp_path)
    assert (bare.max_dynamic_patch, config.max_dynamic_patch) == (12, 7)
    assert config.layout == "hf"
    assert config.template == "hf"
    assert (config.ps_version, config.use_thumbnail, config.dynamic_image_size) == (
        "v2",
        True,
        True,
    )
    assert config.image_token_id == 37
    other = original()
    folder = tmp_path / "original"
    folder.mkdir()
    assert config.vision == load_config(write_config(folder, other)).vision
    assert config.text == load_config(folder).text


def test_tile_size_of_the_native_preprocessor(tmp_path):
    write_config(tmp_path, _set(native(), "image_seq_length", 16))
    processor = PREPROCESSOR | {"size": {"height": 112, "width": 112}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    config = load_config(tmp_path)
    assert (config.image_size, config.vision.image_size, config.tokens_per_tile) == (112, 56, 16)


def test_processor_in_one_file(tmp_path):
    write_config(tmp_path, native())
    whole = {"image_processor": PREPROCESSOR | {"max_patches": 5}}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole), encoding="utf-8")
    assert load_config(tmp_path).max_dynamic_patch == 5


def test_class_defaults_of_missing_keys(tmp_path):
    config = original()
    for key in ("select_layer", "force_image_size", "ps_version", "use_thumbnail", "torch_dtype"):
        _drop(config, key)
    for key in ("dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "system_message"):
        _drop(config, key)
    for key in ("rope_theta", "rope_scaling", "rms_norm_eps", "max_position_embeddings"):
        _drop(config, f"llm_config.{key}")
    _drop(config, "downsample_ratio")
    loaded = load_config(write_config(tmp_path, config))
    assert (loaded.select_layer, loaded.ps_version, loaded.downsample_ratio) == (-1, "v1", 0.5)
    assert (loaded.use_thumbnail, loaded.dynamic_image_size) == (False, False)
    assert (loaded.min_dynamic_patch, loaded.max_dynamic_patch) == (1, 6)
    assert loaded.image_size == 56
    assert loaded.torch_dtype is None
    text = loaded.text
    assert (text.rope_theta, text.rope_scaling, text.rms_norm_eps) == (1e4, None, 1e-6)
    assert text.max_position_embeddings == 32768


def test_class_defaults_of_the_native_layout(tmp_path):
    config = native()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        _drop(config, f"vision_config.{key}")
    for key in ("image_size", "patch_size", "norm_type", "layer_norm_eps", "use_qk_norm"):
        _drop(config, f"vision_config.{key}")
    _drop(config, "image_seq_length")
    _drop(config, "text_config.vocab_size")
    loaded = load_config(write_config(tmp_path, config))
    vision = loaded.vision
    assert (vision.hidden_size, vision.num_layers, vision.num_heads) == (1024, 24, 16)
    assert (vision.image_size, loaded.tokens_per_tile) == (448, 256)
    assert loaded.text.vocab_size == 151936


@pytest.mark.parametrize("config", [original(), native()], ids=["original", "native"])
def test_vision_of_a_chat_checkpoint(tmp_path, config):
    text = "llm_config" if "llm_config" in config else "text_config"
    whole = load_config(write_config(tmp_path, config)).vision
    _set(config, f"{text}.architectures", ["SomeoneElsesForCausalLM"])
    assert load_vision_config(write_config(tmp_path, config)) == whole


@pytest.mark.parametrize("key", ["intern_vit_6b", "internvl_vision"])
def test_standalone_vision(tmp_path, key):
    config = (original() if key == "intern_vit_6b" else native())["vision_config"]
    assert load_vision_config(write_config(tmp_path, config)).hidden_size == 16
    with pytest.raises(ValueError, match=f"model_type is '{key}'"):
        load_config(tmp_path)


def test_end_tokens_of_both_files(tmp_path):
    write_config(tmp_path, _set(original(), "llm_config.eos_token_id", [38, 5]))
    generation = {"eos_token_id": [7, 38], "pad_token_id": 39}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    assert load_config(tmp_path).eos_token_ids == (7, 38, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    text = load_config(write_config(tmp_path, original(family))).text
    everywhere = family in ("internlm3", "gpt_oss")
    assert text.backbone == family
    assert text.qkv_bias == (everywhere or family == "qwen2")
    assert (text.o_bias, text.mlp_bias) == (everywhere, everywhere)
    assert text.qk_norm == family.startswith("qwen3")
    assert text.head_dim == (12 if family.startswith("qwen3") else 8)
    experts = {"qwen3_moe": ExpertsConfig(3, 2, 20, True), "gpt_oss": ExpertsConfig(3, 2, 48, True)}
    assert text.experts == experts.get(family)
    oss = family == "gpt_oss"
    assert (text.sinks, text.norm_weight_in_fp32) == (oss, oss)
    assert text.gate == ("gpt_oss" if oss else "silu")
    assert text.windows == ((24, None) if oss else (None, None))
    if family in NATIVE_FAMILIES:
        assert load_config(write_config(tmp_path, native(family))).text == text
    config = original(family)
    del config["llm_config"]["architectures"]
    assert load_config(write_config(tmp_path, config)).text == text


@pytest.mark.parametrize(
    ("family", "keys", "biases"),
    [
        ("qwen3", {"attention_bias": True}, (True, True, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("internlm2", {"bias": True}, (True, True, False)),
        ("internlm3", {"bias": False}, (True, False, False)),
        ("internlm3", {"qkv_bias": False}, (False, True, True)),
    ],
)
def test_biases(tmp_path, family, keys, biases):
    config = original(family)
    config["llm_config"] |= keys
    text = load_config(write_config(tmp_path, config)).text
    assert (text.qkv_bias, text.o_bias, text.mlp_bias) == biases


def test_class_defaults_of_biases(tmp_path):
    config = original("internlm2")
    del config["llm_config"]["bias"]
    text = load_config(write_config(tmp_path, config)).text
    assert (text.qkv_bias, text.o_bias, text.mlp_bias) == (True, True, False)


def test_class_defaults_of_mixtures(tmp_path):
    config = native("gpt_oss")
    for key in ("layer_types", "sliding_window", "rope_scaling", "rope_theta", "head_dim"):
        _drop(config, f"text_config.{key}")
    for key in ("num_local_experts", "num_experts_per_tok"):
        _drop(config, f"text_config.{key}")
    config["text_config"]["num_hidden_layers"] = 3
    text = load_config(write_config(tmp_path, config)).text
    assert text.windows == (128, None, 128)
    assert (text.rope_theta, text.head_dim) == (150000.0, 64)
    assert (text.rope_scaling.type, text.rope_scaling.truncate) == ("yarn", False)
    assert text.rope_scaling.attention_factor == pytest.approx(1.3465735903)
    assert text.experts == ExpertsConfig(128, 4, 48, True)
    config = native("qwen3_moe")
    for key in ("norm_topk_prob", "num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        _drop(config, f"text_config.{key}")
    text = load_config(write_config(tmp_path, config)).text
    assert text.experts == ExpertsConfig(128, 8, 768, False)


@pytest.mark.parametrize("path", ["quantization_config", "llm_config.quantization_config"])
def test_mxfp4_is_for_gpt_oss(tmp_path, path):
    def quantised(family, method):
        return _set(original(family), path, {"quant_method": method})

    load_config(write_config(tmp_path, quantised("gpt_oss", "mxfp4")))
    for family, method in (("gpt_oss", "awq"), ("qwen3_moe", "mxfp4")):
        with pytest.raises(ValueError, match="quantization_config"):
            load_config(write_config(tmp_path, quantised(family, method)))


@pytest.mark.parametrize(
    ("family", "context"), [("qwen2", 65536), ("qwen3", 32768), ("phi3", 131072)]
)
def test_context(tmp_path, family, context):
    assert load_config(write_config(tmp_path, original(family))).text.context == context


def test_longrope(tmp_path):
    """Phi-3's three spellings; the factor of the angles is not that of the sines."""
    config = original("phi3")
    scaling = load_config(write_config(tmp_path, config)).text.rope_scaling
    assert (scaling.type, scaling.factor) == ("longrope", 32.0)
    assert scaling.attention_factor == pytest.approx(1.1902380714)
    assert scaling.original_max_position_embeddings == 4096
    assert scaling.long_factor == (1.0, 2.0, 4.0, 8.0)
    for spelling, factor in (("longrope", 1.1902380714), ("yarn", 1.3465735903)):
        config["llm_config"]["rope_scaling"]["type"] = spelling
        other = load_config(write_config(tmp_path, config)).text.rope_scaling
        assert other.attention_factor == pytest.approx(factor)
    _set(config, "llm_config.max_position_embeddings", 4096)
    assert load_config(write_config(tmp_path, config)).text.rope_scaling.attention_factor == 1
    parameters = config["llm_config"].pop("rope_scaling") | {"attention_factor": 1.5}
    parameters |= {"rope_theta": 1e6, "rope_type": "longrope", "type": "longrope"}
    _set(config, "llm_config.rope_parameters", parameters)
    assert load_config(write_config(tmp_path, config)).text.rope_scaling.attention_factor == 1.5


def test_old_vision_defaults(tmp_path):
    """Configs of the first towers leave out what their class knew."""
    config = original()
    config["vision_config"] = {"model_type": "intern_vit_6b"}
    config["force_image_size"] = 448
    loaded = load_config(write_config(tmp_path, config))
    vision = loaded.vision
    assert (vision.hidden_size, vision.intermediate_size) == (3200, 12800)
    assert (vision.num_layers, vision.num_heads, vision.head_dim) == (48, 25, 128)
    assert (vision.image_size, vision.patch_size, vision.layer_norm_eps) == (224, 14, 1e-6)
    assert (vision.norm_type, vision.qkv_bias, vision.qk_norm) == ("rms_norm", False, True)
    assert loaded.tokens_per_tile == 256


@pytest.mark.parametrize(("template", "layer"), [("internvl_zh", -4), ("Hermes-2", -1)])
def test_old_selected_layer(tmp_path, template, layer):
    config = _drop(original() | {"template": template}, "select_layer")
    config["vision_config"]["num_hidden_layers"] = 5
    assert load_config(write_config(tmp_path, config)).select_layer == layer


ACCEPTED = [
    ("llm_config.rope_scaling", None, None),
    ("llm_config.rope_scaling", {"rope_type": "dynamic", "factor": 3}, RopeScaling("dynamic", 3.0)),
    ("llm_config.rope_scaling", {"rope_type": "default"}, None),
]


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_rope_of_llama(tmp_path):
    config = original("llama")
    for scaling in ({"type": "linear", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}):
        _set(config, "llm_config.rope_scaling", scaling)
        text = load_config(write_config(tmp_path, config)).text
        assert text.rope_scaling == RopeScaling(scaling["type"], 4.0)
        assert text.context == 4 * 32768
    text = load_config(write_config(tmp_path, _set(config, "llm_config.rope_scaling", _LLAMA3)))
    scaling = text.text.rope_scaling
    assert (scaling.type, scaling.factor, scaling.attention_factor) == ("llama3", 8.0, 1.0)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
    assert text.text.context == 32768


REFUSED_FAMILY = [
    ("llama", "rope_scaling", _LLAMA3 | {"high_freq_factor": 1.0}, "more than low_freq_factor=1"),
    ("llama", "rope_scaling", {"type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
    ("llama", "rope_scaling", {"type": "longrope"}, "type is 'longrope', supported: default, lin"),
    ("llama", "rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", "attention_bias", 0, "attention_bias is 0, expected true or false"),
    ("internlm2", "bias", None, "bias is None, expected true or false"),
    ("phi3", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, expected 1"),
    ("phi3", "sliding_window", 2047, "sliding_window is 2047, expected an integer from 131072"),
    ("phi3", "rope_scaling", {"type": "dynamic", "factor": 2.0}, "supported: default, su"),
    ("phi3", "rope_scaling", {"type": "su"}, "short_factor is missing, expected 4 numbers"),
    ("qwen3_moe", "decoder_sparse_step", 0, "decoder_sparse_step is 0, expected an integer from 1"),
    (
        "qwen3_moe",
        "mlp_only_layers",
        [2],
        "mlp_only_layers is \\[2\\], .* from 0 to 1",
    ),
    ("qwen3_moe", "mlp_only_layers", [True], "mlp_only_layers is \\[True\\], expected layers"),
    ("qwen3_moe", "mlp_only_layers", 1, "mlp_only_layers is 1, expected layers"),
    ("qwen3_moe", "num_experts_per_tok", 4, "num_experts_per_tok is 4, expected .* 1 to 3"),
    ("qwen3_moe", "num_experts", None, "num_experts is None"),
    ("qwen3_moe", "num_experts_per_tok", "", "num_experts_per_tok is ''"),
    ("qwen3_moe", "num_local_experts", 4, "num_local_experts is 4, expected num_experts=3"),
    ("qwen3_moe", "num_local_experts", "3", "num_local_experts is '3', expected an integer"),
    ("qwen3_moe", "norm_topk_prob", 1, "norm_topk_prob is 1"),
    ("gpt_oss", "layer_types", ["full_attention"], "2 entries, as num_hidden_layers"),
    ("gpt_oss", "layer_types", ["chunked", "full_attention"], "layer_types is"),
    ("gpt_oss", "sliding_window", 0, "sliding_window is 0"),
    ("gpt_oss", "swiglu_limit", 8.0, "swiglu_limit is 8.0, expected 7"),
    ("gpt_oss", "max_position_embeddings", 4096, "factor is 32.0, expected .* = 1"),
    ("gpt_oss", "rope_scaling", {"type": "dynamic", "factor": 2}, "supported: default, yarn"),
    ("phi3", "original_max_position_embeddings", 1, "original_max_position_embeddings is 1"),
]


@pytest.mark.parametrize(("family", "key", "value", "match"), REFUSED_FAMILY)
def test_refused_of_a_family(tmp_path, family, key, value, match):
    write_config(tmp_path, _set(original(family), f"llm_config.{key}", value))
    with pytest.raises(ValueError, match=match) as error:
        load_config(tmp_path)
    assert _one_line(error).startswith("config.json: llm_config.")


@pytest.mark.parametrize("key", ["short_factor", "long_factor"])
@pytest.mark.parametrize("value", [[1.0] * 3, [1.0] * 5, [1.0, 1, 1, 0], [1, 1, 1, "1"], 1, None])
def test_refused_longrope_factors(tmp_path, key, value):
    config = original("phi3")
    config["llm_config"]["rope_scaling"][key] = value
    with pytest.raises(ValueError, match=f"{key} is .*, expected 4 numbers") as error:
        load_config(write_config(tmp_path, config))
    _one_line(error)


@pytest.mark.parametrize(("path", "value", "expected"), ACCEPTED)
def test_rope_spellings(tmp_path, path, value, expected):
    config = _set(original(), path, value)
    assert load_config(write_config(tmp_path, config)).text.rope_scaling == expected


def test_rope_parameters(tmp_path):
    config = original()
    _drop(config, "llm_config.rope_scaling")
    _drop(config, "llm_config.rope_theta")
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}
    _set(config, "llm_config.rope_parameters", parameters)
    text = load_config(write_config(tmp_path, config)).text
    assert (text.rope_theta, text.rope_scaling) == (5e5, RopeScaling("dynamic", 2.0))


@pytest.mark.parametrize(
    ("select_layer", "used"), [(-1, 2), (-2, 1), (-3, 0), (0, 0), (1, 1), (2, 2)]
)
def test_selected_layer(tmp_path, select_layer, used):
    config = _set(original(), "select_layer", select_layer)
    assert load_config(write_config(tmp_path, config)).vision_layers_used == used


def test_unknown_keys_are_ignored(tmp_path):
    plain = load_config(write_config(tmp_path, original()))
    config = original()
    for path in ("use_moe", "vision_config.num_experts", "llm_config.some_new_flag", "flash_x"):
        _set(config, path, {"deep": [1, None, "x"]})
    assert load_config(write_config(tmp_path, config)) == plain


def test_system_message(tmp_path):
    config = _set(original(), "system_message", "Be brief. 请")
    assert load_config(write_config(tmp_path, config)).system_message == "Be brief. 请"


NUMBERS = ["3", None, True, 2.0, [2], {"a": 1}, -1, 0, 10**30, -(10**30)]
SIZES = [
    "vision_config.hidden_size",
    "vision_config.intermediate_size",
    "vision_config.num_hidden_layers",
    "vision_config.num_attention_heads",
    "llm_config.vocab_size",
    "llm_config.hidden_size",
    "llm_config.intermediate_size",
    "llm_config.num_hidden_layers",
    "llm_config.num_attention_heads",
    "llm_config.max_position_embeddings",
    "min_dynamic_patch",
    "max_dynamic_patch",
]


@pytest.mark.parametrize("path", SIZES)
@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_wrong_sizes(tmp_path, path, value):
    write_config(tmp_path, _set(original(), path, value))
    with pytest.raises(ValueError, match=path.replace(".", r"\.")) as error:
        load_config(tmp_path)
    assert show(value) in _one_line(error)


REFUSED = [
    ("model_type", "blip", "model_type is 'blip', supported: internvl_chat, internvl, llava"),
    ("model_type", "llava", "architectures is \\['InternVLChatModel'\\], supported: \\['LlavaLl"),
    ("model_type", None, "model_type is None"),
    ("model_type", ["internvl_chat"], "model_type is \\['internvl_chat'\\]"),
    (
        "llm_config.architectures",
        ["MptForCausalLM"],
        "llm_config.architectures is \\['MptForCausalLM'\\], supported: Qwen2ForCausalLM, Qwen3",
    ),
    ("llm_config.architectures", [], "llm_config.architectures is \\[\\]"),
    ("llm_config.model_type", "qwen", "llm_config.model_type is 'qwen', supported: qwen2, qwen3"),
    ("llm_config.model_type", "qwen3", "architectures and model_type disagree"),
    ("llm_config", None, "llm_config is None, expected an object"),
    ("vision_config", [], "vision_config is \\[\\], expected an object"),
    ("llm_config.hidden_act", "gelu", "supported: silu"),
    ("vision_config.hidden_act", "quick_gelu", "supported: gelu"),
    ("vision_config.norm_type", "batch_norm", "supported: layer_norm, rms_norm"),
    ("vision_config.qkv_bias", 1, "true or false"),
    ("vision_config.qk_normalization", "yes", "qk_normalization is 'yes'"),
    ("vision_config.num_channels", 1, "num_channels is 1, supported: 3"),
    ("vision_config.hidden_size", 17, "multiple of num_attention_heads=2"),
    ("vision_config.hidden_size", 6, "head_dim is 3"),
    ("vision_config.hidden_size", 1024, "head_dim is 512"),
    ("vision_config.image_size", 57, "multiple of patch_size=14"),
    ("vision_config.image_size", [56, 28], "square"),
    ("vision_config.image_size", [56], "square"),
    ("vision_config.image_size", [], "square"),
    ("vision_config.patch_size", 0, "patch_size is 0"),
    ("vision_config.layer_norm_eps", 0, "layer_norm_eps is 0"),
    ("vision_config.layer_norm_eps", -1e-6, "layer_norm_eps"),
    ("vision_config.layer_norm_eps", "1e-6", "layer_norm_eps"),
    ("llm_config.rms_norm_eps", True, "rms_norm_eps is True"),
    ("llm_config.num_attention_heads", 3, "num_key_value_heads is 2, expected a divisor"),
    ("llm_config.num_key_value_heads", 3, "divisor of num_attention_heads=4"),
    ("llm_config.hidden_size", 34, "multiple of num_attention_heads=4"),
    ("llm_config.head_dim", 7, "head_dim is 7"),
    ("llm_config.head_dim", 260, "head_dim is 260"),
    ("llm_config.rope_theta", 0, "rope_theta is 0"),
    ("llm_config.rope_theta", 1e300, "rope_theta is 1e\\+300"),
    ("llm_config.rope_scaling", "dynamic", "rope_scaling is 'dynamic', expected an object"),
    ("llm_config.rope_scaling", {}, "rope_scaling.type is missing"),
    (
        "llm_config.rope_scaling",
        {"type": "su", "factor": 2.0},
        "type is 'su', supported: default, lin",
    ),
    ("llm_config.rope_scaling", {"rope_type": 3, "factor": 2.0}, "rope_type is 3, supported"),
    ("llm_config.rope_scaling", {"type": "dynamic"}, "factor is missing"),
    ("llm_config.rope_scaling", {"type": "dynamic", "factor": 0}, "factor is 0"),
    (
        "llm_config.rope_scaling",
        {"type": "dynamic", "rope_type": "default", "factor": 2.0},
        "disagree",
    ),
    ("llm_config.rope_parameters", {"rope_theta": 1e4}, "rope_theta is given twice"),
    ("llm_config.rope_parameters", {"rope_type": "default"}, "disagree"),
    ("llm_config.use_sliding_window", True, "use_sliding_window is True, supported: False"),
    ("llm_config.use_sliding_window", 0, "use_sliding_window is 0"),
    ("llm_config.layer_types", ["sliding_attention"], "layer_types"),
    ("llm_config.tie_word_embeddings", "no", "true or false"),
    ("llm_config.eos_token_id", -1, "eos_token_id is -1"),
    ("llm_config.eos_token_id", [1, "2"], "eos_token_id"),
    ("llm_config.bos_token_id", True, "bos_token_id is True"),
    ("llm_config.quantization_config", {"quant_method": "gptq"}, "is 'gptq', supported: awq"),
    ("quantization_config", {}, "quant_method is missing, supported: awq"),
    ("quantization_config", {"quant_method": "awq", "bits": 8}, "bits is 8, supported: 4"),
    ("quantization_config", {"quant_method": "awq", "version": "gemv"}, "supported: gemm"),
    ("quantization_config", {"quant_method": "awq", "zero_point": False}, "supported: True"),
    ("quantization_config", {"quant_method": "awq", "group_size": 96}, "one of 32, 64, 128"),
    ("quantization_config", {"quant_method": "awq", "group_size": -1}, "group_size is -1"),
    ("vision_config.quantization_config", {"quant_method": "awq"}, "unquantised weights"),
    ("llm_config.rope_theta", 1, "rope_theta is 1"),
    ("llm_config.partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, expected 1"),
    ("use_llm_lora", 16, "use_llm_lora is 16, supported: 0"),
    ("flash_mode", True, "flash_mode is True"),
    ("force_image_size", 70, "force_image_size is 70, expected a multiple of 28"),
    ("force_image_size", -28, "force_image_size is -28"),
    ("force_image_size", 1 << 20, "force_image_size"),
    ("downsample_ratio", 0.3, "downsample_ratio is 0.3"),
    ("downsample_ratio", 2, "downsample_ratio is 2"),
    ("downsample_ratio", 0, "downsample_ratio is 0"),
    ("select_layer", 3, "select_layer is 3, expected an integer from -3 to 2"),
    ("select_layer", -4, "select_layer is -4"),
    ("select_layer", "last", "select_layer is 'last'"),
    ("ps_version", "v3", "ps_version is 'v3', supported: v1, v2"),
    ("ps_version", 2, "ps_version is 2"),
    ("template", "vicuna", "template is 'vicuna', supported: internvl_zh"),
    ("template", "hf", "template is 'hf'"),
    ("template", None, "template is None"),
    ("max_dynamic_patch", 0, "max_dynamic_patch is 0"),
    ("min_dynamic_patch", 13, "at least min_dynamic_patch=13"),
    ("use_thumbnail", "yes", "use_thumbnail is 'yes'"),
    ("dynamic_image_size", None, "dynamic_image_size is None"),
    ("system_message", 5, "system_message is 5"),
    ("torch_dtype", "int8", "torch_dtype is 'int8', supported"),
    ("qllama_config", {"hidden_size": 8}, "InternVL-14B-224px"),
]


@pytest.mark.parametrize(("path", "value", "match"), REFUSED)
def test_refused_values(tmp_path, path, value, match):
    write_config(tmp_path, _set(original(), path, value))
    with pytest.raises(ValueError, match=match) as error:
        load_config(tmp_path)
    assert _one_line(error).startswith("config.json: ")


REFUSED_NATIVE = [
    ("vision_feature_layer", [-1], "vision_feature_layer"),
    ("vision_feature_select_strategy", "full", "supported: 'default'"),
    ("projector_hidden_act", "relu", "supported: gelu"),
    ("vision_config.use_mean_pooling", False, "use_mean_pooling is False"),
    ("vision_config.use_mask_token", True, "use_mask_token is True"),
    ("vision_config.use_absolute_position_embeddings", False, "absolute"),
    ("vision_config.model_type", "intern_vit_6b", "supported: internvl_vision"),
    ("image_seq_length", 256, "image_seq_length is 256, expected 4"),
    ("image_token_id", "37", "image_token_id is '37'"),
    ("text_config.architectures", ["Qwen3ForCausalLM"], "text_config.architectures"),
]


@pytest.mark.parametrize(("path", "value", "match"), REFUSED_NATIVE)
def test_refused_native_values(tmp_path, path, value, match):
    write_config(tmp_path, _set(native(), path, value))
    with pytest.raises(ValueError, match=match) as error:
        load_config(tmp_path)
    _one_line(error)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_patches": 0}, "preprocessor_config.json: max_patches is 0"),
        ({"min_patches": 13}, "at least min_patches=13"),
        ({"crop_to_patches": 1}, "crop_to_patches is 1"),
        ({"size": {"height": 56, "width": 112}}, "width is 112, expected height=56"),
        ({"size": {"shortest_edge": 56}}, "size.height is missing"),
        ({"size": {"height": 70, "width": 70}}, "multiple of 28"),
    ],
)
def test_refused_preprocessor(tmp_path, change, match):
    write_config(tmp_path, native())
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR | change), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=match):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "Expecting value"),
        (b"[]", "expected an object"),
        (b"3", "expected an object"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer of 5000 digits"),
        (b'{"a": ' + b"[" * 200000 + b"}", "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b" " * (MAX_JSON_BYTES + 1), "more than"),
    ],
    ids=range(12),
)
def test_malformed_files(tmp_path, data, match):
    (tmp_path / "config.json").write_bytes(data)
    for load in (load_config, load_vision_config):
        with pytest.raises(ValueError, match=match) as error:
            load(tmp_path)
        assert _one_line(error).startswith("config.json: ")


def test_missing_and_odd_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with pytest.raises(NotADirectoryError, match="is a file, expected a checkpoint folder"):
        load_config(file)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OSError, match=r"config\.json is"):
        load_config(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="not a regular file"):
        load_config(tmp_path)


@pytest.mark.parametrize("base", fuzz.BASES, ids=fuzz.name_of)
def test_fuzz(base):
    found = fuzz.fuzz_configs(base, 600, f"test_config.{fuzz.name_of(base)}", run_every=20)
    assert found["accepted"] > 100
    assert found["refused"] > 100
    assert found["run"] > 2


def _any_number(section, key, low, high, default=0):
    value = section.value(key, default)
    if type(value) in (bool, int, float) and low <= value <= high:
        return int(value)
    section.wrong(key, "a number")


PLANTED = {
    "true is 1": ("integer", _any_number),
    "text is a number": (
        "number",
        lambda s, key, low, high, default=0: float(s.value(key, default)),
    ),
    "1 is true": ("boolean", lambda s, key, default=False: bool(s.value(key, default))),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_fuzz_finds_readers_that_accept_too_much(name, monkeypatch):
    method, lenient = PLANTED[name]
    monkeypatch.setattr(reader._Section, method, lenient)
    with pytest.raises(AssertionError, match="accepted, but"):
        fuzz.fuzz_configs(fuzz.BASES[0], 2000, "planted")


def test_a_tile_is_at_most_what_pictures_are_resized_to():
    assert reader._MAX_IMAGE_SIZE == image.MAX_TILE_SIZE
