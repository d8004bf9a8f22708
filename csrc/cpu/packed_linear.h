#pragma once

#include <initializer_list>
#include <span>
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
  Fine,    ///< 16 bits, as two planes of 8: 1e-9, twice the products, the weights read once
};

struct PackedMatrix {
  PanelMatrix matrix;  ///< of no rows: there is none
  AlignedBuffer storage;
};

/// What an update adds to a part: its columns of x A^T, times B^T. In the fast precision the factors are f16,
/// which loses 2^-11 of the update.
struct PartUpdate {
  PackedMatrix up;     ///< B [rows of the part, rank]
  int64_t column = 0;  ///< its first of x A^T
};

/// One or several Linear layers over the same input, repacked for the kernels and run as one matmul whose
/// outputs stand side by side: q, k, v; gate, up.
struct PackedLinear {
  struct Part {
    PanelMatrix matrix;
    int64_t column = 0;  ///< of its first output in a row of the result
    AlignedBuffer storage;
    Inputs inputs = Inputs::Groups;
    PartUpdate update = {};
  };
  std::string_view name;  ///< of the stage in a profile
  std::vector<Part> parts;
  int64_t in_features = 0;
  int64_t out_features = 0;
  Vector bias;                           ///< [out_features], or empty
  std::vector<int32_t> outlier_columns;  ///< of every row, whatever their values
  PackedMatrix down;                     ///< of its updates the factors A of all parts [ranks, in_features]

  bool has(Inputs inputs) const;
  std::vector<std::span<const uint8_t>> storage() const;  ///< of all its matrices
  int64_t weight_bytes() const;
  const float* bias_of(const Part& part) const { return bias.empty() ? nullptr : bias.data() + part.column; }
};

/// How a layer's inputs are taken where its weights have 8, 6 and 5 bits: the more bits, the less they
/// lose themselves (docs/decisions/0043). With fewer it is Groups.
struct InputsByBits {
  Inputs of_8 = Inputs::Groups, of_6 = Inputs::Groups, of_5 = Inputs::Groups;

  Inputs of(int bits) const {
    return bits >= 8 ? of_8 : bits == 6 ? of_6 : bits == 5 ? of_5 : Inputs::Groups;
  }
};

struct LayerSource {
  LayerSource(const LinearWeights* weights, InputsByBits inputs_ = {}) : layer(weights), inputs(inputs_) {}
  const LinearWeights* layer;
  InputsByBits inputs;
};

/// Reads and repacks, in parallel. `name` is a literal; `norm`: what the layer's rows come out of. Inputs are
/// those of the layers' fewest bits, since all share them.
PackedLinear pack_linear(std::string_view name, std::initializer_list<LayerSource> layers, Context& ctx,
                         const NormWeights* norm = nullptr);
/// A matrix without bias (patch embedding, head).
PackedLinear pack_matrix(std::string_view name, const MatrixView& matrix, Context& ctx,
                         Inputs inputs = Inputs::Groups, const LowRankUpdate& update = {});

}  // namespace qwen2vl::cpu
