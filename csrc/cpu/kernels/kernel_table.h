#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "cpu/panel_matrix.h"

namespace qwen2vl::cpu {

/// Activations quantized to 8 bits per row and block of 32: x[m][k] = scales[m][k / 32] * values[m][k], with
/// scale = max|x| / 127 of the block and values = round-to-nearest-even(x / scale). A block of zeros has
/// scale 0. Or to 16 bits, as two planes of 8: x = scale * (values[0] + values[1] / 256), the second what the
/// first has rounded off, at most 127 / 256.
struct QuantizedRows {
  int64_t rows = 0;
  int64_t cols = 0;                  ///< a multiple of 32
  int planes = 1;                    ///< or 2; the first alone is the rows in 8 bits
  int8_t* values = nullptr;          ///< [planes][rows][cols], 64-byte aligned
  float* scales = nullptr;           ///< [rows][cols / 32]
  int32_t* corrections32 = nullptr;  ///< [planes][rows][cols / 32]: -128 * sum of the block's values
  int32_t* corrections16 = nullptr;  ///< [planes][rows][cols / 16]: the same per half block (for parts of 16)
};

/// Columns that share a scale in GroupedRows.
inline constexpr int64_t kGroupColumns = 256;
inline constexpr int64_t kGroupBlocks = kGroupColumns / kBlock32;
/// Rows of one call of matmul_groups, at most.
inline constexpr int64_t kMaxGroupedRows = 512;

/// How matmul_groups gives a group of a row's weights one scale, so that its products with a row's group are
/// one exact integer: the choice of the kernel table, as its products add up in 32 bits or in 16.
enum class GroupRule {
  /// The values are requantized to 8 bits. The group's scale is
  ///   largest |scale| in it * 128 / 127 / 2^s,   s = 8 - the format's bits, 0 of signed values,
  /// and the values (q * 2^s * m + 2^14) >> 15 with m = round(scale * kGroupMultiplier / largest), where
  /// x = scale * q. Where the format has minima (x = scale * q - minimum), largest is that of |minimum| and
  /// |scale * (2^bits - 1) - minimum|, the scale largest / 127 and the values (q * m + 2^7 - n) >> 8 with m
  /// and n round(127 * 256 / largest * scale or minimum).
  Bytes,
  /// The values stay; the parts' scales become integers, round(scale * (limit / largest)) of the group's
  /// largest |scale| and limit = largest_group_scale, and the group's scale is largest / limit. Where the
  /// format has minima, x = scale * (q - 2^(bits - 1)) + middle, and the middles become integers likewise, up
  /// to 2^15 - 1, with a scale of their own.
  Scales,
};

/// The limit of GroupRule::Scales: a group's sum fits 32 bits, a scale 16.
constexpr int32_t largest_group_scale(const QuantFormat& format) {
  const int64_t values = int64_t{1} << ((format.is_signed() ? 8 : format.bits()) - 1);
  return static_cast<int32_t>(std::min<int64_t>(INT32_MAX / (kGroupColumns * 127 * values), INT16_MAX));
}

/// A row's sums in GroupedRows: of 16 columns each, then of 32.
inline constexpr int64_t kGroupSums = kGroupColumns / 16 + kGroupBlocks;

/// Many rows' activations, quantized to 8 bits as QuantizedRows are but per row and group of 256 columns, and
/// stored group by group.
struct GroupedRows {
  GroupRule rule = GroupRule::Bytes;
  int64_t rows = 0;
  int64_t cols = 0;                ///< a multiple of 32; the last group may be shorter
  int8_t* values = nullptr;        ///< [groups][rows][256], 64-byte aligned; of Scales unsigned, 128 more
  float* scales = nullptr;         ///< [groups][rows]
  int32_t* corrections = nullptr;  ///< of Bytes: [groups][rows]: -128 * sum of the group's values
  int16_t* sums = nullptr;         ///< of Scales: [groups][rows][kGroupSums], of the values less their 128

