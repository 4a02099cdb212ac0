// The emulator's runtime: fibres, the block scheduler, rendezvous, memory checks.
#include "kernels/cuda/emu/simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(IVR_EMU_UCONTEXT)
#include <ucontext.h>
#define IVR_EMU_USE_UCONTEXT 1
#endif

#if !defined(IVR_EMU_USE_UCONTEXT)
extern "C" void ivr_emu_switch(void** from, void* to);
#endif

namespace ivr::emu {
namespace {

// ---- switching stacks ---------------------------------------------------------------------------

constexpr size_t kStackBytes = 64 * 1024;

#if defined(IVR_EMU_USE_UCONTEXT)

using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
void make_context(Context& c, char* stack, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = kStackBytes;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}

#else

// A context is the stack pointer; the callee-saved registers lie on the stack. About 15 times
// faster than swapcontext, which enters the kernel for the signal mask.
using Context = void*;
asm(R"(
.text
.p2align 4
.hidden ivr_emu_switch
.globl ivr_emu_switch
.type ivr_emu_switch, @function
ivr_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ivr_emu_switch, . - ivr_emu_switch
)");
void switch_context(Context& from, Context& to) { ivr_emu_switch(&from, to); }
void make_context(Context& c, char* stack, void (*entry)()) {
  // Entered by `ret`: behind the six registers lies the entry, then the slot where a caller's
  // return address would be, which leaves the stack aligned as at a call.
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(entry);
  c = top - 6;
}

#endif

// ---- state --------------------------------------------------------------------------------------

constexpr int kWarp = 32;

enum class Wait { none, block, warp, done };

struct Fibre {
  Context context;
  char* stack = nullptr;
  Coordinates at;
  Wait wait = Wait::none;
  const char* file = nullptr;  // of the __syncthreads it waits at
  int line = 0;
  Collective kind{};  // of the collective it waits in
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;
  int lane = 0, width = 0;
};

struct Range {
  uintptr_t begin;
  uintptr_t end;
  const char* name;
  int64_t row;
};

// Ranges may overlap (in-place operands, one row's view inside another's), hence the running
// maximum of the ends: it bounds how far back a lookup has to walk.
struct Ranges {
  std::vector<Range> list;
  std::vector<uintptr_t> end_so_far;

  void prepare() {
    std::sort(list.begin(), list.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    end_so_far.clear();
    uintptr_t end = 0;
    for (const Range& r : list) end_so_far.push_back(end = std::max(end, r.end));
  }
  // Index of the last range that begins at or before p; -1: none.
  int64_t last_before(uintptr_t p) const {
    return std::upper_bound(list.begin(), list.end(), p,
                            [](uintptr_t a, const Range& r) { return a < r.begin; }) -
           list.begin() - 1;
  }
  bool contains(uintptr_t p, size_t bytes) const {
    for (int64_t i = last_before(p); i >= 0 && end_so_far[i] >= p + bytes; --i) {
      if (list[i].end >= p + bytes) return true;
    }
    return false;
  }
};

struct Allocation {
  size_t begin;
  size_t end;
  const void* site;
};

// SplitMix64 (Steele, Lea, Flood, 2014): the same order from the same seed with every library.
struct Random {
  uint64_t state;
  size_t below(size_t n) {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % n;
  }
};

// Who touched a byte of shared memory last, and when. Stamps count synchronisations of the launch.
struct Shadow {
  static constexpr int kSeveral = -2, kNobody = -1;
  int writer = kNobody;
  int reader = kNobody;       // kSeveral: more than one since the last write
  int reader_warp = kNobody;  // kSeveral likewise
  uint64_t written = 0;
  uint64_t read = 0;
};

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::sync_warp:
      return "__syncwarp";
    case Collective::shuffle:
      return "__shfl_sync";
    case Collective::shuffle_up:
      return "__shfl_up_sync";
    case Collective::shuffle_down:
      return "__shfl_down_sync";
    case Collective::shuffle_xor:
      return "__shfl_xor_sync";
    case Collective::ballot:
      return "__ballot_sync";
  }
  return "";
}

}  // namespace

struct Machine::State {
  Random random{};
  Ranges readable, writable;
  std::string report;

  char* stacks = nullptr;
  Context scheduler;
  std::vector<Fibre> fibres;
  Fibre* current = nullptr;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  std::vector<int> ready;
  bool failed = false;

