#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/chip.h"
#include "stand_in/runtime.h"

// The stand-in for the chip itself: that it computes what a chip computes, and that it sees what a chip would
// not forgive. Kernels are written as the backend's are.

namespace qwen2vl::cuda {
namespace {

using stand_in::Order;

/// A launch that has ended when it returns, whatever is chosen for others.
template <typename Body>
void run(const char* name, dim3 grid, int threads, int64_t shared_bytes, Body body) {
  stand_in::run(name, grid, threads, shared_bytes, body);
  stand_in::finish(stand_in::submitted());
}

struct WithOrder {
  explicit WithOrder(Order order) : before(stand_in::set_order(order)) {}
  ~WithOrder() { stand_in::set_order(before); }
  Order before;
};
struct WithDeferred {
  explicit WithDeferred(bool deferred) : before(stand_in::set_deferred(deferred)) {}
  ~WithDeferred() { stand_in::set_deferred(before); }
  bool before;
};

int thread_index() { return static_cast<int>(threadIdx.x); }

/// What one block says that does something forbidden; empty where nothing is found.
template <typename Body>
std::string violation(int threads, Body body, int64_t shared_bytes = 4096) {
  const WithOrder forward(Order::Forward);  // which of two threads is named depends on it
  try {
    run("forbidden", dim3(1), threads, shared_bytes, body);
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// Both orders of blocks and threads.
template <typename Test>
void in_both_orders(Test test) {
  for (const Order order : {Order::Forward, Order::Backward}) {
    CAPTURE(order == Order::Backward);
    const WithOrder chosen(order);
    test();
  }
}

// --- kernels that are right --------------------------------------------------------------------------------

struct Where {
  unsigned thread, x, y, z;
};

CHIP_KERNEL void CHIP_BOUNDS(64, 1) write_where(const dim3 expected, Where* out, int* wrong) {
  if (gridDim.x != expected.x || gridDim.y != expected.y || gridDim.z != expected.z || blockDim.x != 40)
    ++*wrong;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x + threadIdx.x] = {threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z};
}

/// Sums over the block, as a tree in shared memory.
CHIP_KERNEL void sum_block(const float* x, float* out) {
  const Shared<float> sums = shared_cast<float>(shared_memory());
  sums[thread_index()] = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread_index() < half) sums[thread_index()] += sums[thread_index() + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

/// c[16][8] += a[16][16] b[16][8], every lane collecting its words as chip.h says.
template <bool is_bf16>
CHIP_KERNEL void multiply(const uint16_t* a, const uint16_t* b, float* c) {
  const int g = thread_index() / 4, t = thread_index() % 4;
  const auto a_word = [&](int row, int k) {
    return a[row * 16 + k] | static_cast<uint32_t>(a[row * 16 + k + 1]) << 16;
  };
  const auto b_word = [&](int k) { return b[k * 8 + g] | static_cast<uint32_t>(b[(k + 1) * 8 + g]) << 16; };
  const uint32_t words[4] = {a_word(g, 2 * t), a_word(g + 8, 2 * t), a_word(g, 2 * t + 8),
                             a_word(g + 8, 2 * t + 8)};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if constexpr (is_bf16)
    mma_bf16(sums, words, b_word(2 * t), b_word(2 * t + 8));
  else
    mma_f16(sums, words, b_word(2 * t), b_word(2 * t + 8));
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

/// The same of matrices in shared memory: A's rows come as they are, B's transposed.
CHIP_KERNEL void multiply_from_shared(const uint16_t* a, const uint16_t* b, float* c) {
  const Shared<uint16_t> left = shared_cast<uint16_t>(shared_memory()), right = left + 16 * 16;
  for (int i = thread_index(); i < 16 * 16; i += 32) left[i] = a[i];
  for (int i = thread_index(); i < 16 * 8; i += 32) right[i] = b[i];
  __syncwarp();
  const int lane = thread_index(), g = lane / 4, t = lane % 4;
  uint32_t words[4], columns[4];
  load_matrices(words, left + lane % 16 * 16 + lane / 16 * 8);
  load_matrices_transposed(columns, right + lane % 16 * 8);  // twice: b is two matrices
  float sums[4] = {};
  mma_f16(sums, words, columns[0], columns[1]);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

struct Shuffled {
  float to, up, down;
  int exchanged, quarter;
  unsigned votes;
  int any, all;
};

CHIP_KERNEL void shuffle_all(Shuffled* out) {
  const int lane = thread_index() % 32;
  Shuffled s;
  s.to = __shfl_sync(kAllLanes, lane * 0.5f, 31 - lane);
  s.up = __shfl_up_sync(kAllLanes, lane * 0.5f, 3);
  s.down = __shfl_down_sync(kAllLanes, lane * 0.5f, 3);
  s.exchanged = __shfl_xor_sync(kAllLanes, -lane, 5);
  s.quarter = __shfl_sync(kAllLanes, lane, 1, 8);
  s.votes = __ballot_sync(kAllLanes, lane % 3 == 0);
  s.any = __any_sync(kAllLanes, lane == 17);
  s.all = __all_sync(kAllLanes, lane != 17);
  out[thread_index()] = s;
}

/// Rows through two stages of shared memory, the next one on its way while one is summed up.
CHIP_KERNEL void sum_stages(const float* x, int rows, float* out) {
  const Shared<float> stages = shared_cast<float>(shared_memory());
  const int width = 4 * static_cast<int>(blockDim.x);
  const auto fetch = [&](int row) {
    if (row <= rows)  // one beyond the end: zeros
      copy_async(shared_cast<uint4>(stages + row % 2 * width + 4 * thread_index()),
                 row < rows ? x + row * width + 4 * thread_index() : nullptr, row < rows);
    copy_commit();
  };
  fetch(0);
  float sum = 0;
  for (int row = 0; row <= rows; ++row) {
    fetch(row + 1);
    copy_wait<1>();
    __syncthreads();
    for (int i = 0; i < width; ++i) sum += stages[row % 2 * width + i];
    __syncthreads();
  }
  out[thread_index()] = sum;
}

/// The last of the blocks to arrive adds up what the others left.
CHIP_KERNEL void meet(float* parts, unsigned* arrived, float* total, unsigned* highest) {
  const Shared<uint32_t> last = shared_cast<uint32_t>(shared_memory());
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
    __threadfence();
    last[0] = atomicAdd(arrived, 1u) + 1 == gridDim.x ? 1u : 0u;
  }
  __syncthreads();
  atomicMax(highest, blockIdx.x * blockDim.x + threadIdx.x);
  if (last[0] == 0) return;
  if (threadIdx.x < gridDim.x) atomicAdd(total, parts[threadIdx.x]);
}

/// Most threads end at once; the others go on to meet at barriers, of the block and of their warps.
CHIP_KERNEL void end_early(int stay, int* out) {
  if (thread_index() % 32 >= stay) return;
  const Shared<int> values = shared_cast<int>(shared_memory());
  values[thread_index()] = thread_index();
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x); ++i)
    if (i % 32 < stay) sum += values[i];
  sum += __shfl_sync(kAllLanes, 1000 * thread_index(), 0);
  out[thread_index()] = sum;
}

std::vector<uint16_t> random_halves(size_t n, uint32_t seed, bool is_bf16) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(n);
  for (uint16_t& v : values) v = is_bf16 ? f32_to_bf16(normal(engine)) : f32_to_f16(normal(engine));
  return values;
}

/// Sums of 17 terms in another order: 17 roundings of at most 2^-24 of what has the terms' absolute values.
void check_product(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, bool is_bf16, float start,
                   const std::vector<float>& c) {
  const auto value = [&](uint16_t h) {
    return static_cast<double>(is_bf16 ? bf16_to_f32(h) : f16_to_f32(h));
  };
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) {
      double sum = start, size = std::fabs(start);
      for (size_t k = 0; k < 16; ++k) {
        const double term = value(a[i * 16 + k]) * value(b[k * 8 + j]);
        sum += term;
        size += std::fabs(term);
      }
      CAPTURE(i);
      CAPTURE(j);
      CHECK(std::fabs(c[i * 8 + j] - sum) <= 17 * size * 0x1p-24);
    }
}

TEST_CASE("every thread of the grid runs once, knowing where it is") {
  in_both_orders([] {
    const dim3 grid(3, 2, 4);
    std::vector<Where> where(24 * 40, Where{99, 99, 99, 99});
    int wrong = 0;
    const int64_t before = stand_in::launches();
    run("write_where", grid, 40, 0, [&] { write_where(grid, where.data(), &wrong); });
    CHECK(stand_in::launches() == before + 1);
    CHECK(wrong == 0);
    bool right = true;
    for (unsigned i = 0; i < where.size(); ++i) {
      const unsigned block = i / 40;
      right &= where[i].thread == i % 40 && where[i].x == block % 3 && where[i].y == block / 3 % 2 &&
               where[i].z == block / 6;
    }
    CHECK(right);
  });
}

TEST_CASE("barriers: a tree of sums, by one warp and by many") {
  in_both_orders([] {
    for (const int threads : {2, 32, 64, 256, 1024}) {
      CAPTURE(threads);
      std::vector<float> x(static_cast<size_t>(3 * threads)), out(3);
      std::iota(x.begin(), x.end(), 1.0f);
      run("sum_block", dim3(3), threads, 4 * threads, [&] { sum_block(x.data(), out.data()); });
      for (int block = 0; block < 3; ++block)
        CHECK(out[static_cast<size_t>(block)] ==
              std::accumulate(x.begin() + block * threads, x.begin() + (block + 1) * threads, 0.0f));
    }
  });
}

TEST_CASE("mma is a product of matrices") {
  for (const bool is_bf16 : {false, true}) {
    CAPTURE(is_bf16);
    const auto a = random_halves(256, 1, is_bf16), b = random_halves(128, 2, is_bf16);
    std::vector<float> c(128, 0.25f);
    run("multiply", dim3(1), 32, 0, [&] {
      if (is_bf16)
        multiply<true>(a.data(), b.data(), c.data());
      else
        multiply<false>(a.data(), b.data(), c.data());
    });
    check_product(a, b, is_bf16, 0.25f, c);
  }
}

TEST_CASE("matrices come from shared memory as mma wants them, transposed or not") {
  in_both_orders([] {
    const auto a = random_halves(256, 3, false), b = random_halves(128, 4, false);
    std::vector<float> c(128);
    run("multiply_from_shared", dim3(1), 32, 1024,
        [&] { multiply_from_shared(a.data(), b.data(), c.data()); });
    check_product(a, b, false, 0.0f, c);
  });
}

TEST_CASE("a warp's lanes exchange values and votes") {
  in_both_orders([] {
    std::vector<Shuffled> out(64);
    run("shuffle_all", dim3(1), 64, 0, [&] { shuffle_all(out.data()); });
    for (int i = 0; i < 64; ++i) {
      const Shuffled& s = out[static_cast<size_t>(i)];
      const int lane = i % 32;
      CAPTURE(i);
      CHECK(s.to == (31 - lane) * 0.5f);
      CHECK(s.up == (lane < 3 ? lane : lane - 3) * 0.5f);
      CHECK(s.down == (lane > 28 ? lane : lane + 3) * 0.5f);
      CHECK(s.exchanged == -(lane ^ 5));
      CHECK(s.quarter == lane / 8 * 8 + 1);
      CHECK(s.votes == 0x49249249u);
      CHECK(s.any == 1);
      CHECK(s.all == 0);
    }
  });
}

TEST_CASE("asynchronous copies in stages, with zeros for what is not there") {
  in_both_orders([] {
    for (const int rows : {1, 2, 5}) {
      std::vector<float> out(64);
      float* x = nullptr;
      REQUIRE(cudaMalloc(&x, static_cast<size_t>(rows) * 256 * 4) == cudaSuccess);
      std::iota(x, x + rows * 256, 0.0f);
      run("sum_stages", dim3(1), 64, 2048, [&] { sum_stages(x, rows, out.data()); });
      const float expected = std::accumulate(x, x + rows * 256, 0.0f);
      CHECK(std::all_of(out.begin(), out.end(), [&](float sum) { return sum == expected; }));
      CHECK(cudaFree(x) == cudaSuccess);
    }
  });
}

TEST_CASE("atomics, and the last block to arrive") {
  in_both_orders([] {
    std::vector<float> parts(20, -1.0f);
    unsigned arrived = 0, highest = 0;
    float total = 0;
    run("meet", dim3(20), 64, 16, [&] { meet(parts.data(), &arrived, &total, &highest); });
    CHECK(arrived == 20);
    CHECK(total == 210);
    CHECK(highest == 20 * 64 - 1);
  });
}

TEST_CASE("threads that have ended are not waited for") {
  in_both_orders([] {
    std::vector<int> out(64, -1);
    run("end_early", dim3(1), 64, 256, [&] { end_early(2, out.data()); });
    for (int i = 0; i < 64; ++i)
      CHECK(out[static_cast<size_t>(i)] == (i % 32 < 2 ? 66 + 1000 * (i / 32 * 32) : -1));
  });
}

TEST_CASE("a warp's own barrier orders its lanes, whole or in part") {
  CHECK(violation(64, [] {
          const Shared<int> values = shared_cast<int>(shared_memory()) + thread_index() / 32 * 32;
          const int lane = thread_index() % 32;
          for (int round = 0; round < 3; ++round) {
            values[lane] = lane + round;
            __syncwarp();
            if (values[31 - lane] != 31 - lane + round) stand_in::fail("wrong value");
            __syncwarp();
          }
        }) == "");
  CHECK(violation(32, [] {
          const Shared<int> values = shared_cast<int>(shared_memory());
          const int lane = thread_index();
          const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
          for (int round = 0; round < 3; ++round) {
            values[lane] = lane;
            __syncwarp(half);
            if (values[lane ^ 1] != (lane ^ 1)) stand_in::fail("wrong value");
            __syncwarp(half);
          }
        }) == "");
}

TEST_CASE("numbers in 16 bits are rounded to nearest even") {
  CHECK(pack_bf16(1.0f, -2.0f) == 0xc0003f80u);
  CHECK(pack_bf16(std::bit_cast<float>(0x3f808000u), std::bit_cast<float>(0x3f818000u)) == 0x3f823f80u);
  CHECK(pack_f16(1e6f, -1e6f) == 0xfbff7bffu);
  CHECK(pack_small_f16(1.0f + 0x1p-11f, 1.0f + 3 * 0x1p-11f) == 0x3c023c00u);
  CHECK(unpack_f16(0xc0003c00u).x == 1.0f);
  CHECK(unpack_f16(0xc0003c00u).y == -2.0f);
  CHECK(unpack_bf16(0xc0003f80u).y == -2.0f);
  CHECK(subtract_bf16(pack_bf16(143.0f, 128.0f), pack_bf16(136.0f, 136.0f)) == pack_bf16(7.0f, -8.0f));
  CHECK(fast_exp2(-3.0f) == 0.125f);
  CHECK(fast_exp2(-1e30f) == 0.0f);
  CHECK(fast_exp2(-126.5f) == 0.0f);
  CHECK(contains(violation(1, [] { (void)subtract_bf16(pack_bf16(256.0f, 0.0f), pack_bf16(0.5f, 0.0f)); }),
                 "not a bf16"));
}

// --- what is forbidden, and found --------------------------------------------------------------------------

TEST_CASE("found: a missing barrier between a write and another thread's read") {
  for (const int distance : {1, 32}) {  // of the same warp, and of another
    CAPTURE(distance);
    const std::string text = violation(64, [&] {
      const Shared<float> values = shared_cast<float>(shared_memory());
      values[thread_index()] = 1.0f;
      __syncthreads();
      values[thread_index()] = 2.0f;
      if (thread_index() >= distance) (void)static_cast<float>(values[thread_index() - distance]);
    });
    CHECK(contains(text, "kernel forbidden, block (0, 0, 0), thread "));
    CHECK(contains(text, "reads byte "));
    CHECK(contains(text, "has written since the barrier at test_stand_in.cpp:"));
  }
}

TEST_CASE("found: a missing barrier between a read and another thread's write") {
  for (const int readers : {1, 2, 32, 64}) {
    CAPTURE(readers);
    const std::string text = violation(64, [&] {
      const Shared<uint16_t> values = shared_cast<uint16_t>(shared_memory());
      if (thread_index() == 0) values[5] = 1;
      __syncthreads();
      if (thread_index() < readers) (void)static_cast<int>(values[5]);
      if (thread_index() == 63) values[5] = 2;
    });
    CHECK(contains(text, "thread 63: writes byte 10 "));
    CHECK(contains(text, "has read since the barrier"));
    CHECK(contains(text, "(and others)") == (readers > 1));
  }
}

TEST_CASE("found: two threads that write the same byte; neighbouring bytes are each one's own") {
  CHECK(contains(violation(64, [] { shared_memory()[thread_index() / 63] = 1; }), "writes byte 0 "));
  CHECK(contains(violation(64, [] { shared_memory()[thread_index() / 63] = 1; }), "thread 0 has written"));
  CHECK(violation(64, [] { shared_memory()[thread_index()] = 1; }) == "");
}

TEST_CASE("found: a warp that relies on its lanes going together") {
  const auto exchange = [](bool in_step, int sync) {
    const Shared<int> values = shared_cast<int>(shared_memory());
    values[thread_index()] = 1;
    if (in_step) (void)__shfl_sync(kAllLanes, 0, 0);  // lanes meet, but it says nothing about memory
    if (sync != 0) __syncwarp();
    (void)static_cast<int>(values[thread_index() ^ 1]);
  };
  CHECK(contains(violation(32, [&] { exchange(false, 0); }), "which no thread of the block has written"));
  CHECK(contains(violation(32, [&] { exchange(true, 0); }), "without a __syncwarp"));
  CHECK(violation(32, [&] { exchange(false, 1); }) == "");
  // A warp's barrier orders that warp alone.
  CHECK(contains(violation(64,
                           [] {
                             const Shared<int> values = shared_cast<int>(shared_memory());
                             values[thread_index()] = 1;
                             __syncwarp();
                             if (thread_index() >= 32) (void)static_cast<int>(values[thread_index() - 32]);
                           }),
                 "has written since the block began"));
}

TEST_CASE("found: matrices that are loaded before the warp has met") {
  const auto load = [](bool synchronized) {
    const Shared<uint16_t> rows = shared_cast<uint16_t>(shared_memory());
    for (int i = 0; i < 8; ++i) rows[thread_index() * 8 + i] = 1;
    if (synchronized) __syncwarp();
    uint32_t r[4];
    load_matrices(r, rows + thread_index() * 8);
  };
  CHECK(contains(violation(32, [&] { load(false); }),
                 "has written since the block began, without a __syncwarp"));
  CHECK(violation(32, [&] { load(true); }) == "");
}

TEST_CASE("found: bytes that nobody wrote, in this block or in an earlier one") {
  CHECK(contains(
      violation(32, [] { (void)static_cast<float>(shared_cast<float>(shared_memory())[thread_index()]); }),
      "thread 0: reads byte 0 of shared memory (with 4 from 0), which no thread of the block has written"));
  // Half of a word.
  CHECK(contains(violation(1,
                           [] {
                             shared_cast<uint16_t>(shared_memory())[0] = 1;
                             (void)static_cast<uint32_t>(shared_cast<uint32_t>(shared_memory())[0]);
                           }),
                 "reads byte 2 of shared memory"));
  std::string text;
  const WithOrder forward(Order::Forward);
  try {
    run("two blocks", dim3(2), 1, 16, [] {
      if (blockIdx.x == 0)
        shared_memory()[0] = 1;
      else
        (void)static_cast<int>(shared_memory()[0]);
    });
  } catch (const std::runtime_error& e) {
    text = e.what();
  }
  CHECK(contains(text, "kernel two blocks, block (1, 0, 0), thread 0: reads byte 0"));
}

TEST_CASE("found: accesses outside of the block's memory, and unaligned ones") {
  const auto write_float = [](int64_t i) { shared_cast<float>(shared_memory())[i] = 0.0f; };
  CHECK(violation(1, [&] { write_float(24); }, 100) == "");
  CHECK(contains(
      violation(1, [&] { write_float(25); }, 100), "writes byte 100 of shared memory (with 4 from 100)"));
  CHECK(contains(violation(1, [&] { write_float(25); }, 102), "of which the block has 102 bytes"));
  CHECK(contains(violation(1, [&] { write_float(-1); }, 100), "writes byte -4 "));
  CHECK(contains(violation(1, [] { Shared<float>()[0] = 0.0f; }), "of which the block has"));
  CHECK(contains(violation(1, [] { shared_cast<uint32_t>(shared_memory() + 2)[0] = 1; }),
                 "not a multiple of 4"));
  CHECK(contains(violation(1, [] { shared_cast<uint4>(shared_memory() + 8)[0] = uint4{}; }),
                 "not a multiple of 16"));
  CHECK(contains(violation(32,
                           [] {
                             uint32_t r[4];
                             load_matrices(r, shared_cast<uint16_t>(shared_memory()) + 4);
                           }),
                 "not a multiple of 16"));
  alignas(16) unsigned words[8] = {};
  CHECK(contains(violation(1, [&] { (void)load_once(reinterpret_cast<const uint4*>(words + 1)); }),
                 "not a multiple of 16"));
  CHECK(contains(violation(1, [&] { copy_async(shared_cast<uint4>(shared_memory()), words + 2, true); }),
                 "not a multiple of 16"));
}

TEST_CASE("found: lanes that are missing from what a warp does together") {
  const auto product = [](bool take_part) {
    float c[4] = {};
    const uint32_t a[4] = {};
    if (take_part) mma_bf16(c, a, 0, 0);
  };
  CHECK(violation(64, [&] { product(true); }) == "");
  const std::string text = violation(64, [&] { product(thread_index() != 40); });
  CHECK(contains(text, "thread 32: deadlock: waits for its warp at mma_bf16, test_stand_in.cpp:"));
  CHECK(contains(text, "; 8 have ended or were never there"));
  CHECK(contains(violation(24, [&] { product(true); }), "24, 25, 26, 27, 28, 29, 30, 31 have ended"));

  // Two places of a kernel are two instructions.
  const auto apart = [] {
    float c[4] = {};
    const uint32_t a[4] = {};
    if (thread_index() < 16)
      mma_bf16(c, a, 0, 0);
    else
      mma_bf16(c, a, 0, 0);
  };
  CHECK(contains(violation(32, apart), "wait elsewhere (the first at mma_bf16"));
  CHECK(contains(violation(32,
                           [] {
                             if (thread_index() == 3)
                               __syncwarp();
                             else
                               (void)__shfl_sync(kAllLanes, 1, 0);
                           }),
                 "3 wait elsewhere (the first at __syncwarp"));
  CHECK(contains(violation(32, [] { (void)__shfl_sync(0xffu, 1, 0); }),
                 "a mask that the thread is not part of"));
  CHECK(contains(violation(32,
                           [] {
                             if (thread_index() != 7) (void)__shfl_xor_sync(kAllLanes, 1, 1);
                           }),
                 "thread 6: a shuffle at "));
}

TEST_CASE("found: barriers that not all threads come to") {
  const std::string text = violation(64, [] {
    if (thread_index() == 33)
      __syncwarp();
    else
      __syncthreads();
  });
  CHECK(contains(text, "kernel forbidden, block (0, 0, 0), thread 33: deadlock: "));
  CHECK(contains(text, "wait at __syncthreads"));
  const auto apart = [] {
    if (thread_index() < 32)
      __syncthreads();
    else
      __syncthreads();
  };
  CHECK(contains(violation(64, apart), "but thread 0 at that of test_stand_in.cpp:"));
}

TEST_CASE("found: data that is used before its copy has been waited for") {
  alignas(16) const uint32_t source[4] = {1, 2, 3, 4};
  const auto copy = [&](int groups, bool wait_first, bool barrier) {
    const Shared<uint32_t> to = shared_cast<uint32_t>(shared_memory());
    if (thread_index() == 0) copy_async(shared_cast<uint4>(to), source, true);
    for (int i = 0; i < groups; ++i) copy_commit();
    if (wait_first) copy_wait<1>();
    if (barrier) __syncthreads();
    if (to[2] != 3) stand_in::fail("wrong value");
  };
  CHECK(violation(64, [&] { copy(2, true, true); }) == "");
  const std::string text = violation(64, [&] { copy(2, false, true); });
  CHECK(contains(text,
                 "thread 0: reads byte 8 of shared memory (with 4 from 8), which a copy_async of thread 0"));
  CHECK(contains(text, "not been waited for"));
  CHECK(contains(violation(64, [&] { copy(1, true, true); }),
                 "not been waited for"));  // one may still be pending
  CHECK(contains(violation(64, [&] { copy(0, true, true); }), "not been waited for"));  // never committed
  CHECK(contains(violation(64, [&] { copy(2, true, false); }), "thread 0 has written since the block began"));
  // Another thread may still be reading what a copy replaces.
  CHECK(contains(violation(64,
                           [&] {
                             const Shared<uint4> to = shared_cast<uint4>(shared_memory());
                             if (thread_index() == 0) to[0] = uint4{};
                             __syncthreads();
                             const uint4 old = to[0];
                             if (thread_index() == 63) copy_async(to, &source[old.x], true);
                           }),
                 "thread 63: copies to byte 0 "));
  // The next block knows nothing of a copy that was never waited for.
  CHECK(violation(64, [&] {
          copy_async(shared_cast<uint4>(shared_memory()) + thread_index(), source, true);
        }) == "");
  CHECK(violation(64, [] { shared_memory()[thread_index()] = 1; }) == "");
}

TEST_CASE("found: launches that no chip takes, and what only a kernel may do") {
  const auto launch = [](dim3 grid, int threads, int64_t bytes) {
    run("too much", grid, threads, bytes, [] {});
  };
  CHECK_NOTHROW(launch(dim3(1), 1024, 227 * 1024));
  CHECK_THROWS_AS(launch(dim3(1), 1025, 0), std::runtime_error);
  CHECK_THROWS_AS(launch(dim3(0), 32, 0), std::runtime_error);
  CHECK_THROWS_AS(launch(dim3(1, 65536), 32, 0), std::runtime_error);
  CHECK_THROWS_AS(launch(dim3(1), 32, 227 * 1024 + 1), std::runtime_error);
  CHECK_THROWS_AS(shared_memory()[0] = 1, std::runtime_error);
  CHECK_THROWS_AS(__syncthreads(), std::runtime_error);
  CHECK(contains(violation(1, [] { stand_in::run("inner", dim3(1), 1, 0, [] {}); }),
                 "a launch within a kernel"));
}

TEST_CASE("after a violation the next launch finds everything as at first") {
  for (int round = 0; round < 20; ++round) {
    CHECK(violation(256, [&] {
            const Shared<float> values = shared_cast<float>(shared_memory());
            for (int i = 0; i < 100; ++i) {
              values[thread_index()] = 1.0f;
              __syncthreads();
              if (i == round && thread_index() == 100 + round) throw std::runtime_error("of the kernel");
              (void)__shfl_xor_sync(kAllLanes, 1.0f, 1);
            }
          }) == "of the kernel");
    std::vector<float> x(256, 1.0f), out(1);
    run("sum_block", dim3(1), 256, 1024, [&] { sum_block(x.data(), out.data()); });
    CHECK(out[0] == 256.0f);
  }
}

TEST_CASE("blocks and threads run backwards where that is chosen") {
  for (const Order chosen : {Order::Forward, Order::Backward}) {
    const WithOrder order(chosen);
    std::vector<int> seen;
    run("note", dim3(2), 40, 0,
        [&] { seen.push_back(static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x)); });
    CHECK(seen.size() == 80);
    if (chosen == Order::Backward) std::reverse(seen.begin(), seen.end());
    CHECK(std::is_sorted(seen.begin(), seen.end()));
  }
}

