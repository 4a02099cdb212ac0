// The emulator's runtime: fibres, the block scheduler, rendezvous, memory checks.
#include "kernels/cuda/emu/simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
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

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kNamedBarriers = 16;

enum class Wait { none, block, warp, barrier, named, done };

struct Copy {
  char* to;
  const char* from;
  size_t source_bytes;
  int64_t group;
};

// Registers as the last wgmma_fence that names them has seen them.
struct Registers {
  const char* at;
  std::vector<char> then;
};

// A lane's part of a wgmma.
struct Product {
  float* d;
  int n;
  const uint32_t* a;  // null: a is in shared memory
  uint64_t a_matrix, b_matrix;
  bool transposed, accumulate;
  uint32_t a_then[4];
  int64_t group;
};

// Accumulators of products in flight: their registers are poisoned, their values wait here.
struct Accumulators {
  float* d;
  std::vector<float> values;
  int pending;
};

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
  const uint64_t* barrier = nullptr;  // the mbarrier it waits at, and for the end of which phase
  int parity = 0;
  int named = 0;                 // the named barrier it waits at
  std::vector<Copy> copies;      // asynchronous, not landed, in the order of their issue
  int64_t groups = 0;            // committed
  std::vector<uint64_t> fences;  // stamps of fence_async_reads
  int registers = 0;             // as set; 0: those of the launch
  std::vector<Registers> fenced;
  std::vector<Product> products;  // not landed, in the order of their issue
  std::vector<Accumulators> accumulators;
  int64_t product_groups = 0;  // committed
};

// What a thread, or the copy engine, is known to have done: its accesses before a stamp.
using Known = std::vector<uint64_t>;

struct Barrier {
  int count, pending;  // arrivals per phase, and still to come in this one
  int64_t bytes = 0;   // expected and not there yet
  int phase = 0;
  Known arrived, completed;  // what this phase's arrivals knew; what the last phase's did
};

struct BulkCopy {
  char* to;
  const char* from;  // null: `box` at `at`
  size_t bytes;
  uint64_t* barrier;
  cuda::TensorBox box{};
  int at[cuda::TensorBox::kMaxRank] = {};
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  Known known;
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
  int copier = kNobody;       // whose asynchronous copy is on its way here
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
    case Collective::ldmatrix:
      return "ldmatrix";
    case Collective::mma:
      return "mma.sync";
    case Collective::wgmma_fence:
      return "wgmma.fence";
    case Collective::wgmma:
      return "wgmma";
    case Collective::wgmma_commit:
      return "wgmma.commit_group";
    case Collective::wgmma_wait:
      return "wgmma.wait_group";
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

  // Shared memory of the block: dynamic bytes from 0, so that descriptors reach all of them, static
  // arrays behind them.
  std::vector<char> shared;
  std::vector<Shadow> shadow;
  std::vector<Allocation> allocations;
  size_t static_begin = 0, static_end = 0;

  uint64_t clock = 1;        // counts completed synchronisations
  uint64_t block_start = 0;  // clock values
  uint64_t last_block_sync = 0;
  std::vector<uint64_t> lane_sync;  // [warp, lane, lane]: last __syncwarp that both took part in
  std::vector<uint64_t> warp_sync;  // [warp]: last __syncwarp of all its lanes

  // From the first mbarrier of a block on: known[thread][thread or copy engine], and reads of 16
  // bytes, [place, thread].
  std::map<const uint64_t*, Barrier> barriers;
  std::vector<BulkCopy> bulk;
  std::vector<Known> known;
  std::vector<uint64_t> reads;
  NamedBarrier named[kNamedBarriers];

  // Per 16 bytes of shared memory: the warps whose wgmma in flight read there.
  std::vector<uint16_t> multiplied;
  std::vector<std::vector<Product>> issued;  // [warpgroup], as its first warp issued them
  std::vector<size_t> issues;                // [warp], how many of them it has issued

  int id(const Fibre& f) const { return static_cast<int>(&f - fibres.data()); }
  int self() const { return id(*current); }

  [[gnu::format(printf, 2, 3)]] void fail(const char* format, ...);
  void yield() { switch_context(current->context, scheduler); }
  void wake(Fibre& f) {
    f.wait = Wait::none;
    ready.push_back(id(f));
  }

