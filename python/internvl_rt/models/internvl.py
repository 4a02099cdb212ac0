"""Vision tower, projector and decoder joined: the tensors-in, tensors-out model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from internvl_rt.config import ModelConfig
from internvl_rt.models.decoder import Decoder, decoder_ops
from internvl_rt.models.projector import Projector
from internvl_rt.models.vision import VISION_OPS, VisionTower
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters
from internvl_rt.runtime.batch import Chunk, make_batch
from internvl_rt.runtime.kv_cache import KvCache
from internvl_rt.runtime.platform import Graph, Platform


class InternVL:
    """Holds the weights, and no state between calls but captured graphs."""

    def __init__(
        self,
        config: ModelConfig,
        w: Parameters,
        opset: OpSet,
        dtype: torch.dtype,
        quant: str | None = None,
        pack: bool = False,
    ) -> None:
        """w: tensors on the platform where the model will run.

        quant: "int8" or "int4" for the language model; the vision tower keeps dtype. pack: the
        language model's weights also where they could be read in place.
        """
        self.config, self.ops, self.dtype, self.platform = config, opset, dtype, w.platform
        opset.require(*VISION_OPS, *decoder_ops(config.text))
        # The decoder begins with the largest weight: its pages of the file are let go before the
        # packed rest is there.
        self.decoder = Decoder(config.text, w, opset, dtype, quant, pack)
        self.vision = VisionTower(config.vision, w, config.vision_layers_used, opset, dtype)
        self.projector = Projector(config, w, opset, dtype)
        self._tiles = TileGraphs(self._encode, config.image_size, dtype, self.platform)
        self.capturable = not opset.has_reference

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[t, 3, height, width] -> [t, n, hidden] on the platform, in micro-batches of tiles.

        height and width are multiples of patch size times unshuffle ratio (28), n is their product
        over the square of that.
        """
        with self.platform.lock, self.platform.scope():
            pixels = self.platform.receive(pixels)
            captured = self.platform.tile_graphs and self.capturable and self._tiles.fit(pixels)
            encode = self._tiles if captured else self._encode
            sizes = micro_batches(len(pixels), self.platform.micro_batches)
            out = [encode(tiles) for tiles in pixels.split(sizes)]
            return self.platform.hand_out(torch.cat(out) if out else self._encode(pixels))

    def run(self, chunks: Sequence[Chunk], cache: KvCache) -> Tensor | None:
        """The decoder's logits, as it gives them, of prompts or parts of them."""
        batch = make_batch(chunks, self.decoder.rotary)
        moved = self.platform.upload(list(batch.metadata().values()))
        return self.decoder(batch.on_device(moved), cache)

    def _encode(self, pixels: Tensor) -> Tensor:
        grid = tuple(s // self.config.vision.patch_size for s in pixels.shape[-2:])
        return self.projector(self.vision(pixels)[:, 1:], grid)


def micro_batches(tiles: int, sizes: Sequence[int]) -> list[int]:
    """tiles as a sum of sizes, which are in descending order and end with 1; large ones first."""
    out: list[int] = []
    for size in sizes:
        out += [size] * (tiles // size)
        tiles %= size
    return out


class TileGraphs:
    """Micro-batches of square tiles of the trained size as captured graphs, by their number."""

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype,
        platform: Platform,
    ) -> None:
        self._encode, self._size, self._dtype, self._platform = encode, size, dtype, platform
        self._graphs: dict[int, tuple[Tensor, Graph]] = {}

    def fit(self, pixels: Tensor) -> bool:
        return pixels.shape[-2:] == (self._size, self._size)

    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels [t, 3, S, S] -> features [t, n, hidden]."""
        t = len(pixels)
        if t not in self._graphs:
            # In the model's dtype, to which the tower rounds pixels first of all.
            here = pixels.to(self._dtype, copy=True)
            self._graphs[t] = here, self._platform.capture(lambda: self._encode(here))
        here, graph = self._graphs[t]
        here.copy_(pixels)
        graph.replay()
        return graph.outputs.clone()
