#pragma once

// A stand-in for the chip: what csrc/cuda/chip.h promises to a kernel, built by a C++ compiler and run on the
// processor, thread by thread. It is slow and strict: every access to shared memory is checked for its
// bounds, its alignment, bytes that nobody wrote and missing barriers; a warp's instructions need the whole
// warp. A violation is an exception that names the kernel, the block, the thread, the byte, and both
// accesses; stand_in::run throws it.
//
// A block's threads are fibers: each runs until it has to wait for others, so there is no parallelism, and no
// order that a kernel could not meet on a chip. Blocks run one after another. Several host threads may
// launch; launches then wait for each other.
//
// What it cannot show: races in global memory other than by running blocks and threads backwards (set_order);
// launches that overlap or streams that race; the chip's own rounding in mma and in its approximations;
// registers and speed.

#include <math.h>

#include <bit>
#include <cmath>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/half.h"

#define CHIP_KERNEL inline
#define CHIP_DEVICE inline
#define CHIP_HOST_DEVICE inline
#define CHIP_BOUNDS(threads, blocks)

// --- CUDA's vector types -----------------------------------------------------------------------------------

// They may alias anything, as on the chip: kernels read rows of numbers through them.
#define STAND_IN_VECTOR(alignment) __attribute__((may_alias, aligned(alignment)))

struct STAND_IN_VECTOR(8) float2 {
  float x, y;
};
struct STAND_IN_VECTOR(16) float4 {
  float x, y, z, w;
};
struct STAND_IN_VECTOR(8) int2 {
  int x, y;
};
struct STAND_IN_VECTOR(16) int4 {
  int x, y, z, w;
};
struct STAND_IN_VECTOR(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct STAND_IN_VECTOR(16) uint4 {
  unsigned x, y, z, w;
};
#undef STAND_IN_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- running -----------------------------------------------------------------------------------------------

namespace qwen2vl::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

namespace stand_in {

/// A line of a kernel, for messages and to tell barriers apart.
using Line = std::source_location;

/// What the running thread reads as threadIdx and so on.
struct Here {
  uint3 thread{}, block{};
  dim3 block_size, grid;
};
inline constinit Here here;

/// Throws, with the kernel, the block and the running thread in front.
[[noreturn]] void fail(const std::string& what);

/// n bytes of shared memory about to be read or written by the running thread, checked.
const uint8_t* read(int64_t offset, int n, int alignment);
uint8_t* write(int64_t offset, int n, int alignment);

void block_barrier(Line line);
void warp_barrier(uint32_t mask, Line line);

enum class Shuffle { Index, Up, Down, Xor };
uint32_t shuffle(Shuffle how, uint32_t mask, uint32_t value, int by, int width, Line line);
uint32_t ballot(uint32_t mask, bool vote, Line line);

void multiply(bool is_bf16, float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Line line);
void load_matrices(bool transposed, uint32_t* r, int64_t offset, Line line);

void copy_async(int64_t offset, const void* from, bool valid, Line line);
void copy_commit();
void copy_wait(int pending);

/// Fails where a global address is not a multiple of `alignment`.
void check_alignment(const void* address, size_t alignment);

using ThreadFunction = void (*)(void* body);
void run_now(const char* name, dim3 grid, int threads, int64_t shared_bytes, ThreadFunction thread,
             void* body);

/// Runs a launch or an asynchronous copy: now, or, where work is deferred, as late as the host allows. While
/// there is a list to record into (cudaStreamBeginCapture), what this host thread submits goes there instead.
void submit(std::function<void()> work);
void record_into(std::vector<std::function<void()>>* work);

/// Deferred work runs when the host waits for it, and no earlier: a result that is read, or memory that is
/// used again, without waiting is then wrong each time, and not once in a thousand. All streams are one
/// queue. Also chosen by QWEN2VL_STAND_IN_DEFERRED=1 in the environment. An error is thrown by the call that
/// waits. Returns what was chosen before.
bool set_deferred(bool deferred);
/// Pieces of work so far; runs those that are left of the first `count`.
int64_t submitted();
void finish(int64_t count);

/// Calls `body` once per thread of the grid. Recorded or deferred, it is a copy that is called later: it may
/// refer to nothing that ends before.
template <typename Body>
void run(const char* name, dim3 grid, int threads, int64_t shared_bytes, Body body) {
  submit([=]() mutable {
    run_now(name, grid, threads, shared_bytes, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
  });
}

/// The order of a launch's blocks, and of a block's threads between two barriers. What a kernel computes must
/// not depend on it. Backward is also chosen by QWEN2VL_STAND_IN_ORDER=backward in the environment. Returns
/// what was chosen before.
enum class Order { Forward, Backward };
Order set_order(Order order);

/// Since the program started: to see that something was launched at all.
int64_t launches();

inline constexpr int64_t kSharedBytes = 227 * 1024;  ///< that a block may have

}  // namespace stand_in

// --- shared memory -----------------------------------------------------------------------------------------

/// A pointer into the block's shared memory, which is checked where it is used.
template <typename T>
class Shared {
  using Value = std::remove_const_t<T>;
  static_assert(std::is_trivially_copyable_v<Value>);

 public:
  /// p[i], which is read where it becomes a value and written where it is assigned to. It cannot be kept in
  /// an `auto`: that would read at another time than the chip does. (`c ? p[i] : 0` has the type of the 0.)
  class Element {
   public:
    operator Value() && { return get(); }
    Value operator=(const Value& value) && { return set(value); }
    Value operator=(Element&& other) && { return set(other.get()); }
    Value operator+=(const Value& value) && { return set(static_cast<Value>(get() + value)); }
    Value operator-=(const Value& value) && { return set(static_cast<Value>(get() - value)); }
    Value operator*=(const Value& value) && { return set(static_cast<Value>(get() * value)); }
    Value operator|=(const Value& value) && { return set(static_cast<Value>(get() | value)); }
    Shared operator&() && { return Shared(offset_); }

   private:
    friend class Shared;
    explicit Element(int64_t offset) : offset_(offset) {}
    Value get() const { return Shared(offset_).read(); }
    Value set(const Value& value) const {
      std::memcpy(stand_in::write(offset_, sizeof(Value), alignof(Value)), &value, sizeof(Value));
      return value;
    }
    int64_t offset_;
  };

  Shared() = default;
  /// Bytes from the start of the block's shared memory.
  explicit Shared(int64_t offset) : offset_(offset) {}
  template <typename U>
    requires std::is_same_v<const U, T>
  Shared(Shared<U> other) : offset_(other.offset()) {}

  auto operator[](int64_t i) const {
    if constexpr (std::is_const_v<T>)
      return (*this + i).read();
    else
      return Element(offset_ + i * kSize);
  }
  auto operator*() const { return (*this)[0]; }

  Shared operator+(int64_t n) const { return Shared(offset_ + n * kSize); }
  Shared operator-(int64_t n) const { return Shared(offset_ - n * kSize); }
  friend Shared operator+(int64_t n, Shared pointer) { return pointer + n; }
  ptrdiff_t operator-(Shared other) const { return (offset_ - other.offset_) / kSize; }
  Shared& operator+=(int64_t n) { return *this = *this + n; }
  Shared& operator-=(int64_t n) { return *this = *this - n; }
  Shared& operator++() { return *this += 1; }
  Shared& operator--() { return *this -= 1; }
  Shared operator++(int) { return std::exchange(*this, *this + 1); }
  Shared operator--(int) { return std::exchange(*this, *this - 1); }
  auto operator<=>(const Shared&) const = default;

  int64_t offset() const { return offset_; }

 private:
  static constexpr int64_t kSize = sizeof(T);
  Value read() const {
    Value value;
    std::memcpy(&value, stand_in::read(offset_, sizeof(Value), alignof(Value)), sizeof(Value));
    return value;
  }
  int64_t offset_ = int64_t{-1} << 40;  // in no block's memory
};

inline Shared<uint8_t> shared_memory() { return Shared<uint8_t>(0); }

template <typename T, typename U>
Shared<T> shared_cast(Shared<U> pointer) {
  static_assert(std::is_const_v<T> || !std::is_const_v<U>);
  return Shared<T>(pointer.offset());
}

// --- numbers -----------------------------------------------------------------------------------------------

inline uint32_t mask_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t which) {
  if ((which & 0x8888u) != 0) stand_in::fail("permute_bytes of a selector beyond 7");
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = which >> (4 * i) & 7u;
    out |= ((from < 4 ? a >> (8 * from) : b >> (8 * (from - 4))) & 255u) << (8 * i);
  }
  return out;
}

