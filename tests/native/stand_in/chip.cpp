#include "stand_in/chip.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define STAND_IN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define STAND_IN_ASAN 1
#endif
#endif
#ifdef STAND_IN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(STAND_IN_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define STAND_IN_UCONTEXT 1
#endif
#ifdef STAND_IN_UCONTEXT
#include <ucontext.h>
#endif

// --- switching stacks --------------------------------------------------------------------------------------

#ifndef STAND_IN_UCONTEXT

// Saves what a call must preserve on the stack, puts the stack pointer into *save and goes on where `to` was
// saved. swapcontext does the same with a system call for the signal mask: a hundred times slower.
extern "C" void stand_in_switch(void** save, void* to) __asm__("stand_in_switch");

#if defined(__x86_64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    "stand_in_switch:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n");
#else
__asm__(
    ".text\n"
    ".p2align 4\n"
    "stand_in_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#endif
#endif  // STAND_IN_UCONTEXT

namespace qwen2vl::cuda::stand_in {
namespace {

constexpr int kMaxThreads = 1024, kLanes = 32;

bool chosen(const char* variable, const char* value) {
  const char* text = std::getenv(variable);
  return text != nullptr && std::strcmp(text, value) == 0;
}

/// A context that can be switched to. The scheduler's own has no stack of its own here.
struct Fiber {
#ifdef STAND_IN_UCONTEXT
  ucontext_t context{};
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;  // lowest address
  size_t size = 0;
  void* sanitizer = nullptr;
};

void finish_switch(void* sanitizer);

void switch_context(Fiber& from, Fiber& to) {
#ifdef STAND_IN_ASAN
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.size);
#endif
#ifdef STAND_IN_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  stand_in_switch(&from.stack_pointer, to.stack_pointer);
#endif
  // Whoever switches to `from` again comes back here.
  finish_switch(from.sanitizer);
}

// --- a block's state ---------------------------------------------------------------------------------------

/// An instruction of a whole warp. `complete` runs once all lanes that must be there are.
struct Instruction {
  const char* name;
  bool all_lanes;  // none may have ended, and all must be at the same line
  void (*complete)(int first_thread, uint32_t lanes);
};

/// What a thread waits for: an instruction of its warp, or the block's barrier (no instruction).
struct Waiting {
  const Instruction* instruction = nullptr;
  uint32_t mask = 0;
  void* operands = nullptr;  // on the waiting thread's stack
  Line line;
};

struct Copy {
  int64_t to;
  const void* from;
  bool valid;
  int group;
};

struct Thread {
  Fiber* fiber = nullptr;
  Waiting waiting;
  // The last __syncwarp of some lanes only that this thread was part of.
  uint32_t partial_time = 0, partial_mask = 0;
  int group = 0;  // copies committed so far
  std::vector<Copy> copies;
};

struct Warp {
  uint32_t ready = 0, at_instruction = 0, at_barrier = 0, ended = 0;
  uint32_t synchronized = 0;  // when all lanes last were
};

/// Who last touched a byte of shared memory. Times count barriers of the block and of warps.
struct Byte {
  uint32_t written = 0, read = 0;
  uint16_t writer : 15 = 0, copying : 1 = 0;
  // The last of the readers since a barrier; whether others of its warp, or other warps, have read too.
  uint16_t reader : 14 = 0, many_lanes : 1 = 0, many_warps : 1 = 0;
};
static_assert(sizeof(Byte) == 12);

struct Access {
  int64_t begin;
  int n;
};

struct Chip {
  std::mutex in_use;
  const char* kernel = nullptr;  // null while nothing runs
  ThreadFunction function = nullptr;
  void* body = nullptr;
  int n_threads = 0, n_warps = 0, alive = 0;
  int64_t shared_bytes = 0;

  int current = -1;  // thread; -1: the scheduler
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
  Fiber scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  std::exception_ptr error;

  uint8_t* memory = nullptr;
  std::vector<Byte> bytes;
  uint32_t now = 1, block_start = 1, barrier = 1;
  Line barrier_line;
  bool barrier_seen = false;

  Order order = chosen("QWEN2VL_STAND_IN_ORDER", "backward") ? Order::Backward : Order::Forward;
  int64_t launches = 0;

  Chip() {
    memory = static_cast<uint8_t*>(std::aligned_alloc(1024, static_cast<size_t>(kSharedBytes)));
    bytes.resize(static_cast<size_t>(kSharedBytes));
  }
  ~Chip() {
    for (const auto& fiber : fibers) munmap(fiber->stack - guard_bytes(), fiber->size + guard_bytes());
    std::free(memory);
  }
  Chip(const Chip&) = delete;
  Chip& operator=(const Chip&) = delete;

  static size_t guard_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
};

Chip the_chip;
Chip& chip() { return the_chip; }

std::string place(dim3 at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string place(Line line) {
  const std::string file = line.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(line.line());
}

bool same_line(Line a, Line b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string name_of(int thread) { return "thread " + std::to_string(thread); }

[[noreturn]] void fail_at(int thread, const std::string& what) {
  const Chip& c = chip();
  std::string text;
  if (c.kernel != nullptr) {
    text = std::string("kernel ") + c.kernel + ", block " +
           place(dim3(here.block.x, here.block.y, here.block.z));
    if (thread >= 0) text += ", " + name_of(thread);
    text += ": ";
  }
  throw std::runtime_error(text + what);
}

/// The running thread. What only a kernel may call fails elsewhere.
int running_thread(const char* what) {
  const Chip& c = chip();
  if (c.current < 0) fail_at(-1, std::string(what) + " outside of a kernel");
  return c.current;
}

// --- threads -----------------------------------------------------------------------------------------------

/// Tells an address sanitizer that the stack has changed. A fiber learns from it where the scheduler's stack
/// is, which is another one for each host thread that launches.
void finish_switch(void* sanitizer) {
#ifdef STAND_IN_ASAN
  Chip& c = chip();
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(sanitizer, &stack, &size);
  if (c.current < 0) return;
  c.scheduler.stack = const_cast<char*>(static_cast<const char*>(stack));
  c.scheduler.size = size;
#else
  (void)sanitizer;
#endif
}

void to_scheduler(Fiber& from) {
  chip().current = -1;
  switch_context(from, chip().scheduler);
}

/// Never returns: one thread after another.
void fiber_loop() {
  Chip& c = chip();
  finish_switch(nullptr);
  for (;;) {
    try {
      c.function(c.body);
    } catch (...) {
      c.error = std::current_exception();
    }
    const int thread = c.current;
    Warp& warp = c.warps[thread / kLanes];
    warp.ended |= 1u << thread % kLanes;
    --c.alive;
    Fiber* fiber = std::exchange(c.threads[thread].fiber, nullptr);
    c.idle.push_back(fiber);
    to_scheduler(*fiber);
  }
}

void prepare(Fiber& fiber, size_t index) {
#ifdef STAND_IN_ASAN
  __asan_unpoison_memory_region(fiber.stack, fiber.size);
#endif
  fiber.sanitizer = nullptr;
#ifdef STAND_IN_UCONTEXT
  (void)index;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_loop, 0);
#else
  // Stacks begin at different places in their pages: at the same, they would fight for the same cache lines.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.size - index % 32 * 128);
#if defined(__x86_64__)
  *--top = nullptr;  // the loop's return address, which also aligns the stack as a call does
  *--top = reinterpret_cast<void*>(fiber_loop);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
  top -= 20;
  std::fill(top, top + 20, nullptr);
  top[11] = reinterpret_cast<void*>(fiber_loop);  // x30
#endif
  fiber.stack_pointer = top;
#endif
}

Fiber* take_fiber() {
  Chip& c = chip();
  if (!c.idle.empty()) {
    Fiber* fiber = c.idle.back();
    c.idle.pop_back();
    return fiber;
  }
#ifdef STAND_IN_ASAN
  constexpr size_t kStack = 256 * 1024;
#else
  constexpr size_t kStack = 128 * 1024;
#endif
  auto fiber = std::make_unique<Fiber>();
  void* memory = mmap(nullptr, kStack + Chip::guard_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // An overflow ends the program, and not another thread's data.
  mprotect(memory, Chip::guard_bytes(), PROT_NONE);
  fiber->stack = static_cast<char*>(memory) + Chip::guard_bytes();
  fiber->size = kStack;
  prepare(*fiber, c.fibers.size());
  c.fibers.push_back(std::move(fiber));
  return c.fibers.back().get();
}

void resume(int thread) {
  Chip& c = chip();
  if (c.threads[thread].fiber == nullptr) c.threads[thread].fiber = take_fiber();
  Fiber& fiber = *c.threads[thread].fiber;
  c.current = thread;
  here.thread.x = static_cast<unsigned>(thread);
  switch_context(c.scheduler, fiber);
  if (c.error) std::rethrow_exception(std::exchange(c.error, nullptr));
}

// --- instructions of a warp --------------------------------------------------------------------------------

/// The lanes that the waiting thread's instruction takes place with, or 0 while some are not there.
uint32_t arrived(int thread) {
  const Chip& c = chip();
  const Warp& warp = c.warps[thread / kLanes];
  const Waiting& mine = c.threads[thread].waiting;
  const uint32_t wanted = mine.instruction->all_lanes ? mine.mask : mine.mask & ~warp.ended;
  if ((warp.at_instruction & wanted) != wanted) return 0;
  const int first = thread / kLanes * kLanes;
  for (uint32_t rest = wanted; rest != 0; rest &= rest - 1) {
    const Waiting& other = c.threads[first + std::countr_zero(rest)].waiting;
    if (other.instruction != mine.instruction || other.mask != mine.mask) return 0;
    if (mine.instruction->all_lanes && !same_line(other.line, mine.line)) return 0;
  }
  return wanted;
}

void execute(const Instruction& instruction, uint32_t mask, void* operands, Line line) {
  Chip& c = chip();
  const int thread = running_thread(instruction.name);
  Warp& warp = c.warps[thread / kLanes];
  const uint32_t bit = 1u << thread % kLanes;
  if ((mask & bit) == 0)
    fail(std::string(instruction.name) + " at " + place(line) +
         " with a mask that the thread is not part of");
  c.threads[thread].waiting = {&instruction, mask, operands, line};
  warp.at_instruction |= bit;
  if (const uint32_t lanes = arrived(thread)) {
    instruction.complete(thread / kLanes * kLanes, lanes);
    warp.at_instruction &= ~lanes;
    warp.ready |= lanes & ~bit;
  } else {
    to_scheduler(*c.threads[thread].fiber);
  }
}

template <typename Operands>
Operands& operands_of(int thread) {
  return *static_cast<Operands*>(chip().threads[thread].waiting.operands);
}

/// Calls f(thread, its operands) for every lane.
template <typename Operands, typename F>
void for_each_lane(int first, uint32_t lanes, F f) {
  for (; lanes != 0; lanes &= lanes - 1) {
    const int thread = first + std::countr_zero(lanes);
    f(thread, operands_of<Operands>(thread));
  }
}

void tick() {
  Chip& c = chip();
  if (++c.now == 0) fail_at(-1, "more barriers than can be counted");
}

void complete_warp_barrier(int first, uint32_t lanes) {
  Chip& c = chip();
  tick();
  Warp& warp = c.warps[first / kLanes];
  if ((lanes | warp.ended) == kAllLanes) {
    warp.synchronized = c.now;
    return;
  }
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    Thread& thread = c.threads[first + std::countr_zero(rest)];
    thread.partial_time = c.now;
    thread.partial_mask = lanes;
  }
}
constexpr Instruction kWarpBarrier{"__syncwarp", false, complete_warp_barrier};

struct ShuffleOperands {
  uint32_t value;
  int source;
  uint32_t result;
};
void complete_shuffle(int first, uint32_t lanes) {
  for_each_lane<ShuffleOperands>(first, lanes, [&](int thread, ShuffleOperands& o) {
    if ((lanes >> o.source & 1u) == 0)
      fail_at(thread, "a shuffle at " + place(chip().threads[thread].waiting.line) + " from lane " +
                          std::to_string(o.source) + ", which is not in the mask or has ended");
    o.result = operands_of<ShuffleOperands>(first + o.source).value;
  });
}
constexpr Instruction kShuffles[] = {{"__shfl_sync", false, complete_shuffle},
                                     {"__shfl_up_sync", false, complete_shuffle},
                                     {"__shfl_down_sync", false, complete_shuffle},
                                     {"__shfl_xor_sync", false, complete_shuffle}};

struct BallotOperands {
  bool vote;
  uint32_t result;
};
void complete_ballot(int first, uint32_t lanes) {
  uint32_t votes = 0;
  for_each_lane<BallotOperands>(first, lanes, [&](int thread, const BallotOperands& o) {
    votes |= static_cast<uint32_t>(o.vote) << thread % kLanes;
  });
  for_each_lane<BallotOperands>(first, lanes, [&](int, BallotOperands& o) { o.result = votes; });
}
constexpr Instruction kBallot{"a vote of the warp", false, complete_ballot};

struct MultiplyOperands {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

using Eight = float __attribute__((vector_size(32)));

const float* f16_values() {
  static const std::vector<float> values = [] {
    std::vector<float> table(65536);
    for (int i = 0; i < 65536; ++i) table[static_cast<size_t>(i)] = f16_to_f32(static_cast<uint16_t>(i));
    return table;
  }();
  return values.data();
}

template <bool is_bf16>
void complete_multiply(int first, uint32_t) {
  const float* table = is_bf16 ? nullptr : f16_values();
  const auto value = [&](uint32_t word, int half) {
    const uint32_t bits = word >> (16 * half) & 0xffffu;
    return is_bf16 ? std::bit_cast<float>(bits << 16) : table[bits];
  };
  float a[16][16];
  alignas(32) float b[16][8], c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& o = operands_of<MultiplyOperands>(first + lane);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < 4; ++word)
        a[g + word % 2 * 8][2 * t + word / 2 * 8 + half] = value(o.a[word], half);
      for (int word = 0; word < 2; ++word) b[2 * t + word * 8 + half][g] = value(o.b[word], half);
      c[g][2 * t + half] = o.c[half];
      c[g + 8][2 * t + half] = o.c[2 + half];
    }
  }
  for (int row = 0; row < 16; ++row) {
    Eight sums;
    std::memcpy(&sums, c[row], sizeof(sums));
    for (int k = 0; k < 16; ++k) {
      Eight right;
      std::memcpy(&right, b[k], sizeof(right));
      sums += a[row][k] * right;
    }
    std::memcpy(c[row], &sums, sizeof(sums));
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& o = operands_of<MultiplyOperands>(first + lane);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      o.c[half] = c[g][2 * t + half];
      o.c[2 + half] = c[g + 8][2 * t + half];
    }
  }
}
constexpr Instruction kMultiplyBf16{"mma_bf16", true, complete_multiply<true>};
constexpr Instruction kMultiplyF16{"mma_f16", true, complete_multiply<false>};