  bool run_block();
  void begin_block();
  bool end_block();
  void begin_known();
  void finish_block_barrier();
  void finish_collective(int warp);
  void report_deadlock();
  void check(const Ranges& ranges, const void* p, size_t bytes, size_t alignment, bool write);
  bool ordered(int me, int other, uint64_t stamp) const;
  void touch_shared(int me, const void* p, size_t bytes, bool write);
  void load_matrices(int first);
  void multiply(int first);
  void land(int thread, const Copy& copy);
  void place(char* to, const char* from, size_t bytes, size_t source_bytes, int writer);
  void arrived(const char* to, size_t bytes, int writer);
  void expect_bulk(char* to, size_t bytes);
  void place_box(const BulkCopy& copy);
  void issue(int first);
  void land_products(int first);
  void land_product(int first, size_t i);
  template <typename F>
  void walk_matrix(uint64_t matrix, int lines, bool transposed, int n, const F& f);
  void lock_matrix(int me, const char* p);
  int copy_engine() const { return static_cast<int>(fibres.size()); }
  Barrier& barrier(const uint64_t* at);
  void settle(const uint64_t* at);
  void land_bulk();
  void join(uint32_t mask, int first);
  bool read_by_others(int me, size_t offset) const;
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
  int at_barrier = 0, in_collective = 0, at_mbarrier = 0, at_named = 0, done = 0, missing = -1;
  const Fibre* barrier = nullptr;
  const Fibre* collective = nullptr;
  for (const Fibre& f : fibres) {
    at_barrier += f.wait == Wait::block;
    in_collective += f.wait == Wait::warp;
    at_mbarrier += f.wait == Wait::barrier;
    at_named += f.wait == Wait::named;
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
  if (at_mbarrier > 0) whole += ", " + std::to_string(at_mbarrier) + " at an mbarrier";
  if (at_named > 0) whole += ", " + std::to_string(at_named) + " at a named barrier";
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

void Machine::State::begin_block() {
  ready.resize(fibres.size());
  for (size_t i = 0; i < fibres.size(); ++i) {
    Fibre& f = fibres[i];
    f.wait = Wait::none;
    // Copies that the block before never waited for.
    for (const Copy& copy : f.copies) land(static_cast<int>(i), copy);
    f.copies.clear();
    f.groups = 0;
    f.fences.clear();
    f.registers = 0;
    f.fenced.clear();
    f.product_groups = 0;
    ready[i] = static_cast<int>(i);
    make_context(f.context, f.stack, fibre_entry);
  }
  // Bytes of ff are a NaN in every float type and an impossible index in every integer type.
  std::fill(shared.begin(), shared.end(), static_cast<char>(0xff));
  block_start = last_block_sync = ++clock;
  barriers.clear();
  bulk.clear();
  known.clear();
  for (auto& list : issued) list.clear();
  std::fill(issues.begin(), issues.end(), 0);
}

// What a block has left undone. All fibres are done.
bool Machine::State::end_block() {
  const Dim3 block = fibres[0].at.block;
  char name[64];
  std::snprintf(name, sizeof(name), "block (%u, %u, %u)", block.x, block.y, block.z);
  int registers = 0;
  bool set = false;
  for (size_t i = 0; i < fibres.size() && !failed; ++i) {
    const Fibre& f = fibres[i];
    if (!f.products.empty()) fail("%s ends with a wgmma in flight, of thread %zu", name, i);
    if (f.registers != fibres[i / kWarpgroup * kWarpgroup].registers) {
      fail("%s: the threads of a warpgroup differ in setmaxnreg", name);
    }
    const int at_launch = Limits::kRegisters / static_cast<int>(fibres.size()) / 8 * 8;
    set = set || f.registers > 0;
    registers += f.registers > 0 ? f.registers : at_launch;
  }
  for (size_t w = 0; w < issues.size() && !failed; ++w) {
    if (issues[w] == issues[w / 4 * 4]) continue;
    fail("%s: warp %zu issues %zu wgmma, warp %zu of its warpgroup %zu", name, w, issues[w],
         w / 4 * 4, issues[w / 4 * 4]);
  }
  for (int i = 0; i < kNamedBarriers && !failed; ++i) {
    if (named[i].arrived > 0)
      fail("%s ends with %d threads at named barrier %d", name, named[i].arrived, i);
  }
  if (set && registers > Limits::kRegisters && !failed) {
    fail("%s: setmaxnreg asks for %d registers, there are %d", name, registers, Limits::kRegisters);
  }
  return !failed;
}

bool Machine::State::run_block() {
  begin_block();
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
    if (!bulk.empty()) {
      const bool ended = std::all_of(fibres.begin(), fibres.end(),
                                     [](const Fibre& f) { return f.wait == Wait::done; });
      if (ended) {
        fail("block (%u, %u, %u) ends with a bulk copy on its way", fibres[0].at.block.x,
             fibres[0].at.block.y, fibres[0].at.block.z);
        return false;
      }
      land_bulk();
      continue;
    }
    const bool all_done = std::all_of(fibres.begin(), fibres.end(),
                                      [](const Fibre& f) { return f.wait == Wait::done; });
    if (!all_done) report_deadlock();
    return all_done && end_block();
  }
}

Machine::Machine(uint64_t seed, int capability)
    : state_(std::make_unique<State>()), capability_(capability) {
  state_->random.state = seed;
}

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
  s.static_begin = s.static_end = (dynamic_shared + 63) / 64 * 64 + 64;
  s.allocations.assign(1, {0, dynamic_shared, nullptr});
  s.shared.resize(s.static_begin + Limits::kStaticShared + 16);
  s.shadow.assign(s.shared.size(), Shadow{});
  s.multiplied.assign(s.shared.size() / 16 + 1, 0);

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
  s.issued.assign((warps + 3) / 4, {});
  s.issues.assign(warps, 0);
  s.reads.clear();
  for (NamedBarrier& b : s.named) b = {};

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
  if (me.kind == Collective::ldmatrix) load_matrices(first);
  if (me.kind == Collective::mma) multiply(first);
  if (me.kind == Collective::wgmma) issue(first);
  if (me.kind == Collective::wgmma_wait) land_products(first);
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
    if (!known.empty()) join(me.mask, first);
  }
  for (int i = 0; i < lanes; ++i) {
    Fibre& f = fibres[first + i];
    if ((me.mask >> i & 1u) == 0) continue;
    f.result = ballot;
    if (f.kind >= Collective::shuffle && f.kind <= Collective::shuffle_xor) {
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
  if (begin + bytes > s.static_begin + Limits::kStaticShared) {
    s.fail("static shared memory exceeds %zu bytes", Limits::kStaticShared);
  }
  s.allocations.push_back({begin, begin + bytes, site});
  return s.shared.data() + begin;
}

void* dynamic_shared_bytes() { return running->shared.data(); }

// Whether a synchronisation lies between what thread `other` did at `stamp` and what `me` does now.
bool Machine::State::ordered(int me, int other, uint64_t stamp) const {
  if (other == me || stamp < last_block_sync) return true;
  if (!known.empty() && stamp < known[static_cast<size_t>(me)][static_cast<size_t>(other)]) {
    return true;
  }
  if (other / kWarp != me / kWarp) return false;
  const size_t pair = (static_cast<size_t>(me / kWarp) * kWarp + me % kWarp) * kWarp +
                      static_cast<size_t>(other % kWarp);
  return stamp < lane_sync[pair];
}

void Machine::State::touch_shared(int me, const void* p, size_t bytes, bool write) {
  const char* what = write ? "write" : "read";
  const auto offset = static_cast<size_t>(static_cast<const char*>(p) - shared.data());
  const bool inside = std::any_of(allocations.begin(), allocations.end(), [&](const Allocation& a) {
    return offset >= a.begin && offset + bytes <= a.end;
  });
  if (!inside) {
    const Allocation* nearest = &allocations.front();
    for (const Allocation& a : allocations) {
      if (a.begin <= offset && (nearest->begin > offset || a.begin > nearest->begin)) nearest = &a;
    }
    fail("out-of-bounds %s of %zu bytes of shared memory: offset %lld of an array of %zu bytes",
         what, bytes, static_cast<long long>(offset) - static_cast<long long>(nearest->begin),
         nearest->end - nearest->begin);
  }
  const int warp = me / kWarp;
  // What read_by_others says of bytes of the same 16 that were written at this time.
  bool others = false;
  uint64_t asked = ~uint64_t{0};
  for (size_t i = offset; i < offset + bytes; ++i) {
    Shadow& b = shadow[i];
    if (write && multiplied[i / 16] > 0) {
      fail("write of shared memory that a wgmma in flight reads");
    }
    if (b.copier != Shadow::kNobody) {
      fail("%s of shared memory that an asynchronous copy of thread %d has not reached", what,
           b.copier);
    }
    const bool written = b.writer != Shadow::kNobody && b.written >= block_start;
    if (!write && !written) fail("read of shared memory that no thread has written");
    if (written && !ordered(me, b.writer, b.written)) {
      fail("race: thread %d %ss shared memory that thread %d wrote, no barrier between", me, what,
           b.writer);
    }
    // Reads that a synchronisation has put behind this thread no longer count.
    bool read = b.reader != Shadow::kNobody && b.read >= last_block_sync;
    if (read && b.reader != Shadow::kSeveral) {
      read = b.reader == me || !ordered(me, b.reader, b.read);
    } else if (read) {
      read = b.reader_warp != warp || b.read >= warp_sync[static_cast<size_t>(warp)];
      if (read && write && !known.empty()) {
        if (i % 16 == 0 || b.written != asked) others = read_by_others(me, i);
        asked = b.written;
        read = others;
      }
    }
    if (!write && !known.empty()) {
      reads[i / 16 * fibres.size() + static_cast<size_t>(me)] = clock;
    }
    if (write) {
      if (read && b.reader != me) {
        fail("race: thread %d writes shared memory that another thread reads, no barrier between",
             me);
      }
      b.writer = me;
      b.written = clock;
      b.reader = b.reader_warp = Shadow::kNobody;
    } else {
      const bool alone = !read || b.reader == me;
      const bool one_warp = !read || b.reader_warp == warp;
      b.reader = alone ? me : Shadow::kSeveral;
      b.reader_warp = one_warp ? warp : Shadow::kSeveral;
      b.read = clock;
    }
  }
}

void shared_access(const void* p, size_t bytes, bool write) {
  running->touch_shared(running->self(), p, bytes, write);
}

void shared_access16(const void* p, bool write) {
  Machine::State& s = *running;
  if ((static_cast<const char*>(p) - s.shared.data()) % 16 != 0) {
    s.fail("misaligned %s of 16 bytes of shared memory", write ? "write" : "read");
  }
  s.touch_shared(s.self(), p, 16, write);
}

// ---- asynchronous copies ------------------------------------------------------------------------

void copy_async(void* shared, const void* global, size_t source_bytes) {
  Machine::State& s = *running;
  if (source_bytes > 0) s.check(s.readable, global, source_bytes, 16, false);
  shared_access16(shared, true);
  auto* to = static_cast<char*>(shared);
  // What was there is gone; what comes has not come.
  std::memset(to, 0xff, 16);
  Shadow* b = &s.shadow[static_cast<size_t>(to - s.shared.data())];
  for (int i = 0; i < 16; ++i) b[i].copier = s.self();
  Fibre& f = *s.current;
  f.copies.push_back({to, static_cast<const char*>(global), source_bytes, f.groups});
}

void commit_copies() { ++running->current->groups; }

void wait_copies(int newest) {
  Machine::State& s = *running;
  Fibre& f = *s.current;
  const int64_t landed = f.groups - newest;
  size_t n = 0;
  while (n < f.copies.size() && f.copies[n].group < landed) s.land(s.self(), f.copies[n++]);
  f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<int64_t>(n));
}

