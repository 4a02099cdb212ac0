// Planted bugs of Hopper's primitives: boxes of tensors, wgmma, named barriers, registers.
//
// box_*       y = x moved by 2 rows and 3 columns, zeros from outside, box by box.
// wgmma_*     y = a b^T, a = x's rows 0 to 63 and b those from 64 on, 64 columns each, in bf16; or
//             y = a c with c = rows 64 to 127, all 128 columns.
// tensor_*    x is bf16, two a float: y = a b^T of 64 rows each and all columns, in steps of 64
//             columns that bulk copies bring.
// named_*     one warpgroup writes a row, another reads it.
// registers_* warpgroups ask for registers.
#include "kernels/cuda/emu/planted.h"
#include "kernels/cuda/tiles.cuh"

namespace ivr::emu {
namespace {

using cuda::Barrier;
using cuda::bf16;
using cuda::Shared;
using cuda::Swizzle;
using cuda::TensorBox;

constexpr int kWarpgroup = 128;
constexpr int kRowBytes = 128, kRowElements = 64;  // of a swizzled tile of bf16
constexpr int kEight = 8 * kRowBytes;

float load_float(const float* p) { return __uint_as_float(cuda::load_raw<uint32_t>(p)); }
void store_float(float* p, float v) { cuda::store_raw(p, __float_as_uint(v)); }

// ---- boxes --------------------------------------------------------------------------------------

constexpr int kBoxRows = 16, kBoxColumns = 32;

template <Planted kCase>
TensorBox moved_box(const PlantedParams& p) {
  const int64_t more = kCase == Planted::box_wrong_stride    ? 16
                       : kCase == Planted::box_narrow_stride ? 4
                                                             : 0;
  return {p.x,
          2,
          {p.columns, p.rows},
          {4, p.columns * 4 + more},
          {kBoxColumns, kCase == Planted::box_row_too_many ? kBoxRows + 1 : kBoxRows},
          kCase == Planted::box_wrong_swizzle ? Swizzle::none : Swizzle::bytes128};
}

template <Planted kCase>
void box_kernel(const PlantedParams& p, const TensorBox& map) {
  IVR_DYNAMIC_SHARED(float, tile);
  IVR_SHARED(Barrier, full, 1);
  const int thread = threadIdx.x;
  const int column = static_cast<int>(blockIdx.x) * kBoxColumns;
  const int row = static_cast<int>(blockIdx.y) * kBoxRows;
  if (thread == 0) cuda::barrier_init(full, 1);
  __syncthreads();
  if (thread == 0) {
    int bytes = kBoxRows * kRowBytes;
    if (kCase == Planted::box_more_bytes) bytes += kRowBytes;
    if (kCase == Planted::box_fewer_bytes) bytes -= kRowBytes;
    cuda::barrier_expect(full, bytes);
    const int start = kCase == Planted::box_misplaced_tile ? kBoxColumns : 0;
    cuda::copy_tensor(tile + start, map, {column - 3, row - 2}, full);
  }
  if constexpr (kCase != Planted::box_no_wait) cuda::barrier_wait(full, 0);
  for (int i = thread; i < kBoxRows * kBoxColumns; i += kWarpgroup) {
    const int r = i / kBoxColumns, c = i % kBoxColumns;
    if (row + r >= p.rows || column + c >= p.columns) continue;
    store_float(p.y + (row + r) * p.columns + column + c,
                tile[r * kBoxColumns + (c / 4 ^ r % 8) * 4 + c % 4]);
  }
}

// Rows in the order of a box that walks every (rows / 2)-th first, or every third of a half.
template <int kRank>
void planes_kernel(const PlantedParams& p, const TensorBox& map) {
  IVR_DYNAMIC_SHARED(float, tile);
  IVR_SHARED(Barrier, full, 1);
  const int thread = threadIdx.x, elements = static_cast<int>(p.rows * p.columns);
  if (thread == 0) cuda::barrier_init(full, 1);
  __syncthreads();
  if (thread == 0) {
    cuda::barrier_expect(full, 4 * elements);
    const int at[kRank] = {};
    cuda::copy_tensor(tile, map, at, full);
  }
  cuda::barrier_wait(full, 0);
  for (int i = thread; i < elements; i += kWarpgroup) store_float(p.y + i, tile[i]);
}

// ---- wgmma --------------------------------------------------------------------------------------

// Rows of x from `first` on, 64 columns from `column` on, as a bulk copy would lay them.
void stage(const PlantedParams& p, Shared<bf16> tile, int first, int rows, int column) {
  for (int i = threadIdx.x; i < rows * 8; i += kWarpgroup) {
    const int row = i / 8, chunk = i % 8;
    float f[8];
    for (int e = 0; e < 8; ++e) {
      f[e] = load_float(p.x + (first + row) * p.columns + column + chunk * 8 + e);
    }
    cuda::Vec<bf16> v;
    cuda::pack(f, v);
    cuda::store16_shared(tile + cuda::tile_offset<kRowElements>(row, chunk), v);
  }
}

template <int kTiles>
void store_sums(const PlantedParams& p, int first, const float (&d)[kTiles][4]) {
  const int warp = threadIdx.x % kWarpgroup / 32, lane = threadIdx.x % 32;
  for (int n = 0; n < kTiles; ++n) {
    for (int e = 0; e < 4; ++e) {
      const int row = first + warp * 16 + lane / 4 + e / 2 * 8;
      store_float(p.y + row * p.columns + n * 8 + lane % 4 * 2 + e % 2, d[n][e]);
    }
  }
}

// a from shared memory: y[0:64, 0:kN] = a b^T; wgmma_groups: y[64:128, 0:kN] has the next kN rows.
template <Planted kCase, int kN>
void shared_kernel(const PlantedParams& p) {
  IVR_DYNAMIC_SHARED(bf16, tiles);
  constexpr bool kGroups = kCase == Planted::wgmma_groups || kCase == Planted::wgmma_wrong_wait;
  const Shared<bf16> a = tiles, b = tiles + 64 * kRowElements;
  const int warp = threadIdx.x / 32;
  stage(p, a, 0, 64, 0);
  stage(p, b, 64, 128, 0);
  if constexpr (kCase != Planted::wgmma_no_proxy_fence) cuda::fence_async_reads();
  if constexpr (kCase != Planted::wgmma_no_barrier) __syncthreads();

  float d[kN / 8][4] = {}, e[kN / 8][4] = {};
  const auto multiply = [&](float (&sums)[kN / 8][4], int row) {
    if constexpr (kCase != Planted::wgmma_no_fence) cuda::wgmma_fence(sums);
    if constexpr (kCase == Planted::wgmma_late_write) sums[0][0] = 1.0f;
    for (int k = 0; k < 4; ++k) {
      if (kCase == Planted::wgmma_missing_warp && warp == 2 && k == 3) continue;
      if (kCase == Planted::wgmma_other_operand && warp == 2 && k == 3) row += 8;
      int start = k * 16 + row * kRowElements;
      if (kCase == Planted::wgmma_off_by_one) start += kRowElements;
      const int stride = kCase == Planted::wgmma_wrong_stride ? kEight / 2 : kEight;
      const auto swizzle =
          kCase == Planted::wgmma_wrong_swizzle ? Swizzle::bytes64 : Swizzle::bytes128;
      cuda::wgmma<kN, kCase == Planted::wgmma_wrong_major>(
          sums, cuda::matrix_descriptor(a + k * 16, 16, kEight),
          cuda::matrix_descriptor(b + start, 16, stride, swizzle), k > 0);
    }
    if constexpr (kCase != Planted::wgmma_uncommitted) cuda::wgmma_commit();
  };
  multiply(d, 0);
  if constexpr (kGroups) {
    multiply(e, kN);
    cuda::wgmma_wait<1>(d);
    store_sums(p, 0, d);
    kCase == Planted::wgmma_wrong_wait ? cuda::wgmma_wait<1>(e) : cuda::wgmma_wait<0>(e);
    store_sums(p, 64, e);
    return;
  }
  if constexpr (kCase == Planted::wgmma_early_use) d[0][0] *= 2.0f;
  if constexpr (kCase == Planted::wgmma_early_reuse) {
    if (threadIdx.x == 5) cuda::store16_shared(b, cuda::Vec<bf16>{});
  }
  if constexpr (kCase == Planted::wgmma_no_wait) {
    store_sums(p, 0, d);
  } else {
    cuda::wgmma_wait<0>(d);
    store_sums(p, 0, d);
  }
}

// a from registers: y[0:64] = a c.
template <Planted kCase>
void registers_kernel(const PlantedParams& p) {
  IVR_DYNAMIC_SHARED(bf16, tiles);
  constexpr int kHalf = 64 * kRowElements;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  stage(p, tiles, 64, 64, 0);
  stage(p, tiles + kHalf, 64, 64, kRowElements);
  cuda::fence_async_reads();
  __syncthreads();
  uint32_t a[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int r = 0; r < 4; ++r) {
      const int row = warp * 16 + lane / 4 + r % 2 * 8, column = k * 16 + lane % 4 * 2 + r / 2 * 8;
      const float* x = p.x + row * p.columns + column;
      a[k][r] = cuda::pack_bf16(load_float(x), load_float(x + 1));
    }
  }
  float d[16][4] = {};
  kCase == Planted::wgmma_a_not_fenced ? cuda::wgmma_fence(d) : cuda::wgmma_fence(d, a);
  for (int k = 0; k < 4; ++k) {
    const int leading = kCase == Planted::wgmma_wrong_leading ? kHalf : kHalf * 2;
    cuda::wgmma<128, true>(
        d, a[k], cuda::matrix_descriptor(tiles + k * 16 * kRowElements, leading, kEight), true);
  }
  cuda::wgmma_commit();
  if constexpr (kCase == Planted::wgmma_a_changed) a[1][0] ^= 1;
  cuda::wgmma_wait<0>(d);
  store_sums(p, 0, d);
}

// ---- both ---------------------------------------------------------------------------------------

template <Planted kCase>
TensorBox rows_box(const PlantedParams& p) {
  return {p.x,
          2,
          {p.columns * 2, p.rows},
          {2, p.columns * 4},
          {kRowElements, kCase == Planted::tensor_row_too_many ? 65 : 64},
          kCase == Planted::tensor_wrong_swizzle ? Swizzle::none : Swizzle::bytes128};
}

// Thread 0 asks, the second warpgroup multiplies.
template <Planted kCase>
void tensor_kernel(const PlantedParams& p, const TensorBox& map) {
  constexpr int kStages = 2, kTile = 64 * kRowElements;
  IVR_DYNAMIC_SHARED(bf16, tiles);
  IVR_SHARED(Barrier, full, kStages);
  IVR_SHARED(Barrier, empty, kStages);
  const int thread = threadIdx.x, steps = static_cast<int>(p.columns) * 2 / kRowElements;
  if (thread < kStages) {
    cuda::barrier_init(full + thread, 1);
    cuda::barrier_init(empty + thread, kWarpgroup);
  }
  __syncthreads();
  for (int step = 0; thread == 0 && step < steps; ++step) {
    const int stage = step % kStages, phase = step / kStages;
    if constexpr (kCase != Planted::tensor_early_reuse)
      cuda::barrier_wait(empty + stage, phase - 1);
    const int tiles_expected = kCase == Planted::tensor_wrong_bytes ? 1 : 2;
    cuda::barrier_expect(full + stage, tiles_expected * 2 * kTile);
    for (int half = 0; half < 2; ++half) {
      cuda::copy_tensor(tiles + (stage * 2 + half) * kTile, map, {step * kRowElements, half * 64},
                        full + stage);
    }
  }
  if (thread < kWarpgroup) return;
  float d[8][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const Shared<bf16> a = tiles + stage * 2 * kTile;
    if constexpr (kCase != Planted::tensor_no_wait)
      cuda::barrier_wait(full + stage, step / kStages);
    cuda::wgmma_fence(d);
    for (int k = 0; k < 4; ++k) {
      cuda::wgmma<64, false>(d, cuda::matrix_descriptor(a + k * 16, 16, kEight),
                             cuda::matrix_descriptor(a + kTile + k * 16, 16, kEight), true);
    }
    cuda::wgmma_commit();
    if constexpr (kCase == Planted::tensor_early_release) {
      cuda::barrier_arrive(empty + stage);
      // What the copy brings meanwhile is what the products would read.
      if (step + kStages < steps) cuda::barrier_wait(full + stage, step / kStages + 1);
    }
    cuda::wgmma_wait<0>(d);
    if constexpr (kCase != Planted::tensor_early_release) cuda::barrier_arrive(empty + stage);
  }
  store_sums(p, 0, d);
}

template <Planted kCase>
void named_kernel(const PlantedParams& p) {
  IVR_SHARED(float, row, kWarpgroup);
  const int i = threadIdx.x % kWarpgroup;
  if (threadIdx.x < kWarpgroup) {
    row[i] = load_float(p.x + i);
    const int id = kCase == Planted::named_wrong_id ? 2 : 1;
    cuda::named_barrier_arrive(id,
                               kCase == Planted::named_wrong_count ? kWarpgroup : 2 * kWarpgroup);
    if constexpr (kCase == Planted::named_unawaited) cuda::named_barrier_arrive(3, 2 * kWarpgroup);
  } else {
    if constexpr (kCase != Planted::named_missing) cuda::named_barrier_sync(1, 2 * kWarpgroup);
    store_float(p.y + i, row[kWarpgroup - 1 - i]);
  }
}

template <Planted kCase>
void set_registers_kernel() {
  if (threadIdx.x >= kWarpgroup) {
    cuda::take_registers<240>();
  } else if (kCase != Planted::registers_one_warp || threadIdx.x < 32) {
    cuda::give_up_registers<kCase == Planted::registers_too_many ? 40 : 24>();
  }
}

}  // namespace