struct LoadOperands {
  uint32_t* r;
  int64_t row;
};

const uint8_t* read_for_warp(int thread, int64_t offset, int n, int alignment);

template <bool transposed>
void complete_load(int first, uint32_t) {
  uint16_t matrices[4][8][8];
  for_each_lane<LoadOperands>(first, kAllLanes, [&](int thread, const LoadOperands& o) {
    std::memcpy(matrices[thread % kLanes / 8][thread % 8], read_for_warp(thread, o.row, 16, 16), 16);
  });
  for_each_lane<LoadOperands>(first, kAllLanes, [&](int thread, const LoadOperands& o) {
    const int row = thread % kLanes / 4, column = thread % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto& m = matrices[i];
      o.r[i] = transposed ? m[column][row] | static_cast<uint32_t>(m[column + 1][row]) << 16
                          : m[row][column] | static_cast<uint32_t>(m[row][column + 1]) << 16;
    }
  });
}
constexpr Instruction kLoad{"load_matrices", true, complete_load<false>};
constexpr Instruction kLoadTransposed{"load_matrices_transposed", true, complete_load<true>};

// --- shared memory -----------------------------------------------------------------------------------------

std::string since() {
  const Chip& c = chip();
  return c.barrier_seen ? "since the barrier at " + place(c.barrier_line) : "since the block began";
}

