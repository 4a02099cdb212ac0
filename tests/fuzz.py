"""Mutated configs, headers and indexes: what is accepted must be sound.

The tests run a few thousand mutations of each kind; many more by hand:
`PYTHONPATH=python python tests/fuzz.py --configs 600000 --headers 400000`. Whether an accepted
config is sound is decided here anew, from its JSON and from what the model would make of it, and
an accepted header must be one that the format's own library reads alike.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import json
import math
import random
import struct
import tempfile
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from internvl_rt import json_file
from internvl_rt.config import ModelConfig, VisionConfig, load_config, load_vision_config
from internvl_rt.models import families
from internvl_rt.models.internvl import InternVL
from internvl_rt.models.rotary import Rotary
from internvl_rt.ops import OpSet
from internvl_rt.runtime.batch import Chunk
from internvl_rt.runtime.kv_cache import KvCache
from internvl_rt.runtime.plan import make_plan
from internvl_rt.runtime.platform import CPU
from internvl_rt.weights import Checkpoint, parse_header, tensor_shapes
from tiny_model import (
    FAMILIES,
    NATIVE_FAMILIES,
    PREPROCESSOR,
    TOWER,
    VISION,
    llava,
    native,
    original,
)

CONFIG, PROCESSOR, GENERATION = "config.json", "preprocessor_config.json", "generation_config.json"
TOWER_CONFIG = f"{TOWER}/{CONFIG}"
BASES = [functools.partial(original, f) for f in FAMILIES]
BASES += [functools.partial(native, f) for f in NATIVE_FAMILIES]
BASES += [llava]


def name_of(base) -> str:
    return "-".join((getattr(base, "func", base).__name__, *getattr(base, "args", ())))


# What breaks parsers, as bytes.
ODD_BYTES = [b"-", b"0", b"99", b"1e999", b"null", b"true", b"[", b"{", b'"', b"\\ud800", b"."]
ODD = [None, True, False, -1, 0, 1, 2, 3, 7, 10**40, 0.5, 1.5, -0.0, 1e308, 1e-300, "", "x", "8"]
ODD += ["NaN", "\ud800", [], [1], [8, 8], ["x"], {}, [[]], {"type": "dynamic", "factor": 2.0}]
# Keys that the bases lack and that change what a config means.
MORE = {
    "head_dim": 8,
    "attention_bias": True,
    "mlp_bias": True,
    "bias": False,
    "qkv_bias": True,
    "partial_rotary_factor": 0.5,
    "sliding_window": 8,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "mlp_only_layers": [1],
    "decoder_sparse_step": 2,
    "tie_word_embeddings": True,
    "flash_mode": True,
    "qllama_config": {},
}
ROPES = [
    {"type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


# ---- mutations ----------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut, doubled or replaced by what breaks parsers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 40)]
        elif kind == 3:
            data[at : at + rng.randint(0, 4)] = rng.choice(ODD_BYTES)
        else:
            digits = [i for i, c in enumerate(data) if chr(c).isdigit()]
            if digits:
                data[rng.choice(digits)] = ord(rng.choice("0123456789"))
    return bytes(data)


def _near(rng: random.Random, value):
    """A value of the same kind, or the same value as another kind."""
    if isinstance(value, bool):
        return rng.choice([not value, int(value), str(value).lower(), [value], None])
    if isinstance(value, (int, float)):
        changed = [value + 1, value - 1, 2 * value, -value, value / 2, value // 2, float(value)]
        return rng.choice([*changed, str(value), [value], [value, value], value * 10**6])
    if isinstance(value, str):
        return rng.choice([value.upper(), value + " ", value[1:], [value], {value: value}])
    if isinstance(value, list):
        return rng.choice([[], value * 2, value[1:], value[:1] * len(value), dict.fromkeys("ab")])
    return rng.choice([None, [], {}, 0])


def mutate_values(rng: random.Random, config: dict) -> dict:
    """One to three values somewhere replaced, dropped or added."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        sections = [config, *(v for v in config.values() if isinstance(v, dict))]
        deeper = [v for s in sections[1:] for v in s.values() if isinstance(v, dict)]
        section = rng.choice([*sections, *sections[1:], *deeper])
        keys = sorted(section)
        kind = rng.randrange(7)
        if kind == 0 or not keys:
            key = rng.choice(sorted(MORE))
            section[key] = copy.deepcopy(MORE[key])
        elif kind == 1:
            section["rope_scaling"] = copy.deepcopy(rng.choice(ROPES))
        elif kind == 2:
            del section[rng.choice(keys)]
        elif kind == 3:
            section[rng.choice(keys)] = copy.deepcopy(rng.choice(ODD))
        elif kind == 4:
            key, other = rng.choice(keys), rng.choice(keys)
            section[key] = copy.deepcopy(section[other])
        else:
            key = rng.choice(keys)
            section[key] = _near(rng, section[key])
    return config


