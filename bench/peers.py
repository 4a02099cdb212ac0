"""What each op is timed beside: the same work by torch (or Pillow), as one would write it.

A peer gets a case's arguments, prepares what a model would prepare once (plain weights, gathered
caches), and returns the call to time; None where it has no way to do the same.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl_rt import _C, ops
from internvl_rt.ops.grouped_linear import PackedExperts
from internvl_rt.ops.linear import PackedWeight, unpack

Call = Callable[[], Any]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    weight_in_fp32: bool = False,
) -> Call | None:
    if weight_in_fp32:
        return None
    if residual is None:
        return lambda: F.rms_norm(x, weight.shape, weight, eps)

    def both() -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.rms_norm(h, weight.shape, weight, eps), h

    return both


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Call:
    return lambda: F.layer_norm(x, weight.shape, weight, bias, eps)


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Call | None:
    epilogues = {"none": lambda y: y, "gelu": F.gelu, "silu": F.silu}
    if activation not in epilogues:
        return None
    w, epilogue = _plain(weight).to(x.dtype), epilogues[activation]

    def call() -> Tensor:
        y = epilogue(F.linear(x, w, bias))
        y = y if scale is None else y * scale
        y = y if residual is None else residual + y
        return y if out_dtype is None else y.to(out_dtype)

    return call


def grouped_linear(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Call:
    experts = [_plain(weight[e]) for e in range(weight.shape[0])]
    bounds = offsets.tolist()

    def call() -> Tensor:
        sorted_x = x if rows is None else x[rows]
        parts = [
            F.linear(sorted_x[begin:end], w, None if bias is None else bias[e])
            for e, (w, (begin, end)) in enumerate(zip(experts, pairwise(bounds), strict=True))
        ]
        return torch.cat(parts)

    return call


def _grouped_mm(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Call | None:
    """torch's own product of groups, which knows the offsets on the device alone, as ours does."""
    if bias is not None or x.dtype != torch.bfloat16:
        return None
    experts = torch.stack([_plain(weight[e]) for e in range(weight.shape[0])]).transpose(1, 2)
    ends = offsets[1:]
    return lambda: F.grouped_mm(x if rows is None else x[rows], experts, offs=ends)


def moe_route(logits: Tensor, top_k: int, normalize: bool) -> Call:
    E = logits.shape[1]

    def call() -> tuple[Tensor, ...]:
        scores = logits.float().softmax(1)
        weights, ids = (t[:, :top_k] for t in scores.sort(descending=True, stable=True))
        if normalize:
            weights = weights / weights.sum(1, keepdim=True)
        order = ids.flatten().argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel(), device=order.device)
        offsets = F.pad(torch.bincount(ids.flatten(), minlength=E).cumsum(0), (1, 0))
        return ids.int(), weights, (order // top_k).int(), places.view_as(ids).int(), offsets.int()

    return call


def moe_combine(x: Tensor, weights: Tensor, places: Tensor, residual: Tensor | None = None) -> Call:
    def call() -> Tensor:
        y = (x[places] * weights[..., None]).sum(1).to(x.dtype)
        return y if residual is None else residual + y

    return call


_MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4_unpack(blocks: Tensor, scales: Tensor) -> Call:
    table = _MXFP4.to(blocks.device, torch.bfloat16)

    def call() -> Tensor:
        values = torch.stack((table[(blocks & 15).int()], table[(blocks >> 4).int()]), -1)
        return torch.ldexp(values.flatten(-2), scales.int()[..., None] - 127).flatten(-2).bfloat16()

    return call


def gated_activation(x: Tensor, kind: str = "silu") -> Call | None:
    if kind != "silu":
        return None
    gate, up = x.chunk(2, dim=-1)
    return lambda: F.silu(gate) * up


def gated_linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, kind: str = "silu"
) -> Call | None:
    if kind != "silu":
        return None
    w = _plain(weight).to(x.dtype)

    def call() -> Tensor:
        gate, up = F.linear(x, w, bias).chunk(2, dim=-1)
        return F.silu(gate) * up

    return call


