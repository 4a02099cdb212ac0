"""Whole models against the outputs of the original implementation, tensor for tensor.

tests/golden/<case> holds a tiny checkpoint in a real layout and what the reference implementation
computed from it in float32; its own bfloat16 error is the yardstick for ours. To keep the
repository small some cases have the logits of the last positions only, and some, whose tower others
have too, an empty vision tower; their golden.json says so. Pixels are stored as the bytes that they
were made from.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import internvl_rt as ivr
from internvl_rt import _C
from internvl_rt.config import load_config
from internvl_rt.engine import Engine
from internvl_rt.models.internvl import InternVL
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters
from internvl_rt.weights import Checkpoint
from isas import ISAS, runs, stand_in

GOLDEN = Path(__file__).parent / "golden"
CHAT_CASES = (
    "internvl2_5-qwen2",
    "internvl2_5-qwen2-448",
    "internvl3-qwen2_5",
    "chat-v1_1-llama",
    "internvl2-internlm2",
    "internvl2-phi3",
    "internvl3_5-qwen3",
    "internvl3_5-qwen3moe",
    "internvl3_5-gptoss",
    "posinterp-300m-qwen2",
)


def normalised(pixels):
    """Bytes [t, 3, height, width] as the reference was given them: rounded to bfloat16."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return ((pixels / 255 - mean) / std).bfloat16().float()


class Golden:
    def __init__(self, case):
        self.folder = GOLDEN / case
        self.meta = json.loads((self.folder / "golden.json").read_text())
        self.tensors = load_file(self.folder / "golden.safetensors")
        for name, x in self.tensors.items():
            if x.dtype == torch.uint8:
                self.tensors[name] = normalised(x)
        self.image_token = self.meta.get("token_ids", {}).get("img_context_token_id")

    def __getitem__(self, key):
        return self.tensors[key]

    def inputs(self, sub):
        """Arguments of forward for one subcase."""
        names = ("input_ids", "pixel_values", "image_flags", "attention_mask")
        found = {n: self.tensors.get(f"{sub}.{n}") for n in names}
        if sub == "e2e":
            found["pixel_values"] = self.picture()
        return found

    def picture(self):
        """The tiles of the case's picture file, by our own preprocessing."""
        about = self.meta["e2e_picture"]
        return ivr.image.preprocess(GOLDEN / about["file"], about["max_num"], about["image_size"])


def golden(case, _cache={}):  # noqa: B006
    if case not in _cache:
        _cache[case] = Golden(case)
    return _cache[case]


def subcases(cases):
    return [(c, s) for c in cases for s in golden(c).meta["subcases"]]


def assert_close(name, ours, reference, *, law):
    reference = reference.float()
    scale = max(float(reference.std()), 1.0)
    error = float((ours.float() - reference).abs().max())
    assert error <= law(scale), f"{name}: off by {error:.3g}, allowed {law(scale):.3g}"


def fp32(scale):
    return 5e-4 * scale


def bf16(own_error):
    """Twice the reference's own bfloat16 error plus 1 % of the scale."""
    return lambda scale: 2 * own_error + 0.01 * scale


