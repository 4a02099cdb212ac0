// Kernels with one bug each, written as the mistakes are made: what the emulator has to find.
//
// Most are a sum over a row of x by a block of 128 threads, whose threads write it to the row of y.
// async_*, bulk_*: a row of x is copied through two stages of shared memory and reversed piece by
// piece.
// tile_*: y = a b, where a is x's rows 0 to 15 and b its rows 16 to 31, 16 columns each, in bf16.
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

// y[row] = x[row], each piece of 512 columns reversed; columns is a multiple of 512.
template <Planted kCase>
void copy_kernel(const PlantedParams& p) {
  constexpr int kStages = 2, kPiece = 4 * kThreads;
  IVR_SHARED(float, stages, kStages* kPiece);
  const int thread = threadIdx.x;
  const float* x = p.x + blockIdx.x * p.columns;
  float* y = p.y + blockIdx.x * p.columns;
  const int pieces = static_cast<int>(p.columns) / kPiece;
  const auto copy = [&](int piece) {
    int column = 4 * thread;
    if (kCase == Planted::async_past_row) column += 4;
    if (kCase == Planted::async_misaligned) column += 1;
    const bool valid = piece < pieces;
    cuda::copy16_async(stages + piece % kStages * kPiece + 4 * thread,
                       x + (valid ? piece * kPiece + column : 0), valid);
    cuda::commit_copies();
  };
  copy(0);
  for (int piece = 0; piece < pieces; ++piece) {
    copy(piece + 1);
    if constexpr (kCase == Planted::async_wrong_wait) {
      cuda::wait_copies<2>();
    } else if constexpr (kCase != Planted::async_no_wait) {
      cuda::wait_copies<1>();
    }
    if constexpr (kCase != Planted::async_missing_barrier) __syncthreads();
    const auto stage = stages + piece % kStages * kPiece;
    for (int i = thread; i < kPiece; i += kThreads) {
      store_float(y + piece * kPiece + i, stage[kPiece - 1 - i]);
    }
    if constexpr (kCase != Planted::async_early_reuse) __syncthreads();
  }
}

// The same by bulk copies: thread 0 asks for them, all threads say when they have read a stage.
template <Planted kCase>
void bulk_kernel(const PlantedParams& p) {
  constexpr int kStages = 2, kPiece = 512, kBytes = 4 * kPiece;
  IVR_SHARED(float, stages, kStages* kPiece);
  IVR_SHARED(cuda::Barrier, full, kStages);
  IVR_SHARED(cuda::Barrier, empty, kStages);
  const int thread = threadIdx.x;
  const float* x = p.x + blockIdx.x * p.columns;
  float* y = p.y + blockIdx.x * p.columns;
  const int pieces = static_cast<int>(p.columns) / kPiece;
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      cuda::barrier_init(full + i, 1);
      cuda::barrier_init(empty + i, kThreads);
    }
  }
  if constexpr (kCase != Planted::bulk_unknown_barrier) __syncthreads();
  const auto copy = [&](int piece) {
    const int end = kCase == Planted::bulk_unawaited ? pieces + 1 : pieces;
    if (thread != 0 || piece >= end) return;
    const int stage = piece % kStages, phase = piece / kStages;
    if constexpr (kCase != Planted::bulk_early_reuse) cuda::barrier_wait(empty + stage, phase - 1);
    const int more = kCase == Planted::bulk_wrong_bytes ? 16 : 0;
    cuda::barrier_expect(full + stage, kBytes + more);
    const bool last = kCase == Planted::bulk_past_row && piece == pieces - 1;
    const float* from = x + piece % pieces * kPiece + (last ? 4 : 0);
    cuda::copy_bulk(stages + stage * kPiece, from, kBytes, full + stage);
  };
  copy(0);
  for (int piece = 0; piece < pieces; ++piece) {
    copy(piece + 1);
    const int stage = piece % kStages, phase = piece / kStages;
    if constexpr (kCase == Planted::bulk_wrong_phase) {
      cuda::barrier_wait(full + stage, phase - 1);
    } else if constexpr (kCase != Planted::bulk_no_wait) {
      cuda::barrier_wait(full + stage, phase);
    }
    for (int i = thread; i < kPiece; i += kThreads) {
      store_float(y + piece * kPiece + i, stages[stage * kPiece + kPiece - 1 - i]);
    }
    if (kCase != Planted::bulk_missing_arrival || thread != 77) cuda::barrier_arrive(empty + stage);
    if (kCase == Planted::bulk_extra_arrival && thread == 77) cuda::barrier_arrive(empty + stage);
  }
}

