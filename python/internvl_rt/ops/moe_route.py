"""Mixture of experts: which experts a token goes to, and in which order experts take tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


class Routing(NamedTuple):
    """The T * k assignments of tokens to experts, by token and sorted by expert.

    ids: int32 [T, k], a token's experts, the largest logit first; weights: float32 [T, k].
    tokens: int32 [T * k], the token at each sorted place; places: int32 [T, k], the sorted place of
    each assignment; offsets: int32 [E + 1], expert e has places offsets[e] to offsets[e + 1].
    """

    ids: Tensor
    weights: Tensor
    tokens: Tensor
    places: Tensor
    offsets: Tensor


def moe_route(
    logits: Tensor,
    *,
    top_k: int,
    normalize: bool,
    out: Any = None,
    backend: str | None = None,
) -> Routing:
    """The top_k experts of every token, their weights, and the assignments sorted by expert.

    logits: [T, E], float32 or bfloat16, contiguous in E. A row's experts are those of its largest
        logits, the lower id first among equals; a row with NaN has NaN weights.
    normalize: the weights are the softmax over the chosen logits (Qwen3-MoE with norm_topk_prob:
        softmax over all experts, divided by the sum of the chosen; GPT-OSS: softmax of the top k,
        the same number), else the softmax over all E of which the chosen are kept.
    Within an expert, tokens stand in ascending order. grouped_linear takes tokens and offsets,
    moe_combine takes weights and places.
    Returns a Routing (out: its five tensors). Raises ValueError for shapes or a top_k that do not
    fit.
    """
    run = _op.face(backend)
    if run is None:
        result = reference(logits, top_k=top_k, normalize=normalize)
        return Routing(*give("moe_route", result, out))
    if out is None:
        (T, E), device = logits.shape if logits.dim() == 2 else (0, 0), logits.device
        shapes = ((T, top_k), (T, top_k), (T * top_k,), (T, top_k), (E + 1,))
        out = [
            torch.empty(
                [max(n, 0) for n in shape],
                dtype=torch.float32 if name == "weights" else torch.int32,
                device=device,
            )
            for name, shape in zip(Routing._fields, shapes, strict=True)
        ]
    routing = Routing(*out)
    run(logits, top_k, normalize, *routing)
    return routing


def reference(logits: Tensor, *, top_k: int, normalize: bool) -> Routing:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values, ids = (v[:, :top_k] for v in x.sort(dim=-1, descending=True, stable=True))
    weights = values.softmax(-1) if normalize else x.softmax(-1).gather(-1, ids)
    flat = ids.flatten()
    order = flat.argsort(stable=True)  # [T * k] assignments by expert
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(flat, minlength=x.shape[1])
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return Routing(
        ids.int(), weights, (order // top_k).int(), places.view_as(ids).int(), offsets.int()
    )


def cost(logits: Tensor, *, top_k: int, **_: Any) -> Cost:
    T, E = logits.shape
    return Cost(logits.numel() * logits.element_size() + 16 * T * top_k + 4 * E, 2 * T * E)


def _case(name: str, T: int, E: int, k: int, *, normalize: bool = True, **flags: bool) -> Case:
    def build(make: Inputs) -> dict[str, Any]:
        return {"logits": make.normal(T, E, std=2.0), "top_k": k, "normalize": normalize}

    return Case(name, build, **flags)


def _ties(make: Inputs) -> dict[str, Any]:
    logits = make.integers(-2, 3, 40, 30).to(make.dtype)[:, 3:24]
    logits[7] = 0.0
    return {"logits": logits, "top_k": 6, "normalize": False}


def _masked(make: Inputs) -> dict[str, Any]:
    logits = make.normal(9, 20)
    logits[2, :17] = -torch.inf
    return {"logits": logits, "top_k": 5, "normalize": True}


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape).build(make)


_op = register(
    Op(
        name="moe_route",
        function=moe_route,
        reference=reference,
        faces={"native": _C.moe_route, "cuda": _C.moe_route},
        cost=cost,
        dims="T tokens, E experts, k experts of a token",
        shaped=_shaped,
        shape_help="TxExk",
        cases=(
            _case("empty", 0, 8, 2),
            _case("one", 1, 1, 1),
            _case("odd", 5, 7, 3),
            _case("odd_all", 3, 37, 37, normalize=False),
            _case("tail_all_probabilities", 33, 21, 4, normalize=False),
            Case("ties", _ties),
            Case("masked", _masked),
            _case("gpt_oss_20b", 40, 32, 4),
            _case("qwen3_30b_a3b_decode", 1, 128, 8, bench=True),
            _case("qwen3_30b_a3b_prefill", 320, 128, 8, bench=True, slow=True),
        ),
    )
)
