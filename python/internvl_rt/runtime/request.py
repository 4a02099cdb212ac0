"""What a caller asks for, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Defaults are greedy.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    seed fixes the noise of a sampled answer. Tokens of stop_ids end the answer, once
    min_new_tokens have been given.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        def number(name: str, allowed: str, holds: Callable[[float], bool]) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} is {type(value).__name__}, expected a number {allowed}")
            if not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name} is {value}, allowed: {allowed}")

        def integer(name: str, low: int, high: int = 2**31 - 1) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} is {type(value).__name__}, expected an integer")
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, allowed: {low} to {high}")

        integer("max_new_tokens", 1)
        integer("min_new_tokens", 0)
        integer("top_k", 0)
        integer("seed", -(2**63), 2**63 - 1)
        # Logits are divided by it in float32.
        number("temperature", "0, or 1e-6 to 1e6", lambda x: x == 0 or 1e-6 <= x <= 1e6)
        number("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1)
        number("min_p", "0 to 1", lambda x: 0 <= x <= 1)
        number("repetition_penalty", "1e-6 to 1e6", lambda x: 1e-6 <= x <= 1e6)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, allowed: at most max_new_tokens "
                f"{self.max_new_tokens}"
            )


class Request:
    """One prompt on its way through the engine.

    finish_reason becomes "stop" (a stop token, or on_token asked for the end), "length",
    "cancelled" or "error".
    """

    def __init__(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        pixels: Tensor | None = None,
        image_positions: Sequence[int] = (),
        on_token: Callable[[int, int], bool] | None = None,
    ) -> None:
        """pixels [t, 3, S, S] fill the prompt's image_positions in order, features tile by tile.

        on_token is told every token that is not a stop token and its index; True ends the answer.
        Where Ctrl-C comes in between it is told the same token again, and answers the same.
        """
        self.prompt = torch.tensor(ids, dtype=torch.int64)
        self.params = params
        self.pixels = pixels
        self.on_token = on_token
        self.image: Tensor | None = None  # [N, hidden], once the pixels are encoded
        self.image_row: Tensor | None = None
        if len(image_positions):
            self.image_row = torch.full((len(ids),), -1)
            self.image_row[torch.tensor(image_positions)] = torch.arange(len(image_positions))
        self.tokens: list[int] = []  # generated, stop token included
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        # Engine state.
        self.pages: Tensor | None = None  # once it is admitted
        self.done = 0  # positions whose keys and values are in the cache

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def finish(self, reason: str, error: Exception | None = None) -> None:
        """Ends it, unless it has ended. Who sees the reason sees tokens and error as they stay."""
        if not self.finished:
            self.error = error
            self.finish_reason = reason
        self.image = self.pixels = None