TEST_CASE("host threads launch beside each other") {
  std::vector<std::thread> threads;
  std::array<float, 4> sums{};
  for (size_t i = 0; i < sums.size(); ++i)
    threads.emplace_back([&, i] {
      std::vector<float> x(128, static_cast<float>(i)), out(1);
      for (int round = 0; round < 20; ++round) {
        run("sum_block", dim3(1), 128, 512, [&] { sum_block(x.data(), out.data()); });
        sums[i] += out[0];
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < sums.size(); ++i) CHECK(sums[i] == 20.0f * 128.0f * static_cast<float>(i));
}

// --- the runtime's calls -----------------------------------------------------------------------------------

TEST_CASE("device memory is aligned, poisoned, counted and limited") {
  const int64_t before = stand_in::memory_in_use();
  uint8_t *a = nullptr, *b = nullptr;
  REQUIRE(cudaMalloc(&a, 1000) == cudaSuccess);
  CHECK(reinterpret_cast<uintptr_t>(a) % 256 == 0);
  CHECK(std::all_of(a, a + 1000, [](uint8_t byte) { return byte == 0xcd; }));
  CHECK(stand_in::memory_in_use() == before + 1000);
  size_t free = 0, total = 0;
  stand_in::set_memory(before + 1500);
  CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess);
  CHECK(free == 500);
  CHECK(cudaMalloc(&b, 501) == cudaErrorMemoryAllocation);
  CHECK(b == nullptr);
  CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(cudaMalloc(&b, 500) == cudaSuccess);
  CHECK(cudaFree(a) == cudaSuccess);
  CHECK(cudaFree(b) == cudaSuccess);
  CHECK(cudaFree(nullptr) == cudaSuccess);
  int on_host = 0;
  CHECK(cudaFree(&on_host) == cudaErrorInvalidValue);
  (void)cudaGetLastError();
  stand_in::set_memory(int64_t{16} << 30);
  CHECK(stand_in::memory_in_use() == before);

  const int64_t pinned = stand_in::pinned_in_use();
  REQUIRE(cudaMallocHost(&a, 100) == cudaSuccess);
  CHECK(stand_in::pinned_in_use() == pinned + 100);
  CHECK(cudaFreeHost(a) == cudaSuccess);
  CHECK(stand_in::pinned_in_use() == pinned);
}

TEST_CASE("there is one device, and what it says of itself") {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return;  // chosen by the environment
  cudaDeviceProp properties;
  REQUIRE(cudaGetDeviceProperties(&properties, 0) == cudaSuccess);
  CHECK(std::string(properties.name) == "stand-in");
  CHECK(properties.major == 8);
  CHECK(properties.multiProcessorCount == 4);
  CHECK(cudaSetDevice(0) == cudaSuccess);
  CHECK(cudaSetDevice(count) == cudaErrorInvalidDevice);
  (void)cudaGetLastError();
}

struct Stream {
  Stream() { REQUIRE(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess); }
  ~Stream() { (void)cudaStreamDestroy(stream); }
  cudaStream_t stream = nullptr;
};

TEST_CASE("a graph does again what was captured, with the arguments of then") {
  const WithDeferred immediately(false);
  const Stream s;
  int value = 0, copied = 0, step = 2;
  int* counter = &value;
  REQUIRE(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  stand_in::run("add", dim3(3), 1, 0, [counter, step] { atomicAdd(counter, step); });
  CHECK(cudaMemcpyAsync(&copied, &value, sizeof value, cudaMemcpyDefault, s.stream) == cudaSuccess);
  step = 1000;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  REQUIRE(cudaStreamEndCapture(s.stream, &graph) == cudaSuccess);
  CHECK(value == 0);
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
  CHECK(cudaGraphDestroy(graph) == cudaSuccess);
  for (int round = 1; round <= 3; ++round) {
    CHECK(cudaGraphLaunch(executable, s.stream) == cudaSuccess);
    CHECK(value == 6 * round);
    CHECK(copied == value);
  }
  CHECK(cudaGraphExecDestroy(executable) == cudaSuccess);
}

TEST_CASE("waiting and allocating spoil a capture") {
  const Stream s;
  cudaGraph_t graph = nullptr;
  REQUIRE(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  CHECK(cudaStreamSynchronize(s.stream) == cudaErrorStreamCaptureUnsupported);
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, 16) == cudaErrorStreamCaptureUnsupported);
  CHECK(cudaStreamEndCapture(s.stream, &graph) == cudaErrorStreamCaptureInvalidated);
  CHECK(graph == nullptr);
  (void)cudaGetLastError();
  CHECK(cudaStreamSynchronize(s.stream) == cudaSuccess);
}

TEST_CASE("deferred work happens when the host waits for it, and no earlier") {
  const Stream s;
  cudaEvent_t event = nullptr;
  REQUIRE(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
  int value = 0, copied = -1;
  const WithDeferred late(true);
  stand_in::run("set", dim3(1), 1, 0, [&] { value = 1; });
  CHECK(cudaEventRecord(event, s.stream) == cudaSuccess);
  CHECK(cudaMemcpyAsync(&copied, &value, sizeof value, cudaMemcpyDefault, s.stream) == cudaSuccess);
  CHECK(value == 0);
  CHECK(cudaEventSynchronize(event) == cudaSuccess);
  CHECK(value == 1);
  CHECK(copied == -1);
  CHECK(cudaStreamSynchronize(s.stream) == cudaSuccess);
  CHECK(copied == 1);

  stand_in::run("wrong", dim3(1), 1, 0, [] { shared_memory()[0] = 1; });
  stand_in::run("set", dim3(1), 1, 0, [&] { value = 2; });
  CHECK_THROWS_AS((void)cudaStreamSynchronize(s.stream), std::runtime_error);
  CHECK(cudaStreamSynchronize(s.stream) == cudaSuccess);
  CHECK(value == 1);
  CHECK(cudaEventDestroy(event) == cudaSuccess);
}

}  // namespace
}  // namespace qwen2vl::cuda
