// What a barrier over the whole grid costs: the probe `grid_barrier` of bench/gpu_check.py builds
// this as a shared library. A persistent kernel that walks through a model's layers pays it several
// times a layer, in place of a launch.
//
// Every block, one per multiprocessor, writes the round's number, meets the barrier and reads what
// another block wrote, so that a barrier that does not order is seen.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;

struct Arguments {
  uint32_t* written;  // [blocks]: the last round that a block wrote
  uint32_t* arrived;  // of all rounds together
  uint32_t* wrong;    // reads that came too early
  uint32_t rounds;
};

struct Cooperative {
  __device__ void wait(const Arguments&, uint32_t) const { cooperative_groups::this_grid().sync(); }
};

// One counter that only grows: a round is over when every block has arrived as often as its number
// says.
struct Counting {
  __device__ void wait(const Arguments& a, uint32_t round) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(a.arrived, 1u);
      const auto* arrived = static_cast<const volatile uint32_t*>(a.arrived);
      while (*arrived < round * gridDim.x) {
      }
      __threadfence();
    }
    __syncthreads();
  }
};

template <typename Barrier>
__global__ void __launch_bounds__(kThreads) rounds_kernel(Arguments a) {
  const Barrier barrier;
  const uint32_t other = (blockIdx.x + 1) % gridDim.x;
  for (uint32_t round = 1; round <= a.rounds; ++round) {
    if (threadIdx.x == 0) static_cast<volatile uint32_t*>(a.written)[blockIdx.x] = round;
    barrier.wait(a, round);
    // The other block may be a round ahead, never behind.
    if (threadIdx.x == 0 && static_cast<volatile uint32_t*>(a.written)[other] < round) {
      atomicAdd(a.wrong, 1u);
    }
  }
}

// Microseconds of a round; negative where an order was wrong.
template <typename Barrier>
cudaError_t time_rounds(int blocks, uint32_t rounds, float* us) {
  uint32_t* memory = nullptr;
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  const size_t words = static_cast<size_t>(blocks) + 2;
  cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&memory), words * sizeof(uint32_t));
  if (error == cudaSuccess) error = cudaStreamCreate(&stream);
  if (error == cudaSuccess) error = cudaEventCreate(&begin);
  if (error == cudaSuccess) error = cudaEventCreate(&end);
  Arguments a{memory + 2, memory, memory + 1, rounds};
  void* arguments[] = {&a};
  const auto kernel = reinterpret_cast<const void*>(&rounds_kernel<Barrier>);
  // The first pass warms up.
  for (int pass = 0; pass < 2 && error == cudaSuccess; ++pass) {
    error = cudaMemsetAsync(memory, 0, words * sizeof(uint32_t), stream);
    if (error == cudaSuccess) error = cudaEventRecord(begin, stream);
    if (error == cudaSuccess) {
      error =
          cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, stream);
    }
    if (error == cudaSuccess) error = cudaEventRecord(end, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  }
  float ms = 0.0f;
  uint32_t wrong = 0;
  if (error == cudaSuccess) error = cudaEventElapsedTime(&ms, begin, end);
  if (error == cudaSuccess) {
    error = cudaMemcpy(&wrong, a.wrong, sizeof(wrong), cudaMemcpyDeviceToHost);
  }
  *us = wrong == 0 ? ms * 1e3f / static_cast<float>(rounds) : -1.0f;
  if (end != nullptr) cudaEventDestroy(end);
  if (begin != nullptr) cudaEventDestroy(begin);
  if (stream != nullptr) cudaStreamDestroy(stream);
  if (memory != nullptr) cudaFree(memory);
  return error;
}

}  // namespace

// Microseconds of a round with cooperative groups and with a counter, and the number of blocks.
// Returns what went wrong in words, or null.
extern "C" const char* grid_barrier(int device, unsigned rounds, float* cooperative_us,
                                    float* counting_us, int* blocks) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(blocks, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = time_rounds<Cooperative>(*blocks, rounds, cooperative_us);
  if (error == cudaSuccess) error = time_rounds<Counting>(*blocks, rounds, counting_us);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
