"""Mixture of experts beyond the generated cases: the published formulas, equal bits, refusals."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from internvl_rt import _C, num_threads, ops, set_num_threads
from internvl_rt.ops import pack, pack_experts
from internvl_rt.ops.linear import WeightFormat, packed_size
from internvl_rt.ops.registry import bits

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=_C.supported_isas())
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa("")


@pytest.fixture
def make():
    generator = torch.Generator().manual_seed(23)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture
def threads():
    before = num_threads()
    yield set_num_threads
    set_num_threads(before)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# Routing.


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_weights_of_both_families(make, backend):
    logits = make(50, 32) * 3
    probabilities = logits.softmax(-1)
    values, ids = probabilities.topk(4)
    kept = ops.moe_route(logits, top_k=4, normalize=False, backend=backend)
    assert torch.equal(kept.ids, ids.int())
    torch.testing.assert_close(kept.weights, values)
    # Qwen3-MoE with norm_topk_prob.
    shared = ops.moe_route(logits, top_k=4, normalize=True, backend=backend)
    torch.testing.assert_close(shared.weights, values / values.sum(-1, keepdim=True))
    # GPT-OSS.
    torch.testing.assert_close(shared.weights, logits.topk(4).values.softmax(-1))


def test_assignments_are_sorted_by_expert_and_token(make):
    T, E, k = 70, 9, 3
    r = ops.moe_route(make(T, E), top_k=k, normalize=True)
    assert r.offsets[0] == 0
    assert r.offsets[-1] == T * k
    for e, (begin, end) in enumerate(itertools.pairwise(r.offsets.tolist())):
        tokens = r.tokens[begin:end]
        assert torch.equal(tokens, (r.ids == e).any(1).nonzero()[:, 0].int())
    t = torch.arange(T, dtype=torch.int32)[:, None].expand(T, k)
    assert torch.equal(r.tokens[r.places.long()], t)
    assert torch.equal(r.places.flatten().sort().values, torch.arange(T * k, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_broken_rows_break_alone(isa, make, dtype, normalize):
    logits = make(7, 37).to(dtype)
    clean = ops.moe_route(logits, top_k=5, normalize=normalize)
    broken = logits.clone()
    broken[1, [30, 36]] = math.nan
    broken[3, 2] = math.inf
    broken[5] = -math.inf
    r = ops.moe_route(broken, top_k=5, normalize=normalize)
    reference = ops.moe_route(broken, top_k=5, normalize=normalize, backend="reference")
    assert torch.equal(r.ids, reference.ids)
    assert r.ids[1, :2].tolist() == [30, 36]
    assert r.ids[5].tolist() == [0, 1, 2, 3, 4]
    for t in (0, 2, 4, 6):
        assert torch.equal(r.ids[t], clean.ids[t])
        assert torch.equal(bits(r.weights[t]), bits(clean.weights[t]))
    assert bool(r.weights[[1, 5]].isnan().all())
    assert bool(r.weights[3].isnan().any())


def test_equal_logits_go_to_the_lower_experts(isa):
    logits = torch.zeros(3, 40)
    logits[1, 20:] = 1.0
    logits[2, 7] = -0.0
    r = ops.moe_route(logits, top_k=8, normalize=True)
    assert r.ids.tolist() == [[*range(8)], [*range(20, 28)], [*range(8)]]
    assert torch.equal(r.weights, torch.full((3, 8), 0.125))


# Products.


def counts_to_offsets(counts):
    return ints(0, *counts).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(70, 453), (96, 160)])
def test_rows_have_the_bits_of_linear(isa, make, dtype, N, K):
    """Alone or among others, sorted or gathered: what `linear` computes with that expert."""
    counts = [1, 0, 2, 3, 17, 37, 0, 5]
    offsets, E, M = counts_to_offsets(counts), len(counts), sum(counts)
    experts = pack_experts(make(E, N, K).to(dtype))
    x, bias = make(M, K).to(dtype), make(E, N).to(dtype)
    y = ops.grouped_linear(x, experts, offsets, bias=bias)
    bounds = list(itertools.pairwise(offsets.tolist()))
    for e, (begin, end) in enumerate(bounds):
        for m in range(begin, end):
            alone = ops.linear(x[m : m + 1], experts[e], bias=bias[e])
            assert torch.equal(bits(y[m : m + 1]), bits(alone)), f"expert {e}, row {m}"
    order = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    gathered = ops.grouped_linear(x[order], experts, offsets, rows=order.argsort().int(), bias=bias)
    assert torch.equal(bits(gathered), bits(y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_join_and_threads_change_nothing(isa, make, dtype, threads):
    # A pass takes 960 rows of 3000 (24 MiB of fp32, the gathered rows beside them): the second
    # expert takes two, the others share the third.
    counts = [0, 1000, 3, 197]
    offsets, experts = counts_to_offsets(counts), pack_experts(make(4, 40, 3000).to(dtype))
    x, rows = make(90, 3000).to(dtype), torch.arange(1200, dtype=torch.int32) % 90
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(bits(ops.grouped_linear(x, experts, offsets, rows=rows)))
    assert all(torch.equal(r, results[0]) for r in results)
    for m in (0, 650, 959, 960, 999, 1000, 1002, 1003, 1199):
        e = int((offsets[1:] <= m).sum())
        alone = ops.linear(x[m % 90 : m % 90 + 1], experts[e])
        assert torch.equal(results[0][m], bits(alone)[0])


def test_bf16_runs_on_tiles_where_tiles_are_forced(make):
    if "amx_emulated" not in _C.supported_isas():
        pytest.skip("no AVX-512 on this machine")
    _C.force_isa("amx_emulated")
    try:
        _C.kernel_counts(reset=True)
        ops.grouped_linear(
            make(20, 64).bfloat16(), pack_experts(make(2, 32, 64).bfloat16()), ints(0, 3, 20)
        )
        counts = _C.kernel_counts(reset=True)
    finally:
        _C.force_isa("")
    assert counts["linear_bf16/amx_emulated"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_experts_is_pack_one_behind_the_other(make, dtype):
    gate, up = make(3, 20, 45).to(dtype), make(3, 13, 45).to(dtype)
    both = torch.cat((gate, up), dim=1)
    packed = pack_experts(both)
    assert packed.shape == (3, 33, 45)
    assert torch.equal(packed.data, torch.cat([pack(w).data for w in both]))
    pairs = list(zip(gate, up, strict=True))
    assert torch.equal(pack_experts(pairs).data, packed.data)
    assert torch.equal(pack_experts((p for p in pairs), count=3).data, packed.data)
    assert torch.equal(ops.unpack(packed[2]), both[2])
    with pytest.raises(IndexError, match="expert is 3, allowed: 0 to 2"):
        packed[3]


# A product with its gate.


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_gated_experts_are_held_in_turns(make, quant):
    pairs = list(zip(make(3, 48, 70), make(3, 48, 70), strict=True))
    plain = pack_experts(pairs, quant=quant)
    gated = pack_experts(iter(pairs), count=3, quant=quant, gated=True)
    assert gated.gated
    assert not plain.gated
    assert gated.data.numel() == plain.data.numel()
    for e, pair in enumerate(pairs):
        assert torch.equal(gated[e].data, pack(pair, quant=quant, gated=True).data)
        assert torch.equal(ops.unpack(gated[e]), ops.unpack(plain[e]))
    half = [(gate[:40], up[:40]) for gate, up in pairs]  # two and a half panels
    assert not pack_experts(half, quant=quant, gated=True).gated


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gpt_oss"])
def test_gated_experts_in_one_kernel(isa, make, dtype, quant, kind, threads):
    counts = [1, 0, 2, 3, 17, 37, 0, 5]
    offsets, E, M = counts_to_offsets(counts), len(counts), sum(counts)
    weights = make(E, 192, 100).to(dtype)
    plain, gated = (pack_experts(weights, quant=quant, gated=gated) for gated in (False, True))
    x, bias = make(M, 100).to(dtype), make(E, 192).to(dtype)
    _C.kernel_counts(reset=True)
    together = ops.grouped_gated_linear(x, gated, offsets, bias=bias, kind=kind)
    assert sum(_C.kernel_counts(reset=True).values()) == 1
    two = ops.gated_activation(ops.grouped_linear(x, plain, offsets, bias=bias), kind=kind)
    if dtype == torch.float32:
        assert torch.equal(together, two)
    else:  # gate and up are not rounded in between
        torch.testing.assert_close(together, two, rtol=3e-2, atol=3e-2)
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        for m in range(begin, end):
            alone = ops.gated_linear(x[m : m + 1], gated[e], bias=bias[e], kind=kind)
            assert torch.equal(bits(together[m : m + 1]), bits(alone)), f"expert {e}, row {m}"
    order = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    for n in (1, 2, 5):
        threads(n)
        again = ops.grouped_gated_linear(
            x[order], gated, offsets, rows=order.argsort().int(), bias=bias, kind=kind
        )
        assert torch.equal(bits(again), bits(together))


# A whole block.


class Block:
    """Experts whose weights exist only where a token goes: real widths cost little."""

    def __init__(self, E, hidden, inner, k, kind, seed=5):
        self.E, self.hidden, self.inner, self.k, self.kind = E, hidden, inner, k, kind
        generator = torch.Generator().manual_seed(seed)
        self.router = torch.randn(E, hidden, generator=generator) * hidden**-0.5
        self.made = {}

    def expert(self, e):
        """bfloat16 gate_up [2I, h], its bias, down [h, I] and its bias."""
        if e not in self.made:
            generator = torch.Generator().manual_seed(100 + e)
            shapes = ((2 * self.inner, self.hidden), (2 * self.inner,))
            shapes += ((self.hidden, self.inner), (self.hidden,))
            self.made[e] = [
                torch.empty(s).normal_(0, s[-1] ** -0.5, generator=generator).bfloat16()
                for s in shapes
            ]
        return self.made[e]

    def packed(self, part, chosen, dtype, gated=False):
        n, k = self.expert(chosen[0])[part].shape
        size = packed_size(n, k, dtype)
        data = torch.empty(self.E * size, dtype=dtype)  # untouched pages cost nothing
        bias = torch.full((self.E, n), math.nan, dtype=dtype)
        for e in chosen:
            out = data[e * size : (e + 1) * size]
            assert pack(self.expert(e)[part].to(dtype), gated=gated, out=out).gated == gated
            bias[e] = self.expert(e)[part + 1]
        form = WeightFormat.bf16 if dtype == torch.bfloat16 else WeightFormat.f32
        return ops.PackedExperts(data, self.E, n, k, form, gated), bias

    def prepare(self, x):
        """Everything that `__call__` needs for tokens like these."""
        chosen = self.route(x).ids.unique().tolist()
        self.up, self.up_bias = self.packed(0, chosen, x.dtype, gated=True)
        self.down, self.down_bias = self.packed(2, chosen, x.dtype)
        return self

    def route(self, x):
        logits = ops.linear(x, self.router.to(x.dtype))
        return ops.moe_route(logits, top_k=self.k, normalize=True)

    def __call__(self, x):
        r = self.route(x)
        f = ops.grouped_gated_linear(
            x, self.up, r.offsets, rows=r.tokens, bias=self.up_bias, kind=self.kind
        )
        f = ops.grouped_linear(f, self.down, r.offsets, bias=self.down_bias)
        return ops.moe_combine(f, r.weights, r.places, residual=x)

    def plain(self, x, ids, dtype):
        """The same in plain torch, token by token; ids fix the choice of near-tied experts."""
        logits = F.linear(x.to(dtype), self.router.to(x.dtype).to(dtype))
        weights = logits.gather(1, ids.long()).softmax(-1)
        rows = []
        for t, token in enumerate(x.to(dtype)):
            y = token.clone()
            for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
                up, up_bias, down, down_bias = (p.to(dtype) for p in self.expert(e))
                gate, value = F.linear(token, up, up_bias).chunk(2)
                if self.kind == "silu":
                    f = F.silu(gate) * value
                else:
                    gate, value = gate.clamp(max=7.0), value.clamp(-7.0, 7.0)
                    f = gate * torch.sigmoid(1.702 * gate) * (value + 1)
                y = y + weight * F.linear(f, down, down_bias)
            rows.append(y)
        return torch.stack(rows)


@pytest.mark.parametrize(
    ("shape", "T", "dtype"),
    [
        ((128, 2048, 768, 8, "silu"), 1, torch.float32),
        ((128, 2048, 768, 8, "silu"), 3, torch.bfloat16),
        ((32, 2880, 384, 4, "gpt_oss"), 2, torch.float32),
        ((32, 2880, 384, 4, "gpt_oss"), 3, torch.bfloat16),
    ],
)
def test_real_widths_against_plain_torch(make, shape, T, dtype):
    block = Block(*shape)
    x = make(T, shape[1]).to(dtype)
    y = block.prepare(x)(x)
    ids = block.route(x).ids
    truth = block.plain(x, ids, torch.float64)
    own = (block.plain(x, ids, dtype).double() - truth).abs().max()
    relative = 2e-6 if dtype == torch.float32 else 8e-3
    bound = 2 * own + relative * truth.abs().clamp(min=float(truth.square().mean().sqrt()))
    assert bool(((y.double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gpt_oss"])
def test_a_token_does_not_depend_on_the_others(isa, make, dtype, kind, threads):
    block = Block(12, 96, 48, 3, kind)
    x = make(45, 96).to(dtype)
    block.prepare(x)
    alone = torch.cat([block(x[t : t + 1]) for t in range(45)])
    for n in (1, 2):
        threads(n)
        for begin, end in ((0, 45), (3, 5), (7, 24), (20, 44)):
            assert torch.equal(bits(block(x[begin:end])), bits(alone[begin:end]))
    broken = x.clone()
    broken[11], broken[30, 4] = math.nan, math.inf
    y = block(broken)
    assert bool(y[11].isnan().all())
    assert not bool(y[30].isfinite().all())
    keep = torch.ones(45, dtype=torch.bool)
    keep[[11, 30]] = False
    assert torch.equal(bits(y[keep]), bits(alone[keep]))


# MXFP4.


def test_mxfp4_element_by_element(isa, make):
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (2, 5, 3), dtype=torch.uint8, generator=generator)
    y = ops.mxfp4_unpack(blocks, scales)
    assert y.shape == (2, 5, 96)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for e, n, g in itertools.product(range(2), range(5), range(3)):
        factor = 2.0 ** (int(scales[e, n, g]) - 127)
        for i in range(32):
            half = int(blocks[e, n, g, i // 2]) >> (4 * (i % 2)) & 15
            expected = values[half % 8] * factor * (-1 if half >= 8 else 1)
            assert float(y[e, n, 32 * g + i]) == expected


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_mxfp4_at_its_ends(isa, backend):
    blocks = torch.full((4, 16), 0x8F, dtype=torch.uint8)  # -6 and -0 in turn
    y = ops.mxfp4_unpack(
        blocks, torch.tensor([0, 252, 254, 255], dtype=torch.uint8), backend=backend
    )
    assert y.shape == (128,)
    y = y.view(4, 32).double()
    assert y[:3, 0].tolist() == [-6 * 2.0**-127, -6 * 2.0**125, -math.inf]
    assert y[:3, 1].tolist() == [0.0, 0.0, 0.0]
    assert bool(y[:3, 1].signbit().all())
    assert bool(y[3].isnan().all())


def test_experts_from_mxfp4_are_those_from_bf16(make):
    """GPT-OSS's rows alternate gate and up: views of them are packed side by side."""
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (3, 12, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (3, 12, 2), dtype=torch.uint8, generator=generator)

    def parts(e):
        w = ops.mxfp4_unpack(blocks[e], scales[e])
        return w[0::2], w[1::2]

    packed = pack_experts((parts(e) for e in range(3)), count=3)
    whole = ops.mxfp4_unpack(blocks, scales)
    expected = torch.cat((whole[:, 0::2], whole[:, 1::2]), dim=1)
    assert torch.equal(packed.data, pack_experts(expected).data)


