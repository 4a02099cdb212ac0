"""OpenVINO as a peer of bench/cpu.py, where it is installed: `pip install openvino`.

The graphs are traced from transformers' own modules, with the cache as OpenVINO's state, and only
the last position's logits. Weights keep their values; the precision hint is the bench's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn


class _Encode(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output


class _Past:
    """What transformers' attention asks of a cache: keys and values of the layers, in turn."""

    is_compileable = False

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self.tensors = list(past)

    def get_seq_length(self, *_: Any) -> int:
        return self.tensors[0].shape[2]

    def update(self, k: Tensor, v: Tensor, i: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        pair = slice(2 * i, 2 * i + 2)
        self.tensors[pair] = (torch.cat(x, 2) for x in zip(self.tensors[pair], (k, v), strict=True))
        return self.tensors[2 * i], self.tensors[2 * i + 1]


class _Step(nn.Module):
    """ids [B, T] and the past -> logits of the last position [B, V] and what is past then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        text, cache = self.model.model.language_model, _Past(past)
        seen, n = past[0].shape[2], ids.shape[1]
        positions = torch.arange(n) + seen
        later = torch.arange(n + seen) > positions[:, None]
        mask = torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)
        x = text(
            inputs_embeds=text.embed_tokens(ids),
            position_ids=positions[None],
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=True,
        )
        return self.model.lm_head(x.last_hidden_state[:, -1]), *cache.tensors


class OpenVino:
    version = ov.__version__

    def __init__(self, model: nn.Module, dtype: torch.dtype, threads: int) -> None:
        """model: an InternVLForConditionalGeneration in float32."""
        hint = "bf16" if dtype == torch.bfloat16 else "f32"
        self._config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        config = model.config.text_config
        self._heads = config.num_key_value_heads
        self._width = config.hidden_size // config.num_attention_heads
        self._tensors = 2 * config.num_hidden_layers
        side = model.config.vision_config.image_size
        side = side[0] if isinstance(side, (list, tuple)) else side
        past = [torch.zeros(1, self._heads, 3, self._width)] * self._tensors
        with torch.inference_mode():
            encode = ov.convert_model(_Encode(model), example_input=torch.zeros(2, 3, side, side))
            self._step = ov.convert_model(
                _Step(model), example_input=(torch.zeros(1, 4, dtype=torch.int64), *past)
            )
        self._encode = ov.Core().compile_model(encode, "CPU", self._config)
        self._compiled: dict[int, Any] = {}

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, threads: int) -> OpenVino:
        from transformers import InternVLForConditionalGeneration

        model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return cls(model.eval(), dtype, threads)

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self._encode(pixels.float().numpy())[0])

    def logits(self, ids: Tensor) -> Tensor:
        request = self._request(len(ids))
        return torch.from_numpy(request.infer([ids.numpy()])[0])

    def prefill(self, ids: Tensor) -> list[int]:
        return self.logits(ids).argmax(-1).tolist()

    def decoder(self, ids: Tensor, steps: int) -> Callable[[], Any]:
        request = self._request(len(ids))

        def run(ids: Tensor) -> Tensor:
            logits = torch.from_numpy(request.infer([ids.numpy()])[0])
            return logits.argmax(-1, keepdim=True)

        state = [run(ids)]

        def step() -> None:
            state[0] = run(state[0])

        return step

    def end_decoding(self) -> None:
        pass

    def _request(self, batch: int) -> Any:
        """A request without a past, for so many rows."""
        if batch not in self._compiled:
            model = self._step.clone()
            names = {}
            for i in range(self._tensors):
                before, after = model.inputs[1 + i], model.outputs[1 + i]
                before.get_tensor().set_names({f"past.{i}"})
                after.get_tensor().set_names({f"present.{i}"})
                before.get_node().set_partial_shape(
                    ov.PartialShape([batch, self._heads, -1, self._width])
                )
                names[f"past.{i}"] = f"present.{i}"
            model.inputs[0].get_node().set_partial_shape(ov.PartialShape([batch, -1]))
            model.validate_nodes_and_infer_types()
            apply_make_stateful_transformation(model, names)
            self._compiled[batch] = ov.Core().compile_model(model, "CPU", self._config)
        request = self._compiled[batch].create_infer_request()
        request.reset_state()
        return request
