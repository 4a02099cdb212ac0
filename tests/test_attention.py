"""Attention and rope beyond single cases: equal bits for any grouping, isolation, errors."""

import math

import pytest
import torch

import internvl_rt
from internvl_rt import _C, ops
from internvl_rt.ops.flash_attention import attend, offsets
from internvl_rt.ops.registry import Inputs, check
from isas import ISAS, runs

FLOATS = (torch.float32, torch.bfloat16)
FLASH = ops.catalogue()["flash_attention"]


@pytest.fixture(params=ISAS)
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa("")


@pytest.fixture
def threads():
    before = internvl_rt.num_threads()
    yield internvl_rt.set_num_threads
    internvl_rt.set_num_threads(before)


class Sequences:
    """Sequences of given lengths, contiguous and in shuffled pages whose spare rows are NaN."""

    def __init__(self, name, dtype, lengths, heads, D, P=64):
        make = Inputs(name, dtype)
        H, K = heads
        self.lengths, self.P, self.scale = lengths, P, D**-0.5
        self.q = [make.normal(n, H, D, std=2.0) for n in lengths]
        self.k = [make.normal(n, K, D, std=2.0) for n in lengths]
        self.v = [make.normal(n, K, D) for n in lengths]
        most = max(-(-n // P) for n in lengths)
        self.table = make.permutation(len(lengths) * most + 2)[: len(lengths) * most]
        self.table = self.table.int().view(len(lengths), most)
        self.k_cache = torch.full((len(lengths) * most + 2, K, P, D), math.nan, dtype=dtype)
        self.v_cache = self.k_cache.clone()
        for b, n in enumerate(lengths):
            for j in range(n):
                page, offset = self.table[b, j // P], j % P
                self.k_cache[page, :, offset] = self.k[b][j]
                self.v_cache[page, :, offset] = self.v[b][j]

    def flash(self, b, **options):
        cu = offsets([self.lengths[b]])
        return ops.flash_attention(
            self.q[b], self.k[b], self.v[b], cu, cu, scale=self.scale, causal=True, **options
        )

    def paged(self, parts, **options):
        """Rows begin..end of sequences b for parts (b, begin, end), in one call."""
        q = torch.cat([self.q[b][begin:end] for b, begin, end in parts])
        table = self.table[[b for b, _, _ in parts]]
        lens = torch.tensor([end for _, _, end in parts], dtype=torch.int32)
        cu = offsets([end - begin for _, begin, end in parts])
        return ops.paged_attention(
            q, self.k_cache, self.v_cache, table, cu, lens, scale=self.scale, **options
        )

    def stepwise(self, b, step, **options):
        n = self.lengths[b]
        return torch.cat(
            [self.paged([(b, i, min(i + step, n))], **options) for i in range(0, n, step)]
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "heads", "D", "P"),
    [
        (590, (14, 2), 64, 64),
        (300, (6, 2), 128, 16),
        (300, (16, 1), 64, 32),
        (270, (3, 1), 20, 1),
        (270, (2, 2), 80, 32),
        (530, (5, 1), 4, 8),
    ],
)
def test_bits_do_not_depend_on_grouping(isa, dtype, n, heads, D, P):
    s = Sequences("grouping", dtype, [n], heads, D, P)
    whole = s.flash(0)
    assert torch.isfinite(whole).all()
    for step in (1, 3, 64, 100, 256, n):
        assert torch.equal(s.stepwise(0, step), whole), f"prefill in chunks of {step}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{"window": 70}, {"prefix": 40}, {"window": 9, "prefix": 40}])
def test_bits_do_not_depend_on_grouping_with_masks_and_sinks(isa, dtype, options):
    s = Sequences("masks", dtype, [300], (6, 2), 64)
    options = dict(options, sinks=Inputs("sinks", dtype).normal(6))
    first = options.get("prefix", 1)  # a prefix lies within the first call
    if "prefix" in options:
        options["prefix"] = torch.tensor([first], dtype=torch.int32)
    whole = s.flash(0, **options)
    for step in (1, 7, 100):
        parts = [(0, first)] + [(i, min(i + step, 300)) for i in range(first, 300, step)]
        rows = torch.cat([s.paged([(0, a, b)], **options) for a, b in parts])
        assert torch.equal(rows, whole), f"chunks of {step}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [128, None])
def test_bits_of_gpt_oss_layers_do_not_depend_on_the_batch(isa, dtype, window, threads):
    """Eight query heads share a kv head: more rows in a decode step than narrow sets hold."""
    lengths = [400, 129, 1]
    s = Sequences("gpt_oss", dtype, lengths, (16, 2), 64)
    options = {"window": window, "sinks": Inputs("gpt_oss_sinks", dtype).normal(16, std=2.0)}
    alone = [s.flash(b, **options) for b in range(len(lengths))]
    threads(2)
    cu = offsets(lengths)
    q, k, v = (torch.cat(x) for x in (s.q, s.k, s.v))
    together = ops.flash_attention(q, k, v, cu, cu, scale=s.scale, causal=True, **options)
    assert torch.equal(together, torch.cat(alone))
    for end in (127, 128, 129, 256, 257, 384, 400):  # around the window's edge and a chunk's
        parts = [(0, end - 1, end), (1, 3, 129), (2, 0, 1)]
        expected = torch.cat([alone[b][begin:stop] for b, begin, stop in parts])
        assert torch.equal(s.paged(parts, **options), expected), f"decode at {end}"
    truth = attend(
        *(x[0].double() for x in (s.q, s.k, s.v)), scale=s.scale, causal=True, prefix=0, **options
    )
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(alone[0].double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_do_not_depend_on_batch_or_threads(isa, dtype, threads):
    lengths = [1, 255, 256, 257, 530, 3]
    s = Sequences("batch", dtype, lengths, (14, 2), 64)
    alone = [s.flash(b) for b in range(len(lengths))]
    for n in (1, 2):
        threads(n)
        cu = offsets(lengths)
        q, k, v = (torch.cat(x) for x in (s.q, s.k, s.v))
        together = ops.flash_attention(q, k, v, cu, cu, scale=s.scale, causal=True)
        assert torch.equal(together, torch.cat(alone)), f"{n} threads"
        decode = s.paged([(b, m - 1, m) for b, m in enumerate(lengths)])
        assert torch.equal(decode, torch.stack([y[-1] for y in alone])), f"{n} threads"
        # A decode step beside prefill chunks, in another order.
        parts = [(4, 100, 530), (1, 254, 255), (3, 0, 257), (5, 1, 3)]
        mixed = s.paged(parts)
        expected = torch.cat([alone[b][begin:end] for b, begin, end in parts])
        assert torch.equal(mixed, expected), f"{n} threads"


@pytest.mark.parametrize("dtype", FLOATS)
def test_full_attention_bits_do_not_depend_on_batch(isa, dtype, threads):
    make = Inputs("tiles", dtype)
    qkv = make.normal(3 * 290, 12, 64)
    q, k, v = qkv[:, :4], qkv[:, 4:8], qkv[:, 8:]
    alone = []
    for i in range(3):
        rows, cu = slice(290 * i, 290 * (i + 1)), offsets([290])
        alone.append(
            ops.flash_attention(q[rows], k[rows], v[rows], cu, cu, scale=0.125, causal=False)
        )
    threads(2)
    cu = offsets([290] * 3)
    together = ops.flash_attention(q, k, v, cu, cu, scale=0.125, causal=False)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [64, 80])
def test_a_row_does_not_depend_on_the_others(isa, dtype, D):
    make, cu_kv = Inputs("others", dtype), offsets([290])
    q, k, v = make.normal(70, 2, D), make.normal(290, 1, D), make.normal(290, 1, D)

    def rows(part):
        return ops.flash_attention(
            part, k, v, offsets([len(part)]), cu_kv, scale=D**-0.5, causal=False
        )

    alone = torch.cat([rows(q[m : m + 1]) for m in range(70)])
    for M in range(1, 71):
        first = (5 * M) % (71 - M)  # rows stand at another place each time
        part = slice(first, first + M)
        assert torch.equal(rows(q[part]), alone[part]), f"{M} rows differ"


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_forced_instruction_set_runs(isa, dtype):
    s = Sequences("counts", dtype, [20], (4, 2), 64)
    _C.kernel_counts(reset=True)
    s.flash(0)
    s.paged([(0, 19, 20)])
    expected = {f"{op}_attention/{runs(isa, dtype)}": 1 for op in ("flash", "paged")}
    assert _C.kernel_counts(reset=True) == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_sequence_does_not_touch_others(isa, dtype, value):
    s = Sequences("broken", dtype, [70, 300, 90], (4, 2), 64)
    parts = [(0, 20, 70), (1, 290, 300), (2, 0, 90)]
    before = s.paged(parts)
    page = s.table[1, 2]
    s.k_cache[page] = s.v_cache[page] = value
    after = s.paged(parts)
    assert torch.equal(after[:50], before[:50])
    assert torch.equal(after[60:], before[60:])
    assert torch.isnan(after[50:60]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("prefix", [None, 40])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_a_row_does_not_see_does_not_touch_it(isa, dtype, where, prefix):
    s = Sequences("unseen", dtype, [300], (4, 2), 64)
    options = {"window": 100, "prefix": None if prefix is None else _ints(prefix)}
    window = s.flash(0, **options)
    getattr(s, where)[0][150] = math.nan
    broken = s.flash(0, **options)
    seen = torch.zeros(300, dtype=torch.bool)
    seen[150:250] = True
    assert torch.equal(broken[~seen], window[~seen])
    assert torch.isnan(broken[seen]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"window": 20, "prefix": 40}])
def test_bits_beside_values_that_are_not_finite(isa, dtype, options):
    """Many blocks of rows in chunks that some of them see, against calls of one block."""
    s = Sequences("not_finite", dtype, [400], (4, 2), 64)
    for key, d, value in ((5, 3, math.inf), (150, 7, math.nan), (300, 3, -math.inf)):
        s.v[0][key, :, d] = s.v_cache[s.table[0, key // s.P], :, key % s.P, d] = value
    first = options.get("prefix", 7)  # a prefix lies within the first call
    if "prefix" in options:
        options = dict(options, prefix=_ints(first))
    whole = s.flash(0, **options)
    expected = (whole.isnan(), whole.nan_to_num())
    assert expected[0].any()
    assert not expected[0][..., 4].any()
    for step in (7, 100):
        parts = [(0, first)] + [(i, min(i + step, 400)) for i in range(first, 400, step)]
        rows = torch.cat([s.paged([(0, a, b)], **options) for a, b in parts])
        assert torch.equal(rows.isnan(), expected[0]), f"chunks of {step}"
        assert torch.equal(rows.nan_to_num(), expected[1]), f"chunks of {step}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 3, 17, 40, 65, 270])
def test_what_a_call_leaves_behind_does_not_touch_the_next(isa, dtype, threads, n):
    threads(1)  # one scratch memory
    s = Sequences("left", dtype, [n], (4, 2), 80, 16)
    before = s.flash(0), s.paged([(0, n - 1, n)])
    broken = torch.full((256, 1, 256), math.nan, dtype=dtype)
    cu = offsets([256])
    ops.flash_attention(broken, broken, broken, cu, cu, scale=1.0, causal=False)
    assert torch.equal(s.flash(0), before[0])
    assert torch.equal(s.paged([(0, n - 1, n)]), before[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("first", [290, 299])
def test_pages_before_the_window_may_be_gone(isa, dtype, first):
    s = Sequences("gone", dtype, [300], (4, 2), 64)
    parts = [(0, first, 300)]
    before = s.paged(parts, window=128)
    s.k_cache[s.table[0, :2].long()] = math.nan
    s.table[0, :2] = -1
    assert torch.equal(s.paged(parts, window=128), before)


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not (_C.has_cuda and HOPPER), reason="there is no Hopper, or no CUDA build")
@pytest.mark.parametrize("mma", [False, True])
@pytest.mark.parametrize(
    "case", [c for c in FLASH.cases if c.name != "empty"], ids=lambda c: c.name
)
def test_both_variants_of_hopper(case, mma):
    _C.force_mma(mma)
    _C.kernel_counts(reset=True)
    try:
        check(FLASH, case, torch.bfloat16, "cuda", "cuda")
    finally:
        _C.force_mma(False)
    D = case.build(Inputs(case.name, torch.bfloat16))["q"].shape[2]
    variant = "plain" if D not in (64, 128) else "mma" if mma else "wgmma"
    assert set(_C.kernel_counts(reset=True)) == {f"flash_attention/{variant}"}


def test_out_may_be_q(isa):
    s = Sequences("inplace", torch.bfloat16, [80], (4, 2), 64)
    expected = s.flash(0)
    cu = offsets([80])
    q = s.q[0].clone()
    y = ops.flash_attention(q, s.k[0], s.v[0], cu, cu, scale=s.scale, causal=True, out=q)
    assert y is q
    assert torch.equal(q, expected)


def test_large_scores_do_not_overflow(isa):
    q = torch.full((1, 1, 4), 1e4)
    k = torch.tensor([1e4, -1e4, 0.9999e4])[:, None, None].expand(3, 1, 4).contiguous()
    v = torch.arange(3.0)[:, None, None].expand(3, 1, 4).contiguous()
    y = ops.flash_attention(q, k, v, offsets([1]), offsets([3]), scale=1.0, causal=False)
    assert torch.equal(y, torch.zeros(1, 1, 4))


def _flash(**changes):
    make = Inputs("errors", torch.float32)
    arguments = {
        "q": make.normal(5, 4, 8),
        "k": make.normal(7, 2, 8),
        "v": make.normal(7, 2, 8),
        "cu_q": offsets([2, 3]),
        "cu_kv": offsets([3, 4]),
        "scale": 1.0,
        "causal": True,
    }
    return ops.flash_attention(**{**arguments, **changes})


def _ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_q": _ints(0, 2, 4)}, r"cu_q\[2\] is 4, expected T = 5"),
        ({"cu_q": _ints(1, 2, 5)}, r"cu_q\[0\] is 1, expected 0"),
        ({"cu_kv": _ints(0, 9, 7)}, r"cu_kv\[2\] is 7 after cu_kv\[1\] is 9: it must not fall"),
        ({"cu_kv": _ints(0, 7)}, r"cu_kv has shape \[2\], expected \[B\+1=3\]"),
        ({"cu_q": _ints()}, r"cu_q is empty, expected B\+1 >= 1 offsets"),
        ({"cu_q": offsets([2, 3]).long()}, r"cu_q is int64, expected int32"),
        ({"scale": 0.0}, r"scale is 0.0*, expected a finite number > 0"),
        ({"scale": math.nan}, r"scale is nan, expected a finite number > 0"),
        ({"window": 0}, r"window is 0, expected at least 1 or None"),
        ({"window": 3, "causal": False}, r"window is given, but causal is false"),
        ({"prefix": _ints(1, 1), "causal": False}, r"prefix is given, but causal is false"),
        ({"prefix": _ints(4, 0)}, r"prefix\[0\] is 4, allowed: 0 to the sequence's 3 keys"),
        ({"prefix": _ints(0, -1)}, r"prefix\[1\] is -1, allowed: 0 to the sequence's 4 keys"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \[3\], expected \[H=4\]"),
        ({"q": torch.zeros(5, 3, 8)}, r"H = 3 query heads is no multiple of K = 2 kv heads"),
        ({"q": torch.zeros(5, 4, 12)}, r"k has shape \[7, 2, 8\], expected \[Tkv, K, D=12\]"),
        ({"v": torch.zeros(7, 2, 8).bfloat16()}, r"v is bfloat16, expected float32"),
        ({"out": torch.zeros(5, 2, 8)}, r"out has shape \[5, 2, 8\], expected \[T=5, H=4, D=8\]"),
    ],
)
def test_flash_attention_refuses(changes, message):
    with pytest.raises(ValueError, match=f"^flash_attention: {message}"):
        _flash(**changes)


@pytest.mark.parametrize("D", [2, 6, 260])
def test_flash_attention_refuses_head_dims(D):
    x = torch.zeros(5, 2, D)
    with pytest.raises(ValueError, match=f"head dim D is {D}, allowed: multiples of 4 from 4 to"):
        _flash(q=x, k=torch.zeros(7, 2, D), v=torch.zeros(7, 2, D))


def _paged(**changes):
    make = Inputs("errors", torch.float32)
    arguments = {
        "q": make.normal(3, 4, 8),
        "k_cache": make.normal(5, 2, 4, 8),
        "v_cache": make.normal(5, 2, 4, 8),
        "page_table": _ints(0, 3, 4, 1).view(2, 2),
        "cu_q": offsets([1, 2]),
        "kv_lens": _ints(5, 8),
        "scale": 1.0,
    }
    return ops.paged_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_table": _ints(0, 5, 4, 1).view(2, 2)}, r"page_table\[0, 1\] is 5, allowed: 0 to 4"),
        ({"page_table": _ints(0, 3, -1, 1).view(2, 2)}, r"page_table\[1, 0\] is -1, allowed: 0 to"),
        ({"kv_lens": _ints(5, 9)}, r"kv_lens\[1\] is 9, allowed: from its 2 queries to .* = 8"),
        ({"kv_lens": _ints(0, 8)}, r"kv_lens\[0\] is 0, allowed: from its 1 queries"),
        ({"kv_lens": _ints(5, -1)}, r"kv_lens\[1\] is -1, allowed: from its 2 queries"),
        ({"kv_lens": _ints(5)}, r"kv_lens has shape \[1\], expected \[B=2\]"),
        ({"prefix": _ints(6, 0)}, r"prefix\[0\] is 6, allowed: 0 to the sequence's 5 keys"),
        ({"k_cache": torch.zeros(5, 2, 3, 8)}, r"v_cache has shape"),
        ({"v_cache": torch.zeros(5, 2, 4, 8).bfloat16()}, r"v_cache is bfloat16, expected float32"),
    ],
)
def test_paged_attention_refuses(changes, message):
    with pytest.raises(ValueError, match=f"^paged_attention: {message}"):
        _paged(**changes)


def test_paged_attention_refuses_odd_pages():
    cache = torch.zeros(5, 2, 6, 8)
    with pytest.raises(ValueError, match="page size P is 6, expected a power of two"):
        _paged(k_cache=cache, v_cache=cache)


def test_unused_page_entries_are_not_looked_at():
    table = _ints(0, 99, 4, 1).view(2, 2)
    assert torch.isfinite(_paged(page_table=table, kv_lens=_ints(4, 8))).all()


def _rope_arguments(T=4, dtype=torch.float32):
    make = Inputs("rope", dtype)
    return {
        "q": make.normal(T, 2, 8),
        "k": make.normal(T, 1, 8),
        "v": make.normal(T, 1, 8),
        "positions": torch.arange(T).float(),
        "inv_freq": torch.tensor([[1.0, 0.1, 0.01, 0.001]]),
        "scale": torch.ones(1),
        "sequence": torch.zeros(T, dtype=torch.int32),
        "k_cache": torch.zeros(2, 1, 4, 8, dtype=dtype),
        "v_cache": torch.zeros(2, 1, 4, 8, dtype=dtype),
        "slots": torch.arange(T),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": torch.tensor([0, 1, 2, 8])}, r"slots\[3\] is 8, expected less than .* = 8"),
        ({"sequence": _ints(0, 0, 1, 0)}, r"sequence\[2\] is 1, allowed: 0 to 0"),
        ({"sequence": _ints(0, -1, 0, 0)}, r"sequence\[1\] is -1, allowed: 0 to 0"),
        ({"inv_freq": torch.ones(1, 5)}, r"inv_freq has R/2 = 5 columns, at most D/2 = 4 allowed"),
        ({"positions": torch.arange(4)}, r"positions is int64, expected float32"),
        ({"k_cache": torch.zeros(2, 1, 4, 8).bfloat16()}, r"k_cache is bfloat16, expected float32"),
        ({"scale": torch.ones(2)}, r"scale has shape \[2\], expected \[B=1\]"),
    ],
)
def test_rope_refuses_and_writes_nothing(changes, message):
    arguments = {**_rope_arguments(), **changes}
    caches = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    out = torch.full((4, 2, 8), 7.0)
    with pytest.raises(ValueError, match=f"^rope: {message}"):
        ops.rope(**arguments, out=out)
    assert torch.equal(arguments["k_cache"], caches[0])
    assert torch.equal(arguments["v_cache"], caches[1])
    assert torch.equal(out, torch.full((4, 2, 8), 7.0))