def grouped_gated_linear(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "silu",
) -> Call | None:
    if kind != "silu":
        return None
    products = grouped_linear(x, weight, offsets, rows, bias)

    def call() -> Tensor:
        gate, up = products().chunk(2, dim=-1)
        return F.silu(gate) * up

    return call


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    scale: float,
    causal: bool,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Call | None:
    lengths, keys = (set(cu.diff().tolist()) for cu in (cu_q, cu_kv))
    if len(lengths) != 1 or len(keys) != 1 or (causal and lengths != keys):
        return None
    if window is not None or sinks is not None or prefix is not None:
        return None
    B = len(cu_q) - 1
    q, k, v = (t.unflatten(0, (B, len(t) // B)).transpose(1, 2) for t in (q, k, v))  # [B, H, n, D]

    def call() -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)

    return call


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float
) -> Tensor:
    """Eager attention on [B, H, n, D], as transformers runs GPT-OSS."""
    B, H, n, _ = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    extra = sinks.to(scores.dtype).view(1, H, 1, 1).expand(B, H, n, 1)
    return torch.cat((scores, extra), -1).softmax(-1)[..., :-1] @ v


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Call | None:
    """Contiguous keys and values, as transformers keeps them; equal lengths only."""
    if len(set(kv_lens.tolist())) != 1 or len(set(cu_q.diff().tolist())) != 1:
        return None
    if prefix is not None or (sinks is None and window is not None):
        return None
    B, L, n = len(kv_lens), int(kv_lens[0]), int(cu_q[1])
    K, D = k_cache.shape[1], k_cache.shape[3]

    def gather(cache: Tensor) -> Tensor:
        pages = cache[page_table.long()]  # [B, pages, K, P, D]
        return pages.transpose(1, 2).reshape(B, K, -1, D)[:, :, :L].contiguous()

    k, v = gather(k_cache), gather(v_cache)
    q = q.unflatten(0, (B, n)).transpose(1, 2)  # [B, H, n, D]
    seen = torch.ones(n, L, dtype=torch.bool, device=q.device).tril(L - n)
    mask = None if n == 1 else seen
    if sinks is not None:
        mask = seen.triu(L - n + 1 - (window or L))

    def call() -> Tensor:
        if sinks is not None:
            y = _with_sinks(q, k, v, mask, sinks, scale)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
            )
        return y.transpose(1, 2).flatten(0, 1)

    return call


def rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scale: Tensor,
    sequence: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Call | None:
    """The table, the rotation and the cache's update of one layer; all tokens of one sequence."""
    D = q.shape[-1]
    if len(inv_freq) != 1 or inv_freq.shape[1] * 2 != D or bool((slots < 0).any()):
        return None
    P = k_cache.shape[2]
    page, offset = slots // P, slots % P

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    def call() -> Tensor:
        angle = positions[:, None] * inv_freq
        angle = torch.cat((angle, angle), dim=-1)[:, None]  # [T, 1, D]
        cos, sin = ((f(angle) * scale).to(q.dtype) for f in (torch.cos, torch.sin))
        k_cache[page, :, offset] = turn(k, cos, sin)
        v_cache[page, :, offset] = v
        return turn(q, cos, sin)

    return call


def embed_scatter(
    ids: Tensor, table: Tensor, image: Tensor | None = None, image_row: Tensor | None = None
) -> Call:
    if image is None or image_row is None:
        return lambda: F.embedding(ids, table)

    def call() -> Tensor:
        y = F.embedding(ids, table)
        here = image_row >= 0
        y[here] = image[image_row[here]]
        return y

    return call


def sample(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    **other: Any,
) -> Call | None:
    """Greedy, or temperature and top-p with torch's own noise: the same work, another draw."""
    if set(other) - {"seed", "index"}:
        return None
    if temperature is None:
        return lambda: logits.argmax(-1)

    def call() -> Tensor:
        values, ids = (logits / temperature[:, None]).sort(-1, descending=True)
        p = values.softmax(-1)
        if top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= top_p[:, None], 0)
        return ids.gather(-1, torch.multinomial(p, 1))[:, 0]

    return call


