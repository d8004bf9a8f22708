#pragma once

#include <algorithm>
#include <initializer_list>
#include <string_view>
#include <vector>

#include "cpu/context.h"
#include "model/weights.h"

namespace qwen2vl::cpu {

/// What becomes of a quantized layer's input rows in the fast precision: the one choice of what its products
/// lose and cost (docs/decisions/0011, 0016, 0023).
enum class Inputs {
  Groups,  ///< 8 bits per 256 columns of a prompt's rows, and the weights requantized: 8e-5 of the energy
  Blocks,  ///< 8 bits per 32 columns: 2e-5, a fifth more time
  Fine,    ///< 16 bits, as two rows of 8: 1e-9, twice the products; of one row, the weights are read once
};

/// One or several Linear layers over the same input, repacked for the kernels and run as one matmul whose
/// outputs stand side by side: q, k, v; gate, up.
struct PackedLinear {
  struct Part {
    PanelMatrix matrix;
    int64_t column = 0;  ///< of its first output in a row of the result
    AlignedBuffer storage;
    Inputs inputs = Inputs::Groups;
  };
  std::string_view name;  ///< of the stage in a profile
  std::vector<Part> parts;
  int64_t in_features = 0;
  int64_t out_features = 0;
  Vector bias;                           ///< [out_features], or empty
  std::vector<int32_t> outlier_columns;  ///< of every row, whatever their values

  bool has(Inputs inputs) const;
  int64_t weight_bytes() const;
  const float* bias_of(const Part& part) const { return bias.empty() ? nullptr : bias.data() + part.column; }
};

/// A layer to pack, and how its inputs are taken where its weights have 8 bits. Others lose more themselves:
/// Groups.
struct LayerSource {
  LayerSource(const LinearWeights* layer, Inputs inputs_of_8_bits = Inputs::Groups);
  const LinearWeights* layer;
  Inputs inputs;
};

/// Reads and repacks, in parallel. `name` is a literal; `norm`: what the layer's rows come out of.
PackedLinear pack_linear(std::string_view name, std::initializer_list<LayerSource> layers, Context& ctx,
                         const NormWeights* norm = nullptr);
/// A matrix without bias (embedding, head).
PackedLinear pack_matrix(std::string_view name, const MatrixView& matrix, Context& ctx,
                         Inputs inputs = Inputs::Groups);

/// A layer's input: rows of float32. What becomes of a row depends on it alone and on whether it is one of
/// the decoded.
struct Rows {
  const float* data = nullptr;
  int64_t rows = 0;
  int64_t stride = 0;
  int64_t decoded = 0;  ///< so many of the rows, the first: of tokens that were drawn, one at a time

  Rows first(int64_t n) const { return {data, n, stride, std::min(n, decoded)}; }
  Rows after(int64_t n) const {
    return {data + n * stride, rows - n, stride, std::max<int64_t>(0, decoded - n)};
  }
};

/// A vector near a layer's input rows and what the layer makes of it: rows less the mean are smaller and lose
/// less in 8 bits, and layer(x) = weight (x - mean) + layer(mean).
struct Center {
  Vector mean;    ///< [in_features]; empty: rows are taken as they are
  Vector output;  ///< [out_features], bias included
};

/// Of the mean of the rows, which then serves any rows; empty where they do not go through
/// KernelTable::matmul_groups.
Center center_of(Context& ctx, const PackedLinear& layer, const Rows& x);

/// out[m][n] (=, +=) x[m] . weight[n] + bias[n] for every row and output feature.
void linear(Context& ctx, const PackedLinear& layer, const Rows& x, float* out, int64_t out_stride,
            Store store, const Center& center = {});

/// out[m][n] = silu(x[m] . gate[n]) * (x[m] . up[n]), out [rows][features]; the layer's two parts are gate
/// and up (SwiGLU, arXiv 2002.05202), each multiplied where it is still in cache. Returns `out`, as the next
/// layer's input.
Rows linear_swiglu(Context& ctx, const PackedLinear& gate_up, const Rows& x, float* out);

}  // namespace qwen2vl::cpu
