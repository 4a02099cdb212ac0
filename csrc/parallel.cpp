#include "csrc/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace ivr {
namespace {

thread_local bool inside_region = false;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    stop_ = true;
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& t : workers_) t.join();
  }

  int size() const { return threads_; }

  void run(int64_t n, int64_t grain, detail::RangeFn fn, void* context) {
    fn_ = fn;
    context_ = context;
    n_ = n;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    take_chunks();
    // A worker announces itself in active_ before it looks at open_, so one of the two sides always
    // sees the other: no worker touches the region after this loop.
    open_.store(false);
    for (int spins = 0;; ++spins) {
      const int active = active_.load();
      if (active == 0) break;
      if (spins < kSpins) {
        pause();
      } else {
        active_.wait(active);
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some 20 us: longer than the gap between two ops

  // A chunk is a share of what is left: long ones first, which read memory as one stream, and short
  // ones last, so that no thread waits long for another one.
  void take_chunks() {
    inside_region = true;
    int64_t begin = next_.load(std::memory_order_relaxed);
    while (begin < n_) {
      const int64_t end = std::min(n_, begin + std::max(grain_, (n_ - begin) / (2 * threads_)));
      if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      fn_(context_, begin, end);
      begin = next_.load(std::memory_order_relaxed);
    }
    inside_region = false;
  }

  void work() {
    uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; epoch_.load() == seen; ++spins) {
        if (spins < kSpins) {
          pause();
        } else {
          epoch_.wait(seen);
        }
      }
      seen = epoch_.load();
      if (stop_) return;
      active_.fetch_add(1);
      if (open_.load()) take_chunks();
      if (active_.fetch_sub(1) == 1) active_.notify_all();
    }
  }

  const int threads_;
  std::vector<std::thread> workers_;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> active_{0};
  std::atomic<bool> open_{false};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  detail::RangeFn fn_ = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0;
  int64_t grain_ = 1;
};

// Everything a forked child must forget: its copy of the pool has no threads, and another thread of
// the parent may have held the lock at the time of the fork.
struct State {
  std::mutex mutex;
  Pool* pool = nullptr;
};

State* state = nullptr;
std::atomic<int> wanted{0};

State& shared_state() {
  static const bool once = [] {
    state = new State;
    // The child leaks the parent's copy: joining threads that do not exist is no option.
    pthread_atfork(nullptr, nullptr, [] {
      state = new State;
      inside_region = false;
    });
    return true;
  }();
  (void)once;
  return *state;
}

// "max 100000" or "200000 100000": CPU time per period, both in microseconds.
double cgroup_cpus() {
  double quota, period;
  std::string word;
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  if (v2 >> word >> period && word != "max") return std::stod(word) / period;
  std::ifstream q("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), p("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  if (q >> quota && p >> period && quota > 0 && period > 0) return quota / period;
  return 0;
}

}  // namespace

int default_num_threads() {
  static const int n = [] {
    cpu_set_t set;
    CPU_ZERO(&set);
    int cpus = sched_getaffinity(0, sizeof(set), &set) == 0
                   ? CPU_COUNT(&set)
                   : static_cast<int>(std::thread::hardware_concurrency());
    const double quota = cgroup_cpus();
    if (quota > 0) cpus = std::min(cpus, static_cast<int>(std::ceil(quota)));
    return std::clamp(cpus, 1, 1024);
  }();
  return n;
}

int num_threads() {
  const int n = wanted.load();
  return n ? n : default_num_threads();
}

void set_num_threads(int64_t n) {
  if (n < 1 || n > 1024) {
    throw std::invalid_argument("set_num_threads: got " + std::to_string(n) +
                                ", allowed: 1 to 1024");
  }
  wanted = static_cast<int>(n);
}

namespace detail {

void run_region(int64_t n, int64_t grain, RangeFn fn, void* context) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int threads = num_threads();
  if (threads == 1 || inside_region || n <= grain) {
    fn(context, 0, n);
    return;
  }
  State& s = shared_state();
  std::lock_guard lock(s.mutex);
  if (!s.pool || s.pool->size() != threads) {
    delete s.pool;
    s.pool = new Pool(threads);
  }
  s.pool->run(n, grain, fn, context);
}

}  // namespace detail
}  // namespace ivr
