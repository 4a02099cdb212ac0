// What the machine can do at most, by the instructions that the kernels are made of: multiply-adds
// on registers alone, and a plain read of memory. The floors that bench/cpu.py sets times beside.
#pragma once

#include "kernels/cpu/isa.h"

namespace ivr {

// Runs `rounds` rounds of independent chains and says how many operations they were, two a
// multiply-add. sink: any number; keeps the compiler from leaving the work out.
IVR_CPU_KERNEL(peak_products, int64_t rounds, int64_t& operations, float& sink)
IVR_DOT_KERNEL(peak_products_dot, int64_t rounds, int64_t& operations, float& sink)
IVR_AMX_KERNEL(peak_products_amx, int64_t rounds, int64_t& operations, float& sink)

// Reads `count` floats in four streams.
IVR_CPU_KERNEL(peak_read, const float* data, int64_t count, float& sink)

}  // namespace ivr