  // Shared memory of the block: static arrays from 0, dynamic bytes behind them.
  std::vector<char> shared;
  std::vector<Shadow> shadow;
  std::vector<Allocation> allocations;
  size_t static_end = 0, dynamic_begin = 0;

  uint64_t clock = 1;        // counts completed synchronisations
  uint64_t block_start = 0;  // clock values
  uint64_t last_block_sync = 0;
  std::vector<uint64_t> lane_sync;  // [warp, lane, lane]: last __syncwarp that both took part in
  std::vector<uint64_t> warp_sync;  // [warp]: last __syncwarp of all its lanes

  int id(const Fibre& f) const { return static_cast<int>(&f - fibres.data()); }
  int self() const { return id(*current); }

  [[gnu::format(printf, 2, 3)]] void fail(const char* format, ...);
  void yield() { switch_context(current->context, scheduler); }
  void wake(Fibre& f) {
    f.wait = Wait::none;
    ready.push_back(id(f));
  }

  bool run_block();
  void finish_block_barrier();
  void finish_collective(int warp);
  void report_deadlock();
  void check(const Ranges& ranges, const void* p, size_t bytes, size_t alignment, bool write);
  bool ordered(int other, uint64_t stamp) const;
};

namespace {
thread_local Machine::State* running = nullptr;

void fibre_entry() {
  running->body(running->argument);
  running->current->wait = Wait::done;
  running->yield();
  __builtin_unreachable();
}
}  // namespace

// Ends the launch: control goes to the scheduler and no fibre is resumed. Fibres hold nothing that
// needs a destructor.
void Machine::State::fail(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  report = text;
  if (current != nullptr) {
    const Coordinates& c = current->at;
    std::snprintf(text, sizeof(text), "; thread (%u, %u, %u) of block (%u, %u, %u)", c.thread.x,
                  c.thread.y, c.thread.z, c.block.x, c.block.y, c.block.z);
    report += text;
  }
  failed = true;
  if (current != nullptr) yield();
}

// ---- scheduling ---------------------------------------------------------------------------------

void Machine::State::finish_block_barrier() {
  const Fibre& first = fibres.front();
  for (const Fibre& f : fibres) {
    if (f.wait != Wait::block) return;
  }
  for (const Fibre& f : fibres) {
    if (f.line != first.line || std::strcmp(f.file, first.file) != 0) {
      fail("divergent barrier: thread 0 waits at %s:%d, thread %d at %s:%d; block (%u, %u, %u)",
           first.file, first.line, id(f), f.file, f.line, f.at.block.x, f.at.block.y, f.at.block.z);
      return;
    }
  }
  last_block_sync = ++clock;
  for (Fibre& f : fibres) wake(f);
}

void Machine::State::report_deadlock() {
  int at_barrier = 0, in_collective = 0, done = 0, missing = -1;
  const Fibre* barrier = nullptr;
  const Fibre* collective = nullptr;
  for (const Fibre& f : fibres) {
    at_barrier += f.wait == Wait::block;
    in_collective += f.wait == Wait::warp;
    done += f.wait == Wait::done;
    if (f.wait == Wait::block && barrier == nullptr) barrier = &f;
    if (f.wait == Wait::warp && collective == nullptr) collective = &f;
    if (f.wait != Wait::block && missing < 0) missing = id(f);
  }
  const Dim3 block = fibres[0].at.block;
  char text[256];
  std::snprintf(text, sizeof(text),
                "deadlock in block (%u, %u, %u): %d threads at __syncthreads, %d in a warp "
                "collective, %d exited",
                block.x, block.y, block.z, at_barrier, in_collective, done);
  std::string whole = text;
  if (barrier != nullptr) {
    std::snprintf(text, sizeof(text), "; thread %d waits at %s:%d, thread %d does not",
                  id(*barrier), barrier->file, barrier->line, missing);
    whole += text;
  }
  if (collective != nullptr) {
    std::snprintf(text, sizeof(text), "; thread %d waits in %s with mask %08x", id(*collective),
                  name_of(collective->kind), collective->mask);
    whole += text;
  }
  fail("%s", whole.c_str());
}