@pytest.fixture(scope="module", params=["native", "reference"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def models(backend):
    loaded = {}

    def get(case, dtype):
        if (case, dtype) not in loaded:
            loaded[case, dtype] = ivr.load(
                GOLDEN / case,
                dtype=dtype,
                backend=backend,
                image_token_id=golden("internvl2_5-qwen2-448").image_token
                if case.endswith("448")
                else 595,
            )
        return loaded[case, dtype]

    return get


def assert_logits_close(logits, g, sub, *, law):
    """Logits of the last positions, as many as the reference has, where there is no padding."""
    reference = g[f"{sub}.logits"]
    n = reference.shape[1]
    mask = g[f"{sub}.attention_mask"].bool()[:, -n:]
    assert_close("logits", logits[:, -n:][mask], reference[mask], law=law)


@pytest.mark.parametrize(("case", "sub"), subcases(CHAT_CASES))
def test_float32(models, case, sub):
    g = golden(case)
    model = models(case, "float32")
    inputs = g.inputs(sub)
    if inputs["pixel_values"] is not None:
        features = model.encode_images(inputs["pixel_values"])
        assert_close("features", features, g[f"{sub}.vit_features"], law=fp32)
    assert_logits_close(model.forward(**inputs), g, sub, law=fp32)
    expected = g[f"{sub}.gen_ids"]
    # The reference ignores image_flags when it generates: features of flag-0 tiles were left out.
    ids = model.generate(**inputs, max_new_tokens=expected.shape[1], eos_token_id=-1)
    assert ids == expected.tolist()


@pytest.mark.parametrize(("case", "sub"), subcases(CHAT_CASES))
def test_bfloat16(models, case, sub):
    g = golden(case)
    model = models(case, "bfloat16")
    inputs = g.inputs(sub)
    own = g.meta["subcases"][sub]["bf16_vs_fp32"]
    if inputs["pixel_values"] is not None:
        features = model.encode_images(inputs["pixel_values"])
        law = bf16(own["vit_features_max_abs"])
        assert_close("features", features, g[f"{sub}.vit_features"], law=law)
    assert_logits_close(model.forward(**inputs), g, sub, law=bf16(own["max_abs"]))


@pytest.mark.parametrize(("case", "sub"), subcases(CHAT_CASES))
def test_stopping(models, case, sub):
    g = golden(case)
    check = g.meta["subcases"][sub].get("stop_check")
    if check is None:
        return
    ids = models(case, "float32").generate(
        **g.inputs(sub), max_new_tokens=20, eos_token_id=check["eos_token_id"]
    )
    expected = check["expected_ids"]
    expected = expected if isinstance(expected[0], list) else [expected]
    pad = check.get("pad_token_id")
    for row, reference in zip(ids, expected, strict=True):
        assert row == [i for i in reference if i != pad]


@pytest.mark.parametrize("sub", ["text", "image1", "dyn", "batch", "multi"])
def test_native_layout(models, sub):
    """The Hugging Face layout of the same weights gives the original's numbers.

    Transformers' own are theirs, to the bit.
    """
    g = golden("internvl3-qwen2_5")
    model = models("internvl3-qwen2_5-hf", "float32")
    inputs = g.inputs(sub)
    assert_logits_close(model.forward(**inputs), g, sub, law=fp32)
    ids = model.generate(**inputs, max_new_tokens=20, eos_token_id=-1)
    assert ids == g[f"{sub}.gen_ids"].tolist()


@pytest.mark.parametrize("sub", ["native", "larger", "smaller", "rect"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vision_tower(backend, sub, dtype):
    g = golden("internvit-300m")
    model = ivr.load_vision(g.folder, dtype=dtype, backend=backend)
    out = model(g[f"{sub}.pixel_values"], output_hidden_states=True)
    own = g.meta["subcases"][sub]["bf16_vs_fp32"]["last_hidden_max_abs"]
    law = fp32 if dtype == "float32" else bf16(own)
    assert_close("last", out.last_hidden_state, g[f"{sub}.last_hidden_state"], law=law)
    assert_close("pooler", out.pooler_output, g[f"{sub}.pooler_output"], law=law)
    *states, last = out.hidden_states
    assert torch.equal(last, out.last_hidden_state)
    for i, state in enumerate(states):
        assert_close(f"hidden {i}", state, g[f"{sub}.hidden_states.{i}"], law=law)
    assert model(g[f"{sub}.pixel_values"]).hidden_states is None


@pytest.mark.parametrize(
    ("case", "sub"),
    [("internvl3-qwen2_5", "image1"), ("internvl3-qwen2_5", "dyn"), ("chat-v1_1-llama", "image1")],
)
def test_hidden_states_of_a_chat_model(backend, case, sub):
    g = golden(case)
    model = ivr.load_vision(g.folder, dtype="float32", backend=backend)
    out = model(g[f"{sub}.pixel_values"], output_hidden_states=True)
    for i, state in enumerate(out.hidden_states):
        if f"{sub}.vit_hidden.{i}" in g.tensors:
            assert_close(f"hidden {i}", state, g[f"{sub}.vit_hidden.{i}"], law=fp32)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    """The same model on each instruction set in turn, and proof of what ran."""
    g = golden("internvl3-qwen2_5")
    _C.force_isa(isa)
    try:
        for dtype in ("float32", "bfloat16"):
            model = ivr.load(g.folder, dtype=dtype, image_token_id=g.image_token)
            _C.kernel_counts(reset=True)
            inputs = g.inputs("batch")
            logits = model.forward(**inputs)
            ran = set(_C.kernel_counts(reset=True))
            own = g.meta["subcases"]["batch"]["bf16_vs_fp32"]["max_abs"]
            law = fp32 if dtype == "float32" else bf16(own)
            assert_logits_close(logits, g, "batch", law=law)
            attention = runs(isa, getattr(torch, dtype))
            assert f"flash_attention/{attention}" in ran
            assert f"paged_attention/{attention}" in ran
            assert {name.split("/")[1] for name in ran} <= {isa, stand_in(isa)}
            if dtype == "bfloat16":
                assert f"linear_bf16/{isa}" in ran
    finally:
        _C.force_isa("")


def test_end_to_end_picture():
    """The case's pixels are made from its picture file: they are the reference's, to the bit."""
    g = golden("internvl2_5-qwen2")
    found = hashlib.sha256(g.picture().numpy().tobytes()).hexdigest()
    assert found == g.meta["e2e_picture"]["pixels_sha256"]


def _rewritten(folder, source, tensors, shards=1):
    """The checkpoint `source` with other tensors, in one file or several with an index."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "preprocessor_config.json"):
        if (source / name).exists():
            (folder / name).write_bytes((source / name).read_bytes())
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _text_logits(folder, g):
    return ivr.load(folder, dtype="bfloat16").forward(**g.inputs("text"))


def test_stacked_experts_give_the_same_bits(tmp_path):
    """Qwen3-MoE as newer Transformers stack it: [E, 2I, hidden] and [E, hidden, I]."""
    g = golden("internvl3_5-qwen3moe")
    tensors = load_file(g.folder / "model.safetensors")
    count = json.loads((g.folder / "config.json").read_text())["llm_config"]["num_experts"]
    for i in range(3):
        at = f"language_model.model.layers.{i}.mlp.experts."
        each = [
            {x: tensors.pop(f"{at}{e}.{x}_proj.weight") for x in ("gate", "up", "down")}
            for e in range(count)
        ]
        gate_up = [torch.cat((t["gate"], t["up"])) for t in each]
        tensors[f"{at}gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{at}down_proj"] = torch.stack([t["down"] for t in each])
    stacked = _rewritten(tmp_path / "stacked", g.folder, tensors)
    assert torch.equal(_text_logits(stacked, g), _text_logits(g.folder, g))


def test_mxfp4_experts_are_their_values(tmp_path):
    """GPT-OSS with packed experts gives the bits of the same values stored in bfloat16."""
    g = golden("internvl3_5-gptoss")
    plain = load_file(g.folder / "model.safetensors")
    packed = dict(plain)
    generator = torch.Generator().manual_seed(3)
    for name in [n for n in plain if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, K, N = packed.pop(name).shape
        blocks = torch.randint(0, 256, (E, N, K // 32, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(121, 125, (E, N, K // 32), generator=generator).to(torch.uint8)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        values = ivr.ops.mxfp4_unpack(blocks, scales, backend="reference")  # [E, N, K]
        plain[name] = values.transpose(1, 2).contiguous()
    folders = [_rewritten(tmp_path / "plain", g.folder, plain)]
    folders.append(_rewritten(tmp_path / "packed", g.folder, packed))
    config = json.loads((folders[1] / "config.json").read_text())
    config["llm_config"]["quantization_config"] = {"quant_method": "mxfp4"}
    (folders[1] / "config.json").write_text(json.dumps(config))
    first, second = (_text_logits(folder, g) for folder in folders)
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, second)


def _logits(folder, dtype="float32"):
    inputs = golden("internvl3-qwen2_5").inputs("dyn")
    return ivr.load(folder, dtype=dtype, image_token_id=595).forward(**inputs)


def test_shards_spellings_and_stored_dtypes_give_the_same_bits(tmp_path):
    original, native = GOLDEN / "internvl3-qwen2_5", GOLDEN / "internvl3-qwen2_5-hf"
    expected = _logits(original)
    tensors = load_file(original / "model.safetensors")
    assert torch.equal(_logits(_rewritten(tmp_path / "shards", original, tensors, 3)), expected)
    wide = {n: t.float() for n, t in tensors.items()}
    assert torch.equal(_logits(_rewritten(tmp_path / "wide", original, wide)), expected)
    older = load_file(native / "model.safetensors")
    newer = {
        "model." + n.replace("language_model.model.", "language_model."): t
        for n, t in older.items()
        if "lm_head" not in n
    }
    newer["lm_head.weight"] = older["language_model.lm_head.weight"]
    assert torch.equal(_logits(native), expected)
    assert torch.equal(_logits(_rewritten(tmp_path / "newer", native, newer)), expected)


def _native_vision(tensors):
    """Tensors of an original vision tower under the native names."""
    parts = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.position_embedding": "embeddings.position_embeddings",
        "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
        "encoder.layers.": "encoder.layer.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".ls1": ".lambda_1",
        ".ls2": ".lambda_2",
        ".attn.proj.": ".attention.projection_layer.",
        ".attn.": ".attention.",
    }
    found = {}
    for name, tensor in tensors.items():
        for old, new in parts.items():
            name = name.replace(old, new)
        if ".qkv." in name:
            for x, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("qkv", f"{x}_proj")] = part.contiguous()
        else:
            found[name] = tensor
    return found


def test_the_larger_tower_under_its_native_names(tmp_path):
    """RMSNorm, normalised queries and keys, no qkv bias: both layouts give the same bits."""
    g = golden("chat-v1_1-llama")
    prefix = "vision_model."
    stored = load_file(g.folder / "model.safetensors").items()
    tower = {n.removeprefix(prefix): t for n, t in stored if n.startswith(prefix)}
    config = json.loads((g.folder / "config.json").read_text())["vision_config"]
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    native = {k: config[k] for k in (*kept, "image_size", "patch_size", "layer_norm_eps")}
    native |= {"model_type": "internvl_vision", "norm_type": "rms_norm", "use_qk_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(native))
    save_file(_native_vision(tower), tmp_path / "model.safetensors")
    pixels = g["image1.pixel_values"]
    ours = ivr.load_vision(tmp_path, dtype="float32")(pixels).last_hidden_state
    original = ivr.load_vision(g.folder, dtype="float32")(pixels).last_hidden_state
    assert torch.equal(ours, original)


def test_the_tower_of_the_contrastive_model(tmp_path):
    """InternVL-14B-224px: the original names, beside those of what is not run."""
    g = golden("chat-v1_1-llama")
    stored = load_file(g.folder / "model.safetensors")
    tensors = {name: t for name, t in stored.items() if name.startswith("vision_model.")}
    others = ("qllama.model.norm.weight", "query_tokens", "text_projection", "logit_scale")
    others += ("clip_projector.proj.bias", "clip_projector2.proj.bias", "itm_head.bias")
    save_file(tensors | {n: torch.zeros(3) for n in others}, tmp_path / "model.safetensors")
    vision = json.loads((g.folder / "config.json").read_text())["vision_config"]
    config = {"model_type": "internvl", "qllama_config": {}, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(8))
    found, expected = (ivr.load_vision(f, dtype="float32") for f in (tmp_path, g.folder))
    assert torch.equal(found(pixels).last_hidden_state, expected(pixels).last_hidden_state)
    with pytest.raises(ValueError, match="InternVL-14B-224px compares and does not chat"):
        ivr.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"force_image_size": 112}))
    with pytest.raises(ValueError, match=r"position_embedding is .*, expected \[1, 65, "):
        ivr.load_vision(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_is_the_embedding(tmp_path, dtype):
    source = golden("internvl3-qwen2_5").folder
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = embedding.clone()
    untied = _logits(_rewritten(tmp_path / "untied", source, tensors), dtype)
    del tensors["language_model.lm_head.weight"]
    tied = _logits(_rewritten(tmp_path / "tied", source, tensors), dtype)
    assert torch.equal(tied, untied)


def test_one_op_can_be_swapped_for_its_reference():
    """A wrong number can be bisected to one op: every single swap stays within tolerance."""
    g = golden("internvl3-qwen2_5")
    config = load_config(g.folder)
    inputs = g.inputs("image1")
    for name in ivr.ops.catalogue():
        parameters = Parameters.of_model(Checkpoint(g.folder), config)
        core = InternVL(config, parameters, OpSet("native", {name: "reference"}), torch.float32)
        model = ivr.Model(g.folder, config, core, Engine(core, kv_tokens=128), g.image_token)
        assert_close(name, model.forward(**inputs), g["image1.logits"], law=fp32)
