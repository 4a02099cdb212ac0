"""Whole models against the outputs of the original implementation, tensor for tensor.

tests/golden/<case> holds a tiny checkpoint in a real layout and what the reference implementation
computed from it in float32; its own bfloat16 error is the yardstick for ours.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import internvl_rt as ivr
from internvl_rt import _C

GOLDEN = Path(__file__).parent / "golden"
CHAT_CASES = (
    "internvl2_5-qwen2",
    "internvl2_5-qwen2-448",
    "internvl3-qwen2_5",
    "posinterp-300m-qwen2",
)


class Golden:
    def __init__(self, case):
        self.folder = GOLDEN / case
        self.meta = json.loads((self.folder / "golden.json").read_text())
        self.tensors = load_file(self.folder / "golden.safetensors")
        self.image_token = self.meta.get("token_ids", {}).get("img_context_token_id")

    def __getitem__(self, key):
        return self.tensors[key]

    def inputs(self, sub):
        """Arguments of forward for one subcase."""
        names = ("input_ids", "pixel_values", "image_flags", "attention_mask")
        found = {n: self.tensors.get(f"{sub}.{n}") for n in names}
        if found["pixel_values"] is not None:
            found["pixel_values"] = found["pixel_values"].float()
        return found


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


def real_positions(g, sub):
    return g[f"{sub}.attention_mask"].bool()


@pytest.mark.parametrize(("case", "sub"), subcases(CHAT_CASES))
def test_float32(models, case, sub):
    g = golden(case)
    model = models(case, "float32")
    inputs = g.inputs(sub)
    if inputs["pixel_values"] is not None:
        features = model.encode_images(inputs["pixel_values"])
        assert_close("features", features, g[f"{sub}.vit_features"], law=fp32)
    mask = real_positions(g, sub)
    assert_close("logits", model.forward(**inputs)[mask], g[f"{sub}.logits"][mask], law=fp32)
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
    mask = real_positions(g, sub)
    logits = model.forward(**inputs)[mask]
    assert_close("logits", logits, g[f"{sub}.logits"][mask], law=bf16(own["max_abs"]))


@pytest.mark.parametrize(("case", "sub"), subcases(("internvl2_5-qwen2",)))
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
    """The Hugging Face layout of the same weights gives the original's numbers."""
    g, original = golden("internvl3-qwen2_5-hf"), golden("internvl3-qwen2_5")
    model = models("internvl3-qwen2_5-hf", "float32")
    inputs = original.inputs(sub)
    mask = real_positions(original, sub)
    assert_close("logits", model.forward(**inputs)[mask], g[f"{sub}.hf_logits"][mask], law=fp32)
    ids = model.generate(**inputs, max_new_tokens=20, eos_token_id=-1)
    assert ids == g[f"{sub}.hf_gen_ids"].tolist()


@pytest.mark.parametrize("sub", ["native", "larger", "smaller", "rect"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vision_tower(backend, sub, dtype):
    g = golden("internvit-300m")
    model = ivr.load_vision(g.folder, dtype=dtype, backend=backend)
    out = model(g[f"{sub}.pixel_values"].float(), output_hidden_states=True)
    own = g.meta["subcases"][sub]["bf16_vs_fp32"]["last_hidden_max_abs"]
    law = fp32 if dtype == "float32" else bf16(own)
    assert_close("last", out.last_hidden_state, g[f"{sub}.last_hidden_state"], law=law)
    assert_close("pooler", out.pooler_output, g[f"{sub}.pooler_output"], law=law)
    for i, state in enumerate(out.hidden_states):
        assert_close(f"hidden {i}", state, g[f"{sub}.hidden_states.{i}"], law=law)
    assert model(g[f"{sub}.pixel_values"].float()).hidden_states is None


@pytest.mark.parametrize("sub", ["image1", "dyn"])
def test_hidden_states_of_a_chat_model(backend, sub):
    g = golden("internvl3-qwen2_5")
    model = ivr.load_vision(g.folder, dtype="float32", backend=backend)
    out = model(g[f"{sub}.pixel_values"].float(), output_hidden_states=True)
    for i, state in enumerate(out.hidden_states):
        if f"{sub}.vit_hidden.{i}" in g.tensors:
            assert_close(f"hidden {i}", state, g[f"{sub}.vit_hidden.{i}"], law=fp32)


@pytest.mark.parametrize("isa", _C.supported_isas())
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
            mask = real_positions(g, "batch")
            own = g.meta["subcases"]["batch"]["bf16_vs_fp32"]["max_abs"]
            law = fp32 if dtype == "float32" else bf16(own)
            assert_close("logits", logits[mask], g["batch.logits"][mask], law=law)
            plain = "avx512" if isa.startswith("amx") else isa
            assert f"flash_attention/{plain}" in ran
            assert f"paged_attention/{plain}" in ran
            assert {name.split("/")[1] for name in ran} <= {isa, plain}
            if isa.startswith("amx") and dtype == "bfloat16":
                assert f"linear_bf16/{isa}" in ran
    finally:
        _C.force_isa("")


def test_end_to_end_picture(backend):
    """From a picture file to tokens, through our own preprocessing."""
    g = golden("internvl2_5-qwen2")
    picture = g.meta["e2e_picture"]
    pixels = ivr.image.preprocess(
        GOLDEN / picture["file"], picture["max_num"], picture["image_size"]
    )
    assert torch.equal(pixels, g["e2e.pixel_values"].float())