std::string bytes_at(Access access, int64_t byte) {
  std::string text = "byte " + std::to_string(byte) + " of shared memory";
  if (access.n > 1)
    text += " (with " + std::to_string(access.n) + " from " + std::to_string(access.begin) + ")";
  return text;
}

void check_place(int thread, Access access, int alignment, const char* verb) {
  const Chip& c = chip();
  if (access.begin < 0 || access.begin > c.shared_bytes - access.n)
    fail_at(thread, std::string(verb) + " " + bytes_at(access, access.begin) + ", of which the block has " +
                        std::to_string(c.shared_bytes) + " bytes");
  if (access.begin % alignment != 0)
    fail_at(thread, std::string(verb) + " " + bytes_at(access, access.begin) + ", not a multiple of " +
                        std::to_string(alignment));
}

/// Whether what a thread of the same warp did at `when` has certainly been done before `thread` goes on.
bool warp_ordered(uint32_t when, int who, int thread) {
  const Chip& c = chip();
  const Thread& t = c.threads[thread];
  return when < c.warps[thread / kLanes].synchronized ||
         (when < t.partial_time && (t.partial_mask >> who % kLanes & 1u) != 0);
}

/// whole_warp: the thread reads for all lanes, itself being one of many.
bool ordered(uint32_t when, int who, int thread, bool whole_warp) {
  if (when < chip().barrier || (who == thread && !whole_warp)) return true;
  return who / kLanes == thread / kLanes && warp_ordered(when, who, thread);
}

