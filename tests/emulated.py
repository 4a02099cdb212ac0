"""The arguments of an op's native face as the params struct of its kernel, read from its header."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C, ops
from internvl_rt.ops.preprocess import _weights as reference_weights

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int32: 3, torch.int64: 4}
C_TYPES = {
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "DType": ctypes.c_int32,
    "Gate": ctypes.c_int32,
    "Activation": ctypes.c_int32,
    "WeightFormat": ctypes.c_int32,
    "int": ctypes.c_int,
}
NESTED = {"AttentionParams": "attention"}  # struct -> header
NO_WINDOW = 2**63 - 1


@functools.cache
def struct(header: str, name: str) -> type[ctypes.Structure]:
    """struct `name` of kernels/<header>.h, field by field."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "kernels" / f"{header}.h").read_text())
    body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)[1]
    fields = []
    for kind, names in re.findall(r"(?:const )?(\w+\*?)(?: const\*)?\s+([^;]+);", body):
        if kind.endswith("*"):
            c_type = ctypes.c_void_p
        else:
            c_type = C_TYPES.get(kind) or struct(NESTED.get(kind, header), kind)
        for field in map(str.strip, names.split(",")):
            field, _, length = field.rstrip("]").partition("[")
            fields.append((field, c_type * int(length) if length else c_type))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def fill(header: str, name: str, **values: Any) -> ctypes.Structure:
    """A params struct: tensors become pointers, dtypes their numbers; every field must be given."""
    kind = struct(header, name)
    assert {n for n, _ in kind._fields_} == set(values), f"{name}: fields differ"

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.data_ptr()
        return DTYPES[value] if isinstance(value, torch.dtype) else value

    params = kind(**{n: plain(v) for n, v in values.items()})
    params.keep = values  # as long as the pointers
    return params


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    """_strides(x_th=x): {"x_t": stride 0, "x_h": stride 1}."""
    found = {}
    for key, x in tensors.items():
        name, dims = key.rsplit("_", 1)
        found |= {f"{name}_{d}": 0 if x is None else x.stride(i) for i, d in enumerate(dims)}
    return found


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, eps: float) -> ctypes.Structure:
    return fill(
        *("layer_norm", "LayerNormParams"),
        **{"x": x, "weight": weight, "bias": bias, "y": y, "eps": eps, "dtype": x.dtype},
        **{"T": x.shape[0], "C": x.shape[1]},
        **_strides(x_t=x, y_t=y),
    )


def gated_activation(x: Tensor, y: Tensor, gate: Any) -> ctypes.Structure:
    return fill(
        *("gated_activation", "GatedActivationParams"),
        **{"x": x, "y": y, "gate": int(gate), "dtype": x.dtype},
        **{"T": y.shape[0], "I": y.shape[1]},
        **_strides(x_t=x, y_t=y),
    )


def pixel_unshuffle_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    h: int,
    w: int,
    r: int,
    by_columns: bool,
    eps: float,
) -> ctypes.Structure:
    return fill(
        *("pixel_unshuffle_mlp", "PixelUnshuffleParams"),
        **{"x": x, "weight": weight, "bias": bias, "y": y, "h": h, "w": w, "r": r, "eps": eps},
        **{"by_columns": by_columns, "dtype": x.dtype, "t": x.shape[0], "C": x.shape[2]},
        **{"x_t": x.stride(0), "x_cell": x.stride(1), "y_row": y.stride(0)},
    )


def embed_scatter(
    ids: Tensor, table: Tensor, image: Tensor | None, image_row: Tensor | None, out: Tensor
) -> ctypes.Structure:
    return fill(
        *("embed_scatter", "EmbedScatterParams"),
        **{"ids": ids, "image_row": image_row, "table": table, "image": image, "out": out},
        **{"T": ids.shape[0], "V": table.shape[0], "C": table.shape[1], "dtype": table.dtype},
        N=0 if image is None else image.shape[0],
        **_strides(table_v=table, image_n=image, out_t=out),
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    y: Tensor,
    residual_out: Tensor | None,
    eps: float,
    weight_in_fp32: bool,
) -> ctypes.Structure:
    T, H, C = x.shape
    return fill(
        *("rms_norm", "RmsNormParams"),
        **{"x": x, "residual": residual, "weight": weight, "y": y, "residual_out": residual_out},
        **{"T": T, "H": H, "C": C, "eps": eps, "weight_in_fp32": weight_in_fp32},
        **_strides(x_th=x, residual_th=residual, y_th=y, residual_out_th=residual_out),
        dtype=x.dtype,
    )


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
    out: Tensor,
) -> ctypes.Structure:
    pages, K, P, D = k_cache.shape
    return fill(
        *("rope", "RopeParams"),
        **{"q": q, "k": k, "v": v, "positions": positions, "inv_freq": inv_freq, "scale": scale},
        **{"sequence": sequence, "slots": slots, "k_cache": k_cache, "v_cache": v_cache},
        **{"out": out, "T": q.shape[0], "H": q.shape[1], "K": K, "P": P, "D": D},
        **{"B": scale.shape[0], "places": pages * P, "half": inv_freq.shape[1], "dtype": q.dtype},
        **_strides(q_th=q, k_th=k, v_th=v, inv_freq_b=inv_freq, out_th=out),
        **{"k_page": k_cache.stride(0), "k_cache_h": k_cache.stride(1), "k_p": k_cache.stride(2)},
        **{"v_page": v_cache.stride(0), "v_cache_h": v_cache.stride(1), "v_p": v_cache.stride(2)},
    )


