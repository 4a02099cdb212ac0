"""The language model: one decoder, driven by config flags."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internvl_rt.config import TextConfig
from internvl_rt.layers import GroupedLinear, Linear, RmsNorm
from internvl_rt.models.rotary import Rotary
from internvl_rt.ops import OpSet
from internvl_rt.parameters import Parameters
from internvl_rt.runtime.batch import Batch
from internvl_rt.runtime.kv_cache import KvCache


def weight_format(name: str, quant: str | None) -> str | None:
    """The format of a weight of a decoder that is quantised to quant; None for the model's dtype.

    The head stays at int8: it is read once per token as the layers are, and errors in logits are
    errors in the answer. Embeddings, norms and routers are not quantised.
    """
    if quant is None:
        return None
    formats = {"qkv": quant, "o": quant, "gate_up": quant, "down": quant, "head": "int8"}
    return formats.get(name.rsplit(".", 1)[-1])


def decoder_ops(config: TextConfig) -> tuple[str, ...]:
    """The ops that a decoder with this config calls."""
    names = ("embed_scatter", "rms_norm", "linear", "rope", "paged_attention")
    names += ("gated_linear", "gated_activation", "sample")
    experts = ("moe_route", "grouped_gated_linear", "grouped_linear", "moe_combine")
    return names if config.experts is None else names + experts


@dataclass(frozen=True)
class _Maker:
    """Makes the decoder's layers from the stored weights. quant: as of weight_format; pack: as of
    Linear."""

    config: TextConfig
    w: Parameters
    opset: OpSet
    dtype: torch.dtype
    quant: str | None
    pack: bool

    def linear(self, name: str, *, gated: bool = False) -> Linear:
        form = weight_format(name, self.quant)
        return Linear(self.opset, *self.w.linear(name), self.dtype, form, gated, self.pack)

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(
            self.opset,
            self.w[f"{name}.weight"],
            self.config.rms_norm_eps,
            self.dtype,
            weight_in_fp32=self.config.norm_weight_in_fp32,
        )


class Attention:
    """Causal self-attention over the paged cache, within the layer's window where it has one.

    Queries and keys may be normalised per head; sinks take weight from the keys.
    """

    def __init__(self, make: _Maker, i: int) -> None:
        config = make.config
        self.ops = make.opset
        self.H, self.K, self.D = config.num_heads, config.num_kv_heads, config.head_dim
        name = f"llm.{i}"
        self.qkv = make.linear(f"{name}.qkv")
        self.o = make.linear(f"{name}.o")
        self.window = config.windows[i]
        self.sinks = make.w[f"{name}.sinks"].to(make.dtype) if config.sinks else None
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = make.norm(f"{name}.q_norm")
            self.k_norm = make.norm(f"{name}.k_norm")

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        batch: Batch,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> None:
        """Adds attention(x [T, hidden]) to residual and appends the tokens' keys and values."""
        H, K, D = self.H, self.K, self.D
        q, k, v = self.qkv(x, phase=batch.phase).view(-1, H + 2 * K, D).split((H, K, K), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(q, out=q)
            self.k_norm(k, out=k)
        q = self.ops.rope(
            q,
            k,
            v,
            batch.positions,
            batch.inv_freq,
            batch.scale,
            batch.sequence,
            k_cache,
            v_cache,
            batch.slots,
        )
        a = self.ops.paged_attention(
            q,
            k_cache,
            v_cache,
            batch.page_table,
            batch.cu_q,
            batch.kv_lens,
            scale=D**-0.5,
            window=self.window,
            sinks=self.sinks,
            phase=batch.phase,
        )
        self.o(a.view(-1, H * D), residual=residual, phase=batch.phase, out=residual)


class Mlp:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, make: _Maker, i: int) -> None:
        self.ops, self.gate = make.opset, make.config.gate
        self.gate_up = make.linear(f"llm.{i}.gate_up", gated=True)
        self.down = make.linear(f"llm.{i}.down")

    def __call__(self, x: Tensor, residual: Tensor, phase: str) -> None:
        """Adds mlp(x [T, hidden]) to residual."""
        weight, bias = self.gate_up.weight, self.gate_up.bias
        f = self.ops.gated_linear(x, weight, bias=bias, kind=self.gate, phase=phase)
        self.down(f, residual=residual, phase=phase, out=residual)