[[noreturn]] void fail_copying(int thread, Access access, int64_t at, std::string_view verb,
                               const Byte& byte) {
  fail_at(thread, std::string(verb) + " " + bytes_at(access, at) + ", which a copy_async of " +
                      name_of(byte.writer) + " writes; it has not been waited for (copy_wait)");
}

void note_read(Byte& byte, int thread, Access access, int64_t at, bool whole_warp) {
  const Chip& c = chip();
  const std::string_view verb = whole_warp ? "reads for its warp" : "reads";
  if (byte.copying) fail_copying(thread, access, at, verb, byte);
  if (byte.written < c.block_start)
    fail_at(thread,
            std::string(verb) + " " + bytes_at(access, at) + ", which no thread of the block has written");
  if (!ordered(byte.written, byte.writer, thread, whole_warp))
    fail_at(thread, std::string(verb) + " " + bytes_at(access, at) + ", which " + name_of(byte.writer) +
                        " has written " + since() +
                        (byte.writer / kLanes == thread / kLanes ? ", without a __syncwarp" : ""));
  const auto who = static_cast<uint16_t>(thread);
  const bool fresh = byte.read < c.barrier;
  const bool same_warp = byte.reader / kLanes == thread / kLanes;
  if (fresh || (!byte.many_warps && same_warp && warp_ordered(byte.read, byte.reader, thread))) {
    byte.many_lanes = whole_warp;
    byte.many_warps = false;
  } else if (!same_warp) {
    byte.many_warps = true;
  } else if (byte.reader != who || whole_warp) {
    byte.many_lanes = true;
  }
  byte.read = c.now;
  byte.reader = who;
}

