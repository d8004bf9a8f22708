#include "cpu/linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>

#include "cpu/outliers.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {
namespace {

// Rows that one task multiplies with its panels: 512 rows of 1280 int8 activations are 640 KiB, most of a
// second-level cache of 1 MiB, and each panel that is loaded is used 512 times.
constexpr int64_t kRowsPerTask = kMaxGroupedRows;
// Panels per task: an even number, since kernels take two at a time.
constexpr int64_t kPanelsPerTask = 4;
// Up to so many rows wait for memory. Their tasks read about so many bytes, four microseconds of a core: no
// thread waits long for the last one.
constexpr int64_t kFewRows = 16;
constexpr int64_t kBytesPerTask = 96 << 10;
constexpr int64_t kMostPanelsPerTask = 16;
// Columns of a mean per task.
constexpr int64_t kColumnsPerTask = 256;

// Of a file that are read at a time: they stay in a core's cache until they are packed.
constexpr int64_t kBytesPerRead = 256 << 10;

PackedLinear::Part pack_part(const MatrixView& source, int64_t column, Context& ctx) {
  PackedLinear::Part part;
  part.column = column;
  part.matrix = {source.type, source.rows, source.cols, panel_parts(source.type, source.cols).bytes, nullptr};
  part.storage = AlignedBuffer(part.matrix.panel_count() * part.matrix.panel_bytes);
  uint8_t* out = part.storage.data();
  part.matrix.data = out;
  const int64_t source_bytes = kPanelRows * row_bytes(source.type, source.cols);  // of a panel
  const int64_t panels = std::max<int64_t>(1, kBytesPerRead / source_bytes);
  ctx.reserve_scratch(panels * source_bytes);
  ctx.pool.parallel_for(part.matrix.panel_count(), panels, [&](int64_t begin, int64_t end, int thread) {
    const int64_t rows = std::min(end * kPanelRows, source.rows) - begin * kPanelRows;
    const uint8_t* read =
        source.read_rows(begin * kPanelRows, rows, reinterpret_cast<uint8_t*>(ctx.scratch(thread)));
    for (int64_t p = begin; p < end; ++p)
      pack_panel(source.type, read, rows, source.cols, p - begin, out + p * part.matrix.panel_bytes);
  });
  return part;
}

/// Whether a layer's rows go through matmul_groups, but for decoded ones. That costs less than it saves from
/// 45 rows on; fewer go the same way, so that a row's result does not depend on how many there are.
bool has_groups(const Context& ctx, const PackedLinear& layer) {
  return ctx.precision == Precision::Fast && ctx.kernels.has_grouped_matmul &&
         std::all_of(layer.parts.begin(), layer.parts.end(), [](const PackedLinear::Part& part) {
           return is_quantized(part.matrix.type) && part.inputs == Inputs::Groups;
         });
}

/// Whether decoded rows and others stand side by side where they go different ways.
bool is_mixed(const Context& ctx, const PackedLinear& layer, const Rows& x) {
  return x.decoded > 0 && x.decoded < x.rows && has_groups(ctx, layer);
}

/// What the quantized parts of a layer multiply: the rows in 8 bits, less their outlier columns, and these.
struct QuantizedInput {
  int64_t count = 0;
  QuantizedRows rows;                     ///< [count]; of two planes where a part is fine
  GroupedRows grouped;                    ///< instead, where these have rows
  std::vector<int32_t> outliers;          ///< columns in which a row has one
  const float* outlier_values = nullptr;  ///< [count][outliers.size()], zero where a row has none there
};

/// Takes outliers as they are found, row by row and in any order, and gives them as columns.
void gather_outliers(Context& ctx, int64_t rows, QuantizedInput& input) {
  for (const auto& found : ctx.outliers())
    for (const Outlier& o : found) input.outliers.push_back(o.column);
  std::sort(input.outliers.begin(), input.outliers.end());
  input.outliers.erase(std::unique(input.outliers.begin(), input.outliers.end()), input.outliers.end());
  const int64_t n = static_cast<int64_t>(input.outliers.size());
  if (n == 0) return;
  float* values = ctx.outlier_values(rows * n);
  std::fill_n(values, rows * n, 0.0f);
  for (const auto& found : ctx.outliers())
    for (const Outlier& o : found)
      values[o.row * n + (std::lower_bound(input.outliers.begin(), input.outliers.end(), o.column) -
                          input.outliers.begin())] = o.value;
  input.outlier_values = values;
}

QuantizedInput quantize_input(Context& ctx, const Rows& x, const PackedLinear& layer, bool fine,
                              const Center& center) {
  const int64_t cols = layer.in_features;
  const bool grouped = !fine && x.decoded == 0 && has_groups(ctx, layer), centered = !center.mean.empty();
  QuantizedInput input;
  input.count = x.rows;
  if (grouped)
    input.grouped = ctx.grouped(x.rows, cols);
  else
    input.rows = ctx.quantized(x.rows, cols, fine ? 2 : 1);
  for (auto& found : ctx.outliers()) found.clear();
  ctx.for_rows_on_threads(x.rows, [&](int64_t r, int thread) {
    const float* row = x.data + r * x.stride;
    float* rest = ctx.row(thread, cols + cols / kBlock32);
    float* maxima = rest + cols;
    if (centered) {
      for (int64_t c = 0; c < cols; ++c) rest[c] = row[c] - center.mean[c];
      row = rest;
    }
    const auto take = [&](auto&& from) {
      if (row != rest) std::memcpy(rest, row, cols * sizeof(float));
      from(rest, ctx.outliers()[thread]);
      row = rest;
    };
    if (!layer.outlier_columns.empty())
      take([&](float* values, auto& found) { take_columns(values, layer.outlier_columns, r, found); });
    const float limit = outlier_limit(ctx.kernels, row, cols, maxima);
    if (std::isfinite(limit))
      take([&](float* values, auto& found) { take_outliers(values, cols, maxima, limit, r, found); });
    if (grouped)
      ctx.kernels.quantize_groups(row, cols, 1, input.grouped, r);
    else
      ctx.kernels.quantize_rows(row, cols, 1, input.rows, r);
  });
  gather_outliers(ctx, x.rows, input);
  return input;
}

/// What `rows` rows cost at least.
Work linear_work(const Context& ctx, const PackedLinear& layer, int64_t rows) {
  Work work;
  for (const PackedLinear::Part& part : layer.parts) {
    const bool int8 = ctx.precision == Precision::Fast && is_quantized(part.matrix.type);
    (int8 ? work.int8_ops : work.float_ops) +=
        2.0 * static_cast<double>(rows * part.matrix.rows * part.matrix.cols);
    work.bytes += static_cast<double>(part.storage.size());
  }
  return work;
}

/// Panels [panel_begin, panel_end) of a part times rows [row_begin, row_end) of x.
struct Task {
  int64_t panel_begin, panel_end, row_begin, row_end;
};

/// fn(part, task, thread) for all of a layer's panels: row block by row block, and within one all panels, so
/// that the activations stay in cache.
template <typename Fn>
void for_tasks(Context& ctx, std::span<const PackedLinear::Part> parts, int64_t rows, const Fn& fn) {
  const int64_t panels = rows > kFewRows ? kPanelsPerTask
                                         : std::clamp<int64_t>(kBytesPerTask / parts[0].matrix.panel_bytes, 1,
                                                               kMostPanelsPerTask);
  const auto tasks_of = [&](const PackedLinear::Part& part) {
    return (part.matrix.panel_count() + panels - 1) / panels;
  };
  int64_t per_block = 0;
  for (const PackedLinear::Part& part : parts) per_block += tasks_of(part);
  const int64_t blocks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  ctx.pool.parallel_for(blocks * per_block, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      const PackedLinear::Part* part = parts.data();
      int64_t in_part = t % per_block;
      for (; in_part >= tasks_of(*part); ++part) in_part -= tasks_of(*part);
      const int64_t row = t / per_block * kRowsPerTask, panel = in_part * panels;
      fn(*part,
         Task{panel, std::min(panel + panels, part->matrix.panel_count()), row,
              std::min(row + kRowsPerTask, rows)},
         thread);
    }
  });
}