  int64_t groups() const { return (cols + kGroupColumns - 1) / kGroupColumns; }
  /// Of group g.
  int64_t columns(int64_t g) const {
    const int64_t left = cols - g * kGroupColumns;
    return left < kGroupColumns ? left : kGroupColumns;
  }
};

/// GroupRule::Bytes' largest multiplier: 2^15 * 127 / 128, so that -128 times it is still above -2^7 2^15.
inline constexpr float kGroupMultiplier = 32511;

/// Of the integer attention (below). Keys of one call of softmax_steps_*, at most, and of a piece of them.
inline constexpr int64_t kIntegerKeys = 512;
inline constexpr int64_t kPieceKeys = 128;
/// The largest integers of 16 bits that probabilities and values become: kPieceKeys products fit 32 bits.
inline constexpr int32_t kLargest16 = 4095;
/// Rows of integers have room for a multiple of so many.
inline constexpr int64_t kIntegerRoom = 64;

enum class Store { Overwrite, Accumulate };

/// Where a matmul puts its result: data[m * stride + n] (=, +=) sum + bias[n].
struct MatmulOutput {
  float* data = nullptr;
  int64_t stride = 0;
  const float* bias = nullptr;  ///< [n], or nullptr
  Store store = Store::Overwrite;
};

/// What one call of a quantized matmul multiplies: panels of the weights with rows of the activations.
struct MatmulTask {
  int64_t panel_begin, panel_end, row_begin, row_end;

  int64_t panels() const { return panel_end - panel_begin; }
  int64_t rows() const { return row_end - row_begin; }
};

/// Loops that do nothing but the most that one core can do with an instruction set (peaks.cpp): ceilings to
/// measure kernels against. The arithmetic ones go `iterations` rounds and return how many operations (a
/// multiply and an add are two) they did.
struct PeakLoops {
  double (*int8_dot)(int64_t iterations);
  double (*float_dot)(int64_t iterations);  ///< bf16 products where the set has them, else fp32
  double (*fp32_fma)(int64_t iterations);
  /// Reads `bytes` (a multiple of 4096); the result depends on all of them.
  uint64_t (*read)(const uint8_t* data, size_t bytes);
};

/// One instruction set's kernels. Nothing here allocates, throws or starts a thread; the caller splits the
/// work. Matrices are row-major; strides count elements. Pointers need no alignment unless said.
struct KernelTable {
  std::string_view isa;
  /// Of the quantized panels that it is given.
  PanelLayout layout = {};

  // --- quantized matmul ---

  /// x [rows, cols], row stride x_stride -> rows row_begin.. of `out`, all its planes.
  void (*quantize_rows)(const float* x, int64_t x_stride, int64_t rows, const QuantizedRows& out,
                        int64_t row_begin);

  /// out[m][n] for the task's rows m and the n of its panels, with activations of 8 or 16 bits. The planes'
  /// integer sums are added before they become floats.
  /// `w` is quantized. `scratch`: 64-byte aligned, matmul_scratch_bytes(w.cols), the caller's thread's own
  /// (only the plain kernels use it). Only columns below w.rows are written.
  void (*matmul_q8)(const PanelMatrix& w, const QuantizedRows& x, const MatmulTask& task,
                    const MatmulOutput& out, std::byte* scratch);

  // --- quantized matmul of many rows ---

  /// Whether matmul_groups is faster than matmul_q8 for many rows here.
  bool has_grouped_matmul = false;
  /// What GroupedRows::rule is to be. The generic kernels have both.
  GroupRule group_rule = GroupRule::Bytes;
  /// As quantize_rows.
  void (*quantize_groups)(const float* x, int64_t x_stride, int64_t rows, const GroupedRows& out,
                          int64_t row_begin);
  /// As matmul_q8, with the weights as group_rule (and x.rule) says. Products within a group are exact
  /// integers and only groups cost float arithmetic; they are added as fma(sum, w_scale * x_scale, total), in
  /// order, and after each the sum of its middles likewise: the same bits on every set with that rule.
  /// `scratch`: matmul_scratch_bytes. The task has at most kMaxGroupedRows rows.
  void (*matmul_groups)(const PanelMatrix& w, const GroupedRows& x, const MatmulTask& task,
                        const MatmulOutput& out, std::byte* scratch);

  // --- float32 matmul ---

