#include "csrc/scratch.h"

#include <memory>
#include <new>

namespace ivr {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(float* p) const { ::operator delete(p, kAlignment); }
};

struct Buffer {
  std::unique_ptr<float, Free> data;
  int64_t floats = 0;
};

}  // namespace

float* thread_scratch(int64_t floats) noexcept {
  thread_local Buffer buffer;
  if (buffer.floats < floats) {
    buffer.data.reset();
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    buffer.data.reset(static_cast<float*>(::operator new(bytes, kAlignment)));
    buffer.floats = floats;
  }
  return buffer.data.get();
}

}  // namespace ivr