def pixel_unshuffle_mlp(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor | PackedWeight,
    b1: Tensor,
    w2: Tensor | PackedWeight,
    b2: Tensor,
    grid: tuple[int, int],
    ratio: int = 2,
    version: str = "v2",
    eps: float = 1e-5,
) -> Call | None:
    if version != "v2":
        return None
    w1, w2 = _plain(w1), _plain(w2)
    (h, w), r, t, C = grid, ratio, len(x), x.shape[-1]

    def call() -> Tensor:
        y = x.reshape(t, h // r, r, w // r, r, C).transpose(2, 3)
        y = y.reshape(t, h * w // (r * r), r * r * C)
        y = F.layer_norm(y, ln_weight.shape, ln_weight, ln_bias, eps)
        return F.linear(F.gelu(F.linear(y, w1, b1)), w2, b2)

    return call


def preprocess(
    image: Tensor,
    columns: int,
    rows: int,
    image_size: int,
    thumbnail: bool = False,
    mean: Any = (0.485, 0.456, 0.406),
    std: Any = (0.229, 0.224, 0.225),
    dtype: torch.dtype = torch.float32,
) -> Call | None:
    if not columns * rows or image.is_cuda:
        return None
    import numpy as np
    from PIL import Image

    picture, S = Image.fromarray(image.numpy()), image_size
    shift, factor = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def call() -> Tensor:
        whole = picture.resize((columns * S, rows * S), Image.Resampling.BICUBIC)
        boxes = [(c * S, r * S, c * S + S, r * S + S) for r in range(rows) for c in range(columns)]
        tiles = [whole.crop(box) for box in boxes]
        if thumbnail:
            tiles.append(picture.resize((S, S), Image.Resampling.BICUBIC))
        pixels = [torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in tiles]
        return torch.stack([((p.float() / 255 - shift) / factor).to(dtype) for p in pixels])

    return call


def _plain(weight: Tensor | PackedWeight) -> Tensor:
    return weight if isinstance(weight, Tensor) else unpack(weight).contiguous()


# Op -> (what the peer is called in a row, its function).
PEERS: dict[str, tuple[str, Callable[..., Call | None]]] = {
    f.__name__: ("Pillow+torch" if f is preprocess else "torch", f)
    for f in (
        embed_scatter,
        flash_attention,
        gated_activation,
        gated_linear,
        grouped_gated_linear,
        grouped_linear,
        layer_norm,
        linear,
        moe_combine,
        moe_route,
        mxfp4_unpack,
        paged_attention,
        pixel_unshuffle_mlp,
        preprocess,
        rms_norm,
        rope,
        sample,
    )
}


def _sdpa(prepare: Callable[..., Call | None], kernel: SDPBackend) -> Callable[..., Call | None]:
    """The peer with one implementation of scaled_dot_product_attention; calls raise RuntimeError
    where it does not take these arguments."""

    def prepared(**arguments: Any) -> Call | None:
        call = prepare(**arguments)
        if call is None or arguments.get("sinks") is not None:
            return None

        def forced() -> Any:
            with sdpa_kernel(kernel):
                return call()

        return forced

    return prepared


def _without_wgmma(**arguments: Any) -> Call:
    """Our own kernel for devices before Hopper."""
    out = torch.empty_like(arguments["q"], memory_format=torch.contiguous_format)

    def call() -> Tensor:
        _C.force_mma(True)
        try:
            return ops.flash_attention(**arguments, out=out, backend="cuda")
        finally:
            _C.force_mma(False)

    return call


# Op -> further peers on a GPU.
GPU_PEERS: dict[str, dict[str, Callable[..., Call | None]]] = {
    f.__name__: {
        "sdpa-flash": _sdpa(f, SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": _sdpa(f, SDPBackend.CUDNN_ATTENTION),
        "sdpa-efficient": _sdpa(f, SDPBackend.EFFICIENT_ATTENTION),
    }
    for f in (flash_attention, paged_attention)
} | {"grouped_linear": {"grouped_mm": _grouped_mm}}

# Ops whose peer is many kernels that a compiler may make one of.
COMPILED = (
    "gated_activation",
    "layer_norm",
    "linear",
    "moe_combine",
    "moe_route",
    "mxfp4_unpack",
    "pixel_unshuffle_mlp",
    "rms_norm",
    "rope",
)


def _compiled(prepare: Callable[..., Call | None], compiler: str) -> Callable[..., Call | None]:
    def prepared(**arguments: Any) -> Call | None:
        call = prepare(**arguments)
        # Without a reset the eighth shape of a function would silently stay as it is written.
        torch.compiler.reset()
        return call and torch.compile(call, dynamic=False, backend=compiler)

    return prepared


def _liger_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    weight_in_fp32: bool = False,
) -> Call | None:
    if residual is not None or weight_in_fp32:
        return None
    norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return lambda: norm.apply(x, weight, eps, 0.0, "llama", False)


def _liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Call:
    norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda: norm.apply(x, weight, bias, eps)


def _liger_gated_activation(x: Tensor, kind: str = "silu") -> Call | None:
    if kind != "silu":
        return None
    gate, up = (half.contiguous() for half in x.chunk(2, dim=-1))
    function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return lambda: function.apply(gate, up)


def _flashinfer_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    weight_in_fp32: bool = False,
) -> Call | None:
    if residual is not None or weight_in_fp32 or x.dim() != 2:
        return None
    norm = importlib.import_module("flashinfer.norm")
    return lambda: norm.rmsnorm(x, weight, eps)


def _flashinfer_gated_activation(x: Tensor, kind: str = "silu") -> Call | None:
    if kind != "silu":
        return None
    activation = importlib.import_module("flashinfer.activation")
    return lambda: activation.silu_and_mul(x)


def _flashinfer_flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    scale: float,
    causal: bool,
    **options: Any,
) -> Call | None:
    if len(cu_q) != 2 or any(o is not None for o in options.values()):
        return None
    prefill = importlib.import_module("flashinfer").single_prefill_with_kv_cache
    return lambda: prefill(q, k, v, causal=causal, sm_scale=scale)


# Package -> op -> its function.
PACKAGES: dict[str, dict[str, Callable[..., Call | None]]] = {
    "flashinfer": {
        "flash_attention": _flashinfer_flash_attention,
        "gated_activation": _flashinfer_gated_activation,
        "rms_norm": _flashinfer_rms_norm,
    },
    "liger_kernel": {
        "gated_activation": _liger_gated_activation,
        "layer_norm": _liger_layer_norm,
        "rms_norm": _liger_rms_norm,
    },
}
GPU_PEERS["flash_attention"]["ours-mma"] = _without_wgmma


def slow_peers(op: str, *, compiler: str) -> dict[str, Callable[..., Call | None]]:
    """Peers of an op that compile with the first call, and those of packages that are here.

    compiler: a backend of torch.compile.
    """
    found = {
        package: functions[op]
        for package, functions in PACKAGES.items()
        if op in functions and importlib.util.find_spec(package) is not None
    }
    if op in COMPILED:
        found["torch.compile"] = _compiled(PEERS[op][1], compiler)
    return found


# Peers that draw other random numbers: their distance from our results says nothing.
OTHER_DRAWS = ("sample",)
