"""The next token of each row of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, Tolerance, give, register


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    history: Tensor | None = None,
    cu_history: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Samples one id per row, every parameter per row; a parameter that is None is neutral.

    logits: float32 [B, V]. temperature, top_p, min_p, repetition_penalty: float32 [B];
    top_k: int32 [B]. temperature 0 is argmax (lowest id on a tie), top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 are off.
    history: int64 [L] ids under penalty, cu_history: int32 [B+1], row b's are cu[b]:cu[b+1].
    seed, index: int64 [B]. The noise is Philox4x32-10 (Salmon et al., 2011) with key seed and
    counter (id // 4, index): a row's token depends on its logits, seed and index alone.

    Order: penalty, temperature, top-k, top-p, min-p, then Gumbel-max. Tokens that tie with the last
    one kept by a filter are kept too.
    Returns int64 [B]; -1 marks a row with NaN or +inf, or with no finite logit.
    Raises ValueError for parameters out of range; on a GPU, where looking would mean waiting, the
    row answers -1 instead.
    """
    parameters = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "history": history,
        "cu_history": cu_history,
        "seed": seed,
        "index": index,
    }
    run = _op.face(backend)
    if run is None:
        return give("sample", reference(logits, **parameters), out)
    if out is None:
        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    B, V = logits.shape
    workspace = torch.empty((B, -(-V // 4) * 4), dtype=torch.float32, device=logits.device)
    run(logits, **parameters, workspace=workspace, out=out)
    return out


def reference(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    history: Tensor | None = None,
    cu_history: Tensor | None = None,
    seed: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    def row(parameter: Tensor | None, b: int, neutral: float) -> float:
        return neutral if parameter is None else parameter[b].item()

    ids = []
    for b in range(logits.shape[0]):
        x = logits[b].float()
        if bool((x.isnan() | (x == torch.inf)).any()) or not bool(x.isfinite().any()):
            ids.append(-1)
            continue
        penalty = row(repetition_penalty, b, 1.0)
        if history is not None and cu_history is not None and penalty != 1.0:
            seen = history[int(cu_history[b]) : int(cu_history[b + 1])].unique()
            x = x.clone()
            x[seen] = torch.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
        if row(temperature, b, 0.0) == 0.0:
            ids.append(int(x.argmax()))
            continue
        x = x / row(temperature, b, 0.0)
        k = int(row(top_k, b, 0))
        if 0 < k < x.shape[0]:
            x = x.masked_fill(x < x.topk(k).values[-1], -torch.inf)
        p = row(top_p, b, 1.0)
        if p < 1.0:
            ordered = x.sort(descending=True).values
            mass = ordered.double().softmax(0).cumsum(0)
            # The first value at which the mass reaches p is the last one kept.
            x = x.masked_fill(x < ordered[int((mass < p).sum().clamp_max(len(x) - 1))], -torch.inf)
        m = row(min_p, b, 0.0)
        if m > 0.0:
            x = x.masked_fill(x < x.max() + torch.tensor(m).log().to(x.device), -torch.inf)
        noise = _gumbel(x.shape[0], int(row(seed, b, 0)), int(row(index, b, 0)))
        ids.append(int((x.double() + noise.to(x.device)).argmax()))
    return torch.tensor(ids, dtype=torch.int64).to(logits.device)


def _gumbel(n: int, seed: int, index: int) -> Tensor:
    """Gumbel noise for tokens 0 .. n-1, float64 [n]."""
    low = 0xFFFFFFFF
    token = torch.arange(n)
    a, b = token // 4, torch.full((n,), index & low)
    c, d = torch.full((n,), index >> 32 & low), torch.zeros(n, dtype=torch.int64)
    k0, k1 = seed & low, seed >> 32 & low

    def multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
        # 32 x 32 bits in halves: the product itself would overflow a signed 64-bit integer.
        high, lower = m >> 16, m & 0xFFFF
        p, q = x * high, x * lower
        carry = (p & 0xFFFF) * 65536 + q
        return (p >> 16) + (carry >> 32), carry & low

    for _ in range(10):
        ph, pl = multiply(a, 0xD2511F53)
        qh, ql = multiply(c, 0xCD9E8D57)
        a, b, c, d = qh ^ b ^ k0, ql, ph ^ d ^ k1, pl
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    random = torch.stack((a, b, c, d))[token % 4, token]
    u = ((random >> 8).double() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(u))


def cost(logits: Tensor, **_: Any) -> Cost:
    return Cost(logits.numel() * 4)


def _case(name: str, B: int, V: int, *, history: int = 0, **options: Any) -> Case:
    flags = {k: options.pop(k) for k in ("bench", "slow") if k in options}

    def build(make: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = {"logits": make.normal(B, V, std=3.0, dtype=torch.float32)}
        for key, value in options.items():
            dtype = torch.int32 if key == "top_k" else torch.float32
            arguments[key] = torch.full((B,), value, dtype=dtype)
        if history:
            arguments["history"] = make.integers(0, V, B * history)
            arguments["cu_history"] = torch.arange(B + 1, dtype=torch.int32) * history
        if options:
            arguments["seed"] = make.integers(-(2**62), 2**62, B)
            arguments["index"] = make.integers(0, 2**40, B)
        return arguments

    return Case(name, build, dtypes=(torch.float32,), **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape, temperature=0.6, top_p=0.95).build(make)


_op = register(
    Op(
        name="sample",
        function=sample,
        reference=reference,
        faces={"native": _C.sample, "cuda": _C.sample},
        cost=cost,
        dims="B rows, V vocabulary, L ids under penalty",
        shaped=_shaped,
        shape_help="BxV",
        tolerance=Tolerance(exact=True),
        cases=(
            _case("empty", 0, 10),
            _case("odd_greedy", 5, 37),
            _case("one", 3, 1, temperature=1.0),
            _case("temperature", 33, 600, temperature=0.7),
            _case("top_k", 33, 600, temperature=1.0, top_k=5),
            _case("top_p", 33, 601, temperature=1.3, top_p=0.8),
            _case("min_p", 33, 600, temperature=1.0, min_p=0.1),
            _case(
                "all",
                65,
                300,
                temperature=0.9,
                top_k=40,
                top_p=0.9,
                min_p=0.02,
                repetition_penalty=1.3,
                history=20,
            ),
            _case("penalty_greedy", 9, 50, repetition_penalty=2.0, history=10),
            _case("qwen2_greedy", 1, 151674, bench=True),
            _case("qwen2_top_p", 1, 151674, temperature=0.6, top_p=0.95, bench=True),
        ),
    )
)
