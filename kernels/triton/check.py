"""Named dimensions, checked in one statement: what csrc/check.h is to the native ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

import triton


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes tensors on the CPU."""
    return bool(triton.knobs.runtime.interpret)


class Checker:
    """The first tensor that carries a dimension's name binds it; later ones must agree.

    check = Checker("rms_norm")
    check.tensor("x", x, FLOATS, "T H C")
    check.tensor("weight", weight, [x.dtype], "C")
    """

    def __init__(self, op: str) -> None:
        self._op = op
        self._bound: dict[str, tuple[int, str]] = {}
        self._device: torch.device | None = None

    def __getitem__(self, dim: str) -> int:
        return self._bound[dim][0]

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self._op}: {what}")

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            self.fail(what)

    def tensor(self, name: str, x: Tensor, dtypes: Sequence[torch.dtype], dims: str) -> None:
        """dims: names, separated by spaces; the last one must be contiguous."""
        if x.dtype not in dtypes:
            expected = " or ".join(_name(d) for d in dtypes)
            self.fail(f"{name} is {_name(x.dtype)}, expected {expected}")
        if self._device not in (None, x.device):
            self.fail(f"{name} is on {x.device}, the tensors before it on {self._device}")
        if not x.is_cuda and not interpreted():
            self.fail(f"{name} is on {x.device}, expected a CUDA device")
        self._device = x.device
        names = dims.split()
        bound = [d for d in names if d in self._bound]
        if x.dim() != len(names) or any(
            self[d] != size for d, size in zip(names, x.shape, strict=True) if d in bound
        ):
            expected = ", ".join(f"{d}={self[d]}" if d in bound else d for d in names)
            origins = ", ".join(f"{d} from {self._bound[d][1]}" for d in bound)
            origins = f" ({origins})" if origins else ""
            self.fail(f"{name} has shape {list(x.shape)}, expected [{expected}]{origins}")
        for d, size in zip(names, x.shape, strict=True):
            self._bound.setdefault(d, (size, f"{name} {list(x.shape)}"))
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            self.fail(f"{name} must be contiguous in its last dimension (stride {x.stride(-1)})")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
