#include "csrc/scratch.h"

#include <new>

namespace ivr {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

void Scratch::Free::operator()(void* p) const { ::operator delete(p, kAlignment); }

void* Scratch::reserve(int64_t bytes) {
  if (bytes_ < bytes) {
    memory_.reset();
    bytes_ = 0;
    memory_.reset(::operator new(static_cast<size_t>(bytes), kAlignment));
    bytes_ = bytes;
  }
  return memory_.get();
}

float* thread_scratch(int64_t floats) noexcept {
  thread_local Scratch scratch;
  return static_cast<float*>(scratch.reserve(floats * static_cast<int64_t>(sizeof(float))));
}

}  // namespace ivr