// One warp. The tiles are 16 rows of 16 bf16 and lie one behind the other in shared memory.
template <Planted kCase>
void tile_kernel(const PlantedParams& p) {
  using cuda::bf16;
  constexpr int kSize = 16;
  IVR_SHARED(bf16, a_tile, kSize * kSize);
  IVR_SHARED(bf16, b_tile, kSize * kSize);
  const int lane = threadIdx.x;
  const auto stage = [&](cuda::Shared<bf16> tile, int first_row) {
    const int row = lane / 2, column = lane % 2 * 8;
    float f[8];
    for (int i = 0; i < 8; ++i) f[i] = load_float(p.x + (first_row + row) * p.columns + column + i);
    cuda::Vec<bf16> v;
    cuda::pack(f, v);
    cuda::store16_shared(tile + row * kSize + column, v);
  };
  stage(a_tile, 0);
  stage(b_tile, kSize);
  if constexpr (kCase == Planted::tile_uncommitted) {
    const auto* x = reinterpret_cast<const bf16*>(p.x);
    cuda::copy16_async(a_tile + lane * 8, x + lane * 8, true);
    cuda::wait_copies<0>();
  }
  if constexpr (kCase != Planted::tile_unsynchronised) __syncwarp();

  // Lanes 0 to 15 name the rows' left halves, 16 to 31 the right ones.
  int row = lane % 16, column = lane / 16 * 8;
  if (kCase == Planted::tile_swapped_matrices) column = 8 - column;
  if (kCase == Planted::tile_row_off_by_one) row += 1;
  if (kCase == Planted::tile_misaligned) column = lane / 16 * 4;
  uint32_t a[4], b[4];
  if (kCase == Planted::tile_mixed_transposition && lane == 7) {
    cuda::load_matrices<true>(a, a_tile + row * kSize + column);
  } else {
    cuda::load_matrices<false>(a, a_tile + row * kSize + column);
  }
  constexpr bool kTransposed = kCase != Planted::tile_not_transposed;
  cuda::load_matrices<kTransposed>(b, b_tile + lane % 16 * kSize + lane / 16 * 8);
  for (int half = 0; half < 2; ++half) {  // 8 columns of b each
    float d[4] = {};
    if (kCase == Planted::tile_divergent && lane < 16) continue;
    cuda::mma(d, a, {b[2 * half], b[2 * half + 1]});
    for (int e = 0; e < 4; ++e) {
      const int i = lane / 4 + e / 2 * 8, j = half * 8 + lane % 4 * 2 + e % 2;
      store_float(p.y + i * p.columns + j, d[e]);
    }
  }
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
  } else if constexpr (kPlantedCase >= Planted::tile_product) {
    return machine.launch({}, {32}, 0, [&p] { tile_kernel<kPlantedCase>(p); });
  } else if constexpr (kPlantedCase >= Planted::bulk_copy) {
    return machine.launch(grid, {kThreads}, 0, [&p] { bulk_kernel<kPlantedCase>(p); });
  } else if constexpr (kPlantedCase >= Planted::async_copy) {
    return machine.launch(grid, {kThreads}, 0, [&p] { copy_kernel<kPlantedCase>(p); });
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
IVR_PLANTED(async_copy);
IVR_PLANTED(async_no_wait);
IVR_PLANTED(async_wrong_wait);
IVR_PLANTED(async_missing_barrier);
IVR_PLANTED(async_early_reuse);
IVR_PLANTED(async_past_row);
IVR_PLANTED(async_misaligned);
IVR_PLANTED(bulk_copy);
IVR_PLANTED(bulk_no_wait);
IVR_PLANTED(bulk_wrong_phase);
IVR_PLANTED(bulk_wrong_bytes);
IVR_PLANTED(bulk_early_reuse);
IVR_PLANTED(bulk_missing_arrival);
IVR_PLANTED(bulk_extra_arrival);
IVR_PLANTED(bulk_unknown_barrier);
IVR_PLANTED(bulk_past_row);
IVR_PLANTED(bulk_unawaited);
IVR_PLANTED(tile_product);
IVR_PLANTED(tile_row_off_by_one);
IVR_PLANTED(tile_uncommitted);
IVR_PLANTED(tile_unsynchronised);
IVR_PLANTED(tile_misaligned);
IVR_PLANTED(tile_divergent);
IVR_PLANTED(tile_mixed_transposition);
IVR_PLANTED(tile_swapped_matrices);
IVR_PLANTED(tile_not_transposed);
#undef IVR_PLANTED

}  // namespace ivr::emu