# ---- what a sound config is ---------------------------------------------------------------------


def _integer(low: int, high: int):
    return lambda v: type(v) is int and low <= v <= high


def _number(low: float, high: float):
    return lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high


def _one_of(*values):
    return lambda v: any(type(v) is type(x) and v == x for x in values)


def _or_null(rule):
    return lambda v: v is None or rule(v)


def _square(high: int):
    side = _integer(1, high)
    return lambda v: side(v) or (type(v) is list and len(v) == 2 and v[0] == v[1] and side(v[0]))


def _ids(v):
    return all(map(_integer(0, (1 << 31) - 1), v if type(v) is list else [v]))


BOOL = _one_of(True, False)
WIDTH, EPS = _integer(1, 1 << 20), _number(1e-12, 1e-2)
# Keys of JSON, what they may hold, and the field that then has the value.
TOP = {
    "torch_dtype": (_or_null(_one_of("float32", "bfloat16", "float16")), None),
    "dtype": (_or_null(_one_of("float32", "bfloat16", "float16")), None),
}
ORIGINAL = TOP | {
    "model_type": (_one_of("internvl_chat"), None),
    "template": (lambda v: type(v) is str and v, "template"),
    "system_message": (_or_null(lambda v: type(v) is str), "system_message"),
    "force_image_size": (_or_null(_square(2048)), None),
    "downsample_ratio": (_number(0.125, 1), None),
    "select_layer": (lambda v: type(v) is int, "select_layer"),
    "ps_version": (_one_of("v1", "v2"), "ps_version"),
    "min_dynamic_patch": (_integer(1, 1024), "min_dynamic_patch"),
    "max_dynamic_patch": (_integer(1, 1024), "max_dynamic_patch"),
    "use_thumbnail": (BOOL, "use_thumbnail"),
    "dynamic_image_size": (BOOL, "dynamic_image_size"),
    "flash_mode": (_one_of(False), None),
    "use_llm_lora": (_one_of(0), None),
    "use_backbone_lora": (_one_of(0), None),
}
NATIVE = TOP | {
    "model_type": (_one_of("internvl"), None),
    "downsample_ratio": (_number(0.125, 1), None),
    "vision_feature_layer": (lambda v: type(v) is int, "select_layer"),
    "image_token_id": (_or_null(_integer(0, (1 << 31) - 1)), "image_token_id"),
    "image_seq_length": (WIDTH, "tokens_per_tile"),
    "projector_hidden_act": (_one_of("gelu"), None),
    "vision_feature_select_strategy": (_one_of("default"), None),
}
LLAVA = TOP | {
    "model_type": (_one_of("llava", "llava_llama"), None),
    "mm_projector_type": (_one_of("mlp2x_gelu"), None),
    "mm_vision_select_feature": (_one_of("patch"), None),
    "mm_vision_select_layer": (lambda v: type(v) is int, "select_layer"),
    "mm_use_im_start_end": (_one_of(False), None),
    "mm_use_im_patch_token": (_one_of(False), None),
    "image_aspect_ratio": (_one_of("pad"), None),
    "mm_vision_tower": (lambda v: type(v) is str and "internvit" in v.lower().replace("_", ""), ""),
}
TOWER_RULES = {
    "hidden_size": (WIDTH, "hidden_size"),
    "intermediate_size": (WIDTH, "intermediate_size"),
    "num_hidden_layers": (_integer(1, 1024), "num_layers"),
    "num_attention_heads": (_integer(1, 4096), "num_heads"),
    "patch_size": (_square(1024), None),
    "image_size": (_square(2048), None),
    "layer_norm_eps": (EPS, "layer_norm_eps"),
    "norm_type": (_one_of("layer_norm", "rms_norm"), "norm_type"),
    "hidden_act": (_one_of("gelu"), "hidden_act"),
    "num_channels": (_one_of(3), None),
    "quantization_config": (_one_of(None), None),
}
ORIGINAL_VISION = TOWER_RULES | {
    "qkv_bias": (BOOL, "qkv_bias"),
    "qk_normalization": (BOOL, "qk_norm"),
}
NATIVE_VISION = TOWER_RULES | {
    "attention_bias": (BOOL, "qkv_bias"),
    "use_qk_norm": (BOOL, "qk_norm"),
}
TEXT = {
    "vocab_size": (_integer(1, 1 << 24), "vocab_size"),
    "hidden_size": (WIDTH, "hidden_size"),
    "intermediate_size": (WIDTH, "intermediate_size"),
    "num_hidden_layers": (_integer(1, 1024), "num_layers"),
    "num_attention_heads": (_integer(1, 4096), "num_heads"),
    "num_key_value_heads": (_or_null(_integer(1, 4096)), "num_kv_heads"),
    "head_dim": (_or_null(_integer(4, 256)), "head_dim"),
    "max_position_embeddings": (_integer(1, 1 << 24), "max_position_embeddings"),
    "rms_norm_eps": (EPS, "rms_norm_eps"),
    "rope_theta": (_or_null(_number(100, 1e12)), "rope_theta"),
    "hidden_act": (_one_of("silu"), None),
    "partial_rotary_factor": (_one_of(1, 1.0), None),
    "use_sliding_window": (_one_of(False), None),
    "tie_word_embeddings": (BOOL, "tie_word_embeddings"),
    "eos_token_id": (_or_null(_ids), None),
    "bos_token_id": (_or_null(_integer(0, (1 << 31) - 1)), "bos_token_id"),
    "pad_token_id": (_or_null(_integer(0, (1 << 31) - 1)), "pad_token_id"),
}
MIXTURE = {
    "num_experts": (_integer(1, 512), None),
    "num_local_experts": (_integer(1, 512), None),
    "num_experts_per_tok": (_integer(1, 512), None),
    "moe_intermediate_size": (WIDTH, None),
    "norm_topk_prob": (BOOL, None),
    "swiglu_limit": (_one_of(7, 7.0), None),
}
DENSE = {
    "decoder_sparse_step": (_integer(1, 1024), None),
    "mlp_only_layers": (_or_null(lambda v: type(v) is list), None),
}
ROPE = {
    "factor": (_number(1, 1e6), "factor"),
    "attention_factor": (_or_null(_number(1e-3, 1e3)), "attention_factor"),
    "low_freq_factor": (_number(1e-3, 1e6), "low_freq_factor"),
    "high_freq_factor": (_number(1e-3, 1e6), "high_freq_factor"),
    "beta_fast": (_number(1e-3, 1e6), "beta_fast"),
    "beta_slow": (_number(1e-3, 1e6), "beta_slow"),
    "truncate": (BOOL, "truncate"),
}
# Those of ROPE that a kind of scaling reads.
ROPE_READS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
AWQ = {
    "quant_method": (_one_of("awq"), None),
    "bits": (_one_of(4), None),
    "group_size": (_one_of(32, 64, 128), "awq_group"),
    "zero_point": (_one_of(True), None),
    "version": (_one_of("gemm", "GEMM"), None),
}
PROCESSOR_RULES = {
    "min_patches": (_integer(1, 1024), "min_dynamic_patch"),
    "max_patches": (_integer(1, 1024), "max_dynamic_patch"),
    "crop_to_patches": (BOOL, None),
}


