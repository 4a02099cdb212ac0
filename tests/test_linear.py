"""linear beyond the generated cases: packing, bit-equality of rows, strides, refusals."""

from functools import partial
from pathlib import Path

import pytest
import torch

from internvl_rt import _C, num_threads, ops, set_num_threads
from internvl_rt.ops import (
    PackedWeight,
    WeightRows,
    gated_activation,
    gated_linear,
    grouped_gated_linear,
    grouped_linear,
    hold,
    linear,
    pack,
    pack_experts,
    unpack,
)
from internvl_rt.ops.linear import WeightFormat
from internvl_rt.ops.registry import bits
from isas import ISAS, reads_rows, stand_in

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=ISAS)
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa("")


@pytest.fixture
def make():
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(70, 453), (416, 1056)])
def test_a_row_does_not_depend_on_the_others(isa, make, dtype, N, K):
    x, w = make(70, K).to(dtype), pack(make(N, K).to(dtype))
    options = {"bias": make(N).to(dtype), "activation": "gelu", "scale": make(N).to(dtype)}
    residual = make(70, N).to(dtype)
    alone = torch.cat(
        [linear(x[m : m + 1], w, residual=residual[m : m + 1], **options) for m in range(70)]
    )
    for M in range(1, 71):
        first = (5 * M) % (71 - M)  # rows stand at another place each time
        part = slice(first, first + M)
        together = linear(x[part], w, residual=residual[part], **options)
        assert torch.equal(bits(together), bits(alone[part])), f"{M} rows differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [800, 1400])  # a block of rows fits L2, and does not
def test_many_rows_equal_rows_alone(isa, make, dtype, K):
    x, w = make(530, K).to(dtype), pack(make(300, K).to(dtype))
    together = linear(x, w)
    for m in (0, 1, 119, 120, 240, 333, 511, 512, 528, 529):
        assert torch.equal(bits(together[m : m + 1]), bits(linear(x[m : m + 1], w)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(isa, make, dtype):
    before = num_threads()
    w = make(1000, 1100).to(dtype)
    held = (pack(w), hold(w))
    try:
        for M in (1, 5, 200):
            x = make(M, 1100).to(dtype)
            results = []
            for threads in (1, 2, 3, 7):
                set_num_threads(threads)
                results += [bits(linear(x, weight)) for weight in held]
            assert all(torch.equal(r, results[0]) for r in results)
    finally:
        set_num_threads(before)


def test_the_working_memory_is_bounded_and_passes_join(isa, make):
    # More rows than one pass prepares (24 MiB of fp32).
    x, w = make(3001, 2200), make(40, 2200)
    packed = pack(w)
    together = linear(x, packed)
    torch.testing.assert_close(together, x @ w.T, rtol=1e-4, atol=1e-3)
    assert torch.equal(bits(together[2999:]), bits(linear(x[2999:], packed)))


def test_the_best_instruction_set_is_the_fast_one():
    best = _C.isa()
    assert best != "amx_emulated"
    if "amx" in ISAS:
        assert best == "amx"
    elif "avx512_bf16" in ISAS:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        assert best == ("avx512_bf16" if amd else "avx512")


def test_the_forced_instruction_set_runs(isa, make):
    x, w = make(20, 64), make(32, 64)
    _C.kernel_counts(reset=True)
    linear(x.bfloat16(), pack(w.bfloat16()))
    assert _C.kernel_counts(reset=True)[f"linear_bf16/{isa}"] == 1
    linear(x, pack(w))
    assert _C.kernel_counts(reset=True)[f"linear_f32/{stand_in(isa)}"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (31, 33), (64, 64), (97, 70), (0, 5), (5, 0)])
def test_pack_and_unpack(isa, make, dtype, N, K):
    w = make(N, K).to(dtype)
    packed = pack(w)
    assert packed.shape == (N, K)
    assert torch.equal(unpack(packed), w)


def test_the_packed_layout(make):
    w = make(40, 35)
    rows = torch.zeros(64, 64)
    rows[:40, :35] = w
    assert torch.equal(
        pack(w).data, rows[:, :35].view(2, 32, 35).transpose(1, 2).reshape(-1).contiguous()
    )
    pairs = rows.bfloat16().view(2, 32, 32, 2).transpose(1, 2)  # [panel, K/2, column, 2]
    assert torch.equal(pack(w.bfloat16()).data, pairs.reshape(-1))


def test_pack_joins_weights_side_by_side(make):
    parts = [make(n, 50).bfloat16() for n in (33, 7, 64)]
    strided = make(20, 90).bfloat16()[::2, 11:61]
    joined = pack([*parts, strided])
    assert torch.equal(joined.data, pack(torch.cat([*parts, strided])).data)
    assert joined.shape == (114, 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (70, 33), (97, 453), (320, 1056)])
