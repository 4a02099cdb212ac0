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

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int32: 3, torch.int64: 4}
C_TYPES = {
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "DType": ctypes.c_int32,
    "Gate": ctypes.c_int32,
}


@functools.cache
def struct(header: str, name: str) -> type[ctypes.Structure]:
    """struct `name` of kernels/<header>.h, field by field."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "kernels" / f"{header}.h").read_text())
    body = re.search(rf"struct {name} \{{(.*?)\}};", text, re.DOTALL)[1]
    fields = []
    for kind, names in re.findall(r"(?:const )?(\w+\*?)\s+([^;]+);", body):
        c_type = ctypes.c_void_p if kind.endswith("*") else C_TYPES[kind]
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

    return kind(**{n: plain(v) for n, v in values.items()})


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


# A new op: the conversion above, a row here and one in kernels/cuda/emu/ops.cpp.
PARAMS: dict[str, Callable[..., ctypes.Structure]] = {
    "embed_scatter": embed_scatter,
    "gated_activation": gated_activation,
    "layer_norm": layer_norm,
    "pixel_unshuffle_mlp": pixel_unshuffle_norm,
    "rms_norm": rms_norm,
}
