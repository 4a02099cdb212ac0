// What the products on matrix tiles share.
#pragma once

#include "kernels/cpu/linear_chunks.h"

namespace ivr {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kChunkPanels = 16;

// What follows in memory is fetched into L2, a share at each call.
struct Fetch {
  const char* at;
  int64_t bytes;

  void operator()() {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b, 0, 2);
    at += bytes;
  }
};

}  // namespace
}  // namespace ivr