def _agree(rules: dict, data: dict, loaded: object) -> None:
    """Every key that is there holds what it may, and the loaded field has the value."""
    for key, (rule, field) in rules.items():
        if key not in data:
            continue
        value = data[key]
        assert rule(value), f"{key} is {value!r}"
        if field and value is not None:
            assert getattr(loaded, field) == value, f"{key} is {value!r}, {field} another"


def _assert_plain(value: object, where: str = "config") -> None:
    """Exact types, finite numbers, all the way down."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _assert_plain(getattr(value, field.name), f"{where}.{field.name}")
    elif isinstance(value, tuple):
        for entry in value:
            _assert_plain(entry, where)
    else:
        assert type(value) in (int, float, str, bool, type(None)), f"{where} is {value!r}"
        assert not isinstance(value, float) or math.isfinite(value), f"{where} is {value!r}"


def assert_sound_vision(config: VisionConfig) -> None:
    _assert_plain(config)
    assert config.hidden_size == config.num_heads * config.head_dim
    assert config.head_dim % 4 == 0
    assert 4 <= config.head_dim <= 256
    assert config.image_size == config.grid * config.patch_size > 0
    assert min(config.intermediate_size, config.num_layers) >= 1


def assert_sound(config: ModelConfig, files: dict[str, bytes]) -> None:
    """The config means what its JSON says, and a model can be made of it."""
    data = json.loads(files[CONFIG])
    section = {"original": "llm_config", "hf": "text_config"}.get(config.layout)
    text_data = data[section] if section else data
    _agree({"original": ORIGINAL, "hf": NATIVE, "llava": LLAVA}[config.layout], data, config)
    vision = data["vision_config"] if section else json.loads(files[TOWER_CONFIG])
    _agree(NATIVE_VISION if config.layout == "hf" else ORIGINAL_VISION, vision, config.vision)
    if config.layout == "hf" and PROCESSOR in files:
        _agree(PROCESSOR_RULES, json.loads(files[PROCESSOR]), config)
    assert_sound_vision(config.vision)
    _assert_plain(config)
    _assert_sound_text(config, text_data, data)

    unit = config.vision.patch_size * config.unshuffle
    assert config.tokens_per_tile == (config.image_size / unit) ** 2 >= 1
    assert 0 <= config.vision_layers_used <= config.vision.num_layers
    assert 1 <= config.min_dynamic_patch <= config.max_dynamic_patch

    small = _shrunk(config, layers=1)
    shapes = tensor_shapes(small)
    assert all(type(n) is int and n > 0 for shape in shapes.values() for n in shape)
    text, width = small.text, small.text.hidden_size
    assert shapes["llm.0.qkv.weight"] == (
        (text.num_heads + 2 * text.num_kv_heads) * text.head_dim,
        width,
    )
    assert shapes["llm.0.o.weight"] == (width, text.num_heads * text.head_dim)


def _assert_sound_text(config: ModelConfig, data: dict, top: dict) -> None:
    text = config.text
    family = families.FAMILIES[text.backbone]
    _agree(TEXT, data, text)
    for bias, value in (
        (family.qkv_bias, text.qkv_bias),
        (family.o_bias, text.o_bias),
        (family.mlp_bias, text.mlp_bias),
    ):
        if bias.key in data:
            assert BOOL(data[bias.key])
            assert data[bias.key] == value
    assert text.num_heads % text.num_kv_heads == 0
    assert text.head_dim % 4 == 0
    assert 1 <= text.context <= 1 << 24
    assert len(text.windows) == len(text.mixtures) == text.num_layers
    assert all(w is None or w >= 1 for w in text.windows)
    assert (text.experts is not None) == any(text.mixtures)
    if family.experts is not None:
        _agree(MIXTURE | (DENSE if family.experts.dense_layers else {}), data, text)
    if text.experts is not None:
        assert 1 <= text.experts.top_k <= text.experts.count <= 512
        named = data.get("mlp_only_layers") or [] if family.experts.dense_layers else []
        assert not any(text.mixtures[i] for i in named)
    stored = [d["quantization_config"] for d in (top, data) if d.get("quantization_config")]
    assert (text.awq_group is not None) == (bool(stored) and text.backbone != "gpt_oss")
    for part in stored:
        _agree({"quant_method": (_one_of("mxfp4"), None)} if text.sinks else AWQ, part, text)
    _assert_sound_rope(config, data)


def _assert_sound_rope(config: ModelConfig, data: dict) -> None:
    text = config.text
    parts = [data[k] for k in ("rope_scaling", "rope_parameters") if data.get(k) is not None]
    assert all(type(part) is dict for part in parts)
    kinds = {p[k] for p in parts for k in ("type", "rope_type") if p.get(k) is not None}
    assert len(kinds) <= 1
    scaling = text.rope_scaling
    if parts:
        assert (scaling is None) == (not kinds or kinds == {"default"})
    if scaling is not None:
        for part in parts:
            _agree({k: ROPE[k] for k in ROPE_READS[scaling.type]}, part, scaling)
        assert 1e-3 <= scaling.attention_factor <= 1e3
        assert scaling.low_freq_factor < scaling.high_freq_factor or scaling.type != "llama3"
        assert scaling.beta_slow < scaling.beta_fast
    lengths = (1, text.max_position_embeddings, text.max_position_embeddings + 1, text.context)
    table, scale = Rotary(text)(lengths)
    assert table.shape == (4, text.head_dim // 2)
    assert bool(torch.isfinite(table).all())
    assert bool((table > 0).all())
    assert float(table.max()) <= 1e6
    assert bool(torch.isfinite(scale).all())


def _shrunk(config: ModelConfig, layers: int = 2) -> ModelConfig:
    """The same model with fewer layers and at most four experts."""
    n = min(layers, config.text.num_layers)
    experts = config.text.experts
    if experts is not None:
        count = min(4, experts.count)
        experts = dataclasses.replace(experts, count=count, top_k=min(experts.top_k, count))
    text = dataclasses.replace(
        config.text,
        num_layers=n,
        windows=config.text.windows[:n],
        mixtures=config.text.mixtures[:n],
        experts=experts,
    )
    layers = min(layers, config.vision.num_layers)
    vision = dataclasses.replace(config.vision, num_layers=layers)
    select = max(config.select_layer, -layers - 1) if config.select_layer < 0 else 0
    return dataclasses.replace(config, vision=vision, text=text, select_layer=select)


class RandomParameters:
    """In place of a checkpoint's: small noise of the shapes that the config asks for."""

    platform = CPU

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = tensor_shapes(config)
        self._shapes.setdefault("llm.head.weight", self._shapes["llm.embed.weight"])
        self._generator = torch.Generator().manual_seed(1)

    def __getitem__(self, name: str) -> torch.Tensor:
        return 0.1 * torch.randn(self._shapes[name], generator=self._generator)

    table = __getitem__

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self[f"{name}.weight"], self[f"{name}.bias"]

    def linear(self, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        bias = f"{name}.bias"
        return [self[f"{name}.weight"]], [self[bias]] if bias in self._shapes else None


def size(config: ModelConfig) -> int:
    """Elements of the shrunk model and of its work on one tile."""
    config = _shrunk(config)
    weights = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    grid = config.image_size // config.vision.patch_size
    return weights + grid**4 + grid**2 * config.vision.intermediate_size


def assert_runs(config: ModelConfig) -> None:
    """A plan, then a tile and eight tokens: shapes that fit, finite numbers."""
    config = _shrunk(config)
    plan = make_plan(config, torch.bfloat16, prefill_chunk=16)
    assert min(plan.weights, plan.mapped, plan.kv_per_token, plan.activations) > 0
    model = InternVL(config, RandomParameters(config), OpSet(None), torch.float32)
    S, text = config.image_size, config.text
    pixels = torch.randn(1, 3, S, S, generator=torch.Generator().manual_seed(2))
    features = model.encode_images(pixels)
    assert features.shape == (1, config.tokens_per_tile, text.hidden_size)
    assert bool(torch.isfinite(features).all())
    T = min(8, text.context)
    cache = KvCache(text, 1, torch.float32)
    ids = torch.arange(T) % text.vocab_size
    chunk = Chunk(ids, 0, torch.tensor([0]), "all", None, None)
    logits = model.run([chunk], cache)
    assert logits.shape == (T, text.vocab_size)
    assert bool(torch.isfinite(logits).all())


# ---- runs ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(files: dict[str, bytes]):
    """Files are read from `files`, which may change meanwhile; that they exist, from the disk."""
    before = json_file.read_bytes
    json_file.read_bytes = lambda path, limit: files[
        TOWER_CONFIG if path.parent.name == TOWER else path.name
    ]
    try:
        yield
    finally:
        json_file.read_bytes = before


def fuzz_configs(base, count: int, seed: str, *, run_every: int = 50) -> collections.Counter:
    """Mutates one base `count` times; how many were accepted, refused and run."""
    rng = random.Random(seed)
    result: collections.Counter = collections.Counter()
    extra = {PROCESSOR: PREPROCESSOR, GENERATION: {"eos_token_id": [38], "pad_token_id": 39}}
    good = {CONFIG: base(), TOWER_CONFIG: VISION} | extra
    clean = {file: json.dumps(content).encode() for file, content in good.items()}
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as name, reading(files):
        folder = Path(name) / "checkpoint"
        for file in good:
            path = folder.parent / file if file == TOWER_CONFIG else folder / file
            path.parent.mkdir(exist_ok=True)
            path.touch()
        others = [file for file in good if file != CONFIG]
        for i in range(count):
            files |= clean
            which = CONFIG if rng.random() < 0.95 else rng.choice(others)
            if rng.random() < 0.25:
                files[which] = mutate_bytes(rng, files[which])
            else:
                changed = mutate_values(rng, copy.deepcopy(good[which]))
                files[which] = json.dumps(changed).encode()
            result[_try_config(folder, files, run=i % run_every == 0)] += 1
    return result


def _check_message(error: Exception) -> None:
    message = str(error)
    assert message.isprintable(), "not one line"
    assert len(message.encode("utf-8")) < 500


def _try_config(folder: Path, files: dict[str, bytes], *, run: bool) -> str:
    try:
        with contextlib.suppress(ValueError):
            assert_sound_vision(load_vision_config(folder))
        config = load_config(folder)
    except ValueError as error:
        _check_message(error)
        return "refused"
    try:
        assert_sound(config, files)
        if run and size(config) < 1 << 20:
            assert_runs(config)
            return "run"
    except Exception as error:
        raise AssertionError(f"accepted, but {error!r}: {files}") from error
    return "accepted"


_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float64: "F64",
}
_ODD_HEADER = [b"-1", b"-0", b"0", b"1", b"99999999999999999999", b"1e2", b"1.0", b"null", b"true"]
_ODD_HEADER += [b"[]", b"{}", b'""', b'"F32"', b'"BOOL"', b"\\ud83d", b"\x00", b" ", b"\n", b","]
_ODD_HEADER += [b"\xef\xbb\xbf"]