def sample(
    logits: Tensor, *, workspace: Tensor, out: Tensor, **parameters: Tensor | None
) -> ctypes.Structure:
    history = parameters["history"]
    return fill(
        *("sample", "SampleParams"),
        **{"logits": logits, "workspace": workspace, "out": out, **parameters},
        **{"B": logits.shape[0], "V": logits.shape[1], "L": 0 if history is None else len(history)},
        **_strides(logits_b=logits, workspace_b=workspace),
    )


def preprocess(
    image: Tensor,
    table: Tensor,
    out: Tensor,
    columns: int,
    rows: int,
    S: int,
    thumbnail: bool,
) -> ctypes.Structure:
    """With the weights of the reference, which owes nothing to the C++ ones."""
    H, W, _ = image.shape
    kept: list[Tensor] = []

    def axis(n_in: int, n_out: int) -> ctypes.Structure:
        first, weights = reference_weights(n_in, n_out)
        fixed = torch.stack(weights, 1)  # [n_out, taps]
        high = fixed + 2048 >> 12
        digits = torch.stack((high, fixed - high * 4096), 1).short()
        count = (first + len(weights)).clamp(max=n_in) - first
        kept.extend((first.int(), count.int(), digits))
        return fill(
            *("preprocess", "ResampleAxis"),
            **{"n_in": n_in, "n_out": n_out, "taps": len(weights)},
            **dict(zip(("first", "count", "weights"), kept[-3:], strict=True)),
        )

    def target(columns: int, rows: int, out: Tensor) -> ctypes.Structure:
        # The order of the passes shows in the bytes: it is Pillow's.
        lost = H - rows * S
        vertical_first = columns * S != W and lost > 0 and lost > 2 * (W - columns * S)
        lines, width = (rows * S, 3 * W) if vertical_first else (3 * H, columns * S)
        kept.append(torch.empty(lines * (-(-width // 16) * 16) + 64, dtype=torch.uint8))
        return fill(
            *("preprocess", "PreprocessTarget"),
            **{"mid": kept[-1], "out": out, "columns": columns, "vertical_first": vertical_first},
            **{"x": axis(W, columns * S), "y": axis(H, rows * S)},
        )

    grid = columns * rows
    targets = [target(columns, rows, out)] if grid else []
    targets += [target(1, 1, out[grid:])] if thumbnail else []
    params = fill(
        *("preprocess", "PreprocessParams"),
        **{"image": image, "H": H, "W": W, "row_stride": image.stride(0), "S": S},
        **{"n_targets": len(targets), "table": table, "dtype": out.dtype},
        targets=(struct("preprocess", "PreprocessTarget") * 2)(*targets),
    )
    params.kept = kept
    return params


def _attention(
    q: Tensor,
    cu_q: Tensor,
    K: int,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: Tensor | None,
    prefix: Tensor | None,
    out: Tensor,
) -> ctypes.Structure:
    T, H, D = q.shape
    return fill(
        *("attention", "AttentionParams"),
        **{"q": q, "out": out, "sinks": sinks, "cu_q": cu_q, "prefix": prefix, "dtype": q.dtype},
        **{"T": T, "B": len(cu_q) - 1, "K": K, "D": D, "group": H // K, "scale": scale},
        **{"window": window or NO_WINDOW, "causal": causal},
        **_strides(q_th=q, out_th=out),
        sinks_dtype=torch.float32 if sinks is None else sinks.dtype,
    )


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: Tensor | None,
    prefix: Tensor | None,
    out: Tensor,
) -> ctypes.Structure:
    return fill(
        *("flash_attention", "FlashAttentionParams"),
        a=_attention(q, cu_q, k.shape[1], scale, causal, window, sinks, prefix, out),
        **{"k": k, "v": v, "cu_kv": cu_kv, "keys": k.shape[0]},
        **_strides(k_th=k, v_th=v),
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    prefix: Tensor | None,
    workspace: Tensor | None,
    out: Tensor,
) -> ctypes.Structure:
    pages, K, P, _ = k_cache.shape
    return fill(
        *("paged_attention", "PagedAttentionParams"),
        a=_attention(q, cu_q, K, scale, True, window, sinks, prefix, out),
        **{"k_cache": k_cache, "v_cache": v_cache, "page_table": page_table, "kv_lens": kv_lens},
        **{"pages": pages, "max_pages": page_table.shape[1], "workspace": workspace},
        **{"page_table_b": page_table.stride(0), "page_shift": P.bit_length() - 1},
        **{f"k_{n}": s for n, s in zip(("page", "h", "p"), k_cache.stride(), strict=False)},
        **{f"v_{n}": s for n, s in zip(("page", "h", "p"), v_cache.stride(), strict=False)},
    )


def linear(
    x: Tensor,
    packed: Tensor,
    N: int,
    K: int,
    weight_format: Any,
    bias: Tensor | None,
    activation: Any,
    residual: Tensor | None,
    scale: Tensor | None,
    decode: bool | None,
    out: Tensor,
) -> ctypes.Structure:
    # What the native face got is packed for a CPU; on a GPU a weight is plain.
    weight = ops.unpack(ops.PackedWeight(packed, N, K, weight_format)).contiguous()
    steps = ("row_step", "panel_step", "row_blocks", "panel_blocks", "items")
    return fill(
        *("linear", "LinearParams"),
        **{"x": x, "weight": weight, "bias": bias, "residual": residual, "scale": scale},
        **{"rows": None, "out": out, "M": x.shape[0], "N": N, "K": K},
        **{"activation": int(activation), "format": int(weight_format)},
        **{"dtype": x.dtype, "out_dtype": out.dtype},
        **_strides(x_m=x, residual_m=residual, out_m=out),
        decode=x.shape[0] <= 16 if decode is None else decode,
        **dict.fromkeys((*steps, "workspace_size", "scratch_size", "workspace"), 0),
    )


def gated_linear(
    x: Tensor,
    packed: Tensor,
    N: int,
    K: int,
    weight_format: Any,
    gated: bool,
    bias: Tensor | None,
    gate: Any,
    decode: bool | None,
    out: Tensor,
) -> ctypes.Structure:
    assert int(gate) == 0, "the one gate that a product has"
    assert not gated, "the CPU's order of rows"
    swiglu = _C.Activation.swiglu
    weight = (packed, N, K, weight_format)
    return linear(x, *weight, bias, swiglu, None, None, decode, out)


def grouped_linear(
    x: Tensor,
    packed: Tensor,
    E: int,
    N: int,
    K: int,
    weight_format: Any,
    offsets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    gate: Any,
    decode: bool | None,
    out: Tensor,
) -> ctypes.Structure:
    assert gate is None, "the CPU's kernel"
    experts = ops.PackedExperts(packed, E, N, K, weight_format)
    M = out.shape[0]
    return fill(
        *("grouped_linear", "GroupedLinearParams"),
        **{"x": x, "rows": rows, "bias": bias, "offsets": offsets, "out": out, "dtype": x.dtype},
        **{"R": x.shape[0], "M": M, "N": N, "K": K, "E": E, "format": int(weight_format)},
        **{"weight": torch.stack([ops.unpack(experts[e]) for e in range(E)])},
        **{"activation": 0},
        **_strides(x_r=x, bias_e=bias, out_m=out),
        decode=M <= 16 if decode is None else decode,
    )


def moe_route(
    logits: Tensor,
    top_k: int,
    normalize: bool,
    ids: Tensor,
    weights: Tensor,
    tokens: Tensor,
    places: Tensor,
    offsets: Tensor,
) -> ctypes.Structure:
    return fill(
        *("moe_route", "MoeRouteParams"),
        **{"logits": logits, "ids": ids, "weights": weights, "tokens": tokens, "places": places},
        **{"offsets": offsets, "T": logits.shape[0], "E": logits.shape[1], "k": top_k},
        **_strides(logits_t=logits, ids_t=ids, weights_t=weights, places_t=places),
        **{"normalize": normalize, "dtype": logits.dtype},
    )


def moe_combine(
    x: Tensor, weights: Tensor, places: Tensor, residual: Tensor | None, out: Tensor
) -> ctypes.Structure:
    return fill(
        *("moe_combine", "MoeCombineParams"),
        **{"x": x, "weights": weights, "places": places, "residual": residual, "out": out},
        **{"T": out.shape[0], "M": x.shape[0], "N": x.shape[1], "k": places.shape[1]},
        **_strides(x_m=x, weights_t=weights, places_t=places, residual_t=residual, out_t=out),
        dtype=x.dtype,
    )


def mxfp4_unpack(blocks: Tensor, scales: Tensor, out: Tensor) -> ctypes.Structure:
    return fill(
        *("mxfp4_unpack", "Mxfp4Params"),
        **{"blocks": blocks, "scales": scales, "out": out, "B": len(scales)},
    )


# A new op: the conversion above, a row here and one in kernels/cuda/emu/ops.cpp.
PARAMS: dict[str, Callable[..., ctypes.Structure]] = {
    "embed_scatter": embed_scatter,
    "flash_attention": flash_attention,
    "gated_activation": gated_activation,
    "gemm": linear,
    "grouped_linear": grouped_linear,
    "layer_norm": layer_norm,
    "linear": linear,
    "moe_combine": moe_combine,
    "moe_route": moe_route,
    "mxfp4_unpack": mxfp4_unpack,
    "paged_attention": paged_attention,
    "pixel_unshuffle_mlp": pixel_unshuffle_norm,
    "preprocess": preprocess,
    "rms_norm": rms_norm,
    "rope": rope,
    "sample": sample,
}