def test_rows_in_place_give_the_bits_of_packed_panels(isa, make, dtype, N, K):
    # One more row in front, odd strides, two parts: as tensors lie in a file.
    whole = make(N + 4, K + 7).to(dtype)[1:]
    parts = [whole[: N // 2, 3 : K + 3], whole[N // 2 : N, 2 : K + 2]]
    held, packed = hold(parts), pack(parts)
    assert isinstance(held, WeightRows) == reads_rows(isa, dtype)
    assert held.shape == (N, K)
    assert torch.equal(unpack(held), unpack(packed))
    x, bias = make(430, K).to(dtype), make(N).to(dtype)
    for M in (*range(1, 15), 24, 35, 36, 40, 61, 430):
        expected = linear(x[:M], packed, bias=bias, activation="gelu")
        assert torch.equal(bits(linear(x[:M], held, bias=bias, activation="gelu")), bits(expected))


@pytest.mark.parametrize("first", [0, 1, 2, 20, 31])
@pytest.mark.parametrize("K", [2048, 2033, 20])
def test_rows_in_place_that_share_a_set_of_the_cache(isa, make, K, first):
    # 4 KB from row to row, wherever the first begins in its cache line.
    rows = make(1 + 70 * 2048).bfloat16()
    w = torch.cat([rows.new_zeros(first), rows])[first : first + 70 * 2048].view(70, 2048)[:, :K]
    assert w.data_ptr() % 64 == 2 * first
    held, packed = hold(w), pack(w)
    x = make(40, K).bfloat16()
    for M in (1, 3, 12, 13, 24, 40):
        assert torch.equal(bits(linear(x[:M], held)), bits(linear(x[:M], packed)))


def test_rows_held_for_another_instruction_set(isa, make):
    if not reads_rows(isa, torch.bfloat16):
        pytest.skip("this instruction set reads packed panels")
    x, w = make(5, 64).bfloat16(), make(40, 64).bfloat16()
    held = hold(w)
    assert isinstance(held, WeightRows)
    _C.force_isa("portable")
    assert torch.equal(linear(x, held), linear(x, pack(w)))


@pytest.mark.parametrize("M", [2, 40])
def test_a_held_weight_is_not_copied(isa, make, M):
    if not reads_rows(isa, torch.bfloat16):
        pytest.skip("this instruction set reads packed panels")
    x, w = make(M, 64).bfloat16(), make(40, 64).bfloat16()
    held = hold(w)
    w.zero_()
    assert not linear(x, held).any()


@pytest.fixture
def tiles(isa):
    if not isa.startswith("amx"):
        pytest.skip("this instruction set has no matrix tiles")


def _product_on_tiles(x, w):
    """TDPBF16PS as Intel's manual has it: of every 32 k a chain over the even and one over the odd
    ones, both from zero, and their sum is added to what there is. Finite, denormal nowhere."""
    total = torch.zeros(len(x), len(w))
    terms = x[:, None].double() * w.double()  # exact, as are the sums below before they are rounded
    for step in terms.split(32, dim=2):
        chains = [torch.zeros_like(total), torch.zeros_like(total)]
        for k in range(step.shape[2]):
            chains[k % 2] = (chains[k % 2].double() + step[..., k]).float()
        total += chains[0] + chains[1]
    return total


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("K", [32, 70, 453])
def test_the_order_of_sums_on_tiles(make, K):
    x, w = make(40, K).bfloat16(), make(50, K).bfloat16()
    expected = _product_on_tiles(x, w)
    for M in (5, 40):
        for weight in (pack(w), hold(w)):
            y = linear(x[:M], weight, out_dtype=torch.float32)
            assert torch.equal(bits(y), bits(expected[:M]))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("M", [3, 20])
def test_denormals_on_tiles_count_as_zero(M):
    x, w = torch.zeros(M, 64).bfloat16(), torch.zeros(4, 64).bfloat16()
    x[:, 0], w[0, 0] = 2.0**-130, 2.0**100  # a denormal operand, on either side
    x[:, 1], w[1, 1] = 2.0**100, 2.0**-130
    x[:, 2], w[2, 2] = 2.0**-70, 2.0**-70  # a denormal product
    x[:, 40], w[3, 40] = 2.0**-63, 2.0**-63  # the least number that is normal
    for weight in (pack(w), hold(w)):
        y = linear(x, weight, out_dtype=torch.float32)
        assert torch.equal(y, torch.tensor([0.0, 0.0, 0.0, 2.0**-126]).expand(M, 4))


def test_out_may_be_strided_and_may_be_the_residual(isa, make):
    x, w = make(18, 40), make(33, 40)
    wide = torch.full((18, 50), 3.0)
    out = wide[:, 9:42]
    residual = make(18, 33)
    out.copy_(residual)
    assert linear(x, w, residual=out, out=out) is out
    torch.testing.assert_close(out, residual + x @ w.T)
    assert bool((wide[:, :9] == 3).all())
    assert bool((wide[:, 42:] == 3).all())


def test_out_may_lie_beside_x_but_not_over_it(make):
    """Rows of one stride that take turns in memory share none of it."""
    weights, offsets = [make(32, 40), make(32, 40)], torch.tensor([0, 18], dtype=torch.int32)
    calls = [
        partial(linear, weight=pack(weights[0])),
        partial(gated_linear, weight=pack(weights, gated=True)),
        partial(grouped_linear, weight=pack_experts(weights[:1]), offsets=offsets),
        partial(grouped_gated_linear, weight=pack_experts([weights], gated=True), offsets=offsets),
    ]
    for call in calls:
        wide, flat = make(18, 80), make(2000)
        x, beside = wide[:, :40], wide[:, 40:72]
        expected = call(x.clone())
        assert torch.equal(call(x, out=beside), expected)
        x = flat[:720].view(18, 40)
        assert torch.equal(call(x, out=flat[720 : 720 + 576].view(18, 32)), call(x.clone()))
        for x, out in (
            (wide[:, :40], wide[:, :32]),
            (wide[:, :40], wide[:, 39:71]),
            (wide[:, 40:], wide[:, 9:41]),
            (flat[40:].as_strided((18, 40), (80, 1), 40), flat.as_strided((18, 32), (80, 1), 100)),
            (flat[:720].view(18, 40), flat[719 : 719 + 576].view(18, 32)),
        ):
            with pytest.raises(ValueError, match="linear: out overlaps x, expected memory of its"):
                call(x, out=out)


def test_logits_in_fp32_are_not_rounded(isa, make):
    x, w = make(3, 64).bfloat16(), make(50, 64).bfloat16()
    y = linear(x, w, out_dtype=torch.float32)
    torch.testing.assert_close(y, x.float() @ w.float().T, rtol=1e-5, atol=1e-5)


def test_nan_and_inf_stay_in_their_row(isa, make):
    x, w = make(40, 64), pack(make(40, 64))
    clean = linear(x, w)
    x[7, 3], x[9, 5] = float("nan"), float("inf")
    y = linear(x, w, activation="gelu")
    assert bool(y[7].isnan().all())
    assert not bool(y[8].isnan().any())
    assert torch.equal(linear(x, w)[10:], clean[10:])


def test_gelu_at_its_ends(isa):
    x = torch.tensor([[-float("inf"), -1e30, -50.0, -6.0, 0.0, 6.0, 50.0, 1e30, float("inf")]])
    y = torch.empty_like(x)
    for i in range(x.shape[1]):
        y[:, i] = linear(x[:, i : i + 1], torch.ones(1, 1), activation="gelu")[0]
    assert torch.equal(y[0, [0, 1, 2, 4, 6, 7, 8]], x[0].clamp(min=0)[[0, 1, 2, 4, 6, 7, 8]])
    torch.testing.assert_close(y[0, [3, 5]], torch.tensor([-5.919e-9, 6.0]), rtol=0, atol=1e-9)


# ---- a product with its gate ---------------------------------------------------------------------


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_a_gated_weight_is_held_in_turns(make, quant):
    parts = [make(48, 70), make(48, 70)]
    plain, gated = pack(parts, quant=quant), pack(parts, quant=quant, gated=True)
    assert gated.gated
    assert not plain.gated
    assert torch.equal(unpack(gated), unpack(plain))
    if quant is None:
        turned = torch.cat([part[i : i + 16] for i in (0, 16, 32) for part in parts])
        assert torch.equal(gated.data, pack(turned).data)
    assert not pack(make(48, 70), quant=quant, gated=True).gated  # one and a half panels
    none = pack(make(0, 70), quant=quant, gated=True)
    assert unpack(none).shape == (0, 70)
    assert gated_linear(make(3, 70), none).shape == (3, 0)


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gpt_oss"])
def test_a_gated_product_in_one_kernel(isa, make, dtype, quant, kind):
    parts, bias = [make(96, 100).to(dtype), make(96, 100).to(dtype)], make(192).to(dtype)
    plain, gated = (pack(parts, quant=quant, gated=gated) for gated in (False, True))
    x = make(70, 100).to(dtype)
    _C.kernel_counts(reset=True)
    together = gated_linear(x, gated, bias=bias, kind=kind)
    assert sum(_C.kernel_counts(reset=True).values()) == 1
    two = gated_activation(linear(x, plain, bias=bias), kind=kind)
    if dtype == torch.float32:
        assert torch.equal(together, two)
    else:  # gate and up are not rounded in between
        torch.testing.assert_close(together, two, rtol=3e-2, atol=3e-2)
    held = hold(parts, gated=True) if quant is None else gated
    for M in (1, 2, 13, 17, 40, 69):
        alone = gated_linear(x[:M], held, bias=bias, kind=kind)
        assert torch.equal(bits(alone), bits(together[:M])), M


REFUSALS = [
    ({"x": torch.zeros(2, 9)}, r"linear: x has shape \[2, 9\], expected \[M, K=8\]"),
    ({"x": torch.zeros(2, 8).bfloat16()}, "linear: x is bfloat16, expected the weight's float32"),
    ({"bias": torch.zeros(3)}, r"linear: bias has shape \[3\], expected \[N=4\]"),
    (
        {"residual": torch.zeros(1, 4)},
        r"linear: residual has shape \[1, 4\], expected \[M=2, N=4\]",
    ),
    ({"activation": "swiglu"}, "linear: activation is 'swiglu', allowed"),
    ({"weight": pack(torch.zeros(32, 8), gated=True)}, "linear: weight is held for gated_linear"),
    ({"activation": "relu"}, "linear: activation is 'relu', allowed"),
    ({"out_dtype": torch.bfloat16}, "linear: out_dtype is torch.bfloat16, allowed"),
    ({"out": torch.zeros(2, 5)}, r"linear: out has shape \[2, 5\], expected \[M=2, N=4\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(2, 8), "weight": pack(torch.zeros(4, 8)), **change}
    with pytest.raises(ValueError, match=message):
        linear(**arguments)


def test_formats_to_come_are_refused():
    weight = PackedWeight(torch.zeros(256, dtype=torch.uint8), 4, 8, WeightFormat.fp8)
    with pytest.raises(ValueError, match="linear: weight format is not implemented"):
        linear(torch.zeros(2, 8), weight)
    with pytest.raises(ValueError, match=r"pack: weight is torch\.float16"):
        pack(torch.zeros(4, 8).half())
    with pytest.raises(ValueError, match="pack: got no weight"):
        pack([])
    with pytest.raises(ValueError, match="one K"):
        pack([torch.zeros(4, 8), torch.zeros(4, 9)])


def test_the_catalogue_knows_the_op():
    assert "linear" in ops.catalogue()