/// Fails where a write would collide.
void check_write(const Byte& byte, int thread, Access access, int64_t at, const char* verb) {
  const Chip& c = chip();
  if (byte.copying) fail_copying(thread, access, at, verb, byte);
  if (byte.written >= c.block_start && !ordered(byte.written, byte.writer, thread, false))
    fail_at(thread, std::string(verb) + " " + bytes_at(access, at) + ", which " + name_of(byte.writer) +
                        " has written " + since() +
                        (byte.writer / kLanes == thread / kLanes ? ", without a __syncwarp" : ""));
  if (byte.read < c.barrier) return;
  const bool same_warp = byte.reader / kLanes == thread / kLanes;
  const bool after_reads =
      !byte.many_warps && (byte.many_lanes ? same_warp && warp_ordered(byte.read, byte.reader, thread)
                                           : ordered(byte.read, byte.reader, thread, false));
  if (!after_reads)
    fail_at(thread, std::string(verb) + " " + bytes_at(access, at) + ", which " + name_of(byte.reader) +
                        (byte.many_lanes || byte.many_warps ? " (and others)" : "") + " has read " + since() +
                        (same_warp && !byte.many_warps ? ", without a __syncwarp" : ""));
}

/// Calls f(byte, position) for the bytes of an access: once where all are in the same state, as they mostly
/// are.
template <typename F>
void for_each_byte(Access access, F f) {
  Byte* bytes = chip().bytes.data() + access.begin;
  if (std::memcmp(bytes, bytes + 1, static_cast<size_t>(access.n - 1) * sizeof(Byte)) == 0) {
    f(bytes[0], access.begin);
    std::fill(bytes + 1, bytes + access.n, bytes[0]);
  } else {
    for (int i = 0; i < access.n; ++i) f(bytes[i], access.begin + i);
  }
}

const uint8_t* read_by(int thread, int64_t offset, int n, int alignment, bool whole_warp) {
  const Access access{offset, n};
  check_place(thread, access, alignment, "reads");
  for_each_byte(access, [&](Byte& byte, int64_t at) { note_read(byte, thread, access, at, whole_warp); });
  return chip().memory + offset;
}

const uint8_t* read_for_warp(int thread, int64_t offset, int n, int alignment) {
  return read_by(thread, offset, n, alignment, true);
}

// --- blocks ------------------------------------------------------------------------------------------------

