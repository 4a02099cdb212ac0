"""The emulator of kernels/cuda/emu as a library: compiled here, called with params structs."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "cuda"
# Punning through pointers is how kernels are written; unknown pragmas are nvcc's.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-fno-strict-aliasing", "-ffp-contract=off", f"-I{ROOT}"]


class Finding(Exception):  # noqa: N818
    """What the emulator reports."""


class Emulator:
    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.ivr_emu_op.restype = ctypes.c_char_p
        self._library.ivr_emu_op.argtypes = [ctypes.c_size_t]
        self._library.ivr_emu_params_size.restype = ctypes.c_size_t
        self._run = self._library.ivr_emu_run
        self._run.argtypes = [
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]

    def ops(self) -> list[str]:
        names = (self._library.ivr_emu_op(i) for i in itertools.count())
        return [name.decode() for name in itertools.takewhile(bool, names)]

    def gemm_config(self, params: ctypes.Structure) -> str:
        """The matrix product of Hopper that takes a call of linear, or "none"."""
        name = ctypes.create_string_buffer(128)
        self._library.ivr_emu_gemm_config(ctypes.byref(params), name, ctypes.c_size_t(len(name)))
        return name.value.decode()

    def run(self, op: str, params: ctypes.Structure, seed: int = 0, *, capability: int = 80) -> str:
        """Runs an op and returns its launch configuration; Finding if something is wrong."""
        size = self._library.ivr_emu_params_size(op.encode())
        assert size == ctypes.sizeof(params), f"{op}: params differ from kernels/{op}.h"
        report = ctypes.create_string_buffer(1024)
        arguments = (ctypes.byref(params), capability, seed, report, len(report))
        status = self._run(op.encode(), *arguments)
        assert status in (0, 1), f"no emulated op {op}"
        if status == 1:
            raise Finding(f"{op}: {report.value.decode()}")
        return report.value.decode()


UNITS = sorted((SOURCES / "emu").glob("*.cpp"))


def compile_units(units: list[Path], folder: Path, *flags: str) -> list[Path]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulator with")
    objects = [folder / f"{unit.stem}.o" for unit in units]

    def compile_unit(unit: Path, target: Path) -> subprocess.CompletedProcess[str]:
        command = [compiler, *FLAGS, *flags, "-c", str(unit), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(compile_unit, units, objects):
            assert done.returncode == 0, done.stderr
    return objects


def link(objects: list[Path], library: Path) -> Emulator:
    subprocess.run(["g++", "-shared", "-o", str(library), *map(str, objects)], check=True)
    return Emulator(library)
