"""A checkpoint's `config.json` as frozen dataclasses.

Unknown keys are ignored: real configs carry dozens of unused ones. Unknown values of known keys
raise a one-line ValueError that names the key, because a value that is not understood changes
the maths. Missing optional keys get the defaults of the classes that wrote the files.

Three layouts exist: "original" (`internvl_chat`, with `llm_config`), "hf" (`internvl`, the
Transformers-native one, with `text_config`) and "llava" (`llava`, of Chat V1.0, whose vision tower
has a config of its own). What a family of language models writes stands in `models/families.py`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from internvl_rt.json_file import read_json, show
from internvl_rt.models.families import FAMILIES, Bias, Family
from internvl_rt.prompt import TEMPLATES, is_text

_MAX_WIDTH = 1 << 20
_MAX_LAYERS = 1 << 10
_MAX_HEADS = 1 << 12
_MAX_VOCAB = 1 << 24
_MAX_POSITIONS = 1 << 24
_MAX_IMAGE_SIZE = 1 << 11  # what `image.py` resizes to
_MAX_PATCH_SIZE = 1 << 10
_MAX_TILES = 1 << 10
_MAX_TOKEN_ID = (1 << 31) - 1
_MAX_HEAD_DIM = 256
_MAX_EXPERTS = 1 << 9
_MIN_THETA = 100
_MAX_EPS = 1e-2
_MIN_FACTOR = 1e-3
_AWQ_GROUPS = (32, 64, 128)
_REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """InternViT. Sizes in elements; `image_size` and `patch_size` in pixels, both square."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int
    layer_norm_eps: float
    norm_type: str
    qkv_bias: bool
    qk_norm: bool
    hidden_act: str

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one side of a picture of `image_size`."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rescaling of the rotary angles (`models/rotary.py`); a type reads the fields it needs.

    "linear": factor. "dynamic": factor, beyond `max_position_embeddings` alone. "llama3": factor,
    low_freq_factor, high_freq_factor. "longrope": short_factor and long_factor, one number for
    each pair of dimensions. "yarn": factor, beta_fast, beta_slow, truncate.
    """

    type: str
    factor: float = 1.0
    attention_factor: float = 1.0  # cos and sin are multiplied by it
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def follows_length(self) -> bool:
        """The angles depend on the length of the sequence."""
        return self.type in ("dynamic", "longrope")

    def context(self, positions: int) -> int:
        """The longest sequence, from max_position_embeddings: some configs store it stretched."""
        if self.type in ("linear", "dynamic"):
            return int(positions * self.factor)
        if self.type == "yarn":
            return max(positions, int(self.original_max_position_embeddings * self.factor))
        return positions


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of `count` MLPs of `width`, of which a token takes `top_k`.

    normalize: the weights of the chosen ones add up to 1.
    """

    count: int
    top_k: int
    width: int
    normalize: bool


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The language model. `backbone` is a key of `models/families.py`'s table."""

    backbone: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norm_weight_in_fp32: bool
    gate: str  # kind of ops.gated_activation
    sinks: bool
    windows: tuple[int | None, ...]  # by layer: keys that a token sees, None for all before it
    experts: ExpertsConfig | None
    mixtures: tuple[bool, ...]  # by layer: experts in place of the MLP
    awq_group: int | None  # columns that share a scale, where projections are stored as AWQ's int4
    tie_word_embeddings: bool  # as stored; the presence of the head's tensor decides
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None

    @property
    def context(self) -> int:
        """The longest sequence, prompt and answer together."""
        positions = self.max_position_embeddings
        if self.rope_scaling is not None:
            positions = self.rope_scaling.context(positions)
        return min(positions, _MAX_POSITIONS)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole chat checkpoint. `image_size` is the side of a tile in pixels.

    The last three are Chat V1.0's: a projector without a norm, pictures that are padded to squares,
    and the name of the vision tower, which may be a checkpoint of its own beside this one.
    """

    vision: VisionConfig
    text: TextConfig
    layout: str  # "original" | "hf" | "llava"
    template: str
    system_message: str | None
    image_size: int
    downsample_ratio: float
    select_layer: int
    ps_version: str
    min_dynamic_patch: int
    max_dynamic_patch: int
    use_thumbnail: bool
    dynamic_image_size: bool
    image_token_id: int | None
    torch_dtype: str | None
    eos_token_ids: tuple[int, ...]  # of generation_config.json, then of the text config
    projector_norm: bool = True
    pad_to_square: bool = False
    tower: str | None = None

    @property
    def unshuffle(self) -> int:
        """Side of the square of patches that becomes one token."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.image_size // self.vision.patch_size // self.unshuffle) ** 2

    @property
    def vision_layers_used(self) -> int:
        """Layers to run for the selected hidden state; 0 selects the embeddings."""
        return self.select_layer % (self.vision.num_layers + 1)