/// A matrix from a panel on.
PanelMatrix from_panel(const PanelMatrix& w, int64_t panel) {
  PanelMatrix rest = w;
  rest.data = w.panel(panel);
  rest.rows -= panel * kPanelRows;
  return rest;
}

/// `fine`: whether all planes of the rows are multiplied.
void quantized_task(const KernelTable& kernels, const PanelMatrix& w, const QuantizedInput& x,
                    const Task& task, const MatmulOutput& out, std::byte* scratch, bool fine) {
  if (x.grouped.rows > 0) {
    kernels.matmul_groups(w, task.panel_begin, task.panel_end, x.grouped, task.row_begin, task.row_end, out,
                          scratch);
  } else {
    QuantizedRows rows = x.rows;
    if (!fine) rows.planes = 1;
    kernels.matmul_q8(w, task.panel_begin, task.panel_end, rows, task.row_begin, task.row_end, out, scratch);
  }
  const int64_t n = static_cast<int64_t>(x.outliers.size());
  if (n == 0) return;
  float* columns = reinterpret_cast<float*>(scratch);  // [n][16]
  for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
    kernels.unpack_columns(w, p, x.outliers.data(), n, columns);
    kernels.gemm_f32(
        x.outlier_values + task.row_begin * n, n, columns, n * kPanelRows, task.row_end - task.row_begin,
        std::min(kPanelRows, w.rows - p * kPanelRows), n,
        {out.data + task.row_begin * out.stride + p * kPanelRows, out.stride, nullptr, Store::Accumulate});
  }
}

