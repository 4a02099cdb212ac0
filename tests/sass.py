"""Reads kernels back from a cubin: registers, stack and instructions."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

LOAD, STORE = r"\bLDG\.E\.128\b", r"\bSTG\.E\.128\b"
MATRIX = r"\bHG?MMA\b"
NARROW = r"\b(LDG|STG)\.E\b(?!\.128)"


@dataclass
class Kernel:
    registers: int = -1
    stack: int = -1
    sass: list[str] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.sass)

    def check_local_memory(self, name: str) -> None:
        """Local memory is a spill, or an array that did not fit into registers."""
        assert self.count(r"\b(EXIT|BPT)\b") > 0, f"{name}: no code read"
        assert self.stack == 0, f"{name}: {self.stack} bytes of stack"
        assert self.count(r"\b(STL|LDL)\b") == 0, f"{name}: touches local memory"


def tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    wheel = spec and Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    path = shutil.which(name) or (wheel and shutil.which(name, path=str(wheel)))
    if not path:
        pytest.skip(f"no {name}: neither on the PATH nor in a triton wheel")
    return path


def output(*command: str | Path) -> str:
    """What a command prints, warnings included."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_kernels(binary: Path) -> dict[str, Kernel]:
    """The kernels of one architecture's cubin by mangled name."""
    cuobjdump = tool("cuobjdump")
    kernels: dict[str, Kernel] = {}
    name = None
    for line in output(cuobjdump, "-res-usage", binary).splitlines():
        if found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif name and (found := re.search(r"REG:(\d+) STACK:(\d+)", line)):
            kernels[name] = Kernel(int(found[1]), int(found[2]))
            name = None
    kernel = None
    for line in output(cuobjdump, "-sass", binary).splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels[found[1]]
        elif kernel and re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            kernel.sass.append(line)
    return kernels