_VISION_DEFAULTS = {
    "original": {
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": 48,
        "num_attention_heads": 25,
        "patch_size": 14,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_norm": True,
    },
    "hf": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": [14, 14],
        "image_size": [448, 448],
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "qkv_bias": False,
        "qk_norm": False,
    },
}
# The default of the code that Chat V1-1 came with; later code says -1.
_SELECT_LAYER = {"internvl_zh": -4}
_VISION_MODEL_TYPES = {"intern_vit_6b": "original", "internvl_vision": "hf"}
_CONTRASTIVE = "InternVL-14B-224px"
_LLAVA_TOWER = re.compile(r"(?i)[a-z0-9._-]*intern_?vit[-_]?6b[a-z0-9._-]*")


def load_config(folder: Path) -> ModelConfig:
    """The configuration of the chat checkpoint in `folder`.

    Reads config.json and, where present, generation_config.json (eos ids) and, in the hf layout,
    preprocessor_config.json or processor_config.json (tile limits). In the llava layout the vision
    tower's own config.json is read from the folder of its name beside this one; without it the
    tower is taken for InternViT-6B. Raises OSError for a file that is missing or cannot be read,
    ValueError for content that is malformed or not supported.
    """
    top = _Section.read(folder, "config.json")
    if "qllama_config" in top:
        _fail(f"config.json: {_CONTRASTIVE} compares and does not chat; load_vision runs its tower")
    kinds = {"internvl_chat": _original, "internvl": _native}
    kinds |= {"llava": _llava, "llava_llama": _llava}
    model_type = top.choice("model_type", tuple(kinds))
    return kinds[model_type](folder, top)


def load_vision_config(folder: Path) -> VisionConfig:
    """The vision encoder of a standalone InternViT checkpoint or of a whole one."""
    top = _Section.read(folder, "config.json")
    if "qllama_config" in top:
        return _contrastive(top)
    nested = {"internvl_chat": "original", "internvl": "hf"}
    model_type = top.choice("model_type", (*_VISION_MODEL_TYPES, *nested))
    if model_type in nested:
        # What a language model is stored in is not the vision tower's concern.
        top.quantization(("awq", "mxfp4"))
        return _vision(top.section("vision_config"), nested[model_type])
    return _vision(top, _VISION_MODEL_TYPES[model_type])


def _fail(message: str) -> NoReturn:
    raise ValueError(message) from None