void Machine::State::land(int thread, const Copy& copy) {
  place(copy.to, copy.from, 16, copy.source_bytes, thread);
}

// The source is read now, as late as the kernel allows.
void Machine::State::place(char* to, const char* from, size_t bytes, size_t source_bytes,
                           int writer) {
  std::memset(to, 0, bytes);
  if (source_bytes > 0) std::memcpy(to, from, source_bytes);
  arrived(to, bytes, writer);
}

void Machine::State::arrived(const char* to, size_t bytes, int writer) {
  Shadow* b = &shadow[static_cast<size_t>(to - shared.data())];
  for (size_t i = 0; i < bytes; ++i) {
    b[i].copier = Shadow::kNobody;
    b[i].writer = writer;
    b[i].written = clock;
  }
}

// ---- mbarriers and bulk copies ------------------------------------------------------------------

namespace {

void raise_to(Known& known, const Known& other) {
  for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], other[i]);
}

}  // namespace

void Machine::State::begin_known() {
  if (!known.empty()) return;
  const size_t threads = fibres.size();
  known.assign(threads, Known(threads + 1, 0));
  // Reads of blocks before are older than this one's start.
  reads.resize((shared.size() / 16 + 1) * threads, 0);
  for (size_t i = 0; i < threads; ++i) {
    for (size_t j = i / kWarp * kWarp; j < std::min(threads, (i / kWarp + 1) * kWarp); ++j) {
      known[i][j] = lane_sync[i * kWarp + j % kWarp];
    }
  }
}

