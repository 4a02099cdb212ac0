"""Pixel unshuffle and the two-layer MLP that turns ViT features into token embeddings.

Chat V1.0 has the MLP alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internvl_rt.config import ModelConfig
from internvl_rt.layers import LayerNorm, Linear
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters


class Projector:
    EPS = 1e-5  # torch's default for LayerNorm: no config carries it

    def __init__(
        self, config: ModelConfig, w: Parameters, opset: OpSet, dtype: torch.dtype
    ) -> None:
        self.ops, self.ratio, self.version = opset, config.unshuffle, config.ps_version
        self.norm = None
        if config.projector_norm:
            self.norm = LayerNorm(opset, *w.pair("proj.ln"), self.EPS, dtype)
        self.fc1 = Linear(opset, *w.linear("proj.fc1"), dtype)
        self.fc2 = Linear(opset, *w.linear("proj.fc2"), dtype)

    def __call__(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """[t, rows*columns, C] (tokens may be strided) -> [t, rows*columns / ratio^2, hidden]."""
        if self.norm is None:
            hidden = self.fc1(features.flatten(0, 1), activation="gelu")
            return self.fc2(hidden).view(len(features), -1, self.fc2.weight.shape[0])
        return self.ops.pixel_unshuffle_mlp(
            features,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            grid=grid,
            ratio=self.ratio,
            version=self.version,
            eps=self.EPS,
        )