def mutate_header(rng: random.Random, header: bytes, payload: bytes) -> bytes:
    """The file with a few bytes of its header changed, mostly with a length that still fits."""
    header = bytearray(header)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(header))
        kind = rng.randrange(6)
        if kind == 0:
            header[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del header[at : at + rng.randint(1, 6)]
        elif kind == 2:
            header[at:at] = header[at : at + rng.randint(1, 60)]
        elif kind == 3:
            header[at : at + rng.randint(0, 3)] = rng.choice(_ODD_HEADER)
        else:  # another digit in place of one
            digits = [i for i, c in enumerate(header) if chr(c).isdigit()]
            if digits:
                header[rng.choice(digits)] = ord(rng.choice("0123456789"))
        if not header:
            header += b"{"
    length = len(header) if rng.random() < 0.95 else rng.randrange(1 << rng.randrange(1, 64))
    if rng.random() < 0.1:
        payload = payload[: rng.randrange(len(payload) + 1)] + b"x" * rng.randrange(3)
    return struct.pack("<Q", length) + bytes(header) + payload


def accepts_header(data: bytes) -> bool:
    """Whether the header is accepted; then the library must read the very same tensors."""
    try:
        found = parse_header(data, len(data), "x.safetensors")
    except ValueError as error:
        _check_message(error)
        return False
    theirs = dict(safetensors.deserialize(data))
    assert set(found) == set(theirs)
    for name, info in found.items():
        assert list(info.shape) == theirs[name]["shape"]
        assert _NAMES[info.dtype] == theirs[name]["dtype"]
        assert data[info.begin : info.end] == theirs[name]["data"]
    return True


def _tensor(dtype: str, shape: tuple[int, ...], offsets: tuple[int, int]) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": _tensor("U8", (4,), (0, 4)),
    "b": _tensor("F32", (2, 1), (4, 12)),
    "c": _tensor("BF16", (2, 3), (12, 24)),
    "d": _tensor("I8", (0,), (12, 12)),
    "é\n": _tensor("F16", (), (24, 26)),
    "e": _tensor("U8", (2, 1, 1), (26, 28)),
}