void float_task(const KernelTable& kernels, const PanelMatrix& w, const Rows& x, const Task& task,
                const MatmulOutput& out, std::byte* scratch) {
  const float* a = x.data + task.row_begin * x.stride;
  const int64_t rows = task.row_end - task.row_begin;
  const auto output_at = [&](int64_t panel) {
    MatmulOutput o = out;
    o.data += task.row_begin * out.stride + panel * kPanelRows;
    if (o.bias != nullptr) o.bias += panel * kPanelRows;
    return o;
  };
  const int64_t n_begin = task.panel_begin * kPanelRows;
  const int64_t n_end = std::min(task.panel_end * kPanelRows, w.rows);
  const uint8_t* data = w.panel(task.panel_begin);
  visit_dtype(w.type, [&]<DType T>() {
    if constexpr (T == DType::F32) {
      kernels.gemm_f32(a, x.stride, reinterpret_cast<const float*>(data), w.panel_bytes / 4, rows,
                       n_end - n_begin, w.cols, output_at(task.panel_begin));
    } else if constexpr (T == DType::F16 || T == DType::BF16) {
      const auto gemm = T == DType::F16 ? kernels.gemm_f16 : kernels.gemm_bf16;
      gemm(a, x.stride, reinterpret_cast<const uint16_t*>(data), w.panel_bytes / 2, rows, n_end - n_begin,
           w.cols, output_at(task.panel_begin));
    } else {
      for (int64_t p = task.panel_begin; p < task.panel_end; ++p) {
        float* panel = reinterpret_cast<float*>(scratch);
        kernels.unpack_panel(w, p, panel);
        kernels.gemm_f32(a, x.stride, panel, w.cols * kPanelRows, rows,
                         std::min(kPanelRows, w.rows - p * kPanelRows), w.cols, output_at(p));
      }
    }
  });
}

/// A layer's input as its kernels want it, and the products with it. `fine`: of all parts.
class Product {
 public:
  Product(Context& ctx, const PackedLinear& layer, const Rows& x, bool fine = false,
          const Center& center = {})
      : ctx_(ctx), x_(x) {
    if (std::any_of(layer.parts.begin(), layer.parts.end(),
                    [&](const PackedLinear::Part& part) { return in_8_bits(part.matrix); }))
      quantized_ = quantize_input(ctx, x, layer, fine || layer.has(Inputs::Fine), center);
  }

  void operator()(const PanelMatrix& w, const Task& task, const MatmulOutput& out, int thread,
                  bool fine = false) const {
    if (in_8_bits(w)) {
      quantized_task(ctx_.kernels, w, quantized_, task, out, ctx_.scratch(thread), fine);
    } else {
      float_task(ctx_.kernels, w, x_, task, out, ctx_.scratch(thread));
    }
  }

 private:
  bool in_8_bits(const PanelMatrix& w) const {
    return ctx_.precision == Precision::Fast && is_quantized(w.type);
  }

  Context& ctx_;
  Rows x_;
  QuantizedInput quantized_;
};

}  // namespace

bool PackedLinear::has(Inputs inputs) const {
  return std::any_of(parts.begin(), parts.end(), [&](const Part& part) { return part.inputs == inputs; });
}

int64_t PackedLinear::weight_bytes() const {
  int64_t bytes = static_cast<int64_t>(bias.size()) * 4;
  for (const Part& part : parts) bytes += static_cast<int64_t>(part.storage.size());
  return bytes;
}

LayerSource::LayerSource(const LinearWeights* layer_, Inputs inputs_of_8_bits)
    : layer(layer_),
      inputs(dtype_traits(layer_->weight.type).format.bits() == 8 ? inputs_of_8_bits : Inputs::Groups) {}

PackedLinear pack_linear(std::string_view name, std::initializer_list<LayerSource> layers, Context& ctx,
                         const NormWeights* norm) {
  PackedLinear packed;
  packed.name = name;
  if (norm != nullptr) packed.outlier_columns = outlier_columns(norm->weight);
  for (const auto& [layer, inputs] : layers) {
    packed.in_features = layer->weight.cols;
    packed.parts.push_back(pack_part(layer->weight, packed.out_features, ctx));
    packed.parts.back().inputs = inputs;
    packed.out_features += layer->weight.rows;
    packed.bias.insert(packed.bias.end(), layer->bias.begin(), layer->bias.end());
  }
  ctx.reserve_scratch(matmul_scratch_bytes(packed.in_features));
  return packed;
}

