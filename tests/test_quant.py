"""Weight-only quantisation: the definition, the packed form, the product's laws, whole models."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

import internvl_rt as ivr
from internvl_rt import _C, num_threads, set_num_threads
from internvl_rt.config import load_config
from internvl_rt.models.decoder import weight_format
from internvl_rt.ops import grouped_linear, linear, pack, pack_experts, unpack
from internvl_rt.ops.linear import packed_size
from internvl_rt.ops.quantise import dequantise, quantise
from internvl_rt.ops.registry import bits
from internvl_rt.runtime.plan import make_plan
from isas import ISAS, stand_in

FORMATS = ("int8", "int4")
DTYPES = (torch.float32, torch.bfloat16)
MIXTURES = [
    Path(__file__).parent / "golden" / f"internvl3_5-{name}" for name in ("qwen3moe", "gptoss")
]
SHAPES = [(0, 5), (5, 0), (1, 1), (33, 65), (64, 64), (2100, 70)]


@pytest.fixture(params=ISAS)
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa("")


@pytest.fixture
def make():
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(shape, generator=generator)


# ---- the definition ------------------------------------------------------------------------------


def test_int8_by_hand():
    w = torch.zeros(2, 66)
    w[0, :4] = torch.tensor([127.0, -127.0, 0.5, 1.5])  # halves go to the even code
    w[0, 64] = 1e-30
    codes, scales = quantise(w, "int8")
    assert codes.shape == (2, 128)
    assert codes[0, :4].tolist() == [127, -127, 0, 2]
    assert scales[0, 0] == 1
    assert codes[0, 64] in (126, 127)  # the scale is rounded to bfloat16
    assert not bool(codes[0, 65:].any())
    assert not bool(codes[1].any())
    assert not bool(scales[1].any())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int4_gives_the_largest_magnitude_the_lowest_code(sign):
    w = sign * torch.tensor([[-8.0, 7.0, 7.4, 7.9, 0.5, -2.5, 0.0]])
    codes, scales = quantise(w, "int4")
    assert codes[0, :7].tolist() == [-8, 7, 7, 7, 0, -2, 0]
    assert scales[0, 0] == sign


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_error_is_half_a_step(make, fmt):
    w = make(40, 200)
    codes, scales = quantise(w, fmt)
    error = (dequantise(codes, scales)[:, :200] - w).abs()
    step = scales.float().abs().repeat_interleave(64, dim=1)[:, :200]
    # int4 has no +8: a value beyond 7.5 steps opposite to the largest is off by up to one.
    assert bool((error <= step * (0.502 if fmt == "int8" else 1.03)).all())
    assert float(((error / step) ** 2).mean()) < 1.1 / 12


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(fmt, bad):
    w = torch.ones(3, 70)
    w[1, 66] = bad
    with pytest.raises(ValueError, match=f"^quantise: a weight is NaN or infinite, {fmt} needs"):
        quantise(w, fmt)
    with pytest.raises(ValueError, match=f"^pack: a weight is NaN or infinite, {fmt} needs"):
        pack([torch.ones(300, 70), w.bfloat16()], quant=fmt)


def test_the_smallest_weights_are_zero():
    codes, scales = quantise(torch.full((1, 64), 1e-38), "int8")
    assert not bool(codes.any())
    assert not bool(scales.any())


# ---- the packed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_unpack_gives_codes_times_scales(isa, make, fmt, N, K):
    w = make(N, K) * 10.0 ** (8 * make(N, K))  # groups of every size
    w[::3, ::2] *= 1e-30
    w[: N // 4].clamp_(-1e-38, 1e-38)
    w[N // 4 : N // 3] = 0
    for weight in (w, w.bfloat16(), w.double(), w.T.contiguous().T):
        _C.kernel_counts(reset=True)
        packed = pack(weight, quant=fmt)
        assert N * K == 0 or _C.kernel_counts(reset=True) == {f"quantise_panel/{stand_in(isa)}": 1}
        assert packed.shape == (N, K)
        assert packed.data.numel() == packed_size(N, K, fmt)
        assert torch.equal(unpack(packed), dequantise(*quantise(weight.float(), fmt))[:, :K])
    both = pack([w, w.bfloat16()], quant=fmt)
    assert torch.equal(
        unpack(both), torch.cat([unpack(pack(p, quant=fmt)) for p in (w, w.bfloat16())])
    )


def test_the_packed_layout():
    w = torch.zeros(33, 64)
    w[32, :5] = torch.tensor([-8.0, 7.0, 3.0, -2.0, 5.0])  # scale 1
    for fmt in FORMATS:
        panel = pack(w, quant=fmt).data.view(2, -1)[1]
        scale, first, second = panel[:2], panel[64:68], panel[64 + 128 : 64 + 128 + 4]
        q = quantise(w, fmt)[0][32].int()
        if fmt == "int4":
            assert scale.view(torch.bfloat16).item() == 1
            q += 8
            assert first.tolist() == [int(q[k] | q[k + 4] << 4) for k in range(4)]
            assert second.tolist() == [8 << 4 | 8] * 4
        else:
            assert first.tolist() == (q[:4] + 128).tolist()
            assert second.tolist() == (q[4:8] + 128).tolist()


def test_packing_joins_weights_and_refuses_the_rest(make):
    parts = [make(n, 70) for n in (33, 7, 64)]
    assert torch.equal(pack(parts, quant="int4").data, pack(torch.cat(parts), quant="int4").data)
    with pytest.raises(ValueError, match=r"^quant is 'int3', allowed: int8, int4$"):
        pack(parts, quant="int3")
    with pytest.raises(ValueError, match=r"^pack: weight is torch\.int32 on cpu"):
        pack(torch.zeros(2, 2, dtype=torch.int32), quant="int8")
    out = torch.empty(packed_size(104, 70, "int8") + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^pack: data has shape \[16897\], expected \[P=16896\]"):
        pack(parts, quant="int8", out=out)


# ---- the product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(70, 453), (416, 1056)])
def test_the_product_in_fp32_is_that_of_the_dequantised_weight(isa, make, N, K, fmt):
    """Bit for bit."""
    quantised = pack(make(N, K), quant=fmt)
    bias, residual = make(N), make(70, N)
    plain = pack(unpack(quantised))
    for M in (1, 2, 3, 5, 13, 40, 70):
        x = make(M, K)
        options = {"bias": bias, "residual": residual[:M]}
        ours = linear(x, quantised, **options)
        assert torch.equal(bits(ours), bits(linear(x, plain, **options))), M


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(70, 453), (416, 1056), (1500, 130)])
def test_codes_times_integers(isa, make, N, K, fmt):
    """The definition in kernels/cpu/linear_digits.h: exact sums of a group, added in order."""
    w = pack(make(N, K), quant=fmt)
    codes, scales = quantise(unpack(w), fmt)
    assert torch.equal(dequantise(codes, scales)[:, :K], unpack(w))
    groups = codes.shape[1] // 64
    codes = codes.view(N, groups, 64).double()
    for M in (1, 2, 3, 4, 6, 7, 13, 40, 70):
        x = (make(M, K) * 8 ** make(M, K)).bfloat16()
        x[0, :64] = 0
        spread = torch.nn.functional.pad(x.double(), (0, -K % 64)).view(M, groups, 64)
        power = 2.0 ** (13 - spread.abs().amax(-1).clamp(min=1e-30).log2().floor())
        taken = (spread * power[..., None]).round() / power[..., None]
        assert bool((taken - spread).abs().max() > 0)
        total = torch.zeros(M, N)
        for g in range(groups):
            sums = (taken[:, g] * power[:, g, None]) @ codes[:, g].T
            factor = scales[:, g].float() * (1 / power[:, g, None]).float()
            if isa == "portable":  # rounds twice
                total = sums.float() * factor + total
            else:
                total = (sums.float().double() * factor.double() + total.double()).float()
        assert torch.equal(bits(linear(x, w, out_dtype=torch.float32)), bits(total)), M


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_instruction_set_with_fused_additions_gives_the_same_bits(make, fmt):
    x, w = make(40, 453).bfloat16(), pack(make(300, 453), quant=fmt)
    results = []
    for isa in ISAS[1:]:
        _C.force_isa(isa)
        results.append(linear(x, w, out_dtype=torch.float32))
    _C.force_isa("")
    assert all(torch.equal(bits(y), bits(results[0])) for y in results)


def test_codes_times_numbers_that_are_not_finite_or_tiny(isa, make):
    w = pack(make(40, 200), quant="int8")
    x = make(9, 200).bfloat16()
    right = linear(x, w)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[4, 130] = bad
        y = linear(broken, w)
        assert bool(y[4].isnan().all())
        assert torch.equal(bits(y[[0, 1, 2, 3, 5, 6, 7, 8]]), bits(right[[0, 1, 2, 3, 5, 6, 7, 8]]))
    for power in (2.0**-100, 2.0**100):
        truth = (x * power).double() @ unpack(w).double().T
        y = linear(x * power, w, out_dtype=torch.float32).double()
        assert float((y - truth).abs().max() / truth.abs().max()) < 1e-3
    largest = torch.full((1, 200), torch.finfo(torch.bfloat16).max).bfloat16()
    if isa != "portable":  # its products overflow before they are added
        assert not bool(linear(largest, w).isnan().any())
    assert not bool(linear(torch.full((1, 200), 1e-39).bfloat16(), w).any())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(isa, make, dtype, fmt):
    x, w = make(80, 453).to(dtype), pack(make(300, 453), quant=fmt)
    alone = torch.cat([linear(row, w) for row in x.split(1)])
    before = num_threads()
    try:
        for threads in (1, 3):
            set_num_threads(threads)
            for M in (2, 3, 4, 12, 13, 17, 36, 50, 80):
                assert torch.equal(bits(linear(x[80 - M :], w)), bits(alone[80 - M :])), M
    finally:
        set_num_threads(before)


def test_the_forced_instruction_set_runs(isa, make):
    x, w = make(20, 64), pack(make(32, 64), quant="int4")
    _C.kernel_counts(reset=True)
    linear(x.bfloat16(), w)
    assert _C.kernel_counts(reset=True) == {f"linear_codes/{isa}": 1}
    linear(x, w)
    assert _C.kernel_counts(reset=True) == {f"linear_f32/{stand_in(isa)}": 1}


def test_refusals(make):
    w = pack(make(4, 8), quant="int8")
    with pytest.raises(ValueError, match=r"^linear: x has shape \[2, 9\], expected \[M, K=8\]"):
        linear(torch.zeros(2, 9), w)
    short = dataclasses.replace(w, data=w.data[:-1])
    with pytest.raises(ValueError, match=r"^linear: weight has shape"):
        linear(torch.zeros(2, 8), short)


# ---- models --------------------------------------------------------------------------------------


PROMPT = torch.arange(3, 40)[None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", FORMATS)
def test_a_model_equals_its_reference(chat_folder, quant, dtype):
    native = ivr.load(chat_folder, dtype=dtype, quant=quant)
    logits = native.forward(PROMPT)
    truth = ivr.load(chat_folder, dtype="float32", backend="reference", quant=quant).forward(PROMPT)
    plain = ivr.load(chat_folder, dtype="float32").forward(PROMPT)
    own = ivr.load(chat_folder, dtype=dtype, backend="reference", quant=quant).forward(PROMPT)
    error = (logits - truth).abs().max()
    assert error <= 2 * (own - truth).abs().max() + 1e-4 * truth.std()
    assert (truth - plain).abs().max() > 1e-3 * plain.std(), "nothing was quantised"


@pytest.mark.parametrize("quant", FORMATS)
def test_tokens_depend_on_neither_batch_nor_chunk_nor_threads(chat_folder, quant):
    questions = ["Hello world", "a", "What is in it? " * 6]
    model = ivr.load(chat_folder, dtype="bfloat16", quant=quant)
    alone = [model.chat(q, max_new_tokens=8) for q in questions]
    assert model.batch_chat(questions, max_new_tokens=8) == alone
    before = num_threads()
    try:
        chunked = ivr.load(chat_folder, dtype="bfloat16", quant=quant, prefill_chunk=5, threads=1)
        assert chunked.batch_chat(questions, max_new_tokens=8) == alone
        assert torch.equal(chunked.forward(PROMPT), model.forward(PROMPT))
    finally:
        set_num_threads(before)


def test_pictures_are_seen_in_full(chat_folder):
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    size = load_config(chat_folder).image_size
    pixels = torch.nn.functional.interpolate(pixels, (size, size))
    features = [
        ivr.load(chat_folder, quant=quant).encode_images(pixels) for quant in (None, "int4")
    ]
    assert torch.equal(*features)


def test_what_is_quantised():
    names = ("llm.0.qkv", "llm.0.o", "llm.0.gate_up", "llm.0.down", "llm.head")
    assert [weight_format(n, "int4") for n in names] == ["int4"] * 4 + ["int8"]
    assert [weight_format(n, "int8") for n in names] == ["int8"] * 5
    assert {weight_format(n, None) for n in names} == {None}
    kept = ("llm.embed", "llm.0.norm1", "llm.0.q_norm", "llm.0.router")
    assert {weight_format(n, "int8") for n in kept} == {None}


def test_the_plan_counts_quantised_bytes(chat_folder):
    config = load_config(chat_folder)

    def planned(quant):
        plan = make_plan(config, torch.bfloat16, prefill_chunk=64, quant=quant)
        return plan.weights

    for quant in FORMATS:
        decoder = ivr.load(chat_folder, dtype="bfloat16", quant=quant)._core.decoder
        layers = [decoder.head]
        for block in decoder.layers:
            layers += (block.attention.qkv, block.attention.o, block.mlp.gate_up, block.mlp.down)
        saved = sum(w.n * w.k * 2 - w.data.numel() for w in (x.weight for x in layers))
        assert planned(None) - planned(quant) == saved
        assert all(x.weight.data.dtype == torch.uint8 for x in layers)


def test_unknown_formats_are_refused(chat_folder):
    with pytest.raises(ValueError, match=r"^quant is 'int3', allowed: int8, int4$"):
        ivr.load(chat_folder, quant="int3")
    with pytest.raises(ValueError, match=r"^quant is 'int3', allowed: int8, int4$"):
        make_plan(load_config(chat_folder), torch.bfloat16, prefill_chunk=64, quant="int3")


# ---- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_is_what_linear_makes_of_its_weight(isa, make, dtype, fmt):
    weights, counts = make(5, 70, 453), [3, 0, 40, 1, 13]
    packed, sizes = pack_experts(weights, quant=fmt), torch.tensor([0, *counts])
    x, bias = make(sum(counts), 453).to(dtype), make(5, 70).to(dtype)
    offsets = sizes.cumsum(0).int()
    ours = grouped_linear(x, packed, offsets, bias=bias)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        assert torch.equal(packed[e].data, pack(weights[e], quant=fmt).data)
        alone = linear(x[begin:end], packed[e], bias=bias[e])
        assert torch.equal(bits(ours[begin:end]), bits(alone))


def test_experts_of_another_shape_are_refused(make):
    with pytest.raises(ValueError, match=r"^pack_experts: expert 1 is torch\.float32 \[4, 9\]"):
        pack_experts([make(4, 8), make(4, 9)], quant="int8")
    packed = pack_experts(make(2, 4, 8), quant="int4")
    with pytest.raises(ValueError, match=r"^grouped_linear: x "):
        grouped_linear(torch.zeros(3, 9), packed, torch.tensor([0, 1, 3], dtype=torch.int32))
    short = dataclasses.replace(packed, data=packed.data[:-1])
    with pytest.raises(ValueError, match=r"^grouped_linear: weight has shape"):
        grouped_linear(torch.zeros(3, 8), short, torch.tensor([0, 1, 3], dtype=torch.int32))


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("folder", MIXTURES, ids=lambda folder: folder.name)
def test_a_mixture_equals_its_reference(folder, quant):
    truth = ivr.load(folder, dtype="float32", backend="reference", quant=quant).forward(PROMPT)
    plain = ivr.load(folder, dtype="float32").forward(PROMPT)
    model = ivr.load(folder, dtype="float32", quant=quant)
    error = (model.forward(PROMPT) - truth).abs().max()
    assert error <= 1e-3 * truth.std()
    assert (truth - plain).abs().max() > 20 * error, "nothing was quantised"
    experts = [layer.mlp for layer in model._core.decoder.layers]
    assert all(m.gate_up.weight.gated for m in experts)
    assert all(m.gate_up.weight.data.dtype == torch.uint8 for m in experts)
    assert all(m.down.weight.data.dtype == torch.uint8 for m in experts)
    chunked = ivr.load(folder, dtype="float32", quant=quant, prefill_chunk=5)
    assert torch.equal(chunked.forward(PROMPT), model.forward(PROMPT))


def test_the_plan_counts_quantised_experts():
    for folder in MIXTURES:
        config = load_config(folder)
        plans = [
            make_plan(config, torch.float32, prefill_chunk=64, quant=quant).weights
            for quant in (None, "int8", "int4")
        ]
        model = ivr.load(folder, dtype="float32", quant="int4")
        experts = [layer.mlp for layer in model._core.decoder.layers]
        held = sum(w.data.numel() for m in experts for w in (m.gate_up.weight, m.down.weight))
        assert plans[0] > plans[1] > plans[2] > held
