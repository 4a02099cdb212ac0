"""The language model: one decoder, driven by config flags."""

from __future__ import annotations

import torch
from torch import Tensor

from internvl_rt.config import TextConfig
from internvl_rt.layers import Linear, RmsNorm
from internvl_rt.models.rotary import Rotary
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters
from internvl_rt.runtime.batch import Batch
from internvl_rt.runtime.kv_cache import KvCache


class Attention:
    """Causal self-attention over the paged cache; queries and keys may be normalised per head."""

    def __init__(
        self, config: TextConfig, w: Parameters, i: int, opset: OpSet, dtype: torch.dtype
    ) -> None:
        self.ops = opset
        self.H, self.K, self.D = config.num_heads, config.num_kv_heads, config.head_dim
        name, eps = f"llm.{i}", config.rms_norm_eps
        self.qkv = Linear(opset, *w.linear(f"{name}.qkv"), dtype)
        self.o = Linear(opset, *w.linear(f"{name}.o"), dtype)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RmsNorm(opset, w[f"{name}.q_norm.weight"], eps, dtype)
            self.k_norm = RmsNorm(opset, w[f"{name}.k_norm.weight"], eps, dtype)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        batch: Batch,
        rope: tuple[Tensor, Tensor],
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        """Adds attention(x [T, hidden]) to residual and appends the tokens' keys and values."""
        H, K, D = self.H, self.K, self.D
        q, k, v = self.qkv(x).view(-1, H + 2 * K, D).split((H, K, K), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(q, out=q)
            self.k_norm(k, out=k)
        q = self.ops.rope(
            q, k, v, batch.positions, *rope, batch.sequence, k_cache, v_cache, batch.slots
        )
        a = self.ops.paged_attention(
            q, k_cache, v_cache, batch.page_table, batch.cu_q, batch.kv_lens, scale=D**-0.5
        )
        self.o(a.view(-1, H * D), residual=residual, out=residual)


class Mlp:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, w: Parameters, i: int, opset: OpSet, dtype: torch.dtype) -> None:
        self.ops = opset
        self.gate_up = Linear(opset, *w.linear(f"llm.{i}.gate_up"), dtype)
        self.down = Linear(opset, *w.linear(f"llm.{i}.down"), dtype)

    def __call__(self, x: Tensor, residual: Tensor) -> None:
        """Adds mlp(x [T, hidden]) to residual."""
        f = self.ops.gated_activation(self.gate_up(x), kind="silu")
        self.down(f, residual=residual, out=residual)


class DecoderLayer:
    """x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(
        self, config: TextConfig, w: Parameters, i: int, opset: OpSet, dtype: torch.dtype
    ) -> None:
        eps = config.rms_norm_eps
        self.norm1 = RmsNorm(opset, w[f"llm.{i}.norm1.weight"], eps, dtype)
        self.norm2 = RmsNorm(opset, w[f"llm.{i}.norm2.weight"], eps, dtype)
        self.attention = Attention(config, w, i, opset, dtype)
        self.mlp = Mlp(w, i, opset, dtype)

    def __call__(
        self, x: Tensor, batch: Batch, rope: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor
    ) -> None:
        """Updates x [T, hidden] in place."""
        self.attention(self.norm1(x), x, batch, rope, k_cache, v_cache)
        self.mlp(self.norm2(x), x)


class Decoder:
    def __init__(self, config: TextConfig, w: Parameters, opset: OpSet, dtype: torch.dtype) -> None:
        self.ops, self.width = opset, config.hidden_size
        self.embed = w.table("llm.embed.weight").to(dtype)
        self.head = Linear(opset, *w.linear("llm.head"), dtype)
        self.layers = [DecoderLayer(config, w, i, opset, dtype) for i in range(config.num_layers)]
        self.norm = RmsNorm(opset, w["llm.norm.weight"], config.rms_norm_eps, dtype)
        self.rotary = Rotary(config)

    def __call__(self, batch: Batch, cache: KvCache) -> Tensor | None:
        """float32 logits [R, V] of the rows that the batch asks for; None if it asks for none."""
        x = self.ops.embed_scatter(
            batch.ids, self.embed, image=batch.image, image_row=batch.image_row
        )  # [T, hidden]
        rope = self.rotary(batch.rope_lens)
        for layer, k, v in zip(self.layers, cache.k, cache.v, strict=True):
            layer(x, batch, rope, k, v)
        if batch.logits_rows is not None:
            if len(batch.logits_rows) == 0:
                return None
            x = x[batch.logits_rows]
        return self.head(self.norm(x), out_dtype=torch.float32)
