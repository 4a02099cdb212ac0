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
};

constexpr Op kPlanted[] = {
#define IVR_PLANTED(name) \
  {"planted/" #name, sizeof(PlantedParams), run_planted<static_cast<int>(Planted::name)>}
    IVR_PLANTED(row_sum),         IVR_PLANTED(collectives),       IVR_PLANTED(dynamic_shared),
    IVR_PLANTED(missing_barrier), IVR_PLANTED(reused_scratch),    IVR_PLANTED(unwritten_shared),
    IVR_PLANTED(shared_overrun),  IVR_PLANTED(read_past_row),     IVR_PLANTED(write_past_row),
    IVR_PLANTED(misaligned),      IVR_PLANTED(divergent_barrier), IVR_PLANTED(two_barriers),
    IVR_PLANTED(wrong_mask),      IVR_PLANTED(missing_lane),      IVR_PLANTED(exited_lane),
    IVR_PLANTED(wrong_lane),
#undef IVR_PLANTED
};

}  // namespace ivr::emu
