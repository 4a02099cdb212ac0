// The planted kernels by name; see planted.cpp and planted_warpgroup.cpp.
#pragma once

#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {

enum class Planted {
  row_sum,           // correct
  collectives,       // correct
  dynamic_shared,    // correct
  missing_barrier,   // partial sums are read before they are there
  reused_scratch,    // partial sums are overwritten while they are read
  unwritten_shared,  // one partial sum too many is read
  shared_overrun,    // the last warp's partial sum lands behind the array
  read_past_row,     // off by one, into the next row
  write_past_row,
  misaligned,         // a 16-byte load from a row of 4-byte alignment
  divergent_barrier,  // one warp meets a barrier that the others never reach
  two_barriers,       // the branches of an if have a barrier each
  wrong_mask,         // half of the lanes call with the mask of the other half
  missing_lane,       // a full-warp shuffle that half of the warp skips
  exited_lane,        // a full-warp shuffle after half of the warp has returned
  wrong_lane,         // a shuffle from a lane outside the mask

  async_copy,             // correct
  async_no_wait,          // what is copied is used at once
  async_wrong_wait,       // one group too few has landed
  async_missing_barrier,  // others' copies are used after the own wait alone
  async_early_reuse,      // a stage is copied into while it is read
  async_past_row,         // off by one vector, behind the row
  async_misaligned,       // from an address that is a multiple of 4 only

  bulk_copy,             // correct
  bulk_no_wait,          // what is copied is used at once
  bulk_wrong_phase,      // the wait is for the phase before
  bulk_wrong_bytes,      // more bytes are expected than come
  bulk_early_reuse,      // a stage is copied into while it is read
  bulk_missing_arrival,  // one thread forgets to say that it has read
  bulk_extra_arrival,    // one thread says it twice
  bulk_unknown_barrier,  // no barrier between initialisation and use
  bulk_past_row,         // 16 bytes too many
  bulk_unawaited,        // the block ends before its last copy

  tile_product,              // correct
  tile_row_off_by_one,       // ldmatrix is given the row below
  tile_uncommitted,          // the copies were never made a group
  tile_unsynchronised,       // ldmatrix reads what other lanes have just stored
  tile_misaligned,           // a row begins between two multiples of 16 bytes
  tile_divergent,            // half of the warp skips mma.sync
  tile_mixed_transposition,  // lanes disagree on .trans
  tile_swapped_matrices,     // finds nothing, multiplies the wrong halves
  tile_not_transposed,       // likewise

  box_copy,              // correct
  box_no_wait,           // what is copied is used at once
  box_more_bytes,        // more bytes are expected than come
  box_fewer_bytes,       // or fewer
  box_row_too_many,      // the box is larger than the tile
  box_misplaced_tile,    // the tile starts inside of the swizzle's pattern
  box_wrong_stride,      // 16 bytes too many a row
  box_narrow_stride,     // no multiple of 16 bytes
  box_wrong_swizzle,     // finds nothing, the map has none
  box_planes,            // correct
  box_cubes,             // correct
  wgmma_16,              // correct
  wgmma_64,              // correct
  wgmma_128,             // correct
  wgmma_groups,          // correct
  wgmma_wrong_wait,      // one group too few has ended
  wgmma_no_proxy_fence,  // ordinary stores are multiplied without a fence
  wgmma_no_barrier,      // or without a barrier
  wgmma_no_fence,        // accumulators that no fence has named
  wgmma_late_write,      // accumulators written between fence and use
  wgmma_missing_warp,    // one warp skips a product
  wgmma_other_operand,   // one warp has another matrix
  wgmma_uncommitted,     // the products were never made a group
  wgmma_early_use,       // accumulators are touched before the wait
  wgmma_early_reuse,     // a matrix is overwritten before the wait
  wgmma_no_wait,         // accumulators are stored without a wait
  wgmma_off_by_one,      // a matrix starts a row too far, inside of the pattern
  wgmma_wrong_stride,    // finds nothing, eights of rows too close
  wgmma_wrong_swizzle,   // likewise, a narrower pattern
  wgmma_wrong_major,     // likewise, rows and columns change places
  wgmma_registers,       // correct
  wgmma_a_not_fenced,    // a of registers that no fence has named
  wgmma_a_changed,       // a is changed before the wait
  wgmma_wrong_leading,   // finds nothing, halves too close
  tensor_product,        // correct
  tensor_no_wait,        // tiles are multiplied before they are there
  tensor_wrong_bytes,    // one tile's bytes are not expected
  tensor_early_reuse,    // a tile is copied into while it is multiplied
  tensor_early_release,  // tiles are given back before the wait
  tensor_row_too_many,   // the box is larger than the tile
  tensor_wrong_swizzle,  // finds nothing, the map has none
  named_barrier,         // correct
  named_missing,         // the readers do not wait
  named_wrong_id,        // the writers come to another barrier
  named_wrong_count,     // writers and readers count differently
  named_unawaited,       // somebody comes and nobody waits
  registers_set,         // correct
  registers_too_many,    // more than there are
  registers_one_warp,    // three warps of a warpgroup leave theirs
};