void barrier_init(uint64_t* barrier, int arrivals) {
  Machine::State& s = *running;
  shared_access(barrier, 8, true);
  s.begin_known();
  const Known nothing(s.fibres.size() + 1, 0);
  s.barriers[barrier] = {arrivals, arrivals, 0, 0, nothing, nothing};
}

// The barrier at an address, whose initialisation the calling thread knows of.
Barrier& Machine::State::barrier(const uint64_t* at) {
  shared_access(at, 8, false);
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("mbarrier used before it is initialised");
  return found->second;
}

// Ends the phase if nothing is missing, and wakes who waited for that.
void Machine::State::settle(const uint64_t* at) {
  Barrier& b = barriers.at(at);
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.count;
  ++b.phase;
  b.completed = b.arrived;
  for (Fibre& f : fibres) {
    if (f.wait != Wait::barrier || f.barrier != at || b.phase % 2 == f.parity) continue;
    raise_to(known[static_cast<size_t>(id(f))], b.completed);
    wake(f);
  }
}

void barrier_arrive(uint64_t* barrier, int64_t expected_bytes) {
  Machine::State& s = *running;
  Barrier& b = s.barrier(barrier);
  if (--b.pending < 0) {
    s.fail("mbarrier: more than %d arrivals in a phase that waits for bytes", b.count);
  }
  b.bytes += expected_bytes;
  const auto me = static_cast<size_t>(s.self());
  s.known[me][me] = ++s.clock;
  raise_to(b.arrived, s.known[me]);
  s.settle(barrier);
}

void barrier_wait(uint64_t* barrier, int parity) {
  Machine::State& s = *running;
  Barrier& b = s.barrier(barrier);
  if (b.phase % 2 != parity) {
    raise_to(s.known[static_cast<size_t>(s.self())], b.completed);
    return;
  }
  s.current->barrier = barrier;
  s.current->parity = parity;
  s.current->wait = Wait::barrier;
  s.yield();
}

void copy_bulk(void* shared, const void* global, size_t bytes, uint64_t* barrier) {
  Machine::State& s = *running;
  s.barrier(barrier);
  if (bytes % 16 != 0) s.fail("bulk copy of %zu bytes, no multiple of 16", bytes);
  s.check(s.readable, global, bytes, 16, false);
  auto* to = static_cast<char*>(shared);
  s.expect_bulk(to, bytes);
  s.bulk.push_back({to, static_cast<const char*>(global), bytes, barrier});
}

// What was there is gone; what comes has not come.
void Machine::State::expect_bulk(char* to, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 16) shared_access16(to + i, true);
  std::memset(to, 0xff, bytes);
  Shadow* b = &shadow[static_cast<size_t>(to - shared.data())];
  for (size_t i = 0; i < bytes; ++i) b[i].copier = self();
}

void Machine::State::land_bulk() {
  std::swap(bulk[random.below(bulk.size())], bulk.back());
  const BulkCopy copy = bulk.back();
  bulk.pop_back();
  const int engine = copy_engine();
  if (copy.from != nullptr) {
    place(copy.to, copy.from, copy.bytes, copy.bytes, engine);
  } else {
    place_box(copy);
  }
  Barrier& b = barriers.at(copy.barrier);
  b.bytes -= static_cast<int64_t>(copy.bytes);
  b.arrived[static_cast<size_t>(engine)] = ++clock;
  settle(copy.barrier);
}

// __syncwarp: every lane of the mask knows what any of them knew.
void Machine::State::join(uint32_t mask, int first) {
  Known all(known[0].size(), 0);
  for (int i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    raise_to(all, known[static_cast<size_t>(first + i)]);
    all[static_cast<size_t>(first + i)] = clock;
  }
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1u) known[static_cast<size_t>(first + i)] = all;
  }
}

// Whether another thread has read there since the last write, with nothing that orders it.
bool Machine::State::read_by_others(int me, size_t offset) const {
  for (int other = 0; other < copy_engine(); ++other) {
    const uint64_t read = reads[offset / 16 * fibres.size() + static_cast<size_t>(other)];
    if (other != me && read >= block_start && read >= shadow[offset].written &&
        !ordered(me, other, read)) {
      return true;
    }
  }
  return false;
}