PackedLinear pack_matrix(std::string_view name, const MatrixView& matrix, Context& ctx, Inputs inputs) {
  const LinearWeights layer{matrix, {}};
  PackedLinear packed = pack_linear(name, {&layer}, ctx);
  packed.parts[0].inputs = inputs;
  return packed;
}

void linear(Context& ctx, const PackedLinear& layer, const Rows& x, float* out, int64_t out_stride,
            Store store, const Center& center) {
  if (is_mixed(ctx, layer, x)) {
    linear(ctx, layer, x.first(x.decoded), out, out_stride, store, center);
    linear(ctx, layer, x.after(x.decoded), out + x.decoded * out_stride, out_stride, store, center);
    return;
  }
  const auto stage = ctx.profile.stage(layer.name, linear_work(ctx, layer, x.rows));
  const Product product(ctx, layer, x, false, center);
  for_tasks(ctx, layer.parts, x.rows, [&](const PackedLinear::Part& part, const Task& task, int thread) {
    const float* bias = center.mean.empty() ? layer.bias_of(part) : center.output.data() + part.column;
    product(part.matrix, task, {out + part.column, out_stride, bias, store}, thread,
            part.inputs == Inputs::Fine);
  });
}

Center center_of(Context& ctx, const PackedLinear& layer, const Rows& x) {
  if (!has_groups(ctx, layer)) return {};
  const auto stage = ctx.profile.stage(layer.name);
  const int64_t cols = layer.in_features;
  Center center{Vector(cols), Vector(layer.out_features)};
  ctx.pool.parallel_for(cols, kColumnsPerTask, [&](int64_t begin, int64_t end, int) {
    float* mean = center.mean.data() + begin;
    for (int64_t r = 0; r < x.rows; ++r)
      ctx.kernels.add_row(mean, x.data + r * x.stride + begin, end - begin);
    ctx.kernels.scale_row(mean, 1.0f / static_cast<float>(x.rows), end - begin);
  });
  // In 16 bits: what is lost here is lost of every row.
  const Product product(ctx, layer, {center.mean.data(), 1, cols}, true);
  for_tasks(ctx, layer.parts, 1, [&](const PackedLinear::Part& part, const Task& task, int thread) {
    product(part.matrix, task,
            {center.output.data() + part.column, layer.out_features, layer.bias_of(part), Store::Overwrite},
            thread, true);
  });
  return center;
}

Rows linear_swiglu(Context& ctx, const PackedLinear& gate_up, const Rows& x, float* out) {
  const int64_t stride = gate_up.parts[0].matrix.rows;
  if (is_mixed(ctx, gate_up, x)) {
    linear_swiglu(ctx, gate_up, x.first(x.decoded), out);
    linear_swiglu(ctx, gate_up, x.after(x.decoded), out + x.decoded * stride);
    return {out, x.rows, stride, x.decoded};
  }
  const auto stage = ctx.profile.stage(gate_up.name, linear_work(ctx, gate_up, x.rows));
  const PackedLinear::Part &gate = gate_up.parts[0], &up = gate_up.parts[1];
  const Product product(ctx, gate_up, x);
  for_tasks(ctx, {&gate, 1}, x.rows, [&](const PackedLinear::Part&, const Task& task, int thread) {
    product(gate.matrix, task, {out, stride, gate_up.bias_of(gate), Store::Overwrite}, thread);

    // up's panels as a matrix of their own: the task's columns alone, in the thread's own memory.
    const int64_t first = task.panel_begin * kPanelRows,
                  width = (task.panel_end - task.panel_begin) * kPanelRows;
    const float* bias = gate_up.bias_of(up);
    float* up_values = ctx.row(thread, x.rows * width);
    product(from_panel(up.matrix, task.panel_begin),
            {0, task.panel_end - task.panel_begin, task.row_begin, task.row_end},
            {up_values, width, bias == nullptr ? nullptr : bias + first, Store::Overwrite}, thread);

    const int64_t columns = std::min(width, stride - first);
    for (int64_t r = task.row_begin; r < task.row_end; ++r)
      ctx.kernels.silu_mul(out + r * stride + first, up_values + r * width, columns);
  });
  return {out, x.rows, stride, x.decoded};
}

}  // namespace qwen2vl::cpu
