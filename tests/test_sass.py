"""What nvcc made of the kernels: instructions, registers and spills, read from the SASS.

Needs nvcc and cuobjdump (the triton wheel brings one), no GPU.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sass import LOAD, NARROW, STORE, Kernel, output, read_kernels

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
ARCHS = ("80", "90a")


@dataclass(frozen=True)
class Budget:
    """What must hold for the kernels of one source whose mangled name matches a pattern."""

    kernel: str
    registers: int
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    archs: tuple[str, ...] = ARCHS


HMMA, LDSM, LDGSTS = r"\bHMMA\.16816\.F32\.BF16\b", r"\bLDSM\b", r"\bLDGSTS\.E.*\.128\b"
# 16 bytes past the L1 cache.
ONCE = r"\bLDG\.E\.NA\.128\.CONSTANT\b"
# Tensor cores fed by asynchronous copies of 16 bytes.
MATRIX = (HMMA, LDSM, LDGSTS)
# Tensor cores of a warpgroup fed by bulk copies of a tensor's box; registers move between roles.
HGMMA, UTMALDG = r"\bHGMMA\.64x\d+x16\.F32\.BF16\b", r"\bUTMALDG\.3D\b"
WARPGROUP = (HGMMA, UTMALDG, r"\bUSETMAXREG\b", r"\bSYNCS\b")

# Every kernel has to match a row; all matching rows hold.
WIDE = {"needs": (LOAD, STORE), "lacks": (NARROW,)}
BUDGETS = {
    "flash_attention": (
        # 128 threads: two blocks an SM.
        Budget(r"flash_attention_kernel", registers=255),
        Budget(r"flash_attention_kernelI.*Li(64|128)E", registers=255, needs=MATRIX),
        Budget(r"flash_attention_kernelI.*Li0E", registers=168, lacks=(HMMA,)),
        # 384 threads: one block an SM. Elsewhere the kernel is a trap.
        Budget(
            r"flash_attention_wgmma_kernel",
            registers=168,
            needs=WARPGROUP,
            lacks=(HMMA, LDGSTS),
            archs=("90a",),
        ),
        Budget(r"flash_attention_wgmma_kernel", registers=32, lacks=(HMMA,), archs=("80",)),
    ),
    "linear": (
        # 256 threads: two blocks an SM.
        Budget(r"linear_kernel", registers=128),
        Budget(
            r"linear_kernel.*KernelE0ELi\d+ELi\d+ELb1E", registers=128, needs=(HMMA, LOAD, ONCE)
        ),
        Budget(r"linear_kernel.*KernelE1ELi\d+ELi\d+ELb1E", registers=128, needs=MATRIX),
        Budget(r"linear_kernel.*KernelE1ELi\d+ELi\d+ELb0E", registers=128, needs=(HMMA, LDSM)),
    ),
    "grouped_linear": (
        # As linear: 256 threads, two blocks an SM, for all that rows are looked up.
        Budget(r"grouped_linear_kernel", registers=128),
        Budget(
            r"grouped_linear_kernel.*KernelE0ELi\d+ELi\d+ELb1E",
            registers=128,
            needs=(HMMA, LOAD, ONCE),
        ),
        Budget(r"grouped_linear_kernel.*KernelE1ELi\d+ELi\d+ELb1E", registers=128, needs=MATRIX),
        Budget(
            r"grouped_linear_kernel.*KernelE1ELi\d+ELi\d+ELb0E", registers=128, needs=(HMMA, LDSM)
        ),
    ),
    "moe_combine": (
        # Places and weights are single words.
        Budget(r"moe_combine_kernel", registers=48),
        Budget(r"moe_combine_kernelI.*Lb1E", registers=40, needs=(LOAD, STORE)),
    ),
    # All operands are single words; 32 registers fill an SM with 2048 threads.
    "moe_route": (Budget(r"moe_route_(whole|tokens|experts)_kernel", registers=32),),
    "mxfp4_unpack": (
        # Four bytes make sixteen.
        Budget(r"mxfp4_unpack_kernel", registers=32),
        Budget(r"mxfp4_unpack_kernelI.*Lb1E", registers=32, needs=(STORE,)),
    ),
    "paged_attention": (
        Budget(r"paged_attention_kernelI.*Li(64|128)E", registers=255, needs=MATRIX),
        Budget(r"paged_attention_kernelI.*Li0E", registers=168, lacks=(HMMA,)),
        # 64 KB of shared memory allow three blocks an SM, and so do the registers.
        Budget(r"split_attention_kernel", registers=168, needs=(*MATRIX, STORE)),
        Budget(r"merge_attention_kernel", registers=64, needs=(LOAD,)),
    ),
    "embed_scatter": (
        # Ids and image rows are 8 bytes each.
        Budget(r"embed_scatter_kernel", registers=32),
        Budget(r"embed_scatter_kernelI.*Lb1E", registers=24, needs=(LOAD, STORE)),
    ),
    "gated_activation": (
        Budget(r"gated_activation_kernel", registers=48),
        # One vector a thread: full occupancy, 2048 threads an SM.
        Budget(r"gated_activation_kernelI.*Lb1E", registers=32, **WIDE),
    ),
    "layer_norm": (
        Budget(r"layer_norm_kernel", registers=64),
        Budget(r"layer_norm_kernelI.*Lb1E", registers=64, **WIDE),
        Budget(r"layer_norm_kernelI.*Li1ELb1E", registers=32),
    ),
    "pixel_unshuffle_mlp": (
        Budget(r"pixel_unshuffle_kernel", registers=64),
        Budget(r"pixel_unshuffle_kernelI.*Lb1E", registers=64, **WIDE),
        Budget(r"pixel_unshuffle_kernelI.*Li1ELb1E", registers=40),
    ),
    "preprocess": (
        Budget(r"preprocess_kernel", registers=80),
        # Along y: sixteen bytes at a time; the lookups and weights are small.
        Budget(r"preprocess_kernelI.*Lb1ELb1ELb[01]E", registers=80, needs=(LOAD,)),
        Budget(r"preprocess_kernelI.*Lb1ELb1ELb1E", registers=80, needs=(STORE,)),
        Budget(r"preprocess_kernelI.*Lb1ELb0ELb1E", registers=80, needs=(LOAD, STORE)),
    ),
    "rms_norm": (
        # 1024 threads of 64 registers fill an SM's register file.
        Budget(r"rms_norm_kernel", registers=64),
        Budget(r"rms_norm_kernelI.*Lb1E", registers=64, **WIDE),
        # One vector a thread: full occupancy, 2048 threads an SM.
        Budget(r"rms_norm_kernelI.*Li1ELb1E", registers=32),
    ),
    "rope": (
        # Positions, sequences, slots and angles are single words.
        Budget(r"rope_kernel", registers=64),
        Budget(r"rope_kernelI.*Lb1E", registers=64, needs=(LOAD, STORE)),
    ),
    # Parameters, ids and the penalised logits are single words.
    "sample": (Budget(r"sample_kernel", registers=64, needs=(LOAD, STORE)),),
}


@pytest.fixture(scope="session", params=SOURCES, ids=lambda s: s.stem)
def compiled(request, tmp_path_factory):
    """(op, {arch: kernels}) of one source, built for every architecture of a release."""
    nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = request.param
    folder = tmp_path_factory.mktemp("sass")

    def build(arch: str) -> dict[str, Kernel]:
        cubin = folder / f"{source.stem}.{arch}.cubin"
        said = output(
            *(nvcc, "-std=c++20", "-O3", "-cubin", f"-arch=sm_{arch}", f"-I{ROOT}"),
            *(source, "-o", cubin),
        )
        # ptxas says so where it waits for each wgmma by itself, or ignores setmaxnreg.
        assert not re.search(r"wgmma|setmaxnreg|warpgroup", said), said
        return read_kernels(cubin)

    with ThreadPoolExecutor(len(ARCHS)) as pool:
        return source.stem, dict(zip(ARCHS, pool.map(build, ARCHS), strict=True))


def test_every_source_has_a_budget():
    assert {source.stem for source in SOURCES} == set(BUDGETS)


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(compiled, arch):
    op, found = compiled
    kernels = found[arch]
    assert kernels, f"{op}: no kernel for sm_{arch}"
    for name, kernel in kernels.items():
        kernel.check_local_memory(name)
        assert any(re.search(b.kernel, name) for b in BUDGETS[op]), f"{name}: no budget"
    for budget in (b for b in BUDGETS[op] if arch in b.archs):
        matching = {n: k for n, k in kernels.items() if re.search(budget.kernel, n)}
        assert matching, f"{op}: no kernel matches {budget.kernel}"
        for name, kernel in matching.items():
            assert kernel.registers <= budget.registers, f"{name}: {kernel.registers} registers"
            for instruction in budget.needs:
                assert kernel.count(instruction) > 0, f"{name}: no {instruction}"
            for instruction in budget.lacks:
                assert kernel.count(instruction) == 0, f"{name}: has {instruction}"


# All that launchers may ask of CUDA: nothing here allocates, waits or is refused under capture.
CALLS = {
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetDriverEntryPointByVersion",
    "cudaGetLastError",
    "cudaLaunchKernelExC",
}


def test_launchers_neither_allocate_nor_wait_and_run_on_the_stream_given():
    files = [p for p in (ROOT / "kernels" / "cuda").rglob("*.*") if p.parent.name != "emu"]
    text = "\n".join(p.read_text() for p in files)
    assert set(re.findall(r"\b(cuda[A-Z]\w*)\(", text)) == CALLS
    launches = re.findall(r"<<<(.+?)>>>\(", text, re.DOTALL)
    assert len(launches) >= len(SOURCES)
    assert all(launch.endswith(", stream") for launch in launches), launches
    assert text.count("config.stream = stream;") == text.count("cudaLaunchKernelExC(") == 1


BULK = r"""
#include "kernels/cuda/prim.cuh"