bool Machine::State::run_block() {
  ready.resize(fibres.size());
  for (size_t i = 0; i < fibres.size(); ++i) {
    Fibre& f = fibres[i];
    f.wait = Wait::none;
    ready[i] = static_cast<int>(i);
    make_context(f.context, f.stack, fibre_entry);
  }
  // Bytes of ff are a NaN in every float type and an impossible index in every integer type.
  std::fill(shared.begin(), shared.end(), static_cast<char>(0xff));
  block_start = last_block_sync = ++clock;
  for (;;) {
    while (!ready.empty()) {
      std::swap(ready[random.below(ready.size())], ready.back());
      current = &fibres[ready.back()];
      ready.pop_back();
      switch_context(scheduler, current->context);
      current = nullptr;
      if (failed) return false;
    }
    finish_block_barrier();
    if (failed) return false;
    if (!ready.empty()) continue;
    const bool all_done = std::all_of(fibres.begin(), fibres.end(),
                                      [](const Fibre& f) { return f.wait == Wait::done; });
    if (!all_done) report_deadlock();
    return all_done;
  }
}

Machine::Machine(uint64_t seed) : state_(std::make_unique<State>()) { state_->random.state = seed; }

Machine::~Machine() {
  if (state_->stacks != nullptr) munmap(state_->stacks, Limits::kThreads * kStackBytes);
}

const std::string& Machine::report() const { return state_->report; }

void Machine::allow_read(const void* begin, int64_t bytes, const char* name, int64_t row) {
  const auto b = reinterpret_cast<uintptr_t>(begin);
  state_->readable.list.push_back({b, b + static_cast<uintptr_t>(bytes), name, row});
}

void Machine::allow_write(const void* begin, int64_t bytes, const char* name, int64_t row) {
  const auto b = reinterpret_cast<uintptr_t>(begin);
  state_->writable.list.push_back({b, b + static_cast<uintptr_t>(bytes), name, row});
}

bool Machine::launch_threads(Dim3 grid, Dim3 block, size_t dynamic_shared,
                             void (*body)(const void*), const void* argument) {
  State& s = *state_;
  s.failed = false;
  s.report.clear();
  if (grid.count() == 0 || block.count() == 0 || block.count() > Limits::kThreads ||
      dynamic_shared > Limits::kDynamicShared) {
    s.fail("impossible launch: grid %ux%ux%u, block %ux%ux%u, %zu bytes of dynamic shared memory",
           grid.x, grid.y, grid.z, block.x, block.y, block.z, dynamic_shared);
    return false;
  }
  if (s.stacks == nullptr) {
    void* stacks = mmap(nullptr, Limits::kThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) {
      s.fail("no memory for fibre stacks");
      return false;
    }
    s.stacks = static_cast<char*>(stacks);
  }
  s.readable.prepare();
  s.writable.prepare();
  s.body = body;
  s.argument = argument;
  s.dynamic_begin = Limits::kStaticShared;
  s.static_end = 0;
  s.allocations.assign(1, {s.dynamic_begin, s.dynamic_begin + dynamic_shared, nullptr});
  s.shared.resize(s.dynamic_begin + dynamic_shared + 16);
  s.shadow.assign(s.shared.size(), Shadow{});

  const unsigned threads = block.count();
  s.fibres.assign(threads, Fibre{});
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& f = s.fibres[i];
    f.stack = s.stacks + i * kStackBytes;
    f.at.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    f.at.block_dim = block;
    f.at.grid_dim = grid;
  }
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  s.lane_sync.assign(size_t{warps} * kWarp * kWarp, 0);
  s.warp_sync.assign(warps, 0);

  std::vector<unsigned> order(grid.count());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[s.random.below(i)]);

  State* const outer = running;
  running = &s;
  for (const unsigned b : order) {
    for (Fibre& f : s.fibres) f.at.block = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    if (!s.run_block()) break;
  }
  running = outer;
  return !s.failed;
}

const Coordinates& coordinates() { return running->current->at; }

// ---- synchronisation ----------------------------------------------------------------------------

void sync_threads(const char* file, int line) {
  Machine::State& s = *running;
  Fibre& f = *s.current;
  const char* slash = std::strrchr(file, '/');
  f.wait = Wait::block;
  f.file = slash != nullptr ? slash + 1 : file;
  f.line = line;
  s.yield();
}

