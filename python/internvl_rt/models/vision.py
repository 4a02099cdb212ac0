"""InternViT: patches to features (Chen et al., 2024, "InternVL")."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt.config import VisionConfig
from internvl_rt.layers import LayerNorm, Linear, RmsNorm
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters

VISION_OPS = ("linear", "layer_norm", "rms_norm", "flash_attention", "pixel_unshuffle_mlp")


@dataclass(frozen=True)
class _Memory:
    """What layers work in, one after the other: on the CPU fresh memory costs page faults."""

    rows: Tensor  # [T, C]
    qkv: Tensor  # [T, 3 * C]
    mlp: Tensor  # [T, width], where qkv was

    @classmethod
    def of(cls, x: Tensor, config: VisionConfig) -> _Memory:
        T, C, width = *x.shape, config.intermediate_size
        wide = x.new_empty(T * max(3 * C, width))
        qkv, mlp = (wide[: T * n].view(T, n) for n in (3 * C, width))
        return cls(torch.empty_like(x), qkv, mlp)


class VisionLayer:
    """x += ls1 * attention(norm1(x)); x += ls2 * mlp(norm2(x)).

    Where queries and keys are normalised, it is over all heads at a time.
    """

    def __init__(
        self, config: VisionConfig, w: Parameters, i: int, opset: OpSet, dtype: torch.dtype
    ) -> None:
        self.ops, self.heads, self.head_dim = opset, config.num_heads, config.head_dim
        name, eps = f"vit.{i}", config.layer_norm_eps

        def norm(which: str) -> LayerNorm | RmsNorm:
            if config.norm_type == "layer_norm":
                return LayerNorm(opset, *w.pair(f"{name}.{which}"), eps, dtype)
            return RmsNorm(opset, w[f"{name}.{which}.weight"], eps, dtype)

        self.norm1, self.norm2 = norm("norm1"), norm("norm2")
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RmsNorm(opset, w[f"{name}.q_norm.weight"], eps, dtype)
            self.k_norm = RmsNorm(opset, w[f"{name}.k_norm.weight"], eps, dtype)
        self.qkv = Linear(opset, *w.linear(f"{name}.qkv"), dtype)
        self.proj = Linear(opset, *w.linear(f"{name}.proj"), dtype)
        self.fc1 = Linear(opset, *w.linear(f"{name}.fc1"), dtype)
        self.fc2 = Linear(opset, *w.linear(f"{name}.fc2"), dtype)
        self.ls1 = w[f"{name}.ls1"].to(dtype)
        self.ls2 = w[f"{name}.ls2"].to(dtype)

    def __call__(self, x: Tensor, cu: Tensor, memory: _Memory) -> None:
        """Updates x [T, C] in place; tile b owns the tokens cu[b] : cu[b+1]."""
        H, D = self.heads, self.head_dim
        rows = self.norm1(x, out=memory.rows)
        qkv = self.qkv(rows, phase="prefill", out=memory.qkv).view(-1, 3, H * D)
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(qkv[:, 0], out=qkv[:, 0])
            self.k_norm(qkv[:, 1], out=qkv[:, 1])
        q, k, v = qkv.unflatten(2, (H, D)).unbind(1)  # [T, H, D] each
        a = rows.view(-1, H, D)
        self.ops.flash_attention(q, k, v, cu, cu, scale=D**-0.5, causal=False, out=a)
        self.proj(rows, scale=self.ls1, residual=x, phase="prefill", out=x)
        rows = self.norm2(x, out=memory.rows)
        f = self.fc1(rows, activation="gelu", phase="prefill", out=memory.mlp)
        self.fc2(f, scale=self.ls2, residual=x, phase="prefill", out=x)


class VisionTower:
    """InternViT up to the layer whose output is asked for; no norm after the last layer."""

    def __init__(
        self, config: VisionConfig, w: Parameters, layers: int, opset: OpSet, dtype: torch.dtype
    ) -> None:
        self.config, self.dtype = config, dtype
        C, P = config.hidden_size, config.patch_size
        (patch,), bias = w.linear("vit.patch")
        patch = patch.reshape(C, 3 * P * P)
        # Rows of 588 numbers begin at no multiple of 16 bytes, as kernels of a GPU want it.
        self.filled = 0 if w.platform.device.type == "cpu" else -patch.shape[1] % 8
        if self.filled:
            patch = F.pad(patch, (0, self.filled))
        self.patch = Linear(opset, [patch], bias, dtype)
        self.cls = w["vit.cls"].reshape(C).to(dtype)
        # float32: a resized position embedding is rounded once, after the interpolation.
        self.position = w["vit.pos"].reshape(-1, C).float()  # [1 + grid^2, C]
        self.layers = [VisionLayer(config, w, i, opset, dtype) for i in range(layers)]
        self._positions: dict[tuple[int, int], Tensor] = {}

    def __call__(self, pixels: Tensor, each: Callable[[Tensor], None] | None = None) -> Tensor:
        """pixels [t, 3, height, width] -> features [t, 1 + n, C], the CLS token first.

        height and width are multiples of the patch size. each is called with the embeddings and
        with the output of every layer, [t, 1 + n, C]; the buffer is reused after it returns.
        """
        t, _, height, width = pixels.shape
        P, C = self.config.patch_size, self.config.hidden_size
        rows, columns = height // P, width // P
        n = rows * columns
        patches = pixels.to(self.dtype).reshape(t, 3, rows, P, columns, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(t * n, 3 * P * P)
        if self.filled:
            patches = F.pad(patches, (0, self.filled))
        position = self.position_embedding(rows, columns)
        x = torch.empty(t, 1 + n, C, dtype=self.dtype, device=patches.device)
        x[:, 0] = self.cls + position[0]
        patches = self.patch(patches, phase="prefill")
        torch.add(patches.view(t, n, C), position[1:], out=x[:, 1:])
        cu = torch.arange(t + 1, dtype=torch.int32, device=x.device) * (1 + n)
        if each:
            each(x)
        memory = _Memory.of(x.view(-1, C), self.config)
        for layer in self.layers:
            layer(x.view(-1, C), cu, memory)
            if each:
                each(x)
        return x

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """[1 + rows*columns, C]: the trained grid, resized (bicubic, a = -0.75) if it differs."""
        found = self._positions.get((rows, columns))
        if found is None:
            g, C = math.isqrt(len(self.position) - 1), self.config.hidden_size
            found = self.position
            if (rows, columns) != (g, g):
                grid = self.position[1:].reshape(1, g, g, C).permute(0, 3, 1, 2)
                grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
                grid = grid.permute(0, 2, 3, 1).reshape(rows * columns, C)
                found = torch.cat((self.position[:1], grid))
            found = self._positions[rows, columns] = found.to(self.dtype)
        return found