# Refusals.


def route(**changes):
    return ops.moe_route(**{"logits": torch.zeros(3, 5), "top_k": 2, "normalize": True, **changes})


def grouped(**changes):
    arguments = {
        "x": torch.zeros(4, 8),
        "weight": pack_experts(torch.zeros(2, 6, 8)),
        "offsets": ints(0, 3, 4),
    }
    return ops.grouped_linear(**{**arguments, **changes})


GATED = pack_experts(torch.zeros(2, 64, 8), gated=True)


def gated(**changes):
    arguments = {"x": torch.zeros(4, 8), "weight": GATED, "offsets": ints(0, 3, 4)}
    return ops.grouped_gated_linear(**{**arguments, **changes})


def combine(**changes):
    arguments = {
        "x": torch.zeros(4, 8),
        "weights": torch.zeros(2, 2),
        "places": ints(0, 1, 2, 3).view(2, 2),
    }
    return ops.moe_combine(**{**arguments, **changes})


def unpack(**changes):
    arguments = {
        "blocks": torch.zeros(4, 2, 16, dtype=torch.uint8),
        "scales": torch.zeros(4, 2, dtype=torch.uint8),
    }
    return ops.mxfp4_unpack(**{**arguments, **changes})


REFUSALS = [
    (route, {"top_k": 0}, "moe_route: top_k is 0, allowed: 1 to the E = 5 experts"),
    (route, {"top_k": 6}, "moe_route: top_k is 6, allowed: 1 to the E = 5 experts"),
    (route, {"top_k": -1}, "moe_route: top_k is -1, allowed"),
    (route, {"logits": torch.zeros(5)}, r"moe_route: logits has shape \[5\], expected \[T, E\]"),
    (route, {"logits": torch.zeros(3, 5).long()}, "moe_route: logits is int64, expected float32"),
    (grouped, {"x": torch.zeros(4, 9)}, r"grouped_linear: x has shape \[4, 9\], expected \[R, K=8"),
    (grouped, {"x": torch.zeros(4, 8).bfloat16()}, "grouped_linear: x is bfloat16, expected float"),
    (
        grouped,
        {"offsets": ints(0, 4)},
        r"grouped_linear: offsets has shape \[2\], expected \[E\+1=",
    ),
    (
        grouped,
        {"offsets": ints(0, 5, 4)},
        r"grouped_linear: offsets\[2\] is 4 after offsets\[1\] i",
    ),
    (grouped, {"offsets": ints(0, 1, 3)}, r"grouped_linear: offsets\[2\] is 3, expected M = 4"),
    (grouped, {"offsets": ints(1, 1, 4)}, r"grouped_linear: offsets\[0\] is 1, expected 0"),
    (
        grouped,
        {"rows": ints(0, 4, 1, 1)},
        r"grouped_linear: rows\[1\] is 4, expected 0 to less tha",
    ),
    (grouped, {"rows": ints(0, 1, 1, -1)}, r"grouped_linear: rows\[3\] is -1, expected 0 to less"),
    (
        grouped,
        {"bias": torch.zeros(2, 5)},
        r"grouped_linear: bias has shape \[2, 5\], expected \[E",
    ),
    (
        grouped,
        {"out": torch.zeros(4, 5)},
        r"grouped_linear: out has shape \[4, 5\], expected \[M=4",
    ),
    (grouped, {"weight": GATED}, "grouped_linear: weight is held for grouped_gated_linear, expect"),
    (gated, {"kind": "gelu"}, "grouped_gated_linear: kind is 'gelu', allowed: silu, gpt_oss"),
    (gated, {"phase": "chunk"}, "grouped_gated_linear: phase is 'chunk', allowed: decode, prefil"),
    (
        gated,
        {"weight": torch.zeros(2, 7, 8)},
        "grouped_gated_linear: weight has N=7, expected an e",
    ),
    (
        gated,
        {"weight": dataclasses.replace(GATED, n=62)},
        "grouped_gated_linear: a gated weight has N=62, expected a multiple of 32",
    ),
    (gated, {"x": torch.zeros(4, 9)}, r"grouped_gated_linear: x has shape \[4, 9\], expected \[R,"),
    (gated, {"offsets": ints(0, 1, 3)}, r"grouped_gated_linear: offsets\[2\] is 3, expected M = 4"),
    (gated, {"rows": ints(0, 4, 1, 1)}, r"grouped_gated_linear: rows\[1\] is 4, expected 0 to les"),
    (
        gated,
        {"bias": torch.zeros(2, 32)},
        r"grouped_gated_linear: bias has shape \[2, 32\], expect",
    ),
    (
        gated,
        {"out": torch.zeros(4, 64)},
        r"grouped_gated_linear: out has shape \[4, 64\], expected \[M=4, I=32\]",
    ),
    (
        combine,
        {"places": ints(0, 1, 4, 3).view(2, 2)},
        r"moe_combine: places\[1, 0\] is 4, expected",
    ),
    (
        combine,
        {"places": ints(0, -1, 2, 3).view(2, 2)},
        r"moe_combine: places\[0, 1\] is -1, expec",
    ),
    (combine, {"weights": torch.zeros(2, 3)}, r"moe_combine: places has shape \[2, 2\], expected"),
    (combine, {"weights": torch.zeros(2, 2).bfloat16()}, "moe_combine: weights is bfloat16, expec"),
    (
        combine,
        {"residual": torch.zeros(3, 8)},
        r"moe_combine: residual has shape \[3, 8\], expecte",
    ),
    (unpack, {"scales": torch.zeros(4, 3, dtype=torch.uint8)}, "mxfp4_unpack: blocks has shape"),
    (unpack, {"blocks": torch.zeros(4, 2, 16)}, "mxfp4_unpack: blocks is float32, expected uint8"),
    (unpack, {"out": torch.zeros(4, 32).bfloat16()}, r"mxfp4_unpack: out has shape \[4, 32\]"),
    (unpack, {"out": torch.zeros(4, 64)}, "mxfp4_unpack: out is float32, expected bfloat16"),
    (
        unpack,
        {"blocks": torch.zeros(4, 2, 32, dtype=torch.uint8)[..., ::2]},
        r"mxfp4_unpack: blocks has strides \[64, 32, 2\], expected",
    ),
]


@pytest.mark.parametrize(("call", "changes", "message"), REFUSALS)
def test_refusals(call, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**changes)


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        ([], None, "got 0 weights, expected at least one"),
        ([torch.zeros(2, 3)], 2, "got 1 weights, expected 2"),
        ([torch.zeros(2, 3)] * 3, 2, "got more weights than count=2"),
        (iter([torch.zeros(2, 3)]), None, "weights has no length, expected count"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], None, r"expert 1 is torch.float32 \[3, 3\], exp"),
        ([torch.zeros(2, 3), torch.zeros(2, 3).bfloat16()], None, "expert 1 is torch.bfloat16"),
        ([torch.zeros(2, 3), []], None, "expert 1 has no weight"),
    ],
)
def test_pack_experts_refuses(weights, count, message):
    with pytest.raises(ValueError, match=f"^pack_experts: {message}"):
        pack_experts(weights, count=count)
