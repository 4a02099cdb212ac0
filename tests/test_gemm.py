"""The matrix products of Hopper: which of them takes a call, their epilogue under emulation, what
nvcc made of them, what their launches ask for, and the headers that they are built from. Here too:
the descriptors of attention's matrices beside CUTLASS's.

One test at the end of these needs a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import emulated
from internvl_rt import _C, ops
from internvl_rt.ops.registry import check, on_device
from sass import LOAD, STORE, Kernel, output, read_kernels, tool

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "kernels" / "cuda" / "cutlass"
UNITS = sorted(path.stem for path in FOLDER.glob("*.cu"))


def name_of(unit: str) -> str:
    return f"gemm_{unit.replace('_', '_128x')}"


def _id(value: object) -> str:
    return getattr(value, "name", str(value))


# ---- the choice and the epilogue, emulated -----------------------------------------------------

# The catalogue's cases that they take, in bfloat16, and by which kernel.
GEMMS = {
    "linear/aligned_bias": "gemm_bias_128x128",
    "linear/aligned_bias_wide": "gemm_bias_128x256",
    "linear/aligned_gelu": "gemm_gelu_128x128",
    "linear/aligned_residual": "gemm_residual_128x128",
    "linear/aligned_residual_wide": "gemm_residual_128x256",
    "gated_linear/aligned": "gemm_swiglu_128x256",
    "gated_linear/aligned_bias": "gemm_swiglu_128x256",
    "gated_linear/whole_panels": "gemm_swiglu_128x256",
}
PRODUCTS = {"linear": emulated.linear, "gated_linear": emulated.gated_linear}


@pytest.fixture
def products(emulator, monkeypatch):
    """Runs linear and gated_linear as Hopper would, but natively what it has no product for;
    returns the names of what ran."""
    ran: list[str] = []

    def face(op: str, *arguments: Any) -> bool:
        ran.append(emulator.run("gemm", PRODUCTS[op](*arguments)))
        if ran[-1] == "none" and op == "linear":
            _C.linear(*arguments)
        return ran[-1] != "none"

    for op in PRODUCTS:
        faces = ops.catalogue()[op].faces
        monkeypatch.setitem(faces, "emulated", functools.partial(face, op))
    monkeypatch.setattr(_C, "reads_rows", lambda _: False)  # weights get here packed
    monkeypatch.setitem(ops.catalogue()["gated_activation"].faces, "emulated", _C.gated_activation)
    return ran


PRODUCT_CASES = [
    (op, case)
    for op in map(ops.catalogue().get, PRODUCTS)
    for case in op.cases
    if not (case.slow or case.cpu_only) and "gpt_oss" not in case.name
]


@pytest.mark.parametrize(("op", "case"), PRODUCT_CASES, ids=_id)
def test_matrix_products_of_hopper(op, case, products):
    check(op, case, torch.bfloat16, "emulated")
    assert products[0] == GEMMS.get(f"{op.name}/{case.name}", "none")


def _rows_keep_their_bits(name: str, backend: str, device: str) -> int:
    """Runs a case, then some of its rows; returns the number of calls."""
    op = ops.catalogue()[name.partition("/")[0]]
    (case,) = [c for c in op.cases if c.name == name.partition("/")[2]]
    arguments = case.arguments(op.name, torch.bfloat16)
    whole = {k: on_device(v, device) for k, v in arguments.items()}
    together = op.function(**whole, phase="prefill", backend=backend)
    parts = (slice(0, 1), slice(3, 5), slice(2, 19))
    for part in parts:
        rows = whole | {n: whole[n][part] for n in ("x", "residual") if n in whole}
        assert torch.equal(op.function(**rows, phase="prefill", backend=backend), together[part])
    return 1 + len(parts)


@pytest.mark.parametrize("name", GEMMS)
def test_rows_of_a_matrix_product_do_not_depend_on_the_others(name, products):
    calls = _rows_keep_their_bits(name, "emulated", "cpu")
    assert products == [GEMMS[name]] * calls


def test_every_unit_is_a_matrix_product_that_a_case_reaches():
    assert set(map(name_of, UNITS)) == set(GEMMS.values())


BASE = 1 << 20  # an address
BASES = dict.fromkeys(("x", "weight", "out"), BASE)
NONE = {"bias": 0, "scale": 0, "residual": 0}
BIAS, SCALED = NONE | {"bias": BASE}, {"bias": BASE, "scale": BASE, "residual": BASE}
KINDS = {name: int(value) for name, value in _C.Activation.__members__.items()}
# (N, K, epilogue, change, kernel) for any number of rows; the shapes of InternVL first.
CHOICES = [
    (3072, 1024, BIAS, {}, "gemm_bias_128x256"),  # ViT qkv
    (1024, 1024, SCALED, {}, "gemm_residual_128x128"),  # ViT proj
    (4096, 1024, BIAS, {"activation": "gelu"}, "gemm_gelu_128x128"),  # ViT fc1
    (1024, 4096, SCALED, {}, "gemm_residual_128x128"),  # ViT fc2
    (9600, 3200, NONE, {}, "gemm_bias_128x256"),  # ViT-6B qkv
    (896, 4096, BIAS, {"activation": "gelu"}, "gemm_gelu_128x128"),  # projector, 1B
    (1152, 896, BIAS, {}, "gemm_bias_128x128"),  # 1B qkv
    (896, 4864, NONE | {"residual": BASE}, {}, "gemm_residual_128x128"),  # 1B down
    (9728, 896, NONE, {"activation": "swiglu"}, "gemm_swiglu_128x256"),  # 1B gate and up
    (4608, 3584, BIAS, {}, "gemm_bias_128x256"),  # 8B qkv
    (3584, 18944, NONE | {"residual": BASE}, {}, "gemm_residual_128x256"),  # 8B down
    (37888, 3584, NONE, {"activation": "swiglu"}, "gemm_swiglu_128x256"),  # 8B gate and up
    (64, 64, BIAS | {"bias": BASE + 4}, {}, "gemm_bias_128x128"),
    (3064, 64, NONE, {}, "gemm_bias_128x128"),
    (16, 8, BIAS, {"activation": "swiglu"}, "gemm_swiglu_128x256"),
    # What stays with mma.sync.
    (1024, 588, BIAS, {}, "none"),  # ViT patches: a row of the weight is 1176 bytes
    (151674, 896, NONE, {"out_dtype": torch.float32}, "none"),  # logits
    (128, 896, NONE, {"out_dtype": torch.float32}, "none"),  # router
    (1152, 896, BIAS, {"decode": True}, "none"),
    (1152, 896, BIAS, {"dtype": torch.float32, "out_dtype": torch.float32}, "none"),
    (64, 64, NONE, {"activation": "silu"}, "none"),
    (64, 64, NONE | {"scale": BASE}, {}, "none"),
    (64, 64, SCALED, {"activation": "gelu"}, "none"),
    (64, 64, NONE | {"residual": BASE}, {"activation": "swiglu"}, "none"),
    (60, 64, NONE, {}, "none"),
    (24, 64, NONE, {"activation": "swiglu"}, "none"),  # 12 columns of out
    (64, 0, NONE, {}, "none"),
    (64, 64, NONE, {"x": BASE + 8}, "none"),
    (64, 64, NONE, {"weight": BASE + 8}, "none"),
    (64, 64, NONE, {"out": BASE + 8}, "none"),
    (64, 64, SCALED, {"residual": BASE + 8}, "none"),
    (64, 64, SCALED, {"scale": BASE + 2}, "none"),
    (64, 64, BIAS | {"bias": BASE + 2}, {}, "none"),
]


def _description(N: int, K: int, **fields: Any) -> ctypes.Structure:
    """LinearParams of a call on rows without gaps, unless fields say otherwise."""
    fields = {"dtype": torch.bfloat16, "out_dtype": torch.bfloat16, "activation": "none"} | fields
    width = N // 2 if fields["activation"] == "swiglu" else N
    fields = BASES | {"x_m": K, "out_m": width, "residual_m": width} | fields
    fields |= {k: emulated.DTYPES[fields[k]] for k in ("dtype", "out_dtype")}
    fields |= {"format": fields["dtype"], "activation": KINDS[fields["activation"]]}
    return emulated.struct("linear", "LinearParams")(N=N, K=K, **fields)


@pytest.mark.parametrize(("N", "K", "epilogue", "change", "kernel"), CHOICES, ids=str)
def test_the_choice_of_a_matrix_product(emulator, N, K, epilogue, change, kernel):
    for M in (1, 2, 16, 17, 128, 1025, 13325):
        found = emulator.gemm_config(_description(N, K, M=M, **epilogue | change))
        assert found == kernel, f"{M} rows"


@pytest.mark.parametrize(
    ("strides", "taken"),
    [
        ({"x_m": 72, "out_m": 80, "residual_m": 1 << 20}, True),
        ({"x_m": 68}, False),
        ({"x_m": 0}, False),
        ({"x_m": -64}, False),
        ({"out_m": 68}, False),
        ({"residual_m": 60}, False),
        ({"residual_m": 1 << 30}, False),
    ],
    ids=str,
)
def test_strides_of_a_matrix_product(emulator, strides, taken):
    rows = {M: emulator.gemm_config(_description(64, 64, M=M, **SCALED | strides)) for M in (1, 2)}
    # torch gives a single row any stride.
    assert rows[1] == "gemm_residual_128x128"
    assert rows[2] == (rows[1] if taken else "none")


# ---- machine code, as it stands in the extension -----------------------------------------------

WGMMA, COPY, MULTICAST = r"\bHGMMA\b", r"\bUTMALDG\.\dD\b", r"\bUTMALDG\.\dD\.MULTICAST\b"
REGISTERS = r"\bUSETMAXREG\b"
EPILOGUES = ("bias", "gelu", "residual", "swiglu")  # in the order of GemmEpilogue
# 384 threads: a block has the register file of a multiprocessor for itself.
LIMIT = 168


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, Kernel]:
    """The kernels of the built extension by unit, from its code for sm_90a."""
    if not _C.has_gemm:
        pytest.skip("this build has no matrix products of Hopper: CUDA is off, or not for sm_90a")
    return _read(Path(_C.__file__), tmp_path_factory.mktemp("sass"))


def _read(binary: Path, folder: Path) -> dict[str, Kernel]:
    command = [tool("cuobjdump"), "--extract-elf", "all", str(binary.resolve())]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    found = {}
    for cubin in folder.glob("*.sm_90a.cubin"):
        if b"GemmStore" in cubin.read_bytes():
            for name, kernel in read_kernels(cubin).items():
                epilogue = re.search(r"GemmStoreILNS\w*?12GemmEpilogueE(\d)E", name)[1]
                columns = 128 if "Pingpong" in name else 256
                found[f"{EPILOGUES[int(epilogue)]}_{columns}"] = kernel
    return found


def test_the_extension_has_every_unit(kernels):
    assert sorted(kernels) == UNITS


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


# ---- the matrices of attention, as CUTLASS describes them --------------------------------------


def test_descriptors_are_those_of_cutlass(headers, tmp_path):
    """The emulator has the meaning of a descriptor from the documentation alone."""
    ptx = tmp_path / "descriptors.ptx"
    output(
        *(_nvcc(), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-ptx"),
        *("-gencode=arch=compute_90a,code=compute_90a", f"-I{ROOT}", "-isystem", headers),
        *(ROOT / "tests" / "matrix_descriptors.cu", "-o", ptx),
    )
    found = {}
    for kernel in re.split(r"\.visible \.entry ", ptx.read_text())[1:]:
        bytes_on = re.findall(r"add\.s32 .*, (\d+);", kernel)
        constants = re.findall(r"or\.b64 .*, (\d+);", kernel)
        found[re.match(r"\w+", kernel)[0]] = [*zip(bytes_on, constants, strict=True)]
    assert len(found["theirs"]) == 4
    assert found["ours"] == found["theirs"]


# ---- on a GPU ----------------------------------------------------------------------------------


def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skipif(not _is_hopper(), reason="there is no GPU of compute capability 9.0")
@pytest.mark.parametrize("name", GEMMS)
def test_they_run_on_hopper_and_rows_keep_their_bits(name):
    _C.kernel_counts(reset=True)
    calls = _rows_keep_their_bits(name, "cuda", "cuda")
    assert _C.kernel_counts(reset=True) == {f"linear/{GEMMS[name]}": calls}


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