// ---- boxes of tensors ---------------------------------------------------------------------------

namespace {

constexpr size_t swizzled_bytes(cuda::Swizzle swizzle) {
  return swizzle == cuda::Swizzle::bytes128  ? 128
         : swizzle == cuda::Swizzle::bytes64 ? 64
         : swizzle == cuda::Swizzle::bytes32 ? 32
                                             : 16;
}

// The pattern goes by the address in shared memory, so that a tile has to start where it repeats.
constexpr size_t swizzle_mask(cuda::Swizzle swizzle) { return swizzled_bytes(swizzle) / 16 - 1; }
constexpr size_t swizzled(size_t address, cuda::Swizzle swizzle) {
  return address ^ (address >> 7 & swizzle_mask(swizzle)) << 4;
}

// f(row, base) for each row of the box along the contiguous dimension: where the row's coordinate 0
// lies; null: outside of the tensor.
template <typename F>
void walk_box(const cuda::TensorBox& box, const int* at, const F& f) {
  size_t rows = 1;
  for (int d = 1; d < box.rank; ++d) rows *= static_cast<size_t>(box.box[d]);
  for (size_t row = 0; row < rows; ++row) {
    const auto* base = static_cast<const char*>(box.base);
    bool inside = true;
    size_t rest = row;
    for (int d = 1; d < box.rank; ++d) {
      const int64_t i = at[d] + static_cast<int64_t>(rest % static_cast<size_t>(box.box[d]));
      rest /= static_cast<size_t>(box.box[d]);
      inside = inside && i >= 0 && i < box.sizes[d];
      base += i * box.strides[d];
    }
    f(row, inside ? base : nullptr);
  }
}

// What cuTensorMapEncodeTiled would refuse; null: nothing.
const char* refused(const cuda::TensorBox& box, int rank) {
  if (box.rank != rank || rank < 2 || rank > cuda::TensorBox::kMaxRank) return "rank";
  if (reinterpret_cast<uintptr_t>(box.base) % 16 != 0) return "address";
  if (box.strides[0] != 2 && box.strides[0] != 4) return "size of an element";
  for (int d = 0; d < rank; ++d) {
    if (box.sizes[d] < 1 || box.sizes[d] > int64_t{1} << 32) return "size";
    if (box.box[d] < 1 || box.box[d] > 256) return "box";
    if (d > 0 && (box.strides[d] % 16 != 0 || box.strides[d] >= int64_t{1} << 40)) return "stride";
  }
  const auto width = static_cast<size_t>(box.box[0] * box.strides[0]);
  if (width % 16 != 0) return "box";
  // The device allows narrower boxes than the swizzle's rows.
  return box.swizzle == cuda::Swizzle::none || width == swizzled_bytes(box.swizzle) ? nullptr
                                                                                    : "swizzle";
}

}  // namespace

void copy_tensor(void* shared, const cuda::TensorBox& box, const int* at, int rank,
                 uint64_t* barrier) {
  Machine::State& s = *running;
  s.barrier(barrier);
  if (const char* what = refused(box, rank)) s.fail("tensor copy: the map has a wrong %s", what);
  const auto size = static_cast<size_t>(box.strides[0]);
  size_t bytes = size;
  for (int d = 0; d < rank; ++d) bytes *= static_cast<size_t>(box.box[d]);
  auto* to = static_cast<char*>(shared);
  const size_t alignment = 128 * (swizzle_mask(box.swizzle) + 1);
  if (shared_address(to) % alignment != 0) {
    s.fail("tensor copy to offset %u, no multiple of %zu", shared_address(to), alignment);
  }
  const int64_t first = std::max<int64_t>(at[0], 0);
  const int64_t end = std::min<int64_t>(at[0] + box.box[0], box.sizes[0]);
  walk_box(box, at, [&](size_t, const char* base) {
    if (base == nullptr || end <= first) return;
    s.check(s.readable, base + first * box.strides[0], static_cast<size_t>(end - first) * size,
            size, false);
  });
  s.expect_bulk(to, bytes);
  BulkCopy copy{to, nullptr, bytes, barrier, box, {}};
  std::copy_n(at, rank, copy.at);
  s.bulk.push_back(copy);
}

void Machine::State::place_box(const BulkCopy& copy) {
  const cuda::TensorBox& box = copy.box;
  const auto size = static_cast<size_t>(box.strides[0]);
  const size_t width = static_cast<size_t>(box.box[0]) * size;
  const auto start = static_cast<size_t>(copy.to - shared.data());
  std::memset(copy.to, 0, copy.bytes);
  walk_box(box, copy.at, [&](size_t row, const char* base) {
    for (int i = 0; base != nullptr && i < box.box[0]; ++i) {
      const int64_t column = copy.at[0] + i;
      if (column < 0 || column >= box.sizes[0]) continue;
      const size_t offset = start + row * width + static_cast<size_t>(i) * size;
      std::memcpy(shared.data() + swizzled(offset, box.swizzle), base + column * box.strides[0],
                  size);
    }
  });
  arrived(copy.to, copy.bytes, copy_engine());
}

// ---- named barriers, registers, the asynchronous proxy ------------------------------------------