  /// Panel `panel` of any matrix as float32 [cols][16] (64-byte aligned).
  void (*unpack_panel)(const PanelMatrix& w, int64_t panel, float* out);
  /// Columns `columns[0..n)` of panel `panel` of a quantized matrix as float32 [n][16].
  void (*unpack_columns)(const PanelMatrix& w, int64_t panel, const int32_t* columns, int64_t n, float* out);

  /// out[m][n] (m < rows, n < n_cols) = sum over k of a[m * a_stride + k] * b[n / 16][k][n % 16], with panels
  /// `b` of `panel_stride` elements each (at least 16 * depth) in float32, f16 or bf16. float32 FMA, the k in
  /// order. n_cols need not be a multiple of 16; the last panel is readable in full. `a` is float32.
  /// The attention of both towers is made of these: keys and values are kept in panels.
  void (*gemm_f32)(const float* a, int64_t a_stride, const float* b, int64_t panel_stride, int64_t rows,
                   int64_t n_cols, int64_t depth, const MatmulOutput& out);
  void (*gemm_f16)(const float* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride, int64_t rows,
                   int64_t n_cols, int64_t depth, const MatmulOutput& out);
  void (*gemm_bf16)(const float* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride, int64_t rows,
                    int64_t n_cols, int64_t depth, const MatmulOutput& out);
  /// gemm_f16 that meanwhile fetches into the cache what lies at `ahead` as `b`'s panels lie at `b` (`b`
  /// itself where nothing follows): for few rows, whose products wait for memory.
  void (*gemm_f16_ahead)(const float* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride,
                         int64_t rows, int64_t n_cols, int64_t depth, const MatmulOutput& out,
                         const uint16_t* ahead);

  // --- bf16 matmul ---

  /// Whether gemm_bf16_pairs is faster than gemm_f32 here: then the fast precision's attention of text runs
  /// on it.
  bool has_bf16_dot = false;
  /// As gemm_f32 with both sides in bf16 and float32 sums: a [rows][depth], panels [depth / 2][16][2] with
  /// two consecutive k side by side. depth and a_stride are even, `a` is aligned to 4 bytes.
  void (*gemm_bf16_pairs)(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t panel_stride,
                          int64_t rows, int64_t n_cols, int64_t depth, const MatmulOutput& out);
  /// softmax_step (below) for every row of scores [rows][stride], n of each, with the exponentials to
  /// out [rows][out_stride] in bf16 instead of back to the scores, and what it returns to factors [rows]. The
  /// exponentials are within 2^-13 of the exact ones before that rounding, which is 2^-8 at most. scale > 0,
  /// scores are finite.
  void (*softmax_steps_bf16)(const float* scores, int64_t stride, int64_t rows, int64_t n, float scale,
                             float* maxima, float* sums, float* factors, uint16_t* out, int64_t out_stride);
  /// A panel [depth][16] in f16 to pairs [ceil(depth / 2)][16][2] in bf16, rounded to nearest even; an odd
  /// depth's last pair ends in zeros.
  void (*pair_f16_panel)(const uint16_t* panel, int64_t depth, uint16_t* out);
  /// Rounds to nearest even.
  void (*convert_f32_to_bf16)(const float* x, uint16_t* out, int64_t n);

  // --- integer matmul: the tower's attention ---