/// Lets waiting threads go on whose missing lanes have ended since.
bool complete_without(int warp_index) {
  Chip& c = chip();
  Warp& warp = c.warps[warp_index];
  const int first = warp_index * kLanes;
  for (uint32_t rest = warp.at_instruction; rest != 0; rest &= rest - 1) {
    const int thread = first + std::countr_zero(rest);
    const uint32_t lanes = arrived(thread);
    if (lanes == 0) continue;
    c.threads[thread].waiting.instruction->complete(first, lanes);
    warp.at_instruction &= ~lanes;
    warp.ready |= lanes;
    return true;
  }
  return false;
}

std::string lanes_text(uint32_t lanes) {
  std::string text;
  for (int lane = 0; lane < kLanes; ++lane)
    if (lanes >> lane & 1u) text += (text.empty() ? "" : ", ") + std::to_string(lane);
  return text;
}

[[noreturn]] void fail_deadlocked() {
  const Chip& c = chip();
  for (int w = 0; w < c.n_warps; ++w) {
    const Warp& warp = c.warps[w];
    if (warp.at_instruction == 0) continue;
    const int thread = w * kLanes + std::countr_zero(warp.at_instruction);
    const Waiting& waiting = c.threads[thread].waiting;
    uint32_t with = 0, elsewhere = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((warp.at_instruction >> lane & 1u) == 0) continue;
      const Waiting& other = c.threads[w * kLanes + lane].waiting;
      const bool same = other.instruction == waiting.instruction && other.mask == waiting.mask &&
                        same_line(other.line, waiting.line);
      (same ? with : elsewhere) |= 1u << lane;
    }
    std::string text = std::string("deadlock: waits for its warp at ") + waiting.instruction->name + ", " +
                       place(waiting.line) + ": of the lanes of its mask, ";
    const auto add = [&](uint32_t lanes, const std::string& what) {
      if (lanes &= waiting.mask) text += lanes_text(lanes) + " " + what + "; ";
    };
    add(with, "wait with it");
    if (elsewhere != 0) {
      const Waiting& other = c.threads[w * kLanes + std::countr_zero(elsewhere)].waiting;
      add(elsewhere, std::string("wait elsewhere (the first at ") + other.instruction->name + ", " +
                         place(other.line) + ")");
    }
    add(warp.at_barrier, "wait at __syncthreads");
    add(warp.ended, "have ended or were never there");
    fail_at(thread, text.substr(0, text.size() - 2));
  }
  fail_at(-1, "deadlock");
}

void pass_barrier() {
  Chip& c = chip();
  int first = -1;
  for (int w = 0; w < c.n_warps; ++w)
    for (uint32_t rest = c.warps[w].at_barrier; rest != 0; rest &= rest - 1) {
      const int thread = w * kLanes + std::countr_zero(rest);
      if (first < 0) first = thread;
      const Line line = c.threads[thread].waiting.line, expected = c.threads[first].waiting.line;
      if (!same_line(line, expected))
        fail_at(thread, "waits at __syncthreads, " + place(line) + ", but " + name_of(first) +
                            " at that of " + place(expected));
    }
  c.barrier_line = c.threads[first].waiting.line;
  c.barrier_seen = true;
  tick();
  c.barrier = c.now;
  for (int w = 0; w < c.n_warps; ++w) {
    Warp& warp = c.warps[w];
    warp.ready |= std::exchange(warp.at_barrier, 0u);
  }
}

void begin_block() {
  Chip& c = chip();
  if (c.now > 0xf0000000u) {  // times start again: nothing of earlier blocks may look like the present
    std::fill(c.bytes.begin(), c.bytes.end(), Byte{});
    c.now = 0;
  }
  c.block_start = c.barrier = ++c.now;
  c.barrier_seen = false;
  std::fill_n(c.memory, c.shared_bytes, uint8_t{0xcd});
  c.alive = c.n_threads;
  for (int w = 0; w < c.n_warps; ++w) {
    const int lanes = std::min(kLanes, c.n_threads - w * kLanes);
    c.warps[w] = Warp{};
    c.warps[w].ready = kAllLanes >> (kLanes - lanes);
    c.warps[w].ended = ~c.warps[w].ready;
  }
  for (int i = 0; i < c.n_threads; ++i) {
    c.threads[i].partial_time = 0;
    c.threads[i].group = 0;
  }
}

/// Forgets copies that no thread has waited for.
void drop_copies() {
  Chip& c = chip();
  for (int i = 0; i < c.n_threads; ++i) {
    for (const Copy& copy : c.threads[i].copies) std::fill_n(c.bytes.begin() + copy.to, 16, Byte{});
    c.threads[i].copies.clear();
  }
}