def test_rope_in_place_and_token_by_token(isa, threads):
    threads(2)
    a = _rope_arguments(8)
    expected = ops.rope(**a)
    b = _rope_arguments(8)
    assert ops.rope(**b, out=b["q"]) is b["q"]
    assert torch.equal(b["q"], expected)
    c = _rope_arguments(8)
    per_token = ("q", "k", "v", "positions", "sequence", "slots")
    rows = [
        ops.rope(**{n: x[t : t + 1] if n in per_token else x for n, x in c.items()})
        for t in range(8)
    ]
    assert torch.equal(torch.cat(rows), expected)
    for cache in ("k_cache", "v_cache"):
        assert torch.equal(c[cache], a[cache])


def test_rope_angles_are_exact(isa):
    """cos and sin themselves, read off a unit vector, for every quadrant and far out."""
    make = Inputs("angles", torch.float32)
    scattered = make.uniform(1000, low=-1e6, high=1e6)
    quarters = torch.arange(-200, 200) * (math.pi / 2)
    angles = torch.cat((scattered, quarters, torch.arange(64.0), torch.tensor([1e6, -1e6])))
    T = len(angles)
    q = torch.tensor([1.0, 0.0]).expand(T, 1, 2).contiguous()
    k = v = torch.zeros(T, 1, 2)
    cache = torch.zeros(1, 1, 1, 2)
    y = ops.rope(
        q,
        k,
        v,
        angles,
        torch.ones(1, 1),
        torch.ones(1),
        torch.zeros(T, dtype=torch.int32),
        cache,
        cache.clone(),
        torch.full((T,), -1),
    )
    truth = torch.stack((angles.double().cos(), angles.double().sin()), dim=-1)[:, None]
    assert float((y.double() - truth).abs().max()) < 1.5e-7
    assert torch.equal(cache, torch.zeros(1, 1, 1, 2))