  /// Whether gemm_i16 is faster than gemm_f32 here: then the fast precision's attention of the tower runs on
  /// it; and whether gemm_u8_i8 is faster still: then so do values and probabilities of quantized towers.
  bool has_i16_dot = false;
  bool has_u8_dot = false;
  /// out[m][n] (=, +=) scales[m] * sum over k of a[m * a_stride + k] * b[n / 16][k / run][n % 16][k % run],
  /// where run is the k in 4 bytes. depth is a multiple of it; the integer sums fit 32 bits. The panels are
  /// readable in full. Adding is one fma: the same bits on every set.
  void (*gemm_i16)(const int16_t* a, int64_t a_stride, const int16_t* b, int64_t panel_stride, int64_t rows,
                   int64_t n_cols, int64_t depth, const float* scales, const MatmulOutput& out);
  void (*gemm_u8_i8)(const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t panel_stride, int64_t rows,
                     int64_t n_cols, int64_t depth, const float* scales, const MatmulOutput& out);
  /// A step of streaming softmax, as softmax_step's, to the base 2 and with rounded results, for every row of
  /// scores [rows][stride], n <= kIntegerKeys of each: a piece of kPieceKeys becomes
  ///   out = round(largest * 2^(score - the piece's maximum)),   largest 255 or kLargest16,
  /// which stands for out * scales[piece * scales_stride + row] beside the row's new maximum. `sums` add up
  /// what the rounded ones stand for. Before rounding they are within 2^-13 of the exact ones. Scores and out
  /// have room for n rounded up to kIntegerRoom, whose out becomes 0.
  void (*softmax_steps_u8)(float* scores, int64_t stride, int64_t rows, int64_t n, float* maxima, float* sums,
                           float* factors, uint8_t* out, int64_t out_stride, float* scales,
                           int64_t scales_stride);
  void (*softmax_steps_i16)(float* scores, int64_t stride, int64_t rows, int64_t n, float* maxima,
                            float* sums, float* factors, int16_t* out, int64_t out_stride, float* scales,
                            int64_t scales_stride);
  /// out = round(x * factors / unit), where `largest` * unit is the largest |x * factors|; returns the unit,
  /// 0 where all are 0 and NaN where one is not finite. out has room for n rounded up to kIntegerRoom.
  float (*quantize_i16)(const float* x, const float* factors, int64_t n, float largest, int16_t* out);
  /// out = round((x - centers) * factors), which must be integers of 16 bits. Room as for quantize_i16.
  void (*round_i16)(const float* x, const float* centers, const float* factors, int64_t n, int16_t* out);

  // --- rows ---

  /// out = x / sqrt(mean(x^2) + eps) * weight (Qwen2RMSNorm). In place allowed.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  /// out = (x - mean) / sqrt(var + eps) * weight + bias (torch.nn.LayerNorm). In place allowed.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* out);
  /// gate = gate * sigmoid(gate) * up (SwiGLU).
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  /// x = x * sigmoid(1.702 x) (transformers' QuickGELUActivation).
  void (*quick_gelu)(float* x, int64_t n);
  /// x = x / 2 * (1 + erf(x / sqrt 2)) (torch.nn.GELU, exact).
  void (*gelu)(float* x, int64_t n);
  /// Rotate-half RoPE on one head: for i < half: (x[i], x[i + half]) turned by the angle with the given
  /// cosine and sine [half].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);

  /// One step of streaming softmax over a row of scores (Milakov and Gimelshein, arXiv 1805.02867): scores
  /// [0, n) are scaled by `scale`; running maximum and sum are brought up to date; scores become
  /// exp(score - new maximum); returns exp(old maximum - new maximum), by which what was accumulated before
  /// must be multiplied. Start with *maximum = -infinity, *sum = 0. n >= 1. exp is within 2 ulp.
  float (*softmax_step)(float* scores, int64_t n, float scale, float* maximum, float* sum);

  /// maxima[b] = largest |x| of each block of 32; returns the largest of them. n is a multiple of 32. NaNs
  /// may be passed over.
  float (*block_maxima)(const float* x, int64_t n, float* maxima);
  /// Sum of min(|x|, cap).
  float (*sum_capped)(const float* x, float cap, int64_t n);

  /// x *= factor.
  void (*scale_row)(float* x, float factor, int64_t n);
  /// y += x.
  void (*add_row)(float* y, const float* x, int64_t n);
  /// Rounds to nearest even; overflow becomes infinity.
  void (*convert_f32_to_f16)(const float* x, uint16_t* out, int64_t n);

  // --- measurement ---

  PeakLoops peaks;
};

/// Scratch of matmul_q8, matmul_groups and unpack_panel for matrices of up to `cols` columns.
size_t matmul_scratch_bytes(int64_t cols);

/// The instruction sets that are built in and that this processor runs, best first. Never empty: "generic"
/// is the last one.
std::span<const KernelTable* const> supported_kernels();

/// The table named `isa`; the best one for an empty name. Throws UnsupportedError, naming what is supported,
/// for one that this processor or build lacks.
const KernelTable& select_kernels(std::string_view isa);

}  // namespace qwen2vl::cpu
