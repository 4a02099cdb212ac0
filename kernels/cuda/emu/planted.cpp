// Kernels with one bug each, written as the mistakes are made: what the emulator has to find.
// All are a sum over a row of x by a block of 128 threads, whose threads write it to the row of y,
// except the correct probes of collectives and dynamic shared memory.
#include "kernels/cuda/emu/planted.h"

#include "kernels/cuda/prim.cuh"

namespace ivr::emu {
namespace {

using cuda::kFullMask;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / cuda::kWarpSize;

float load_float(const float* p) { return __uint_as_float(cuda::load_raw<uint32_t>(p)); }
void store_float(float* p, float v) { cuda::store_raw(p, __float_as_uint(v)); }

// Sum over the block, every thread gets it.
template <Planted kCase>
float block_sum(float v, cuda::Shared<float> scratch) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  v = cuda::warp_sum(v, 32);
  if (lane == 0) {
    if constexpr (kCase == Planted::unwritten_shared) {
      if (warp < kWarps - 1) scratch[warp] = v;
    } else if constexpr (kCase == Planted::shared_overrun) {
      scratch[warp + 1] = v;
    } else {
      scratch[warp] = v;
    }
  }
  if constexpr (kCase == Planted::two_barriers) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if constexpr (kCase != Planted::missing_barrier) {
    __syncthreads();
  }
  float sum = 0.0f;
  for (int i = 0; i < kWarps; ++i) sum += scratch[i];
  return sum;
}

template <Planted kCase>
void sum_kernel(const PlantedParams& p) {
  IVR_SHARED(float, scratch, kWarps);
  const int column = threadIdx.x;
  const int lane = threadIdx.x % 32;
  const float* x = p.x + blockIdx.x * p.columns;
  float* y = p.y + blockIdx.x * p.columns;
  const int columns = static_cast<int>(p.columns);

  float v = 0.0f;
  const int read_end = kCase == Planted::read_past_row ? columns + 1 : columns;
  for (int i = column; i < read_end; i += kThreads) v += load_float(x + i);
  if constexpr (kCase == Planted::misaligned) {
    if (column == 0) v = __uint_as_float(cuda::load16(x + 1).words[0]);
  }
  if constexpr (kCase == Planted::wrong_mask) {
    v += __shfl_xor_sync(0x0000ffffu, v, 1);
  }
  if constexpr (kCase == Planted::missing_lane) {
    if (lane < 16) v += __shfl_xor_sync(kFullMask, v, 1);
  }
  if constexpr (kCase == Planted::exited_lane) {
    if (lane >= 16) return;
    v += __shfl_xor_sync(kFullMask, v, 1);
  }
  if constexpr (kCase == Planted::wrong_lane) {
    if (lane < 16) v += __shfl_xor_sync(0x0000ffffu, v, 16);
  }
  float sum = block_sum<kCase>(v, scratch);
  if constexpr (kCase == Planted::reused_scratch) sum += block_sum<kCase>(v, scratch);
  const int write_end = kCase == Planted::write_past_row ? columns + 1 : columns;
  for (int i = column; i < write_end; i += kThreads) store_float(y + i, sum);
  if constexpr (kCase == Planted::divergent_barrier) {
    if (column < 32) __syncthreads();
  }
}

// y[row, i], i < 32: what lane i got from the collective that the row names.
void collectives_kernel(const PlantedParams& p) {
  const int lane = threadIdx.x;
  const float v = load_float(p.x + blockIdx.x * p.columns + lane);
  float got = 0.0f;
  switch (blockIdx.x) {
    case 0:
      got = __shfl_sync(kFullMask, v, 5);
      break;
    case 1:
      got = __shfl_sync(kFullMask, v, lane + 1, 8);
      break;
    case 2:
      got = __shfl_up_sync(kFullMask, v, 3);
      break;
    case 3:
      got = __shfl_down_sync(kFullMask, v, 2, 16);
      break;
    case 4:
      got = __shfl_xor_sync(kFullMask, v, 9);
      break;
    case 5:
      got = static_cast<float>(__ballot_sync(kFullMask, lane % 3 == 0) >> (lane / 8 * 8) & 0xffu);
      break;
    case 6:  // two halves of a warp, each on its own
      if (lane < 16) {
        got = __shfl_xor_sync(0x0000ffffu, v, 1);
      } else {
        got = static_cast<float>(__all_sync(0xffff0000u, lane >= 16) +
                                 2 * __any_sync(0xffff0000u, lane == 3));
      }
      break;
    default:  // the upper half arrives at the second shuffle while the lower is in the first
      got = v;
      if (lane < 16) got = __shfl_sync(0x0000ffffu, v, 2);
      got = __shfl_sync(kFullMask, got, lane ^ 16);
  }
  store_float(p.y + blockIdx.x * p.columns + lane, got);
}

// Reverses a row of up to 128 columns, by shared memory; then each pair within a warp, by
// __syncwarp alone.
void dynamic_shared_kernel(const PlantedParams& p) {
  IVR_DYNAMIC_SHARED(float, row);
  const int columns = static_cast<int>(p.columns);
  const int i = threadIdx.x;
  row[i] = i < columns ? load_float(p.x + blockIdx.x * p.columns + i) : 0.0f;
  __syncthreads();
  const float v = i < columns ? static_cast<float>(row[columns - 1 - i]) : 0.0f;
  __syncthreads();
  row[i] = v;
  __syncwarp();
  const float swapped = row[i ^ 1];
  if (i < columns) store_float(p.y + blockIdx.x * p.columns + i, swapped);
}

}  // namespace

template <int kCase>
bool run_planted(Machine& machine, const void* params, std::string& config) {
  constexpr auto kPlantedCase = static_cast<Planted>(kCase);
  const auto& p = *static_cast<const PlantedParams*>(params);
  const int64_t bytes = p.columns * static_cast<int64_t>(sizeof(float));
  allow_rows(machine, Access::read, "x", p.x, p.rows, 1, bytes, bytes, 0);
  allow_rows(machine, Access::write, "y", p.y, p.rows, 1, bytes, bytes, 0);
  config = "planted";
  const Dim3 grid{static_cast<unsigned>(p.rows)};
  if constexpr (kPlantedCase == Planted::collectives) {
    return machine.launch(grid, {32}, 0, [&p] { collectives_kernel(p); });
  } else if constexpr (kPlantedCase == Planted::dynamic_shared) {
    return machine.launch(grid, {kThreads}, kThreads * sizeof(float),
                          [&p] { dynamic_shared_kernel(p); });
  } else {
    return machine.launch(grid, {kThreads}, 0, [&p] { sum_kernel<kPlantedCase>(p); });
  }
}

#define IVR_PLANTED(name) \
  template bool run_planted<static_cast<int>(Planted::name)>(Machine&, const void*, std::string&)
IVR_PLANTED(row_sum);
IVR_PLANTED(collectives);
IVR_PLANTED(dynamic_shared);
IVR_PLANTED(missing_barrier);
IVR_PLANTED(reused_scratch);
IVR_PLANTED(unwritten_shared);
IVR_PLANTED(shared_overrun);
IVR_PLANTED(read_past_row);
IVR_PLANTED(write_past_row);
IVR_PLANTED(misaligned);
IVR_PLANTED(divergent_barrier);
IVR_PLANTED(two_barriers);
IVR_PLANTED(wrong_mask);
IVR_PLANTED(missing_lane);
IVR_PLANTED(exited_lane);
IVR_PLANTED(wrong_lane);
#undef IVR_PLANTED

}  // namespace ivr::emu