void named_barrier(int id, int threads, bool wait) {
  Machine::State& s = *running;
  if (id < 1 || id >= kNamedBarriers) s.fail("named barrier %d, allowed: 1 to 15", id);
  if (threads < kWarp || threads % kWarp != 0) {
    s.fail("named barrier %d for %d threads, no multiple of %d", id, threads, kWarp);
  }
  s.begin_known();
  NamedBarrier& b = s.named[id];
  if (b.arrived == 0) {
    b.threads = threads;
    b.known.assign(s.fibres.size() + 1, 0);
  }
  if (b.threads != threads) {
    s.fail("named barrier %d is for %d threads, and for %d to others", id, threads, b.threads);
  }
  const auto me = static_cast<size_t>(s.self());
  s.known[me][me] = ++s.clock;
  raise_to(b.known, s.known[me]);
  if (wait) {
    s.current->wait = Wait::named;
    s.current->named = id;
  }
  if (++b.arrived == b.threads) {
    b.arrived = 0;
    for (Fibre& f : s.fibres) {
      if (f.wait != Wait::named || f.named != id) continue;
      raise_to(s.known[static_cast<size_t>(s.id(f))], b.known);
      s.wake(f);
    }
  }
  if (wait) s.yield();
}

void set_registers(int registers) {
  Machine::State& s = *running;
  if (registers < 24 || registers > 256 || registers % 8 != 0) {
    s.fail("setmaxnreg %d, allowed: multiples of 8 from 24 to 256", registers);
  }
  s.current->registers = registers;
}

void fence_async_reads() { running->current->fences.push_back(++running->clock); }

// ---- tensor cores -------------------------------------------------------------------------------

namespace {

// A lane's operands; the lane that completes the collective fills in every lane's result.
struct LoadMatrix {
  const char* row;
  bool transposed;
  uint32_t r[4];
};

struct Multiply {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

float bf16_value(uint32_t bits) { return __uint_as_float(bits << 16); }

}  // namespace

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
  LoadMatrix lane{static_cast<const char*>(row), transposed, {}};
  warp_collective(Collective::ldmatrix, ~0u, reinterpret_cast<uint64_t>(&lane), 0, kWarp);
  std::memcpy(r, lane.r, sizeof(r));
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Multiply lane{a, b, d};
  warp_collective(Collective::mma, ~0u, reinterpret_cast<uint64_t>(&lane), 0, kWarp);
}

void Machine::State::load_matrices(int first) {
  LoadMatrix* lanes[kWarp];
  for (int i = 0; i < kWarp; ++i) {
    lanes[i] = reinterpret_cast<LoadMatrix*>(fibres[static_cast<size_t>(first + i)].value);
    if ((lanes[i]->row - shared.data()) % 16 != 0)
      fail("ldmatrix: row of lane %d is misaligned", i);
    if (lanes[i]->transposed != lanes[0]->transposed) fail("ldmatrix: lanes differ in .trans");
  }
  for (int i = 0; i < kWarp; ++i) {
    for (int m = 0; m < 4; ++m) {
      char* to = reinterpret_cast<char*>(&lanes[i]->r[m]);
      for (int half = 0; half < 2; ++half) {
        // Element (row, column) of matrix m, the transposed one's if asked for.
        int row = i / 4, column = i % 4 * 2 + half;
        if (lanes[i]->transposed) std::swap(row, column);
        const char* from = lanes[m * 8 + row]->row + column * 2;
        touch_shared(first + i, from, 2, false);
        std::memcpy(to + half * 2, from, 2);
      }
    }
  }
}

void Machine::State::multiply(int first) {
  Multiply* lanes[kWarp];
  float a[16][16], b[8][16];
  for (int i = 0; i < kWarp; ++i) {
    lanes[i] = reinterpret_cast<Multiply*>(fibres[static_cast<size_t>(first + i)].value);
    const int row = i / 4, k = i % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const auto value = [&](uint32_t pair) { return bf16_value(pair >> (16 * half) & 0xffffu); };
      for (int r = 0; r < 4; ++r) a[row + r % 2 * 8][k + r / 2 * 8 + half] = value(lanes[i]->a[r]);
      for (int r = 0; r < 2; ++r) b[row][k + r * 8 + half] = value(lanes[i]->b[r]);
    }
  }
  for (int i = 0; i < kWarp; ++i) {
    for (int e = 0; e < 4; ++e) {
      const float* x = a[i / 4 + e / 2 * 8];
      const float* y = b[i % 4 * 2 + e % 2];
      float sum = lanes[i]->d[e];
      for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
      lanes[i]->d[e] = sum;
    }
  }
}

// ---- tensor cores of a warpgroup ----------------------------------------------------------------

uint32_t shared_address(const void* p) {
  Machine::State& s = *running;
  const auto offset = static_cast<const char*>(p) - s.shared.data();
  if (offset % 16 != 0) s.fail("wgmma: a matrix starts at no multiple of 16 bytes");
  return static_cast<uint32_t>(offset);
}

void name_registers(const void* registers, size_t bytes) {
  const auto* at = static_cast<const char*>(registers);
  std::vector<Registers>& fenced = running->current->fenced;
  auto found =
      std::find_if(fenced.begin(), fenced.end(), [at](const Registers& r) { return r.at == at; });
  if (found == fenced.end()) found = fenced.insert(fenced.end(), {at, {}});
  found->then.assign(at, at + bytes);
}

void wgmma_fence() { warp_collective(Collective::wgmma_fence, ~0u, 0, 0, kWarp); }

void wgmma_commit() {
  warp_collective(Collective::wgmma_commit, ~0u, 0, 0, kWarp);
  ++running->current->product_groups;
}

void wgmma_wait(int newest) { warp_collective(Collective::wgmma_wait, ~0u, 0, newest, kWarp); }