using namespace ivr::cuda;

extern "C" __global__ void bulk_kernel(const float* x, float* y) {
  IVR_SHARED(float, stage, 256);
  IVR_SHARED(Barrier, full, 1);
  if (threadIdx.x == 0) barrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(full, 1024);
    copy_bulk(stage, x, 1024, full);
  }
  barrier_wait(full, 0);
  y[threadIdx.x] = stage[threadIdx.x];
  barrier_arrive(full);
}
"""


# a and b from shared memory; boxes of two and four dimensions.
SHARED = r"""
#include "kernels/cuda/prim.cuh"

using namespace ivr::cuda;

template <int kN>
__device__ float product(Shared<bf16> tile, bool transposed) {
  float d[kN / 8][4] = {};
  const uint64_t a = matrix_descriptor(tile, 16, 1024);
  const uint64_t b = matrix_descriptor(tile + 4096, 8192, 1024);
  wgmma_fence(d);
  transposed ? wgmma<kN, true>(d, a, b, false) : wgmma<kN, false>(d, a, b, false);
  wgmma_commit();
  wgmma_wait<0>(d);
  float sum = 0.0f;
  for (int i = 0; i < kN / 2; ++i) sum += d[i / 4][i % 4];
  return sum;
}

extern "C" __global__ void shared_kernel(const __grid_constant__ TensorMap map, float* y) {
  IVR_DYNAMIC_SHARED(bf16, tile);
  IVR_SHARED(Barrier, full, 1);
  if (threadIdx.x == 0) barrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(full, 49152);
    copy_tensor(tile, map, {0, 0}, full);
    copy_tensor(tile + 4096, map, {0, 0, 0, 0}, full);
  }
  barrier_wait(full, 0);
  y[threadIdx.x] = product<16>(tile, false) + product<64>(tile, true) + product<128>(tile, false);
}
"""


@pytest.fixture
def assembled(tmp_path):
    """kernel(source): the only kernel of some source, for sm_90a."""
    nvcc = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")

    def assemble(text: str) -> Kernel:
        source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
        source.write_text(text)
        said = output(
            *(nvcc, "-std=c++20", "-O3", "-cubin", "-arch=sm_90a", f"-I{ROOT}"),
            *(source, "-o", cubin),
        )
        assert not said, said
        (kernel,) = read_kernels(cubin).values()
        return kernel

    return assemble


# What no kernel uses yet.


def test_bulk_copies_assemble(assembled):
    kernel = assembled(BULK)
    assert kernel.count(r"\bUBLKCP\b") == 1
    assert kernel.count(r"\bSYNCS\b") >= 3


def test_products_from_shared_memory_assemble(assembled):
    kernel = assembled(SHARED)
    assert kernel.count(r"\bUTMALDG\.2D\b") == kernel.count(r"\bUTMALDG\.4D\b") == 1
    for columns, transposed in ((16, ""), (64, r".*\btnspB\b"), (128, "")):
        assert kernel.count(rf"\bHGMMA\.64x{columns}x16\b.*gdesc{transposed}") >= 1
    kernel.check_local_memory("shared_kernel")
