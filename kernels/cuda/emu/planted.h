// The planted kernels by name; see planted.cpp.
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
};

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
};

}  // namespace ivr::emu