namespace {

// A signalling NaN: whatever is computed from it is a NaN of other bits.
constexpr uint32_t kPoison = 0x7fa5a5a5;

void poison(float* d, size_t floats) {
  for (size_t i = 0; i < floats; ++i) std::memcpy(d + i, &kPoison, sizeof(kPoison));
}

bool poisoned(const float* d, size_t floats) {
  return std::all_of(d, d + floats, [](const float& f) {
    return std::memcmp(&f, &kPoison, sizeof(kPoison)) == 0;
  });
}

Accumulators* find_overlap(Fibre& f, const void* d, size_t bytes) {
  const auto* begin = static_cast<const char*>(d);
  for (Accumulators& a : f.accumulators) {
    const auto* other = reinterpret_cast<const char*>(a.d);
    if (begin < other + a.values.size() * sizeof(float) && other < begin + bytes) return &a;
  }
  return nullptr;
}

bool as_fenced(const Fibre& f, const void* registers, size_t bytes) {
  const auto* at = static_cast<const char*>(registers);
  return std::any_of(f.fenced.begin(), f.fenced.end(), [=](const Registers& r) {
    return r.at <= at && at + bytes <= r.at + r.then.size() &&
           std::memcmp(at, r.then.data() + (at - r.at), bytes) == 0;
  });
}

bool same_shape(const Product& a, const Product& b) {
  return a.n == b.n && (a.a == nullptr) == (b.a == nullptr) && a.a_matrix == b.a_matrix &&
         a.b_matrix == b.b_matrix && a.transposed == b.transposed && a.accumulate == b.accumulate;
}

}  // namespace

void wgmma(float (*d)[4], int n, const uint32_t* a, uint64_t a_matrix, uint64_t b_matrix,
           bool transposed, bool accumulate) {
  Machine::State& s = *running;
  Fibre& f = *s.current;
  Product product{*d, n, a, a_matrix, b_matrix, transposed, accumulate, {}, f.product_groups};
  const size_t floats = static_cast<size_t>(n) / 2;
  if (a != nullptr) {
    std::copy_n(a, 4, product.a_then);
    if (!as_fenced(f, a, sizeof(product.a_then))) {
      s.fail("wgmma: the last wgmma_fence has not seen these registers of a");
    }
  }
  if (Accumulators* flying = find_overlap(f, d, floats * sizeof(float))) {
    if (flying->d != *d || flying->values.size() != floats) {
      s.fail("wgmma: some of its accumulators are in flight for another one");
    }
    ++flying->pending;
  } else {
    if (!as_fenced(f, d, floats * sizeof(float))) {
      s.fail("wgmma: the last wgmma_fence has not seen these accumulators");
    }
    f.accumulators.push_back({*d, {*d, *d + floats}, 1});
    poison(*d, floats);
  }
  f.products.push_back(product);
  warp_collective(Collective::wgmma, ~0u, reinterpret_cast<uint64_t>(&product), 0, kWarp);
}

void check_landed(const void* d, size_t bytes) {
  Machine::State& s = *running;
  if (find_overlap(*s.current, d, bytes) != nullptr) {
    s.fail("wgmma_wait: accumulators are used that are still in flight");
  }
}

// f(line, chunk, p) for the 16 bytes at p that hold elements [8 chunk, 8 chunk + 8) of a line: of a
// row's two chunks of k or, transposed, of one k's n / 8 chunks of columns.
template <typename F>
void Machine::State::walk_matrix(uint64_t matrix, int lines, bool transposed, int n, const F& f) {
  const auto field = [matrix](int bit) { return static_cast<size_t>(matrix >> bit & 0x3fff) << 4; };
  const size_t start = field(0), leading = field(16), stride = field(32);
  const auto swizzle = static_cast<cuda::Swizzle>(matrix >> 62);
  const size_t width = swizzled_bytes(swizzle), chunks = width / 16;
  if ((matrix >> 49 & 7) != 0 || (start >> 7 & swizzle_mask(swizzle)) != 0) {
    fail("wgmma: a matrix starts at offset %zu, inside of its swizzle's pattern", start);
  }
  for (int line = 0; line < lines; ++line) {
    for (int chunk = 0; chunk < (transposed ? n / 8 : 2); ++chunk) {
      const auto i = static_cast<size_t>(line), c = static_cast<size_t>(chunk);
      size_t at = start + i % 8 * width;
      if (swizzle != cuda::Swizzle::none) {
        at += i / 8 * stride + c % chunks * 16 + c / chunks * leading;
      } else if (transposed) {
        at += i / 8 * leading + c * stride;
      } else {
        at += i / 8 * stride + c * leading;
      }
      // Chunks of k do not leave a swizzled row.
      if (!transposed && swizzle != cuda::Swizzle::none && c >= chunks) continue;
      f(line, chunk, shared.data() + (swizzled(at, swizzle) & 0x3ffff));
    }
  }
}

// The asynchronous proxy is to read 16 bytes for a warp, the first lane of which is `me`.
void Machine::State::lock_matrix(int me, const char* p) {
  touch_shared(me, p, 16, false);
  const auto offset = static_cast<size_t>(p - shared.data());
  for (size_t i = offset; i < offset + 16; ++i) {
    const Shadow& b = shadow[i];
    if (b.writer == copy_engine()) continue;
    const std::vector<uint64_t>& fences = fibres[static_cast<size_t>(b.writer)].fences;
    const auto fence = std::upper_bound(fences.begin(), fences.end(), b.written);
    if (fence == fences.end() || !ordered(me, b.writer, *fence)) {
      fail("wgmma reads shared memory that thread %d has stored, without fence_async_reads between",
           b.writer);
    }
  }
  ++multiplied[offset / 16];
}

