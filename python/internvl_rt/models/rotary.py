"""Rotary frequencies and their rescalings (Su et al., 2021; Peng et al., 2023, "YaRN").

Some rescalings depend on a sequence's length. A table is then made for each sequence of a step by
itself, so that its bits do not depend on who shares the step; keys that are in the cache keep the
rotation that they were written with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from internvl_rt.config import RopeScaling, TextConfig


class Rotary:
    """Frequencies by sequence length, for `ops.rope`; made on the CPU."""

    def __init__(self, config: TextConfig) -> None:
        scaling = config.rope_scaling
        self._follows_length = scaling is not None and scaling.follows_length
        self._scale = 1.0 if scaling is None else scaling.attention_factor
        # One table serves a sequence for a step; a few serve all that decode within the limit.
        self._row = functools.lru_cache(maxsize=256)(functools.partial(inverse_frequencies, config))

    def __call__(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(inv_freq [B, D/2], scale [B]), float32, of sequences with these lengths."""
        rows = [self._row(n if self._follows_length else 0) for n in lengths]
        return torch.stack(rows), torch.full((len(rows),), self._scale, dtype=torch.float32)


def inverse_frequencies(config: TextConfig, length: int) -> Tensor:
    """float32 [D/2]: theta^(-2j/D), rescaled as the config says for a sequence of `length`."""
    scaling = config.rope_scaling
    if scaling is None:
        return _plain(config.rope_theta, config.head_dim)
    return _RESCALED[scaling.type](config, scaling, length)


def _plain(theta: float, D: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)


def _linear(config: TextConfig, scaling: RopeScaling, length: int) -> Tensor:
    return _plain(config.rope_theta, config.head_dim) / scaling.factor


def _dynamic(config: TextConfig, scaling: RopeScaling, length: int) -> Tensor:
    """NTK-aware: beyond the trained length the base grows with the sequence."""
    D, factor = config.head_dim, scaling.factor
    ratio = max(length / config.max_position_embeddings, 1.0)
    stretch = (factor * ratio - (factor - 1)) ** (D / (D - 2)) if ratio > 1 else 1.0
    return _plain(config.rope_theta * stretch, D)


def _llama3(config: TextConfig, scaling: RopeScaling, length: int) -> Tensor:
    """Long wavelengths are stretched by factor, short ones kept, those between blended."""
    f = _plain(config.rope_theta, config.head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * f / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * f / scaling.factor + smooth * f


def _longrope(config: TextConfig, scaling: RopeScaling, length: int) -> Tensor:
    """Every frequency has a factor of its own: one table within the trained length, one beyond."""
    beyond = length > scaling.original_max_position_embeddings
    some = scaling.long_factor if beyond else scaling.short_factor
    factors = torch.tensor(some, dtype=torch.float32)
    D = config.head_dim
    return 1.0 / (factors * config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D))


def _yarn(config: TextConfig, scaling: RopeScaling, length: int) -> Tensor:
    """Stretched below beta_slow turns within the trained length, kept above beta_fast."""
    D, base = config.head_dim, config.rope_theta

    def dimension(turns: float) -> float:
        periods = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return D * math.log(periods) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(D // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    f = _plain(base, D)
    return f / scaling.factor * ramp + f * (1 - ramp)


_RESCALED: Mapping[str, Callable[[TextConfig, RopeScaling, int], Tensor]] = MappingProxyType(
    {
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "longrope": _longrope,
        "yarn": _yarn,
    }
)
