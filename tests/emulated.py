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

from internvl_rt import ops

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int32: 3, torch.int64: 4}
C_TYPES = {
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "DType": ctypes.c_int32,
    "Gate": ctypes.c_int32,
    "Activation": ctypes.c_int32,
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
    for kind, names in re.findall(r"(?:const )?(\w+\*?)\s+([^;]+);", body):
        c_type = ctypes.c_void_p if kind.endswith("*") else C_TYPES.get(kind)
        c_type = c_type or struct(NESTED[kind], kind)
        fields += [(n.strip(), c_type) for n in names.split(",")]
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
        **{"k": k, "v": v, "cu_kv": cu_kv},
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
        **{"out": out, "M": x.shape[0], "N": N, "K": K, "activation": int(activation)},
        **{"dtype": x.dtype, "out_dtype": out.dtype},
        **_strides(x_m=x, residual_m=residual, out_m=out),
        decode=x.shape[0] <= 16 if decode is None else decode,
        **dict.fromkeys((*steps, "workspace_size", "scratch_size", "workspace"), 0),
    )


# A new op: the conversion above, a row here and one in kernels/cuda/emu/ops.cpp.
PARAMS: dict[str, Callable[..., ctypes.Structure]] = {
    "embed_scatter": embed_scatter,
    "flash_attention": flash_attention,
    "gated_activation": gated_activation,
    "layer_norm": layer_norm,
    "linear": linear,
    "paged_attention": paged_attention,
    "pixel_unshuffle_mlp": pixel_unshuffle_norm,
    "rms_norm": rms_norm,
}