// All lanes of a warp have come to a wgmma: from here on its operands are locked.
void Machine::State::issue(int first) {
  const auto lane = [&](int i) {
    return *reinterpret_cast<const Product*>(fibres[static_cast<size_t>(first + i)].value);
  };
  const Product product = lane(0);
  for (int i = 1; i < kWarp; ++i) {
    if (!same_shape(product, lane(i))) fail("wgmma: lanes 0 and %d differ in their operands", i);
  }
  const auto group = static_cast<size_t>(first / kWarpgroup),
             warp = static_cast<size_t>(first / kWarp);
  if ((group + 1) * kWarpgroup > fibres.size()) {
    fail("wgmma: the last warpgroup has less than four warps");
  }
  const size_t index = issues[warp]++;
  if (index == issued[group].size()) issued[group].push_back(product);
  if (!same_shape(product, issued[group][index])) {
    fail("wgmma %zu of warp %zu differs from that of another warp of its warpgroup", index, warp);
  }
  const auto lock = [&](int, int, const char* p) { lock_matrix(first, p); };
  walk_matrix(product.b_matrix, product.transposed ? 16 : product.n, product.transposed, product.n,
              lock);
  // A warp reads the 16 rows of a that are its own.
  const int rows = first % kWarpgroup / 2;
  if (product.a != nullptr) return;
  walk_matrix(product.a_matrix, 64, false, 0, [&](int row, int, const char* p) {
    if (row / 16 == rows / 16) lock_matrix(first, p);
  });
}

// All lanes of a warp have come to a wait.
void Machine::State::land_products(int first) {
  std::vector<Product>& products = fibres[static_cast<size_t>(first)].products;
  for (int i = 1; i < kWarp; ++i) {
    const Fibre& f = fibres[static_cast<size_t>(first + i)];
    if (f.lane != fibres[static_cast<size_t>(first)].lane) {
      fail("wgmma.wait_group: lanes 0 and %d wait for different groups", i);
    }
  }
  const Fibre& f = fibres[static_cast<size_t>(first)];
  const int64_t landed = f.product_groups - f.lane;
  size_t n = 0;
  while (n < products.size() && products[n].group < landed) land_product(first, n++);
  for (int i = 0; i < kWarp; ++i) {
    auto& done = fibres[static_cast<size_t>(first + i)].products;
    done.erase(done.begin(), done.begin() + static_cast<int64_t>(n));
  }
}

void Machine::State::land_product(int first, size_t index) {
  const Product product = fibres[static_cast<size_t>(first)].products[index];
  const int n = product.n, rows = first % kWarpgroup / 2;
  float a[16][16], b[16][128];
  const auto read = [&](const char* p, const auto& store) {
    touch_shared(first, p, 16, false);
    --multiplied[static_cast<size_t>(p - shared.data()) / 16];
    for (int i = 0; i < 8; ++i) {
      uint16_t bits;
      std::memcpy(&bits, p + 2 * i, 2);
      store(i, bf16_value(bits));
    }
  };
  walk_matrix(product.b_matrix, product.transposed ? 16 : n, product.transposed, n,
              [&](int line, int chunk, const char* p) {
                read(p, [&](int i, float value) {
                  const int along = chunk * 8 + i;
                  (product.transposed ? b[line][along] : b[along][line]) = value;
                });
              });
  if (product.a == nullptr) {
    walk_matrix(product.a_matrix, 64, false, 0, [&](int row, int chunk, const char* p) {
      if (row / 16 != rows / 16) return;
      read(p, [&](int i, float value) { a[row % 16][chunk * 8 + i] = value; });
    });
  }
  for (int i = 0; i < kWarp && product.a != nullptr; ++i) {
    const Product& lane = fibres[static_cast<size_t>(first + i)].products[index];
    if (std::memcmp(lane.a, lane.a_then, sizeof(lane.a_then)) != 0) {
      fail("wgmma: registers of a were changed before the wait, by lane %d", i);
    }
    for (int r = 0; r < 4; ++r) {
      float* pair = &a[i / 4 + r % 2 * 8][i % 4 * 2 + r / 2 * 8];
      pair[0] = bf16_value(lane.a_then[r] & 0xffffu);
      pair[1] = bf16_value(lane.a_then[r] >> 16);
    }
  }
  for (int i = 0; i < kWarp; ++i) {
    Fibre& f = fibres[static_cast<size_t>(first + i)];
    const Product& lane = f.products[index];
    Accumulators& sums = *find_overlap(f, lane.d, 1);
    for (int e = 0; e < n / 2; ++e) {
      const float* x = a[i / 4 + e % 4 / 2 * 8];
      const int column = e / 4 * 8 + i % 4 * 2 + e % 2;
      float sum = lane.accumulate ? sums.values[static_cast<size_t>(e)] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += x[k] * b[k][column];
      sums.values[static_cast<size_t>(e)] = sum;
    }
    if (--sums.pending > 0) continue;
    if (!poisoned(sums.d, sums.values.size()))
      fail("wgmma: accumulators were changed before the wait, by lane %d", i);
    std::copy(sums.values.begin(), sums.values.end(), sums.d);
    f.accumulators.erase(f.accumulators.begin() + (&sums - f.accumulators.data()));
  }
}

}  // namespace ivr::emu
