// Scratch memory for kernels: it grows and is kept, so that a call in steady state allocates
// nothing.
#pragma once

#include <cstdint>
#include <memory>

namespace ivr {

class Scratch {
 public:
  // At least `bytes` bytes, 64-byte aligned, with arbitrary contents; valid until the next call.
  // Throws std::bad_alloc.
  void* reserve(int64_t bytes);

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> memory_;
  int64_t bytes_ = 0;
};

// The calling thread's own scratch, as floats. Ends the process where memory is exhausted: it is
// called inside of parallel regions.
float* thread_scratch(int64_t floats) noexcept;

}  // namespace ivr