uint64_t warp_collective(Collective kind, uint32_t mask, uint64_t value, int lane, int width) {
  Machine::State& s = *running;
  Fibre& f = *s.current;
  f.kind = kind;
  f.mask = mask;
  f.value = value;
  f.lane = lane;
  f.width = width;
  f.wait = Wait::warp;
  if ((mask >> (s.self() % kWarp) & 1u) == 0) {
    s.fail("%s: mask %08x leaves out the calling lane %d", name_of(kind), mask, s.self() % kWarp);
  }
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    s.fail("%s: width %d is not a power of two up to 32", name_of(kind), width);
  }
  s.finish_collective(s.self() / kWarp);
  s.yield();
  return f.result;
}

// Called by the lane that arrived last so far: completes its collective if every lane has come.
void Machine::State::finish_collective(int warp) {
  const Fibre& me = *current;
  const int first = warp * kWarp;
  const int lanes = std::min<int>(kWarp, static_cast<int>(fibres.size()) - first);
  for (int i = 0; i < kWarp; ++i) {
    if ((me.mask >> i & 1u) == 0) continue;
    if (i >= lanes || fibres[first + i].wait == Wait::done) {
      fail("%s: mask %08x names lane %d, which %s", name_of(me.kind), me.mask, i,
           i >= lanes ? "the block does not have" : "has exited");
    }
    const Fibre& other = fibres[first + i];
    if (other.wait != Wait::warp) return;
    if (other.kind != me.kind || other.mask != me.mask) {
      // Lanes of a divergent branch may finish a collective of their own first, unless that one
      // waits for this lane.
      if ((other.mask >> (self() % kWarp) & 1u) == 0) return;
      fail("lane %d calls %s with mask %08x while lane %d of its warp calls %s with mask %08x",
           self() % kWarp, name_of(me.kind), me.mask, i, name_of(other.kind), other.mask);
    }
  }
  uint64_t ballot = 0;
  for (int i = 0; i < lanes; ++i) {
    if (me.mask >> i & 1u) ballot |= uint64_t{fibres[first + i].value != 0} << i;
  }
  if (me.kind == Collective::sync_warp) {
    ++clock;
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < lanes; ++j) {
        if ((me.mask >> i & me.mask >> j & 1u) != 0) {
          lane_sync[(static_cast<size_t>(warp) * kWarp + i) * kWarp + j] = clock;
        }
      }
    }
    if (me.mask == (lanes == kWarp ? ~0u : (1u << lanes) - 1)) warp_sync[warp] = clock;
  }
  for (int i = 0; i < lanes; ++i) {
    Fibre& f = fibres[first + i];
    if ((me.mask >> i & 1u) == 0) continue;
    f.result = ballot;
    if (f.kind != Collective::ballot && f.kind != Collective::sync_warp) {
      const int base = i / f.width * f.width;
      int source = i;
      if (f.kind == Collective::shuffle) source = base + (f.lane & (f.width - 1));
      if (f.kind == Collective::shuffle_up) source = i - f.lane;
      if (f.kind == Collective::shuffle_down) source = i + f.lane;
      if (f.kind == Collective::shuffle_xor) source = i ^ f.lane;
      // CUDA: a lane whose source lies outside its segment keeps its own value; for xor only
      // segments above its own are out of reach.
      const bool below = source < base && f.kind != Collective::shuffle_xor;
      if (below || source >= base + f.width) source = i;
      if (source < 0 || (me.mask >> source & 1u) == 0) {
        fail("%s: lane %d reads lane %d, which mask %08x leaves out", name_of(f.kind), i, source,
             me.mask);
      }
      f.result = fibres[first + source].value;
    }
    wake(f);
  }
}

// ---- memory -------------------------------------------------------------------------------------

void Machine::State::check(const Ranges& ranges, const void* p, size_t bytes, size_t alignment,
                           bool write) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const char* what = write ? "write" : "read";
  if (address % alignment != 0) {
    fail("misaligned %s of %zu bytes at %p", what, bytes, p);
  }
  if (readable.list.empty() && writable.list.empty()) return;
  if (ranges.contains(address, bytes)) return;
  const int64_t i = ranges.last_before(address);
  if (i < 0) fail("out-of-bounds %s of %zu bytes at %p, before every range", what, bytes, p);
  const Range& r = ranges.list[i];
  char row[32] = "";
  if (r.row >= 0) std::snprintf(row, sizeof(row), "[%lld]", static_cast<long long>(r.row));
  fail("out-of-bounds %s of %zu bytes at %p: %s%s + %zu, which has %zu bytes to %s", what, bytes, p,
       r.name, row, static_cast<size_t>(address - r.begin), static_cast<size_t>(r.end - r.begin),
       what);
}

