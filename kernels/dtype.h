// Element types that kernels read and write. The numbering is shared with Python (ops/registry.py).
#pragma once

#include <cstddef>
#include <cstdint>

namespace ivr {

enum class DType : int32_t { f32 = 0, bf16 = 1, u8 = 2, i32 = 3, i64 = 4 };

constexpr size_t size_of(DType t) {
  switch (t) {
    case DType::u8:
      return 1;
    case DType::bf16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::i64:
      return 8;
  }
  return 0;
}

}  // namespace ivr
