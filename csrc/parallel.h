// One process-wide pool of threads.
//
// Work is handed out in chunks that become shorter, so that a disturbed core takes fewer of them;
// the caller works too. Regions started from several Python threads are served one after the other,
// a region inside a region runs inline, idle workers sleep, and a forked child starts a pool of its
// own. Results never depend on the number of threads: a chunk is computed by one thread from start
// to end and chunks share no accumulators.
#pragma once

#include <cstdint>
#include <type_traits>

namespace ivr {

int num_threads();
void set_num_threads(int64_t n);  // throws std::invalid_argument unless 1 <= n <= 1024
int default_num_threads();        // from the affinity mask and the cgroup's CPU quota

namespace detail {
using RangeFn = void (*)(void* context, int64_t begin, int64_t end);
void run_region(int64_t n, int64_t grain, RangeFn fn, void* context);
}  // namespace detail

// Calls f(begin, end) on pieces of [0, n) of at least `grain` items (the last may be smaller).
// f must not throw.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  using Body = std::remove_reference_t<F>;
  detail::run_region(
      n, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace ivr