void check_read(const void* p, size_t bytes, size_t alignment) {
  running->check(running->readable, p, bytes, alignment, false);
}

void check_write(const void* p, size_t bytes, size_t alignment) {
  running->check(running->writable, p, bytes, alignment, true);
}

void* shared_bytes(size_t bytes, const void* site) {
  Machine::State& s = *running;
  for (const Allocation& a : s.allocations) {
    if (a.site == site) return s.shared.data() + a.begin;
  }
  // The gap keeps an overrun of one array out of the next.
  const size_t begin = s.static_end;
  s.static_end = (begin + bytes + 63) / 64 * 64 + 64;
  if (begin + bytes > Limits::kStaticShared) {
    s.fail("static shared memory exceeds %zu bytes", Limits::kStaticShared);
  }
  s.allocations.push_back({begin, begin + bytes, site});
  return s.shared.data() + begin;
}

void* dynamic_shared_bytes() { return running->shared.data() + running->dynamic_begin; }

// Whether a synchronisation lies between what thread `other` did at `stamp` and now.
bool Machine::State::ordered(int other, uint64_t stamp) const {
  const int me = self();
  if (other == me || stamp < last_block_sync) return true;
  if (other / kWarp != me / kWarp) return false;
  const size_t pair = (static_cast<size_t>(me / kWarp) * kWarp + me % kWarp) * kWarp +
                      static_cast<size_t>(other % kWarp);
  return stamp < lane_sync[pair];
}

void shared_access(const void* p, size_t bytes, bool write) {
  Machine::State& s = *running;
  const char* what = write ? "write" : "read";
  const auto offset = static_cast<size_t>(static_cast<const char*>(p) - s.shared.data());
  const bool inside = std::any_of(
      s.allocations.begin(), s.allocations.end(),
      [&](const Allocation& a) { return offset >= a.begin && offset + bytes <= a.end; });
  if (!inside) {
    const Allocation* nearest = &s.allocations.front();
    for (const Allocation& a : s.allocations) {
      if (a.begin <= offset && (nearest->begin > offset || a.begin > nearest->begin)) nearest = &a;
    }
    s.fail("out-of-bounds %s of %zu bytes of shared memory: offset %lld of an array of %zu bytes",
           what, bytes, static_cast<long long>(offset) - static_cast<long long>(nearest->begin),
           nearest->end - nearest->begin);
  }
  const int me = s.self();
  const int warp = me / kWarp;
  for (size_t i = offset; i < offset + bytes; ++i) {
    Shadow& b = s.shadow[i];
    const bool written = b.writer != Shadow::kNobody && b.written >= s.block_start;
    if (!write && !written) s.fail("read of shared memory that no thread has written");
    if (written && !s.ordered(b.writer, b.written)) {
      s.fail("race: thread %d %ss shared memory that thread %d wrote, no barrier between", me, what,
             b.writer);
    }
    // Reads that a synchronisation has put behind this thread no longer count.
    bool read = b.reader != Shadow::kNobody && b.read >= s.last_block_sync;
    if (read && b.reader != Shadow::kSeveral) {
      read = b.reader == me || !s.ordered(b.reader, b.read);
    } else if (read) {
      read = b.reader_warp != warp || b.read >= s.warp_sync[static_cast<size_t>(warp)];
    }
    if (write) {
      if (read && b.reader != me) {
        s.fail("race: thread %d writes shared memory that another thread reads, no barrier between",
               me);
      }
      b.writer = me;
      b.written = s.clock;
      b.reader = b.reader_warp = Shadow::kNobody;
    } else {
      const bool alone = !read || b.reader == me;
      const bool one_warp = !read || b.reader_warp == warp;
      b.reader = alone ? me : Shadow::kSeveral;
      b.reader_warp = one_warp ? warp : Shadow::kSeveral;
      b.read = s.clock;
    }
  }
}

}  // namespace ivr::emu
