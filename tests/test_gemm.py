"""The matrix products of Hopper: what nvcc made of them, what their launches ask for, and the
headers that they are built from.

Their epilogue and the choice among them are in test_emulation.py. Nothing here needs a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from internvl_rt import _C, ops
from internvl_rt.ops.registry import on_device
from sass import LOAD, STORE, Kernel, output, read_kernels, tool

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "kernels" / "cuda" / "cutlass"
UNITS = sorted(path.stem for path in FOLDER.glob("*.cu"))

# ---- machine code, as it stands in the extension -----------------------------------------------

WGMMA, COPY, MULTICAST = r"\bHGMMA\b", r"\bUTMALDG\.\dD\b", r"\bUTMALDG\.\dD\.MULTICAST\b"
REGISTERS = r"\bUSETMAXREG\b"
# 384 threads: a block has the register file of a multiprocessor for itself.
LIMIT = 168


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, Kernel]:
    """The kernels of the built extension by unit, from its code for sm_90a."""
    if not _C.has_gemm:
        pytest.skip("this build has no matrix products of Hopper: CUDA is off, or not for sm_90a")
    folder = tmp_path_factory.mktemp("sass")
    cuobjdump = tool("cuobjdump")
    listed = output(cuobjdump, "--list-elf", _C.__file__)
    found = {}
    for unit in UNITS:
        (name,) = re.findall(rf"\S*\b{unit}\S*sm_90a\.cubin", listed)
        done = subprocess.run(
            [cuobjdump, "--extract-elf", name, _C.__file__], cwd=folder, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        (kernel,) = read_kernels(folder / name).values()
        found[unit] = kernel
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_machine_code(kernels, unit):
    kernel = kernels[unit]
    kernel.check_local_memory(unit)
    assert kernel.registers <= LIMIT, f"{unit}: {kernel.registers} registers"
    for instruction in (WGMMA, COPY, MULTICAST, REGISTERS, STORE):
        assert kernel.count(instruction) > 0, f"{unit}: no {instruction}"
    assert kernel.count(r"\bHMMA\b") == 0, f"{unit}: has products of mma.sync"
    assert (kernel.count(LOAD) > 0) == unit.startswith("residual")
    assert kernel.count(r"\bSTG\.E\b(?!\.128)") == 0, f"{unit}: stores narrowly"


# ---- what a launch asks of the copy engine -----------------------------------------------------


def _nvcc() -> str:
    found = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc")
    return found


def _cmake_program() -> str:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    return cmake


def _cmake(*definitions: str) -> subprocess.CompletedProcess[str]:
    command = [
        _cmake_program(),
        *(f"-D{d}" for d in definitions),
        "-P",
        str(FOLDER / "headers.cmake"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def headers(tmp_path_factory) -> str:
    nowhere = tmp_path_factory.mktemp("cutlass")
    done = _cmake(f"PYTHON={sys.executable}", f"INTO={nowhere}")
    if "pip could not download" in done.stderr:
        pytest.skip("pip cannot download CUTLASS here")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().removeprefix("-- ")


@dataclass
class Map:
    """A tensor map: for every mode its size, stride in bytes and box."""

    address: int
    swizzle: int
    modes: list[tuple[int, int, int]]


@dataclass
class Launch:
    grid: tuple[int, ...]
    threads: int
    shared: int
    stages: int
    workspace: int
    sums: tuple[int, int]
    x: Map
    weight: Map


@pytest.fixture(scope="module")
def launches(headers, tmp_path_factory):
    """(M, N, K, x_m, multiprocessors) -> kernel -> what it would be launched with."""
    program = tmp_path_factory.mktemp("maps") / "maps"
    output(
        *(_nvcc(), "-std=c++20", "-O0", "-DNDEBUG", "--expt-relaxed-constexpr"),
        *("-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT}", "-isystem", headers),
        *(ROOT / "tests" / "gemm_maps.cu", "-o", program),
    )

    def run(*arguments: int) -> dict[str, Launch]:
        found = {}
        for block in output(program, *map(str, arguments)).split("kernel ")[1:]:
            name, *lines = block.splitlines()
            maps = [_map(line) for line in lines if line.startswith("map ")]
            values = {k: v for k, *v in map(str.split, lines) if k != "map"}
            x, y, z, threads, shared, stages = map(int, values["launch"])
            workspace, sums = int(values["workspace"][0]), tuple(map(int, values["sums"]))
            found[name] = Launch((x, y, z), threads, shared, stages, workspace, sums, *maps)
        return found

    return run


def _map(line: str) -> Map:
    _, address, element, swizzle, fill, *modes = line.split()
    assert (int(element), int(fill)) == (1, 0), "16-bit elements, zeros beyond the tensor"
    parsed = [tuple(map(int, m.split(","))) for m in modes]
    assert all(step == 1 for *_, step in parsed)
    return Map(int(address), int(swizzle), [tuple(m[:3]) for m in parsed])


SHAPES = [(1025, 4096, 1024, 1024), (77, 272, 200, 208), (13325, 9728, 896, 896), (1, 32, 8, 3)]
SWIZZLE_128 = 3
SHARED_LIMIT = 227 * 1024


@pytest.mark.parametrize(("M", "N", "K", "x_m"), SHAPES)
def test_tensor_maps(launches, M, N, K, x_m):
    found = launches(M, N, K, x_m, 132)
    assert set(found) == {"gemm_bias_128x128", "gemm_residual_128x256", "gemm_swiglu_128x256"}
    stride = x_m if M > 1 else K
    for name, launch in found.items():
        columns = int(name.rpartition("x")[2])
        assert (launch.x.address, launch.weight.address) == (1 << 20, 2 << 20)
        assert launch.x.swizzle == launch.weight.swizzle == SWIZZLE_128
        # The two blocks of a cluster fetch half of the rows of x each, for both.
        assert launch.x.modes[:2] == [(K, 2, 64), (M, 2 * stride, 64)]
        boxes = launch.weight.modes[1:]
        if "swiglu" not in name:
            assert boxes[0] == (N, 2 * K, columns)
        else:
            # 8 rows of gate, 8 of up: in the order in which they come to lie.
            assert [box for *_, box in boxes] == [8, 2, columns // 16, 1]
            (a, sa, _), (b, sb, _), (c, sc, _), _ = boxes
            rows = [
                (i * sa + j * sb + k * sc) // (2 * K)
                for k in range(c)
                for j in range(b)
                for i in range(a)
            ]
            half = N // 2
            pairs = [[e + i, half + e + i] for e in range(0, half, 8) for i in range(8)]
            assert len(rows) == N
            for e in range(0, N, 16):
                expected = pairs[e // 2 : e // 2 + 8]
                assert rows[e : e + 16] == [g for g, _ in expected] + [u for _, u in expected]
        for tensor in (launch.x, launch.weight):
            assert tensor.modes[-1][0] == 1, "one product"
            assert all(s % 16 == 0 for _, s, _ in tensor.modes[1:])


def test_sums_lie_where_the_epilogue_expects_them(launches):
    for name, launch in launches(128, 256, 64, 64, 132).items():
        threads, wrong = launch.sums
        assert threads == (128 if name.endswith("128") else 256)
        assert wrong == 0, f"{name}: {wrong} of a tile's sums"


@pytest.mark.parametrize("multiprocessors", [132, 78])
@pytest.mark.parametrize(("M", "N", "K", "x_m"), SHAPES)
def test_launches(launches, M, N, K, x_m, multiprocessors):
    for launch in launches(M, N, K, x_m, multiprocessors).values():
        blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
        assert 2 <= blocks <= multiprocessors
        assert launch.grid[1] % 2 == 0, "whole clusters"
        assert launch.threads == 384
        assert launch.workspace == 0
        assert launch.shared <= SHARED_LIMIT
        assert launch.stages >= 4


# ---- on a GPU ----------------------------------------------------------------------------------

ON_GPU = [
    ("linear/aligned_bias", "bias_128"),
    ("linear/aligned_bias_wide", "bias_256"),
    ("linear/aligned_gelu", "gelu_128"),
    ("linear/aligned_residual", "residual_128"),
    ("linear/aligned_residual_wide", "residual_256"),
    ("gated_linear/aligned", "swiglu_256"),
]


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not _is_hopper(), reason="there is no GPU of compute capability 9.0")
@pytest.mark.parametrize(("name", "unit"), ON_GPU)
def test_they_run_on_hopper_and_rows_keep_their_bits(name, unit):
    op = ops.catalogue()[name.partition("/")[0]]
    (case,) = [c for c in op.cases if c.name == name.partition("/")[2]]
    arguments = case.arguments(op.name, torch.bfloat16)
    whole = {k: on_device(v, "cuda") for k, v in arguments.items()}
    _C.kernel_counts(reset=True)
    together = op.function(**whole, phase="prefill", backend="cuda")
    assert _C.kernel_counts(reset=True) == {f"linear/gemm_{unit.replace('_', '_128x')}": 1}
    names = [n for n in ("x", "residual") if n in whole]
    for part in (slice(0, 1), slice(3, 5), slice(2, 19)):
        rows = whole | {n: whole[n][part] for n in names}
        assert torch.equal(op.function(**rows, phase="prefill", backend="cuda"), together[part])


# ---- headers -----------------------------------------------------------------------------------


def _one_line(error: str) -> str:
    return " ".join(error.split())


def test_a_given_folder_is_taken(tmp_path):
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "include" / "cutlass" / "cutlass.h").touch()
    done = _cmake("PYTHON=/bin/false", f"INTO={tmp_path / 'into'}", f"DIRECTORY={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"-- {tmp_path}/include"
    assert not (tmp_path / "into").exists()


def test_a_given_folder_without_headers_is_refused(tmp_path):
    done = _cmake("PYTHON=/bin/false", f"INTO={tmp_path / 'into'}", f"DIRECTORY={tmp_path}")
    assert done.returncode != 0
    message = f"INTERNVL_RT_CUTLASS_DIR is '{tmp_path}', which has no include/cutlass/cutlass.h"
    assert message in _one_line(done.stderr)


def test_a_failed_download_names_the_option(tmp_path):
    done = _cmake("PYTHON=/bin/false", f"INTO={tmp_path}")
    assert done.returncode != 0
    assert "pip could not download nvidia-cutlass==" in _one_line(done.stderr)
    assert "-DINTERNVL_RT_CUTLASS_DIR=folder" in _one_line(done.stderr)


def test_another_wheel_is_refused(tmp_path):
    version = re.search(r"cutlass_version (\S+)\)", (FOLDER / "headers.cmake").read_text())[1]
    wheel = tmp_path / f"nvidia_cutlass-{version}-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    done = _cmake("PYTHON=/bin/true", f"INTO={tmp_path}")
    assert done.returncode != 0
    assert f"{wheel} has the SHA-256 " in _one_line(done.stderr)


PROJECT = """
cmake_minimum_required(VERSION 3.28)
project(some LANGUAGES CXX CUDA)
set(Python_EXECUTABLE /bin/false)
add_subdirectory({folder} cuda)
"""


@pytest.mark.parametrize(("architectures", "wanted"), [("80", False), ("80;90a", True)])
def test_only_hopper_needs_headers(architectures, wanted, tmp_path):
    compiler = f"-DCMAKE_CUDA_COMPILER={_nvcc()}"
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(folder=ROOT / "kernels" / "cuda"))
    command = [_cmake_program(), "-S", tmp_path, "-B", tmp_path / "build", compiler]
    command += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == wanted, done.stderr
    assert ("INTERNVL_RT_CUTLASS_DIR" in done.stderr) == wanted
