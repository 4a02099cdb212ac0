"""Muon for the matrices of the layers, AdamW for everything else; float32 masters of all weights.

Muon: Jordan et al., 2024, momentum orthogonalised by a Newton-Schulz iteration; the update is
scaled to AdamW's size (Liu et al., 2025), so that one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def _orthogonal(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices to m [n, rows, columns], roughly."""
    x = m.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        g = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(g, g, g, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).float()


class Optimizer:
    """One step over named parameters, each with its own share of the learning rate."""

    def __init__(self, model: nn.Module, *, decay: float = 0.05) -> None:
        self.named = dict(model.named_parameters())
        self.masters = {n: p.detach().float().clone() for n, p in self.named.items()}
        self.first = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.second = {
            n: torch.zeros_like(m) for n, m in self.masters.items() if not _is_matrix(n, m)
        }
        self.decay, self.steps = decay, 0

    def state(self) -> dict:
        return {
            "masters": self.masters,
            "first": self.first,
            "second": self.second,
            "steps": self.steps,
        }

    def load(self, state: dict) -> None:
        """Takes over what fits: parameters that are new keep their start."""
        for mine, theirs in ((getattr(self, k), state[k]) for k in ("masters", "first", "second")):
            for name, tensor in theirs.items():
                if name in mine and mine[name].shape == tensor.shape:
                    mine[name].copy_(tensor)
        self.steps = state["steps"]
        self._publish(self.masters)

    @torch.no_grad()
    def step(self, rates: dict[str, float], clip: float = 1.0) -> float:
        """rates: learning rate by the beginning of the name; 0 freezes. Returns the norm."""
        chosen = {n: r for n in self.named if (r := _rate(n, rates)) > 0}
        grads = {n: self.named[n].grad.float() for n in chosen if self.named[n].grad is not None}
        if not grads:
            return 0.0
        self.steps += 1
        norm = float(torch.stack(torch._foreach_norm(list(grads.values()))).norm())
        if norm > clip:
            torch._foreach_mul_(list(grads.values()), clip / norm)
        alike: dict[tuple, list[str]] = defaultdict(list)
        for name, grad in grads.items():
            if name in self.second:
                self._adam(name, grad, chosen[name])
            else:
                alike[*grad.shape, chosen[name]].append(name)
        for (*_, rate), names in alike.items():
            self._muon(names, [grads[n] for n in names], rate)
        self._publish(grads)
        for p in self.named.values():
            p.grad = None
        return norm

    def _adam(self, name: str, grad: Tensor, rate: float) -> None:
        m, v, w = self.first[name], self.second[name], self.masters[name]
        m.lerp_(grad, 0.1)
        v.mul_(0.98).addcmul_(grad, grad, value=0.02)
        bias = (1 - 0.9 ** min(self.steps, 1000), 1 - 0.98 ** min(self.steps, 1000))
        if w.ndim > 1:
            w.mul_(1 - rate * self.decay)
        w.addcdiv_(m / bias[0], (v / bias[1]).sqrt_().add_(1e-8), value=-rate)

    def _muon(self, names: list[str], grads: list[Tensor], rate: float) -> None:
        momenta = [self.first[n] for n in names]
        torch._foreach_mul_(momenta, 0.95)
        torch._foreach_add_(momenta, grads)
        ahead = torch.stack(torch._foreach_add(grads, momenta, alpha=0.95))
        update = _orthogonal(ahead) * (0.2 * max(ahead.shape[1:]) ** 0.5)
        weights = [self.masters[n] for n in names]
        torch._foreach_mul_(weights, 1 - rate * self.decay)
        torch._foreach_add_(weights, list(update.unbind()), alpha=-rate)

    @torch.no_grad()
    def _publish(self, names: object) -> None:
        for name in names:
            self.named[name].copy_(self.masters[name])


def _is_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and ".layers." in name


def _rate(name: str, rates: dict[str, float]) -> float:
    return next((r for start, r in rates.items() if name.startswith(start)), 0.0)
