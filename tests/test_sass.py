"""What nvcc made of the kernels: instructions, registers and spills, read from the SASS.

Needs nvcc and cuobjdump (the triton wheel brings one), no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
ARCHS = ("80", "90a")
LOAD, STORE = r"\bLDG\.E\.128", r"\bSTG\.E\.128"


@dataclass(frozen=True)
class Budget:
    """What must hold for the kernels of one source whose mangled name matches a pattern."""

    kernel: str
    registers: int
    needs: tuple[str, ...] = ()


# Every kernel has to match a row; all matching rows hold.
BUDGETS = {
    "rms_norm": (
        # 1024 threads of 64 registers fill an SM's register file.
        Budget(r"rms_norm_kernel", registers=64),
        Budget(r"rms_norm_kernelI.*Lb1E", registers=64, needs=(LOAD, STORE)),
        # One vector a thread: full occupancy, 2048 threads an SM.
        Budget(r"rms_norm_kernelI.*Li1ELb1E", registers=32, needs=(LOAD, STORE)),
    ),
}


@dataclass
class Kernel:
    registers: int = -1
    stack: int = -1
    sass: list[str] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.sass)


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    wheel = spec and Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    path = shutil.which(name) or (wheel and shutil.which(name, path=str(wheel)))
    if not path:
        pytest.skip(f"no {name}: neither on the PATH nor in a triton wheel")
    return path


def _output(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _kernels(cuobjdump: str, binary: Path) -> dict[str, Kernel]:
    """The kernels of one architecture's cubin by mangled name."""
    kernels: dict[str, Kernel] = {}
    name = None
    for line in _output(cuobjdump, "-res-usage", binary).splitlines():
        if found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif name and (found := re.search(r"REG:(\d+) STACK:(\d+)", line)):
            kernels[name] = Kernel(int(found[1]), int(found[2]))
            name = None
    kernel = None
    for line in _output(cuobjdump, "-sass", binary).splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels[found[1]]
        elif kernel and re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            kernel.sass.append(line)
    return kernels


@pytest.fixture(scope="session", params=SOURCES, ids=lambda s: s.stem)
def compiled(request, tmp_path_factory):
    """(op, {arch: kernels}) of one source, built for every architecture of a release."""
    nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cuobjdump = _tool("cuobjdump")
    source = request.param
    folder = tmp_path_factory.mktemp("sass")
    found = {}
    for arch in ARCHS:
        cubin = folder / f"{source.stem}.{arch}.cubin"
        _output(
            *(nvcc, "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", f"-I{ROOT}"),
            *(source, "-o", cubin),
        )
        found[arch] = _kernels(cuobjdump, cubin)
    return source.stem, found


def test_every_source_has_a_budget():
    assert {source.stem for source in SOURCES} == set(BUDGETS)


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(compiled, arch):
    op, found = compiled
    kernels = found[arch]
    assert kernels, f"{op}: no kernel for sm_{arch}"
    for name, kernel in kernels.items():
        assert kernel.count(r"\bEXIT\b") > 0, f"{name}: no code read"
        # Local memory is a spill or an array that did not fit into registers.
        assert kernel.stack == 0, f"{name}: {kernel.stack} bytes of stack"
        assert kernel.count(r"\b(STL|LDL)\b") == 0, f"{name}: touches local memory"
        assert any(re.search(b.kernel, name) for b in BUDGETS[op]), f"{name}: no budget"
    for budget in BUDGETS[op]:
        matching = {n: k for n, k in kernels.items() if re.search(budget.kernel, n)}
        assert matching, f"{op}: no kernel matches {budget.kernel}"
        for name, kernel in matching.items():
            assert kernel.registers <= budget.registers, f"{name}: {kernel.registers} registers"
            for instruction in budget.needs:
                assert kernel.count(instruction) > 0, f"{name}: no {instruction}"
