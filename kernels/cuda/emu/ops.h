// The ops that can be emulated: a row each in ops.cpp, the code in <op>.cpp beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/attention.h"
#include "kernels/cuda/emu/simt.h"

namespace ivr::emu {

struct Op {
  const char* name;
  size_t params_size;
  // Registers the memory that params describe, launches as the op's .cu would, and writes the
  // launch configuration in words. False: machine.report() has the finding.
  bool (*run)(Machine& machine, const void* params, std::string& config);
};

enum class Access { read, write };

// Registers `rows` x `heads` rows of `bytes` each, one range per row; null base: nothing.
// Strides in bytes.
void allow_rows(Machine& machine, Access access, const char* name, const void* base, int64_t rows,
                int64_t heads, int64_t bytes, int64_t row_stride, int64_t head_stride);

// Registers what flash_attention and paged_attention have in common.
void allow_attention(Machine& machine, const AttentionParams& a);

bool run_embed_scatter(Machine& machine, const void* params, std::string& config);
bool run_flash_attention(Machine& machine, const void* params, std::string& config);
bool run_gated_activation(Machine& machine, const void* params, std::string& config);
bool run_gemm(Machine& machine, const void* params, std::string& config);
bool run_grouped_linear(Machine& machine, const void* params, std::string& config);
bool run_layer_norm(Machine& machine, const void* params, std::string& config);
bool run_linear(Machine& machine, const void* params, std::string& config);
bool run_moe_combine(Machine& machine, const void* params, std::string& config);
bool run_moe_route(Machine& machine, const void* params, std::string& config);
bool run_mxfp4_unpack(Machine& machine, const void* params, std::string& config);
bool run_paged_attention(Machine& machine, const void* params, std::string& config);
bool run_pixel_unshuffle_norm(Machine& machine, const void* params, std::string& config);
bool run_preprocess(Machine& machine, const void* params, std::string& config);
bool run_rms_norm(Machine& machine, const void* params, std::string& config);
bool run_rope(Machine& machine, const void* params, std::string& config);
bool run_sample(Machine& machine, const void* params, std::string& config);

// Kernels with a known bug each, and correct ones beside them: the test of the emulator itself.
struct PlantedParams {
  const float* x;  // [rows, columns] contiguous
  float* y;        // [rows, columns] contiguous
  int64_t rows, columns;
};
template <int kCase>
bool run_planted(Machine& machine, const void* params, std::string& config);

}  // namespace ivr::emu
