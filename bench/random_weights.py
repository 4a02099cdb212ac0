"""Weights for a model of any shape, drawn where they are wanted: no checkpoint is written."""

from __future__ import annotations

import torch
from torch import Tensor

from internvl_rt.config import ModelConfig
from internvl_rt.runtime.platform import CPU, Platform
from internvl_rt.weights import tensor_shapes


class RandomWeights:
    """Stands for internvl_rt.parameters.Parameters. Magnitudes are those of trained models: every
    product keeps the size of what goes in, and branches add a little of it."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, platform: Platform = CPU, seed: int = 0
    ) -> None:
        self.platform, self._dtype = platform, dtype
        self._shapes = dict(tensor_shapes(config))
        self._shapes["llm.head.weight"] = self._shapes["llm.embed.weight"]  # if tied too
        self._generator = torch.Generator(platform.device).manual_seed(seed)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        draw = torch.randn(
            shape, generator=self._generator, dtype=torch.float32, device=self.platform.device
        )
        if len(shape) > 1:
            draw *= (draw.numel() // shape[0]) ** -0.5
        elif name.endswith("weight"):  # of a norm
            draw = 1 + 0.1 * draw
        else:
            draw *= 0.1
        return draw.to(self._dtype)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self[f"{name}.weight"], self[f"{name}.bias"]

    def table(self, name: str) -> Tensor:
        return self[name]

    def linear(self, name: str) -> tuple[list[Tensor], list[Tensor] | None]:
        bias = f"{name}.bias"
        return [self[f"{name}.weight"]], [self[bias]] if bias in self._shapes else None

    def finish(self) -> None:
        pass