@dataclass(frozen=True, slots=True)
class _Section:
    """One JSON object and the way to it, for messages."""

    where: str  # "config.json: " or "config.json: llm_config."
    data: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str) -> _Section:
        folder = Path(folder)
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, expected a checkpoint folder")
        return cls(f"{name}: ", read_json(folder / name))

    @classmethod
    def read_optional(cls, folder: Path, name: str) -> _Section:
        if not os.path.lexists(Path(folder) / name):
            return cls(f"{name}: ", {})
        return cls.read(folder, name)

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def wrong(self, key: str, expected: str) -> NoReturn:
        if key not in self.data:
            _fail(f"{self.where}{key} is missing, expected {expected}")
        _fail(f"{self.where}{key} is {show(self.data[key])}, expected {expected}")

    def section(self, key: str) -> _Section:
        value = self.data.get(key)
        if not isinstance(value, dict):
            self.wrong(key, "an object")
        return _Section(f"{self.where}{key}.", value)

    def value(self, key: str, default: Any) -> Any:
        return self.data.get(key, default)

    def integer(self, key: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        value = self.value(key, default)
        if type(value) is not int or not low <= value <= high:
            self.wrong(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: Any = _REQUIRED) -> float:
        """A finite number in [low, high]."""
        value = self.value(key, default)
        if type(value) not in (int, float) or not low <= value <= high:
            self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """`count` finite numbers in [low, high]."""
        value = self.data.get(key)
        if (
            type(value) is not list
            or len(value) != count
            or any(type(v) not in (int, float) or not low <= v <= high for v in value)
        ):
            self.wrong(key, f"{count} numbers from {low:g} to {high:g}")
        return tuple(map(float, value))

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.value(key, default)
        if type(value) is not bool:
            self.wrong(key, "true or false")
        return value

    def choice(self, key: str, allowed: Collection[str], default: Any = _REQUIRED) -> str:
        value = self.value(key, default)
        if type(value) is not str or value not in allowed:
            supported = ", ".join(allowed)
            if key not in self.data:
                _fail(f"{self.where}{key} is missing, supported: {supported}")
            _fail(f"{self.where}{key} is {show(value)}, supported: {supported}")
        return value

    def only(self, key: str, supported: Any, default: Any) -> None:
        """A key of which one value alone is implemented."""
        value = self.value(key, default)
        if type(value) is not type(supported) or value != supported:
            _fail(f"{self.where}{key} is {show(value)}, supported: {supported!r}")

    def square(self, key: str, high: int, default: Any = _REQUIRED) -> int:
        """A side in pixels, stored as one integer or as a pair of equal ones."""
        value = self.value(key, default)
        if type(value) is list:
            if len(value) != 2 or type(value[0]) is not type(value[1]) or value[0] != value[1]:
                self.wrong(key, "a square size")
            value = value[0]
        if type(value) is not int or not 1 <= value <= high:
            self.wrong(key, f"an integer from 1 to {high}")
        return value

    def token_id(self, key: str) -> int | None:
        if key not in self:
            return None
        return self.integer(key, 0, _MAX_TOKEN_ID)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or null."""
        value = self.data.get(key)
        ids = value if type(value) is list else [] if value is None else [value]
        if any(type(i) is not int or not 0 <= i <= _MAX_TOKEN_ID for i in ids):
            self.wrong(key, f"token ids from 0 to {_MAX_TOKEN_ID}")
        return tuple(dict.fromkeys(ids))

    def quantization(self, supported: Collection[str] = ()) -> _Section | None:
        """The object that says how weights are stored, None where there is none."""
        if "quantization_config" not in self:
            return None
        if not supported:
            _fail(f"{self.where}quantization_config is present, supported: unquantised weights")
        part = self.section("quantization_config")
        part.choice("quant_method", supported)
        return part


def _vision(section: _Section, layout: str) -> VisionConfig:
    section.quantization()
    native = layout == "hf"
    defaults = _VISION_DEFAULTS[layout]

    def size(key: str, high: int) -> int:
        return section.integer(key, 1, high, defaults[key])

    section.choice("model_type", ("internvl_vision",) if native else ("intern_vit_6b",))
    section.only("num_channels", 3, 3)
    if native:
        section.only("use_absolute_position_embeddings", True, True)
        section.only("use_mean_pooling", True, True)  # false adds a final norm
        section.only("use_mask_token", False, False)
    config = VisionConfig(
        hidden_size=size("hidden_size", _MAX_WIDTH),
        intermediate_size=size("intermediate_size", _MAX_WIDTH),
        num_layers=size("num_hidden_layers", _MAX_LAYERS),
        num_heads=size("num_attention_heads", _MAX_HEADS),
        patch_size=section.square("patch_size", _MAX_PATCH_SIZE, defaults["patch_size"]),
        image_size=section.square("image_size", _MAX_IMAGE_SIZE, defaults["image_size"]),
        layer_norm_eps=section.number(
            "layer_norm_eps", 1e-12, _MAX_EPS, defaults["layer_norm_eps"]
        ),
        norm_type=section.choice("norm_type", ("layer_norm", "rms_norm"), defaults["norm_type"]),
        qkv_bias=section.boolean(
            "attention_bias" if native else "qkv_bias", default=defaults["qkv_bias"]
        ),
        qk_norm=section.boolean(
            "use_qk_norm" if native else "qk_normalization", default=defaults["qk_norm"]
        ),
        hidden_act=section.choice("hidden_act", ("gelu",), "gelu"),
    )
    if config.hidden_size % config.num_heads:
        section.wrong("hidden_size", f"a multiple of num_attention_heads={config.num_heads}")
    _check_head_dim(section, config.head_dim)
    if config.image_size % config.patch_size:
        section.wrong("image_size", f"a multiple of patch_size={config.patch_size}")
    return config


def _check_head_dim(section: _Section, head_dim: int) -> None:
    if head_dim % 4 or head_dim > _MAX_HEAD_DIM:
        _fail(
            f"{section.where}head_dim is {head_dim}, "
            f"supported: multiples of 4 up to {_MAX_HEAD_DIM}"
        )


def _contrastive(top: _Section) -> VisionConfig:
    """The tower of InternVL-14B-224px, which shares its model_type with the native layout."""
    top.choice("model_type", ("internvl",))
    vision = _vision(top.section("vision_config"), "original")
    if "force_image_size" not in top:
        return vision
    size = top.square("force_image_size", _MAX_IMAGE_SIZE)  # its position embedding is stored so
    if size % vision.patch_size:
        top.wrong("force_image_size", f"a multiple of patch_size={vision.patch_size}")
    return replace(vision, image_size=size)


def _text(top: _Section, section: _Section, layout: str) -> TextConfig:
    family = _family(section)
    stored = [place.quantization(family.quantizations) for place in (top, section)]
    defaults = family.defaults

    def size(key: str, high: int) -> int:
        # The original layout writes every size; the native one leaves out its class's defaults.
        return section.integer(key, 1, high, defaults[key] if layout == "hf" else _REQUIRED)

    hidden_size = size("hidden_size", _MAX_WIDTH)
    num_heads = size("num_attention_heads", _MAX_HEADS)
    num_kv_heads = num_heads  # where the key is null, or missing and null by default
    if section.value("num_key_value_heads", defaults["num_key_value_heads"]) is not None:
        num_kv_heads = section.integer(
            "num_key_value_heads", 1, _MAX_HEADS, defaults["num_key_value_heads"]
        )
    if num_heads % num_kv_heads:
        section.wrong("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    if "head_dim" in section or "head_dim" in defaults:
        head_dim = section.integer("head_dim", 1, _MAX_WIDTH, defaults.get("head_dim"))
    elif hidden_size % num_heads:
        section.wrong("hidden_size", f"a multiple of num_attention_heads={num_heads}")
    else:
        head_dim = hidden_size // num_heads
    _check_head_dim(section, head_dim)

    section.choice("hidden_act", ("silu",), "silu")
    positions = section.integer(
        "max_position_embeddings", 1, _MAX_POSITIONS, defaults["max_position_embeddings"]
    )
    theta, scaling = _rope(section, family, head_dim, positions)
    num_layers = size("num_hidden_layers", _MAX_LAYERS)
    mixtures = _mixtures(section, family, num_layers)
    experts = _experts(section, family, layout)

    def has(bias: Bias) -> bool:
        if bias.key is None:
            return bias.default
        return section.boolean(bias.key, default=bias.default)

    return TextConfig(
        backbone=family.model_type,
        vocab_size=size("vocab_size", _MAX_VOCAB),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size", _MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=section.number("rms_norm_eps", 1e-12, _MAX_EPS, defaults["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=positions,
        qkv_bias=has(family.qkv_bias),
        o_bias=has(family.o_bias),
        mlp_bias=has(family.mlp_bias),
        qk_norm=family.qk_norm,
        norm_weight_in_fp32=family.norm_weight_in_fp32,
        gate=family.gate,
        sinks=family.sinks,
        windows=_windows(section, family, num_layers, positions),
        experts=experts if any(mixtures) else None,
        mixtures=mixtures,
        awq_group=_awq_group([part for part in stored if part is not None]),
        tie_word_embeddings=section.boolean("tie_word_embeddings", default=False),
        eos_token_ids=section.token_ids("eos_token_id"),
        bos_token_id=section.token_id("bos_token_id"),
        pad_token_id=section.token_id("pad_token_id"),
    )


def _windows(
    section: _Section, family: Family, num_layers: int, positions: int
) -> tuple[int | None, ...]:
    section.only("use_sliding_window", False, False)
    if family.window_without_flag and "sliding_window" in section:
        section.integer("sliding_window", positions, _MAX_TOKEN_ID)  # it never acts
    stored = section.data["layer_types"] if "layer_types" in section else []
    allowed = set(family.layer_types)
    if type(stored) is not list or any(type(t) is not str or t not in allowed for t in stored):
        section.wrong("layer_types", f"{' and '.join(map(repr, sorted(allowed)))} alone")
    if stored and len(stored) != num_layers:
        section.wrong("layer_types", f"{num_layers} entries, as num_hidden_layers")
    taken = stored or [family.layer_types[i % len(family.layer_types)] for i in range(num_layers)]
    if "sliding_attention" not in taken:
        return (None,) * num_layers
    window = section.integer("sliding_window", 1, _MAX_TOKEN_ID, family.defaults["sliding_window"])
    return tuple(window if t == "sliding_attention" else None for t in taken)


def _awq_group(stored: Collection[_Section]) -> int | None:
    """Of AWQ's "gemm" packing; None for weights that are stored otherwise."""
    groups: set[int] = set()
    for part in stored:
        if part.data["quant_method"] != "awq":
            continue
        part.only("bits", 4, 4)
        part.only("zero_point", True, True)
        part.choice("version", ("gemm", "GEMM"), "gemm")
        group = part.integer("group_size", 1, _MAX_WIDTH, 128)
        if group not in _AWQ_GROUPS:
            part.wrong("group_size", f"one of {', '.join(map(str, _AWQ_GROUPS))}")
        groups.add(group)
    if len(groups) > 1:
        _fail("config.json: two quantization_configs with different group sizes")
    return groups.pop() if groups else None


def _mixtures(section: _Section, family: Family, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every step-th, but for those that are named."""
    if family.experts is None:
        return (False,) * num_layers
    step, dense = 1, []
    if family.experts.dense_layers:
        step = section.integer("decoder_sparse_step", 1, _MAX_LAYERS, 1)
        dense = section.data["mlp_only_layers"] if "mlp_only_layers" in section else []
        named = type(dense) is list and all(type(i) is int and 0 <= i < num_layers for i in dense)
        if not named:
            section.wrong("mlp_only_layers", f"layers from 0 to {num_layers - 1}")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))


def _experts(section: _Section, family: Family, layout: str) -> ExpertsConfig | None:
    keys, defaults = family.experts, family.defaults
    if keys is None:
        return None

    def size(key: str, high: int) -> int:
        return section.integer(key, 1, high, defaults[key] if layout == "hf" else _REQUIRED)

    for key, supported in {"swiglu_limit": 7, "swiglu_alpha": 1.702}.items():
        if section.number(key, 0, 1e6, supported) != supported:
            section.wrong(key, f"{supported}")
    newer = "num_local_experts"
    if keys.count != newer and newer in section:
        count = section.integer(newer, 1, _MAX_EXPERTS)
        if section.value(keys.count, count) != count:
            section.wrong(newer, f"{keys.count}={show(section.data[keys.count])}")
    else:
        count = size(keys.count, _MAX_EXPERTS)
    normalize = keys.normalize is None or section.boolean(keys.normalize, default=False)
    return ExpertsConfig(
        count=count,
        top_k=size("num_experts_per_tok", count),
        width=size(keys.width, _MAX_WIDTH),
        normalize=normalize,
    )


def _family(section: _Section) -> Family:
    """The family that `architectures` names, or `model_type` where that is absent."""
    found: dict[str, Family] = {}
    if "architectures" in section:
        stored = section.data["architectures"]
        for family in FAMILIES.values():
            if stored == [family.architecture]:
                found["architectures"] = family
        if "architectures" not in found:
            supported = ", ".join(family.architecture for family in FAMILIES.values())
            _fail(f"{section.where}architectures is {show(stored)}, supported: {supported}")
    if "model_type" in section or not found:
        found["model_type"] = FAMILIES[section.choice("model_type", tuple(FAMILIES))]
    if len({family.model_type for family in found.values()}) > 1:
        _fail(f"{section.where}architectures and model_type disagree")
    return next(iter(found.values()))


def _rope(
    section: _Section, family: Family, head_dim: int, positions: int
) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_theta` with `rope_scaling`, or from `rope_parameters`."""
    found: list[RopeScaling | None] = []
    bases: list[float] = []
    if "rope_theta" in section:
        bases.append(section.number("rope_theta", _MIN_THETA, 1e12))
    if not section.data.keys() & {"rope_scaling", "rope_parameters"}:
        default = {"rope_scaling": family.defaults.get("rope_scaling")}
        section = _Section(section.where, section.data | default)
    for key in ("rope_scaling", "rope_parameters"):
        if key not in section:
            continue
        part = section.section(key)
        if "rope_theta" in part:
            bases.append(part.number("rope_theta", _MIN_THETA, 1e12))
        allowed = ("default", *family.rope_types)
        kinds = {part.choice(k, allowed) for k in ("type", "rope_type") if k in part}
        if len(kinds) > 1:
            _fail(f"{part.where}type and {part.where}rope_type disagree")
        if not kinds:
            if key == "rope_scaling":
                part.choice("type", allowed)  # raises: a scaling without a kind
            kinds = {"default"}
        kind = kinds.pop()
        found.append(_scaling(section, part, kind, family, head_dim, positions))
    for place in (section, *(section.section(k) for k in ("rope_parameters",) if k in section)):
        if place.number("partial_rotary_factor", 0, 1, 1) != 1:
            place.wrong("partial_rotary_factor", "1")
    if len(set(bases)) > 1:
        _fail(f"{section.where}rope_theta is given twice: {bases[0]:g} and {bases[1]:g}")
    if len(set(found)) > 1:
        _fail(f"{section.where}rope_scaling and {section.where}rope_parameters disagree")
    theta = bases[0] if bases else family.defaults["rope_theta"]
    return theta, found[0] if found else None


def _scaling(
    section: _Section, part: _Section, kind: str, family: Family, head_dim: int, positions: int
) -> RopeScaling | None:
    """The rescaling that `part`, the object rope_scaling or rope_parameters, describes."""
    if kind == "default":
        return None
    computed = family.rope_types[kind]
    if computed == "longrope":
        return _longrope(section, part, kind, family, head_dim, positions)
    factor = part.number("factor", 1, 1e6)
    if computed == "yarn":
        return _yarn(part, factor, positions)
    if computed != "llama3":
        return RopeScaling(computed, factor)
    low = part.number("low_freq_factor", 1e-3, 1e6)
    high = part.number("high_freq_factor", 1e-3, 1e6)
    if low >= high:
        part.wrong("high_freq_factor", f"more than low_freq_factor={low:g}")
    return RopeScaling(
        computed,
        factor,
        original_max_position_embeddings=part.integer(
            "original_max_position_embeddings", 1, _MAX_POSITIONS
        ),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(part: _Section, factor: float, positions: int) -> RopeScaling:
    key = "original_max_position_embeddings"
    original = positions
    if key in part:
        original = part.integer(key, 1, _MAX_POSITIONS)
        if factor * original != positions:  # which of them counts differs between implementations
            part.wrong("factor", f"max_position_embeddings / {key} = {positions / original:g}")
    fast = part.number("beta_fast", 1e-3, 1e6, 32)
    slow = part.number("beta_slow", 1e-3, 1e6, 1)
    if slow >= fast:
        part.wrong("beta_fast", f"more than beta_slow={slow:g}")
    return RopeScaling(
        "yarn",
        factor,
        attention_factor=_yarn_attention(part, factor),
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=part.boolean("truncate", default=True),
    )


def _yarn_attention(part: _Section, factor: float) -> float:
    """What cos and sin are multiplied by: stored, or 0.1 ln(factor) + 1, or a ratio of such."""
    if "attention_factor" in part:
        return part.number("attention_factor", _MIN_FACTOR, 1e3)
    names = ("mscale", "mscale_all_dim")
    over, under = (part.number(n, 0, 1e3) if n in part else 0.0 for n in names)
    if not over or not under:
        over, under = 1.0, 0.0
    logarithm = 0.1 * math.log(factor)
    return (over * logarithm + 1) / (under * logarithm + 1)


def _longrope(
    section: _Section, part: _Section, kind: str, family: Family, head_dim: int, positions: int
) -> RopeScaling:
    key = "original_max_position_embeddings"
    place = part if key in part else section
    original = place.integer(key, 2, _MAX_POSITIONS, family.defaults[key])
    factor = part.number("factor", 1, 1e6) if "factor" in part else positions / original
    attention_factor = 1.0
    if factor > 1:
        logarithm = math.log(factor)
        su = math.sqrt(1 + logarithm / math.log(original))
        attention_factor = 0.1 * logarithm + 1 if kind == "yarn" else su
    return RopeScaling(
        "longrope",
        factor,
        attention_factor=part.number("attention_factor", _MIN_FACTOR, 1e3, attention_factor),
        original_max_position_embeddings=original,
        short_factor=part.numbers("short_factor", head_dim // 2, 1e-6, 1e6),
        long_factor=part.numbers("long_factor", head_dim // 2, 1e-6, 1e6),
    )


def _original(folder: Path, top: _Section) -> ModelConfig:
    for key in ("use_backbone_lora", "use_llm_lora"):
        if top.integer(key, 0, _MAX_WIDTH, 0):
            _fail(f"{top.where}{key} is {top.data[key]}, supported: 0 (merge the adapter first)")
    top.only("flash_mode", False, False)
    vision = _vision(top.section("vision_config"), "original")
    text = _text(top, top.section("llm_config"), "original")
    image_size = vision.image_size
    if "force_image_size" in top:
        image_size = top.square("force_image_size", _MAX_IMAGE_SIZE)
    template = top.choice("template", [name for name in TEMPLATES if name != "hf"])
    system_message = top.data.get("system_message")
    if system_message is not None and not is_text(system_message):
        top.wrong("system_message", "a string or null")
    config = ModelConfig(
        vision=vision,
        text=text,
        layout="original",
        template=template,
        system_message=system_message,
        image_size=image_size,
        downsample_ratio=top.number("downsample_ratio", 0.125, 1, 0.5),
        select_layer=_select_layer(top, "select_layer", vision, _SELECT_LAYER.get(template, -1)),
        ps_version=top.choice("ps_version", ("v1", "v2"), "v1"),
        min_dynamic_patch=top.integer("min_dynamic_patch", 1, _MAX_TILES, 1),
        max_dynamic_patch=top.integer("max_dynamic_patch", 1, _MAX_TILES, 6),
        use_thumbnail=top.boolean("use_thumbnail", default=False),
        dynamic_image_size=top.boolean("dynamic_image_size", default=False),
        image_token_id=None,
        torch_dtype=_torch_dtype(top),
        eos_token_ids=_eos_token_ids(folder, text),
    )
    _check_tiles(top, "force_image_size" if "force_image_size" in top else "image_size", config)
    if config.min_dynamic_patch > config.max_dynamic_patch:
        top.wrong("max_dynamic_patch", f"at least min_dynamic_patch={config.min_dynamic_patch}")
    return config


def _native(folder: Path, top: _Section) -> ModelConfig:
    top.only("vision_feature_select_strategy", "default", "default")
    top.choice("projector_hidden_act", ("gelu",), "gelu")
    vision = _vision(top.section("vision_config"), "hf")
    text = _text(top, top.section("text_config"), "hf")
    processor = _Section.read_optional(folder, "preprocessor_config.json")
    if not processor.data:  # Transformers 5 keeps all parts of a processor in one file
        whole = _Section.read_optional(folder, "processor_config.json")
        processor = whole.section("image_processor") if "image_processor" in whole else processor
    image_size = vision.image_size
    if "size" in processor:
        size = processor.section("size")
        image_size = size.integer("height", 1, _MAX_IMAGE_SIZE)
        if size.integer("width", 1, _MAX_IMAGE_SIZE) != image_size:
            size.wrong("width", f"height={image_size}")
    processor.boolean("crop_to_patches", default=True)  # the model's processor forces it to true
    config = ModelConfig(
        vision=vision,
        text=text,
        layout="hf",
        template="hf",
        system_message=None,
        image_size=image_size,
        downsample_ratio=top.number("downsample_ratio", 0.125, 1, 0.5),
        select_layer=_select_layer(top, "vision_feature_layer", vision, -1),
        ps_version="v2",
        min_dynamic_patch=processor.integer("min_patches", 1, _MAX_TILES, 1),
        max_dynamic_patch=processor.integer("max_patches", 1, _MAX_TILES, 12),
        use_thumbnail=True,
        dynamic_image_size=True,
        image_token_id=top.token_id("image_token_id"),
        torch_dtype=_torch_dtype(top),
        eos_token_ids=_eos_token_ids(folder, text),
    )
    _check_tiles(top, "image_size", config)
    top.integer("image_seq_length", 1, _MAX_POSITIONS, config.tokens_per_tile)
    if top.value("image_seq_length", config.tokens_per_tile) != config.tokens_per_tile:
        top.wrong("image_seq_length", f"{config.tokens_per_tile} (from the image size)")
    if config.min_dynamic_patch > config.max_dynamic_patch:
        processor.wrong("max_patches", f"at least min_patches={config.min_dynamic_patch}")
    return config


def _llava(folder: Path, top: _Section) -> ModelConfig:
    """Chat V1.0: InternViT-6B, two linear layers and Vicuna, as LLaVA's code saves them."""
    top.only("architectures", ["LlavaLlamaForCausalLM"], None)
    top.choice("mm_projector_type", ("mlp2x_gelu",))
    top.choice("mm_vision_select_feature", ("patch",), "patch")
    top.choice("image_aspect_ratio", ("pad",))
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        top.only(key, False, False)
    name = top.value("mm_vision_tower", None)
    tower = name.rstrip("/").rpartition("/")[2] if type(name) is str else ""
    if not _LLAVA_TOWER.fullmatch(tower):
        top.wrong("mm_vision_tower", "a path that ends in the name of an InternViT-6B")
    vision = _tower(Path(folder).absolute().parent / tower)
    if top.integer("mm_hidden_size", 1, _MAX_WIDTH) != vision.hidden_size:
        top.wrong("mm_hidden_size", f"hidden_size={vision.hidden_size} of {tower}")
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    text = _text(top, _Section(top.where, top.data | llama), "original")
    config = ModelConfig(
        vision=vision,
        text=text,
        layout="llava",
        template="vicuna_v1",
        system_message=None,
        image_size=448 if "448" in name else 336,
        downsample_ratio=1.0,
        select_layer=_select_layer(top, "mm_vision_select_layer", vision, _REQUIRED),
        ps_version="v2",
        min_dynamic_patch=1,
        max_dynamic_patch=1,
        use_thumbnail=False,
        dynamic_image_size=False,
        image_token_id=None,
        torch_dtype=_torch_dtype(top),
        eos_token_ids=_eos_token_ids(folder, text),
        projector_norm=False,
        pad_to_square=True,
        tower=tower,
    )
    _check_tiles(top, "image size", config)
    return config


def _tower(folder: Path) -> VisionConfig:
    """Of a vision tower that is a checkpoint of its own; without one, its class's defaults."""
    if folder.is_dir():
        return load_vision_config(folder)
    return _vision(_Section("", {"model_type": "intern_vit_6b"}), "original")


def _select_layer(top: _Section, key: str, vision: VisionConfig, default: Any) -> int:
    return top.integer(key, -vision.num_layers - 1, vision.num_layers, default)


def _check_tiles(top: _Section, key: str, config: ModelConfig) -> None:
    """A tile must be whole patches, and its grid whole squares of the unshuffle."""
    if not math.isclose(config.downsample_ratio * config.unshuffle, 1, rel_tol=1e-9):
        top.wrong("downsample_ratio", "1 / an integer")
    step = config.vision.patch_size * config.unshuffle
    if config.image_size % step:
        _fail(
            f"{top.where}{key} is {config.image_size}, expected a multiple of {step} "
            f"(patch_size {config.vision.patch_size}, downsample_ratio {config.downsample_ratio:g})"
        )


def _torch_dtype(top: _Section) -> str | None:
    for key in ("torch_dtype", "dtype"):
        if key in top:
            return top.choice(key, ("float32", "bfloat16", "float16"))
    return None


def _eos_token_ids(folder: Path, text: TextConfig) -> tuple[int, ...]:
    generation = _Section.read_optional(folder, "generation_config.json")
    return tuple(dict.fromkeys((*generation.token_ids("eos_token_id"), *text.eos_token_ids)))
