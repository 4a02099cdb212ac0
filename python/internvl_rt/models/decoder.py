"""The language model: one decoder, driven by config flags."""

from __future__ import annotations

import torch
from torch import Tensor

from internvl_rt.config import TextConfig
from internvl_rt.layers import Linear, RmsNorm
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters
from internvl_rt.runtime.batch import Batch
from internvl_rt.runtime.kv_cache import KvCache


class DecoderLayer:
    """x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(
        self, config: TextConfig, w: Parameters, i: int, opset: OpSet, dtype: torch.dtype
    ) -> None:
        self.ops = opset
        self.H, self.K, self.D = config.num_heads, config.num_kv_heads, config.head_dim
        name, eps = f"llm.{i}", config.rms_norm_eps
        self.norm1 = RmsNorm(opset, w[f"{name}.norm1.weight"], eps, dtype)
        self.norm2 = RmsNorm(opset, w[f"{name}.norm2.weight"], eps, dtype)
        self.qkv = Linear(opset, *w.linear(f"{name}.q", f"{name}.k", f"{name}.v"), dtype)
        self.o = Linear(opset, *w.linear(f"{name}.o"), dtype)
        self.gate_up = Linear(opset, *w.linear(f"{name}.gate", f"{name}.up"), dtype)
        self.down = Linear(opset, *w.linear(f"{name}.down"), dtype)

    def __call__(
        self, x: Tensor, batch: Batch, rope: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor
    ) -> None:
        """Updates x [T, hidden] in place and appends the tokens' keys and values."""
        H, K, D = self.H, self.K, self.D
        q, k, v = self.qkv(self.norm1(x)).view(-1, H + 2 * K, D).split((H, K, K), dim=1)
        q = self.ops.rope(
            q, k, v, batch.positions, *rope, batch.sequence, k_cache, v_cache, batch.slots
        )
        a = self.ops.paged_attention(
            q, k_cache, v_cache, batch.page_table, batch.cu_q, batch.kv_lens, scale=D**-0.5
        )
        self.o(a.view(-1, H * D), residual=x, out=x)
        f = self.ops.gated_activation(self.gate_up(self.norm2(x)), kind="silu")
        self.down(f, residual=x, out=x)


class Decoder:
    def __init__(self, config: TextConfig, w: Parameters, opset: OpSet, dtype: torch.dtype) -> None:
        self.ops, self.width = opset, config.hidden_size
        self.embed = w.table("llm.embed.weight").to(dtype)
        self.head = Linear(opset, *w.linear("llm.head"), dtype)
        self.layers = [DecoderLayer(config, w, i, opset, dtype) for i in range(config.num_layers)]
        self.norm = RmsNorm(opset, w["llm.norm.weight"], config.rms_norm_eps, dtype)
        D = config.head_dim
        exponent = torch.arange(0, D, 2, dtype=torch.float32) / D
        self.inv_freq = 1.0 / config.rope_theta**exponent  # [D/2]

    def __call__(self, batch: Batch, cache: KvCache) -> Tensor | None:
        """float32 logits [R, V] of the rows that the batch asks for; None if it asks for none."""
        x = self.ops.embed_scatter(
            batch.ids, self.embed, image=batch.image, image_row=batch.image_row
        )  # [T, hidden]
        B = len(batch.kv_lens)
        rope = (self.inv_freq.expand(B, -1).contiguous(), torch.ones(B))
        for layer, k, v in zip(self.layers, cache.k, cache.v, strict=True):
            layer(x, batch, rope, k, v)
        if batch.logits_rows is not None:
            if len(batch.logits_rows) == 0:
                return None
            x = x[batch.logits_rows]
        return self.head(self.norm(x), out_dtype=torch.float32)