// Those of planted_warpgroup.cpp.
#define IVR_PLANTED_WARPGROUP(X) \
  X(box_copy)                    \
  X(box_no_wait)                 \
  X(box_more_bytes)              \
  X(box_fewer_bytes)             \
  X(box_row_too_many)            \
  X(box_misplaced_tile)          \
  X(box_wrong_stride)            \
  X(box_narrow_stride)           \
  X(box_wrong_swizzle)           \
  X(box_planes)                  \
  X(box_cubes)                   \
  X(wgmma_16)                    \
  X(wgmma_64)                    \
  X(wgmma_128)                   \
  X(wgmma_groups)                \
  X(wgmma_wrong_wait)            \
  X(wgmma_no_proxy_fence)        \
  X(wgmma_no_barrier)            \
  X(wgmma_no_fence)              \
  X(wgmma_late_write)            \
  X(wgmma_missing_warp)          \
  X(wgmma_other_operand)         \
  X(wgmma_uncommitted)           \
  X(wgmma_early_use)             \
  X(wgmma_early_reuse)           \
  X(wgmma_no_wait)               \
  X(wgmma_off_by_one)            \
  X(wgmma_wrong_stride)          \
  X(wgmma_wrong_swizzle)         \
  X(wgmma_wrong_major)           \
  X(wgmma_registers)             \
  X(wgmma_a_not_fenced)          \
  X(wgmma_a_changed)             \
  X(wgmma_wrong_leading)         \
  X(tensor_product)              \
  X(tensor_no_wait)              \
  X(tensor_wrong_bytes)          \
  X(tensor_early_reuse)          \
  X(tensor_early_release)        \
  X(tensor_row_too_many)         \
  X(tensor_wrong_swizzle)        \
  X(named_barrier)               \
  X(named_missing)               \
  X(named_wrong_id)              \
  X(named_wrong_count)           \
  X(named_unawaited)             \
  X(registers_set)               \
  X(registers_too_many)          \
  X(registers_one_warp)

template <int kCase>
bool run_planted_warpgroup(Machine& machine, const void* params, std::string& config);

constexpr Op kPlanted[] = {
#define IVR_PLANTED(name) \
  {"planted/" #name, sizeof(PlantedParams), run_planted<static_cast<int>(Planted::name)>}
    IVR_PLANTED(row_sum),
    IVR_PLANTED(collectives),
    IVR_PLANTED(dynamic_shared),
    IVR_PLANTED(missing_barrier),
    IVR_PLANTED(reused_scratch),
    IVR_PLANTED(unwritten_shared),
    IVR_PLANTED(shared_overrun),
    IVR_PLANTED(read_past_row),
    IVR_PLANTED(write_past_row),
    IVR_PLANTED(misaligned),
    IVR_PLANTED(divergent_barrier),
    IVR_PLANTED(two_barriers),
    IVR_PLANTED(wrong_mask),
    IVR_PLANTED(missing_lane),
    IVR_PLANTED(exited_lane),
    IVR_PLANTED(wrong_lane),
    IVR_PLANTED(async_copy),
    IVR_PLANTED(async_no_wait),
    IVR_PLANTED(async_wrong_wait),
    IVR_PLANTED(async_missing_barrier),
    IVR_PLANTED(async_early_reuse),
    IVR_PLANTED(async_past_row),
    IVR_PLANTED(async_misaligned),
    IVR_PLANTED(tile_product),
    IVR_PLANTED(tile_row_off_by_one),
    IVR_PLANTED(tile_uncommitted),
    IVR_PLANTED(tile_unsynchronised),
    IVR_PLANTED(tile_misaligned),
    IVR_PLANTED(tile_divergent),
    IVR_PLANTED(tile_mixed_transposition),
    IVR_PLANTED(tile_swapped_matrices),
    IVR_PLANTED(tile_not_transposed),
    IVR_PLANTED(bulk_copy),
    IVR_PLANTED(bulk_no_wait),
    IVR_PLANTED(bulk_wrong_phase),
    IVR_PLANTED(bulk_wrong_bytes),
    IVR_PLANTED(bulk_early_reuse),
    IVR_PLANTED(bulk_missing_arrival),
    IVR_PLANTED(bulk_extra_arrival),
    IVR_PLANTED(bulk_unknown_barrier),
    IVR_PLANTED(bulk_past_row),
    IVR_PLANTED(bulk_unawaited),
#undef IVR_PLANTED
#define IVR_PLANTED_CASE(name) \
  {"planted/" #name, sizeof(PlantedParams), run_planted_warpgroup<static_cast<int>(Planted::name)>},
    IVR_PLANTED_WARPGROUP(IVR_PLANTED_CASE)
#undef IVR_PLANTED_CASE
};

}  // namespace ivr::emu