inline uint32_t pack_small_f16(float low, float high) {
  return f32_to_f16(low) | static_cast<uint32_t>(f32_to_f16(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  const auto saturated = [](float x) { return std::fmin(std::fmax(x, -65504.0f), 65504.0f); };
  return pack_small_f16(saturated(low), saturated(high));
}
inline uint32_t pack_bf16(float low, float high) {
  return f32_to_bf16(low) | static_cast<uint32_t>(f32_to_bf16(high)) << 16;
}
inline float2 unpack_f16(uint32_t word) {
  return {f16_to_f32(static_cast<uint16_t>(word & 0xffffu)), f16_to_f32(static_cast<uint16_t>(word >> 16))};
}
inline float2 unpack_bf16(uint32_t word) {
  return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
}

inline uint32_t subtract_bf16(uint32_t a, uint32_t b) {
  const float2 x = unpack_bf16(a), y = unpack_bf16(b);
  const auto difference = [](float p, float q) {
    const float d = p - q, rounded = bf16_to_f32(f32_to_bf16(d));
    if (std::isfinite(d) && (rounded != d || static_cast<double>(p) - static_cast<double>(q) != d))
      stand_in::fail("subtract_bf16 of " + std::to_string(p) + " and " + std::to_string(q) +
                     ", whose difference is not a bf16");
    return d;
  };
  return pack_bf16(difference(x.x, y.x), difference(x.y, y.y));
}

/// The chip's is an approximation, off by two units in the last place at most; subnormals are zero in both.
inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// glibc declares some of these names with C linkage, so that they cannot be defined beside CUDA's others.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// --- matrices ----------------------------------------------------------------------------------------------

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     stand_in::Line line = stand_in::Line::current()) {
  stand_in::multiply(true, c, a, b0, b1, line);
}
inline void mma_bf16_first(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           stand_in::Line line = stand_in::Line::current()) {
  c[0] = c[1] = c[2] = c[3] = 0;
  stand_in::multiply(true, c, a, b0, b1, line);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    stand_in::Line line = stand_in::Line::current()) {
  stand_in::multiply(false, c, a, b0, b1, line);
}

inline void load_matrices(uint32_t (&r)[4], Shared<const uint16_t> row,
                          stand_in::Line line = stand_in::Line::current()) {
  stand_in::load_matrices(false, r, row.offset(), line);
}
inline void load_matrices_transposed(uint32_t (&r)[4], Shared<const uint16_t> row,
                                     stand_in::Line line = stand_in::Line::current()) {
  stand_in::load_matrices(true, r, row.offset(), line);
}

// --- copies ------------------------------------------------------------------------------------------------

inline void copy_async(Shared<uint4> to, const void* from, bool valid,
                       stand_in::Line line = stand_in::Line::current()) {
  stand_in::copy_async(to.offset(), from, valid, line);
}
inline void copy_commit() { stand_in::copy_commit(); }
template <int pending>
void copy_wait() {
  stand_in::copy_wait(pending);
}

inline uint4 load_once(const uint4* from) {
  stand_in::check_alignment(from, alignof(uint4));
  return *from;
}
inline uint2 load_once(const uint2* from) {
  stand_in::check_alignment(from, alignof(uint2));
  return *from;
}
inline uint32_t load_once(const uint32_t* from) {
  stand_in::check_alignment(from, alignof(uint32_t));
  return *from;
}

// Launches run one after another: there is nothing to wait for.
inline void wait_for_previous_launch() {}
inline void let_next_launch_start() {}

}  // namespace qwen2vl::cuda