void run_block() {
  Chip& c = chip();
  begin_block();
  const bool backward = c.order == Order::Backward;
  while (c.alive > 0) {
    bool progress = false;
    int waiting = 0;
    for (int i = 0; i < c.n_warps; ++i) {
      const int w = backward ? c.n_warps - 1 - i : i;
      Warp& warp = c.warps[w];
      do {
        while (warp.ready != 0) {
          const int lane = backward ? 31 - std::countl_zero(warp.ready) : std::countr_zero(warp.ready);
          warp.ready &= ~(1u << lane);
          resume(w * kLanes + lane);
          progress = true;
        }
      } while (warp.at_instruction != 0 && complete_without(w));
      waiting += std::popcount(warp.at_barrier);
    }
    if (c.alive > 0 && waiting == c.alive)
      pass_barrier();
    else if (!progress)
      fail_deadlocked();
  }
  drop_copies();
}

/// Leaves the threads of a block that failed where they are: their stacks are used again from their
/// beginning.
void abandon() {
  Chip& c = chip();
  drop_copies();
  c.idle.clear();
  for (size_t i = 0; i < c.fibers.size(); ++i) {
    Fiber& fiber = *c.fibers[i];
    prepare(fiber, i);
    c.idle.push_back(&fiber);
  }
  for (Thread& thread : c.threads) thread.fiber = nullptr;
}

/// Deferred work.
struct Queue {
  std::mutex mutex;
  bool deferred = chosen("QWEN2VL_STAND_IN_DEFERRED", "1");
  std::deque<std::function<void()>> work;
  int64_t finished = 0;
};
Queue& queue() {
  static Queue queue;
  return queue;
}

thread_local std::vector<std::function<void()>>* recorded = nullptr;
thread_local bool launching = false;

}  // namespace

void fail(const std::string& what) { fail_at(chip().current, what); }

const uint8_t* read(int64_t offset, int n, int alignment) {
  return read_by(running_thread("shared memory"), offset, n, alignment, false);
}

uint8_t* write(int64_t offset, int n, int alignment) {
  Chip& c = chip();
  const int thread = running_thread("shared memory");
  const Access access{offset, n};
  check_place(thread, access, alignment, "writes");
  for_each_byte(access, [&](Byte& byte, int64_t at) {
    check_write(byte, thread, access, at, "writes");
    byte.written = c.now;
    byte.writer = static_cast<uint16_t>(thread);
  });
  return c.memory + offset;
}

void block_barrier(Line line) {
  Chip& c = chip();
  const int thread = running_thread("__syncthreads");
  c.threads[thread].waiting = {nullptr, 0, nullptr, line};
  c.warps[thread / kLanes].at_barrier |= 1u << thread % kLanes;
  to_scheduler(*c.threads[thread].fiber);
}

void warp_barrier(uint32_t mask, Line line) { execute(kWarpBarrier, mask, nullptr, line); }

uint32_t shuffle(Shuffle how, uint32_t mask, uint32_t value, int by, int width, Line line) {
  if (width < 1 || width > kLanes || !std::has_single_bit(static_cast<unsigned>(width)))
    fail("a shuffle at " + place(line) + " over " + std::to_string(width) + " lanes");
  const int lane = running_thread("a shuffle") % kLanes, begin = lane & ~(width - 1);
  int source = lane;
  switch (how) {
    case Shuffle::Index:
      source = begin + (by & (width - 1));
      break;
    case Shuffle::Up:
      if (lane - by >= begin) source = lane - by;
      break;
    case Shuffle::Down:
      if (lane + by < begin + width) source = lane + by;
      break;
    case Shuffle::Xor:
      if ((lane ^ by) < begin + width) source = lane ^ by;
      break;
  }
  ShuffleOperands operands{value, source, 0};
  execute(kShuffles[static_cast<int>(how)], mask, &operands, line);
  return operands.result;
}

uint32_t ballot(uint32_t mask, bool vote, Line line) {
  BallotOperands operands{vote, 0};
  execute(kBallot, mask, &operands, line);
  return operands.result;
}

void multiply(bool is_bf16, float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Line line) {
  MultiplyOperands operands{c, a, {b0, b1}};
  execute(is_bf16 ? kMultiplyBf16 : kMultiplyF16, kAllLanes, &operands, line);
}

void load_matrices(bool transposed, uint32_t* r, int64_t offset, Line line) {
  LoadOperands operands{r, offset};
  execute(transposed ? kLoadTransposed : kLoad, kAllLanes, &operands, line);
}

