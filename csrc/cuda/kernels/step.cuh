#pragma once

// What frames a step of the language model: embeddings and rotations of the rows before it, the likeliest
// token after it. A step that greedy decoding goes on with finds everything it needs on the device: the last
// kernel writes the token, its cell and its position where the next step's first kernel reads them.

#include "cuda/chip.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/pack.cuh"

namespace qwen2vl::cuda {

struct Embed {
  PackedMatrix embed_tokens;
  const uint8_t* stored_rows;  ///< exact: as in the file
  int64_t stored_row_bytes;
  const RowInfo* rows;
  const float* inv_freq;  ///< [half]
  int32_t section_ends[3];
  int32_t half, hidden;
  float* x;         ///< [rows][hidden]
  float* rotation;  ///< [rows][cos: half | sin: half]
};

inline constexpr int kEmbedParts = 8, kEmbedThreads = 128;

/// Grid: (rows, kEmbedParts). The first mrope_section[0] frequencies turn with the time index, the next with
/// the row, the last with the column (apply_multimodal_rotary_pos_emb). kStored: T is the file's type.
template <DType T, bool kStored>
CHIP_KERNEL void CHIP_BOUNDS(kEmbedThreads, 4) embed_rows(Embed p) {
  let_next_launch_start();
  wait_for_previous_launch();
  const int64_t row = blockIdx.x;
  const RowInfo& info = p.rows[row];
  const int first = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  const int step = static_cast<int>(gridDim.y * blockDim.x);
  float* x = p.x + row * p.hidden;
  if (info.embedding != nullptr) {
    for (int i = first; i < p.hidden; i += step) x[i] = info.embedding[i];
  } else if constexpr (kStored) {
    const uint8_t* stored = p.stored_rows + info.token * p.stored_row_bytes;
    for (int64_t piece = first; piece * RowPiece<T>::kColumns < p.hidden; piece += step)
      values_of<T>(stored, p.hidden, piece, [&](int64_t k, float value) { x[k] = value; });
  } else {
    for (int i = first; i < p.hidden; i += step) x[i] = packed_value<T>(p.embed_tokens, info.token, i);
  }
  for (int i = first; i < p.half; i += step) {
    const int axis = i < p.section_ends[0] ? 0 : i < p.section_ends[1] ? 1 : 2;
    const float angle = static_cast<float>(info.position[axis]) * p.inv_freq[i];
    p.rotation[row * 2 * p.half + i] = cosf(angle);
    p.rotation[row * 2 * p.half + p.half + i] = sinf(angle);
  }
}

/// The place of the largest of some logits, the first of equal ones; -1 where none is finite and above all
/// -inf.
struct Likeliest {
  float logit;
  int32_t token;
};

CHIP_DEVICE Likeliest better(Likeliest a, Likeliest b) {
  // NaN never wins: comparisons with it are false.
  return b.token >= 0 && (a.token < 0 || b.logit > a.logit || (b.logit == a.logit && b.token < a.token)) ? b
                                                                                                         : a;
}

inline constexpr int kLikeliestThreads = 256;

struct FindLikeliest {
  const float* logits;  ///< [rows][vocab]
  int64_t vocab;
  Likeliest* parts;   ///< [rows][gridDim.x]
  uint32_t* arrived;  ///< [rows], zero before and after
  int32_t* tokens;    ///< [rows], where the host reads them
  RowInfo* rows;      ///< advanced by the token, or null
};

CHIP_DEVICE Likeliest block_likeliest(Likeliest best, Shared<float> logits, Shared<int32_t> tokens) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    Likeliest other;
    other.logit = __shfl_xor_sync(kAllLanes, best.logit, mask);
    other.token = __shfl_xor_sync(kAllLanes, best.token, mask);
    best = better(best, other);
  }
  if (lane == 0) {
    logits[warp] = best.logit;
    tokens[warp] = best.token;
  }
  __syncthreads();
  best = {0, -1};
  for (int w = 0; w < kLikeliestThreads / 32; ++w) best = better(best, {logits[w], tokens[w]});
  return best;
}

/// Grid: (parts, rows). The last block of a row to arrive goes over the parts.
CHIP_KERNEL void CHIP_BOUNDS(256, 4) find_likeliest(FindLikeliest p) {
  const Shared<float> logits = shared_cast<float>(shared_memory());
  const Shared<int32_t> tokens = shared_cast<int32_t>(shared_memory() + 32);
  const Shared<uint32_t> last = shared_cast<uint32_t>(shared_memory() + 64);
  const int64_t row = blockIdx.y;
  const int parts = static_cast<int>(gridDim.x), thread = static_cast<int>(threadIdx.x);
  let_next_launch_start();
  wait_for_previous_launch();

  const float* from = p.logits + row * p.vocab;
  Likeliest best{0, -1};
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kLikeliestThreads + thread; i < p.vocab;
       i += static_cast<int64_t>(parts) * kLikeliestThreads) {
    const float logit = from[i];
    if (logit == logit) best = better(best, {logit, static_cast<int32_t>(i)});
  }
  best = block_likeliest(best, logits, tokens);
  if (thread == 0) {
    p.parts[row * parts + static_cast<int64_t>(blockIdx.x)] = best;
    __threadfence();
    last[0] = atomicAdd(p.arrived + row, 1u) + 1 == static_cast<uint32_t>(parts) ? 1u : 0u;
  }
  __syncthreads();
  if (last[0] == 0) return;
  __threadfence();
  best = {0, -1};
  for (int i = thread; i < parts; i += kLikeliestThreads) {
    const volatile Likeliest* part = p.parts + row * parts + i;
    best = better(best, {part->logit, part->token});
  }
  __syncthreads();
  best = block_likeliest(best, logits, tokens);
  if (thread != 0) return;
  p.arrived[row] = 0;
  const bool finite = best.token >= 0 && best.logit - best.logit == 0.0f;
  p.tokens[row] = finite ? best.token : -1;
  if (p.rows == nullptr) return;
  RowInfo& info = p.rows[row];
  info.token = finite ? best.token : 0;
  info.embedding = nullptr;
  info.cell += 1;
  for (int axis = 0; axis < 3; ++axis) info.position[axis] += 1;
}

/// float32 [rows][width] -> bf16 [rows][stride]; the stride is even.
struct ToBf16 {
  const float* from;
  int64_t width;
  uint16_t* to;
  int64_t stride;
};

/// A block a row.
CHIP_KERNEL void CHIP_BOUNDS(256, 4) rows_to_bf16(ToBf16 p) {
  const int64_t row = blockIdx.x;
  const float* from = p.from + row * p.width;
  for (int64_t i = 2 * static_cast<int64_t>(threadIdx.x); i < p.width;
       i += 2 * static_cast<int64_t>(blockDim.x))
    *reinterpret_cast<uint32_t*>(p.to + row * p.stride + i) =
        pack_bf16(from[i], i + 1 < p.width ? from[i + 1] : 0.0f);
}

/// Reads memory and does nothing with it: what reading weights takes at least.
CHIP_KERNEL void read_memory(const uint4* from, int64_t vectors, uint32_t* never) {
  uint32_t sink = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * step < vectors; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = load_once(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 4; ++j) sink ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < vectors; i += step) {
    const uint4 v = load_once(from + i);
    sink ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sink == 0x9e3779b9u && vectors < 0) *never = sink;
}

}  // namespace qwen2vl::cuda