// --- CUDA's own names --------------------------------------------------------------------------------------

inline const uint3& threadIdx = qwen2vl::cuda::stand_in::here.thread;
inline const uint3& blockIdx = qwen2vl::cuda::stand_in::here.block;
inline const dim3& blockDim = qwen2vl::cuda::stand_in::here.block_size;
inline const dim3& gridDim = qwen2vl::cuda::stand_in::here.grid;

inline void __syncthreads(std::source_location line = std::source_location::current()) {
  qwen2vl::cuda::stand_in::block_barrier(line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       std::source_location line = std::source_location::current()) {
  qwen2vl::cuda::stand_in::warp_barrier(mask, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

#define STAND_IN_SHUFFLE(name, how, By)                                                                   \
  template <typename T>                                                                                   \
  T name(unsigned mask, T value, By by, int width = 32,                                                   \
         std::source_location line = std::source_location::current()) {                                   \
    static_assert(sizeof(T) == 4);                                                                        \
    return std::bit_cast<T>(qwen2vl::cuda::stand_in::shuffle(qwen2vl::cuda::stand_in::Shuffle::how, mask, \
                                                             std::bit_cast<uint32_t>(value),              \
                                                             static_cast<int>(by), width, line));         \
  }
STAND_IN_SHUFFLE(__shfl_sync, Index, int)
STAND_IN_SHUFFLE(__shfl_up_sync, Up, unsigned)
STAND_IN_SHUFFLE(__shfl_down_sync, Down, unsigned)
STAND_IN_SHUFFLE(__shfl_xor_sync, Xor, int)
#undef STAND_IN_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int vote,
                              std::source_location line = std::source_location::current()) {
  return qwen2vl::cuda::stand_in::ballot(mask, vote != 0, line);
}
inline int __any_sync(unsigned mask, int vote, std::source_location line = std::source_location::current()) {
  return qwen2vl::cuda::stand_in::ballot(mask, vote != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, std::source_location line = std::source_location::current()) {
  return qwen2vl::cuda::stand_in::ballot(mask, vote == 0, line) == 0;
}

// Threads take turns, and only where they wait: nothing comes between a read and a write.
inline unsigned atomicAdd(unsigned* at, unsigned value) { return std::exchange(*at, *at + value); }
inline int atomicAdd(int* at, int value) { return std::exchange(*at, *at + value); }
inline float atomicAdd(float* at, float value) { return std::exchange(*at, *at + value); }
inline unsigned atomicMax(unsigned* at, unsigned value) {
  return std::exchange(*at, *at < value ? value : *at);
}
inline int atomicMax(int* at, int value) { return std::exchange(*at, *at < value ? value : *at); }

#define STAND_IN_MIN_MAX(T)                           \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
STAND_IN_MIN_MAX(int)
STAND_IN_MIN_MAX(unsigned)
STAND_IN_MIN_MAX(long)
STAND_IN_MIN_MAX(unsigned long)
STAND_IN_MIN_MAX(long long)
STAND_IN_MIN_MAX(unsigned long long)
#undef STAND_IN_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }

template <typename T>
T __ldg(const T* from) {
  qwen2vl::cuda::stand_in::check_alignment(from, alignof(T));
  return *from;
}
