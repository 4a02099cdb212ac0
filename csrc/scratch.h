// Scratch memory for kernels: a buffer per thread that grows and is kept, so that a call in steady
// state allocates nothing.
#pragma once

#include <cstdint>

namespace ivr {

// At least `floats` floats, 64-byte aligned, with arbitrary contents; valid until this thread's
// next call. Ends the process where memory is exhausted: it is called inside of parallel regions.
float* thread_scratch(int64_t floats) noexcept;

}  // namespace ivr