class Experts:
    """The weighted sum of the MLPs that a router chooses for a token."""

    def __init__(self, make: _Maker, i: int) -> None:
        config = make.config
        assert config.experts is not None
        self.ops, self.config, self.gate = make.opset, config.experts, config.gate
        name, count = f"llm.{i}", config.experts.count
        self.router = make.linear(f"{name}.router")

        def grouped(part: str, *, gated: bool = False) -> GroupedLinear:
            each = (make.w.linear(f"{name}.experts.{e}.{part}") for e in range(count))
            form = weight_format(part, make.quant)
            return GroupedLinear(make.opset, each, count, make.dtype, form, gated)

        self.gate_up, self.down = grouped("gate_up", gated=True), grouped("down")

    def __call__(self, x: Tensor, residual: Tensor, phase: str) -> None:
        """Adds the chosen experts of x [T, hidden] to residual."""
        logits = self.router(x, out_dtype=torch.float32, phase=phase)  # [T, E]
        routing = self.ops.moe_route(
            logits, top_k=self.config.top_k, normalize=self.config.normalize
        )
        weight, bias = self.gate_up.weight, self.gate_up.bias
        f = self.ops.grouped_gated_linear(
            x,
            weight,
            routing.offsets,
            rows=routing.tokens,
            bias=bias,
            kind=self.gate,
            phase=phase,
        )  # [T * k, width], by expert
        f = self.down(f, routing.offsets, phase=phase)
        self.ops.moe_combine(f, routing.weights, routing.places, residual=residual, out=residual)


class DecoderLayer:
    """x += attention(norm1(x)); x += mlp(norm2(x)), where the MLP may be a mixture of experts."""

    def __init__(self, make: _Maker, i: int) -> None:
        self.norm1 = make.norm(f"llm.{i}.norm1")
        self.norm2 = make.norm(f"llm.{i}.norm2")
        self.attention = Attention(make, i)
        self.mlp = (Experts if make.config.mixtures[i] else Mlp)(make, i)

    def __call__(self, x: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor) -> None:
        """Updates x [T, hidden] in place."""
        self.attention(self.norm1(x), x, batch, k_cache, v_cache)
        self.mlp(self.norm2(x), x, batch.phase)


class Decoder:
    def __init__(
        self,
        config: TextConfig,
        w: Parameters,
        opset: OpSet,
        dtype: torch.dtype,
        quant: str | None = None,
        pack: bool = False,
    ) -> None:
        """quant: "int8" or "int4" for the linear layers; see weight_format. pack: as of Linear."""
        self.ops, self.width = opset, config.hidden_size
        self.embed = w.table("llm.embed.weight").to(dtype)
        make = _Maker(config, w, opset, dtype, quant, pack)
        self.head = make.linear("llm.head")
        self.layers = [DecoderLayer(make, i) for i in range(config.num_layers)]
        self.norm = make.norm("llm.norm")
        self.rotary = Rotary(config)

    def __call__(self, batch: Batch, cache: KvCache) -> Tensor | None:
        """float32 logits [R, V] of the rows that the batch asks for; None if it asks for none.

        The batch's tensors and the cache are where the weights are.
        """
        x = self.ops.embed_scatter(
            batch.ids, self.embed, image=batch.image, image_row=batch.image_row
        )  # [T, hidden]
        for layer, k, v in zip(self.layers, cache.k, cache.v, strict=True):
            layer(x, batch, k, v)
        if batch.logits_rows is not None:
            if len(batch.logits_rows) == 0:
                return None
            x = x[batch.logits_rows]
        return self.head(self.norm(x), out_dtype=torch.float32, phase=batch.phase)
