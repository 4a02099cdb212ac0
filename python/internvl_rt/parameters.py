"""A model's tensors by internal name, straight from the mapped checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor

from internvl_rt.config import ModelConfig, VisionConfig
from internvl_rt.runtime.platform import CPU, Platform
from internvl_rt.weights import Checkpoint, Source, resolve, resolve_vision


class Parameters:
    """Hands tensors out for packing. The file's pages of a tensor are let go when the next one is
    asked for, so loading peaks at one layer above the packed model."""

    def __init__(
        self, checkpoint: Checkpoint, sources: dict[str, Source], platform: Platform = CPU
    ) -> None:
        """platform: where the tensors are wanted."""
        self._checkpoint, self._sources, self.platform = checkpoint, sources, platform
        self._held: list[Source] = []
        self._done = 0
        self._progress = Progress(len(sources))

    @classmethod
    def of_model(
        cls, checkpoint: Checkpoint, config: ModelConfig, platform: Platform = CPU
    ) -> Parameters:
        return cls(checkpoint, resolve(checkpoint, config), platform)

    @classmethod
    def of_vision(
        cls, checkpoint: Checkpoint, config: VisionConfig, platform: Platform = CPU
    ) -> Parameters:
        return cls(checkpoint, resolve_vision(checkpoint, config), platform)

    def __getitem__(self, name: str) -> Tensor:
        """A small tensor, copied: it stays in use while the file may go away."""
        self._begin([name])
        stored = self._checkpoint.load(self._sources[name])
        there = self.platform.load(stored)
        return there.clone() if there is stored else there

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self[f"{name}.weight"], self[f"{name}.bias"]

    def table(self, name: str) -> Tensor:
        """A large tensor that is read row by row: on the CPU a view of the mapped file."""
        self._begin([name])
        stored = self._checkpoint.load(self._sources[name])
        there = self.platform.load(stored)
        if there is stored:
            self._held.clear()
        return there

    def linear(self, name: str) -> tuple[list[Tensor], list[Tensor] | None]:
        """(weights, biases) of a layer, to be stacked along their rows; biases None without any.

        On the CPU views of the file, whose pages are let go at the next call: whoever keeps a view
        reads them again.
        """
        names = [n for n in (f"{name}.weight", f"{name}.bias") if n in self._sources]
        self._begin(names)
        weights, *biases = (
            [self.platform.load(part) for part in self._checkpoint.parts(self._sources[n])]
            for n in names
        )
        return weights, biases[0] if biases else None

    def finish(self) -> None:
        self._begin([])
        self._progress.close()

    def _begin(self, names: Sequence[str]) -> None:
        for source in self._held:
            self._checkpoint.release(source)
        self._held = [self._sources[n] for n in names]
        self._done += len(names)
        self._progress.show(self._done)


class Progress:
    """One line on a terminal, nothing anywhere else."""

    WIDTH = 30

    def __init__(self, total: int) -> None:
        self._total = total
        self._shown = -1
        self._on = sys.stderr is not None and sys.stderr.isatty()

    def show(self, done: int) -> None:
        filled = done * self.WIDTH // max(self._total, 1)
        if self._on and filled != self._shown:
            self._shown = filled
            bar = "#" * filled + "." * (self.WIDTH - filled)
            sys.stderr.write(f"\rloading weights [{bar}]")
            sys.stderr.flush()

    def close(self) -> None:
        if self._on and self._shown >= 0:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