template <int kCase>
bool run_planted_warpgroup(Machine& machine, const void* params, std::string& config) {
  constexpr auto kPlantedCase = static_cast<Planted>(kCase);
  const auto& p = *static_cast<const PlantedParams*>(params);
  const int64_t bytes = p.columns * static_cast<int64_t>(sizeof(float));
  constexpr size_t kTiles = 192 * kRowBytes;
  allow_rows(machine, Access::read, "x", p.x, p.rows, 1, bytes, bytes, 0);
  allow_rows(machine, Access::write, "y", p.y, p.rows, 1, bytes, bytes, 0);
  config = "planted";
  if constexpr (kPlantedCase <= Planted::box_wrong_swizzle) {
    const TensorBox map = moved_box<kPlantedCase>(p);
    const Dim3 grid{static_cast<unsigned>((p.columns + kBoxColumns - 1) / kBoxColumns),
                    static_cast<unsigned>((p.rows + kBoxRows - 1) / kBoxRows)};
    return machine.launch(grid, {kWarpgroup}, kBoxRows * kRowBytes,
                          [&] { box_kernel<kPlantedCase>(p, map); });
  } else if constexpr (kPlantedCase == Planted::box_planes) {
    const int half = static_cast<int>(p.rows) / 2, width = static_cast<int>(p.columns);
    const TensorBox map{
        p.x, 3, {p.columns, 2, half}, {4, half * bytes, bytes}, {width, 2, half}, Swizzle::none};
    return machine.launch({}, {kWarpgroup}, static_cast<size_t>(p.rows * bytes),
                          [&] { planes_kernel<3>(p, map); });
  } else if constexpr (kPlantedCase == Planted::box_cubes) {
    const int sixth = static_cast<int>(p.rows) / 6, width = static_cast<int>(p.columns);
    const TensorBox map{p.x,
                        4,
                        {p.columns, 2, 3, sixth},
                        {4, 3 * bytes, bytes, 6 * bytes},
                        {width, 2, 3, sixth},
                        Swizzle::none};
    return machine.launch({}, {kWarpgroup}, static_cast<size_t>(p.rows * bytes),
                          [&] { planes_kernel<4>(p, map); });
  } else if constexpr (kPlantedCase <= Planted::wgmma_wrong_major) {
    constexpr int kN = kPlantedCase == Planted::wgmma_16    ? 16
                       : kPlantedCase == Planted::wgmma_128 ? 128
                                                            : 64;
    return machine.launch({}, {kWarpgroup}, kTiles, [&] { shared_kernel<kPlantedCase, kN>(p); });
  } else if constexpr (kPlantedCase <= Planted::wgmma_wrong_leading) {
    return machine.launch({}, {kWarpgroup}, kTiles, [&] { registers_kernel<kPlantedCase>(p); });
  } else if constexpr (kPlantedCase <= Planted::tensor_wrong_swizzle) {
    const TensorBox map = rows_box<kPlantedCase>(p);
    return machine.launch({}, {2 * kWarpgroup}, 4 * 64 * kRowBytes,
                          [&] { tensor_kernel<kPlantedCase>(p, map); });
  } else if constexpr (kPlantedCase <= Planted::named_unawaited) {
    return machine.launch({}, {2 * kWarpgroup}, 0, [&] { named_kernel<kPlantedCase>(p); });
  } else {
    return machine.launch({}, {3 * kWarpgroup}, 0, [] { set_registers_kernel<kPlantedCase>(); });
  }
}

#define IVR_PLANTED_CASE(name)                                                                \
  template bool run_planted_warpgroup<static_cast<int>(Planted::name)>(Machine&, const void*, \
                                                                       std::string&);
IVR_PLANTED_WARPGROUP(IVR_PLANTED_CASE)
#undef IVR_PLANTED_CASE

}  // namespace ivr::emu