void copy_async(int64_t offset, const void* from, bool valid, Line line) {
  Chip& c = chip();
  const int thread = running_thread("copy_async");
  const Access access{offset, 16};
  check_place(thread, access, 16, "copies to");
  if (valid) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
      fail("copy_async at " + place(line) + " from an address that is not a multiple of 16");
    // An address sanitizer is to find the line that starts the copy, not the one that waits for it.
    const volatile char* bytes = static_cast<const char*>(from);
    (void)bytes[0];
    (void)bytes[15];
  }
  for_each_byte(access, [&](Byte& byte, int64_t at) {
    check_write(byte, thread, access, at, "copies to");
    byte.copying = true;
    byte.writer = static_cast<uint16_t>(thread);
  });
  c.threads[thread].copies.push_back({offset, from, valid, c.threads[thread].group});
}

void copy_commit() { ++chip().threads[running_thread("copy_commit")].group; }

void copy_wait(int pending) {
  Chip& c = chip();
  const int thread = running_thread("copy_wait");
  auto& copies = c.threads[thread].copies;
  const int finished = c.threads[thread].group - pending;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < finished; ++done) {
    const Copy& copy = copies[done];
    if (copy.valid)
      std::memcpy(c.memory + copy.to, copy.from, 16);
    else
      std::memset(c.memory + copy.to, 0, 16);
    Byte byte;
    byte.written = c.now;
    byte.writer = static_cast<uint16_t>(thread);
    std::fill_n(c.bytes.begin() + copy.to, 16, byte);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
}

void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0)
    fail("reads at an address that is not a multiple of " + std::to_string(alignment));
}

void run_now(const char* name, dim3 grid, int threads, int64_t shared_bytes, ThreadFunction function,
             void* body) {
  Chip& c = chip();
  const std::lock_guard lock(c.in_use);
  if (threads < 1 || threads > kMaxThreads || grid.x < 1 || grid.y < 1 || grid.z < 1 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || shared_bytes < 0 ||
      shared_bytes > kSharedBytes)
    throw std::runtime_error(std::string("kernel ") + name + ": a launch of " + place(grid) + " blocks of " +
                             std::to_string(threads) + " threads with " + std::to_string(shared_bytes) +
                             " bytes of shared memory, which no chip takes");
  // Also where a block fails: what comes after finds the chip idle.
  struct Ending {
    Chip& c;
    bool failed = true;
    ~Ending() {
      if (failed) abandon();
      c.kernel = nullptr;
      c.current = -1;
      launching = false;
    }
  } ending{c};
  launching = true;
  c.kernel = name;
  c.function = function;
  c.body = body;
  c.n_threads = threads;
  c.n_warps = (threads + kLanes - 1) / kLanes;
  c.shared_bytes = shared_bytes;
  ++c.launches;
  here = Here{};
  here.block_size = dim3(static_cast<unsigned>(threads));
  here.grid = grid;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t block = c.order == Order::Backward ? blocks - 1 - i : i;
    here.block = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                  static_cast<unsigned>(block / grid.x / grid.y)};
    run_block();
  }
  ending.failed = false;
}

void submit(std::function<void()> work) {
  if (launching) fail("a launch within a kernel");
  if (recorded != nullptr) {
    recorded->push_back(std::move(work));
    return;
  }
  Queue& q = queue();
  if (!q.deferred) return work();
  const std::lock_guard lock(q.mutex);
  q.work.push_back(std::move(work));
}
void record_into(std::vector<std::function<void()>>* work) { recorded = work; }

bool set_deferred(bool deferred) {
  finish(submitted());
  return std::exchange(queue().deferred, deferred);
}

int64_t submitted() {
  Queue& q = queue();
  const std::lock_guard lock(q.mutex);
  return q.finished + static_cast<int64_t>(q.work.size());
}

void finish(int64_t count) {
  Queue& q = queue();
  const std::lock_guard lock(q.mutex);
  while (q.finished < count && !q.work.empty()) {
    const std::function<void()> work = std::move(q.work.front());
    q.work.pop_front();
    ++q.finished;
    try {
      work();
    } catch (...) {  // nothing of what follows can be relied on, as on a chip after an error
      q.finished += static_cast<int64_t>(q.work.size());
      q.work.clear();
      throw;
    }
  }
}

Order set_order(Order order) { return std::exchange(chip().order, order); }
int64_t launches() { return chip().launches; }

}  // namespace qwen2vl::cuda::stand_in