def fuzz_headers(count: int, seed: str) -> collections.Counter:
    """Mutates two spellings of a header `count` times."""
    rng = random.Random(seed)
    payload = bytes(range(100, 128))
    bases = [
        json.dumps(HEADER).encode(),
        json.dumps(HEADER, ensure_ascii=False, separators=(",", ":")).encode() + b"   ",
    ]
    for base in bases:
        assert accepts_header(struct.pack("<Q", len(base)) + base + payload)
    result: collections.Counter = collections.Counter()
    for _ in range(count):
        data = mutate_header(rng, rng.choice(bases), payload)
        result["accepted" if accepts_header(data) else "refused"] += 1
    return result


def fuzz_indexes(count: int, seed: str) -> collections.Counter:
    """Mutates the index of two shards: accepted, it names all tensors of each that it names."""
    rng = random.Random(seed)
    shards = {"a.safetensors": ("x", "y.weight"), "b.safetensors": ("z",)}
    where = {name: file for file, names in shards.items() for name in names}
    good = {"metadata": {"total_size": 12}, "weight_map": where}
    result: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, names in shards.items():
            save_file({n: torch.ones(1) for n in names}, folder / file)
        for _ in range(count):
            if rng.random() < 0.5:
                data = mutate_bytes(rng, json.dumps(good).encode())
            else:
                data = json.dumps(mutate_values(rng, copy.deepcopy(good))).encode()
            (folder / "model.safetensors.index.json").write_bytes(data)
            try:
                found = Checkpoint(folder)
            except (ValueError, FileNotFoundError) as error:
                _check_message(error)
                result["refused"] += 1
                continue
            named = json.loads(data)["weight_map"]
            assert named.items() <= where.items()
            assert set(found) == set(named) == {n for f in named.values() for n in shards[f]}
            result["accepted"] += 1
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=int, default=100_000)
    parser.add_argument("--headers", type=int, default=100_000)
    parser.add_argument("--indexes", type=int, default=10_000)
    parser.add_argument("--seed", default="1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("headers", dict(fuzz_headers(options.headers, options.seed)), flush=True)
    print("indexes", dict(fuzz_indexes(options.indexes, options.seed)), flush=True)
    each = -(-options.configs // len(BASES))
    for base in BASES:
        name = name_of(base)
        print(name, dict(fuzz_configs(base, each, f"{options.seed}.{name}")), flush=True)


if __name__ == "__main__":
    main()
