// Launches kernels of rows.cuh and chunks.cuh as their .cu files do.
#pragma once

#include <string>

#include "kernels/cuda/chunks.cuh"
#include "kernels/cuda/emu/ops.h"

namespace ivr::emu {

template <typename Config>
std::string words(const Config& c) {
  char text[128];
  cuda::format(c, text, sizeof(text));
  return text;
}

// Both write the configuration in words; false: the machine reports.
template <typename F>
bool launch_rows(Machine& machine, const cuda::RowConfig& c, std::string& config, const F& body) {
  config = words(c);
  const Dim3 block{static_cast<unsigned>(c.threads_per_row),
                   static_cast<unsigned>(c.rows_per_block)};
  return machine.launch({c.blocks}, block, 0, body);
}

template <typename F>
bool launch_chunks(Machine& machine, const cuda::ChunkConfig& c, std::string& config,
                   const F& body) {
  config = words(c);
  return machine.launch({static_cast<unsigned>(c.blocks)}, {cuda::kChunkThreads}, 0, body);
}

}  // namespace ivr::emu
