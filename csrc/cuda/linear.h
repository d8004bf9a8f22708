#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/context.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/packed.cuh"
#include "model/backend_abi.h"
#include "quant/block_types.h"

namespace qwen2vl::cuda {

/// A feature of a layer: a row of one of its matrices with that row's bias; a null matrix is a feature of
/// zeros.
struct Feature {
  const qwen2vl_linear* linear = nullptr;
  int64_t row = 0;
};
using Pairs = std::vector<std::pair<Feature, Feature>>;

/// Features 2 p and 2 p + 1 of one matrix, the last one alone where their number is odd.
Pairs neighbouring(const qwen2vl_linear& linear);
/// Feature i of one and of the other: gate and up.
Pairs side_by_side(const qwen2vl_linear& a, const qwen2vl_linear& b);
/// Dimensions i and half + i of every head, each head filled up to whole tiles.
void append_heads(Pairs& pairs, const qwen2vl_linear& linear, int64_t heads, int64_t head_dim);
int64_t pairs_per_head(int64_t head_dim);

/// Linear layers over the same input, packed for the fast kernels.
struct PackedLinear {
  const char* name = "";
  std::vector<PackedMatrix> parts;  ///< one a stored type
  int64_t rows = 0, cols = 0;       ///< what they were: features, inputs
  int64_t stride = 0;               ///< of an input row: cols filled up to whole units
  int64_t bytes = 0;                ///< of the weights
  const float2* bias = nullptr;     ///< a pair each, or null

  Work work(int64_t n) const;
};

/// Of a matrix alone, in tiles.
int64_t packed_bytes(const qwen2vl_matrix& matrix);

/// What packing needs meanwhile.
struct PackingBuffers {
  DeviceBuffer raw, addresses;
};
PackedLinear pack(Context& ctx, const char* name, const Pairs& pairs, PackingBuffers& buffers);

/// A linear layer as its file has it, for the plain kernels.
struct StoredLinear {
  const char* name = "";
  DType type = DType::F32;
  const uint8_t* weight = nullptr;
  int64_t row_bytes = 0, rows = 0, cols = 0;
  const float* bias = nullptr;
};
StoredLinear store(Context& ctx, const char* name, const qwen2vl_linear& linear);

/// Numbers for the life of the context.
const float* store_floats(Context& ctx, const float* values, int64_t n);

/// y = x W^T for a few rows of bf16 [rows][stride], or of RMSNorm(x) (kNormedRows at most).
struct FewInput {
  const uint16_t* half = nullptr;
  const float* x = nullptr;
  const float* norm = nullptr;
  float eps = 0;
};
void few_rows_linear(Context& ctx, const PackedLinear& linear, const FewInput& input, int64_t rows,
                     Finish finish, Epilogue epilogue);

/// The same for any number of rows of bf16; `expanded` takes the weights as bf16.
void many_rows_linear(Context& ctx, const PackedLinear& linear, const uint16_t* x, int64_t rows,
                      Finish finish, Epilogue epilogue, DeviceBuffer& expanded);

/// RMSNorm, or LayerNorm where there is a bias, of rows of float32 [rows][width] to bf16 or float32
/// [rows][stride].
struct Norm;
void norm(Context& ctx, const char* name, const Norm& p);

void plain_linear_rows(Context& ctx, const StoredLinear& linear, const float* x, int64_t x_stride,
                       int64_t rows, float* out, int64_t stride, bool accumulate);

}  // namespace qwen2vl::cuda
