"""Vision tower, projector and decoder joined: the tensors-in, tensors-out model."""

from __future__ import annotations

import torch
from torch import Tensor

from internvl_rt.config import ModelConfig
from internvl_rt.models.decoder import Decoder
from internvl_rt.models.projector import Projector
from internvl_rt.models.vision import VisionTower
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters


class InternVL:
    """Holds the weights; keeps no state between calls."""

    def __init__(
        self,
        config: ModelConfig,
        w: Parameters,
        opset: OpSet,
        dtype: torch.dtype,
        quant: str | None = None,
    ) -> None:
        """quant: "int8" or "int4" for the language model; the vision tower keeps dtype."""
        self.config, self.ops, self.dtype = config, opset, dtype
        # The decoder begins with the largest weight: its pages of the file are let go before the
        # packed rest is there.
        self.decoder = Decoder(config.text, w, opset, dtype, quant)
        self.vision = VisionTower(config.vision, w, config.vision_layers_used, opset, dtype)
        self.projector = Projector(config, w, opset, dtype)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[t, 3, height, width] -> [t, n, hidden], in micro-batches of tiles.

        height and width are multiples of patch size times unshuffle ratio (28), n is their product
        over the square of that.
        """
        rows, columns = (s // self.config.vision.patch_size for s in pixels.shape[-2:])
        out = [
            self.projector(self.vision(tiles)[:, 1:], (rows, columns))
            for tiles in pixels.split(VisionTower.MICRO_BATCH)
        ]
        n = rows * columns // self.config.unshuffle**2
        return torch.cat(out) if out else self.decoder.embed.new_empty(0, n, self.decoder.width)
