// Times every hot kernel of every instruction set against what the machine can do: int8 dot products, fp32
// multiply-adds and reads from memory, measured in the same run. Shapes are Qwen2-VL 2B's.
//
//   bench_kernels [isa ...] [--threads N] [--only WORD]
//
// Peaks and results vary with whatever else the machine does: compare fractions, not absolute figures.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/half.h"
#include "base/thread_pool.h"
#include "cpu/kernels/kernel_table.h"
#include "cpu/limits.h"
#include "quant/formats.h"
#include "quant/quantize.h"

namespace qwen2vl::bench {
namespace {

using namespace qwen2vl::cpu;

struct Timing {
  double median, best;  ///< seconds
};

Timing time_of(const std::function<void()>& run) {
  run();
  std::vector<double> seconds;
  double total = 0.0;
  while (seconds.size() < 5 || (total < 0.4 && seconds.size() < 51)) {
    const auto start = std::chrono::steady_clock::now();
    run();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    total += seconds.back();
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds.front()};
}

class Bench {
 public:
  Bench(const KernelTable& kernels, int threads, std::string only)
      : kernels_(kernels), pool_(threads), only_(std::move(only)) {}

  void run() {
    measure_peaks();
    for (const auto& s : {LinearShape{DType::Q8_0, 3840, 1280}, LinearShape{DType::Q8_0, 1280, 5120},
                          LinearShape{DType::Q4_0, 8960, 1536}, LinearShape{DType::Q4_0, 1536, 8960},
                          LinearShape{DType::Q6_K, 8960, 1536}, LinearShape{DType::Q4_1, 8960, 1536},
                          LinearShape{DType::Q5_0, 8960, 1536}, LinearShape{DType::Q5_1, 8960, 1536},
                          LinearShape{DType::Q4_K, 8960, 1536}, LinearShape{DType::Q5_K, 8960, 1536},
                          LinearShape{DType::Q2_K, 8960, 1536}, LinearShape{DType::Q3_K, 8960, 1536},
                          LinearShape{DType::IQ4_NL, 8960, 1536}, LinearShape{DType::IQ4_XS, 8960, 1536}}) {
      matmul_many_rows(s);
      matmul_groups(s);
    }
    for (const DType type :
         {DType::Q4_0, DType::Q8_0, DType::Q6_K, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q4_K,
          DType::Q5_K, DType::Q2_K, DType::Q3_K, DType::IQ4_NL, DType::IQ4_XS})
      for (const int64_t rows : {1, 2, 4, 8}) matmul_few_rows(type, rows);
    for (const DType type : {DType::Q4_0, DType::Q6_K})
      for (const int64_t rows : {8, 16, 32, 64})
        for (const int planes : {1, 2}) matmul_streams(type, rows, planes);
    gemm();
    rows();
    packing();
  }

 private:
  struct LinearShape {
    DType type;
    int64_t n, cols;
  };
  struct Matrix {
    AlignedBuffer storage;
    PanelMatrix panels;
  };

  bool wanted(const std::string& name) const { return name.find(only_) != std::string::npos; }

  void report(const std::string& name, double work, const char* unit, double peak, const Timing& t) const {
    std::printf("%-8s %d  %-44s %9.3f ms  %8.1f %s", std::string(kernels_.isa).c_str(), pool_.size(),
                name.c_str(), t.median * 1e3, work / t.median * 1e-9, unit);
    if (peak > 0)
      std::printf("  %5.1f %% (best %5.1f %%)", work / t.median / peak * 100, work / t.best / peak * 100);
    std::printf("\n");
    std::fflush(stdout);
  }

  void on_every_thread(const std::function<void(int)>& fn) {
    pool_.parallel_for(pool_.size(), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) fn(static_cast<int>(i));
    });
  }

  void measure_peaks() {
    peaks_ = measure_limits(kernels_, pool_.size(), 0.3);
    std::printf("%-8s %d  peaks: int8 %.0f Gop/s, float %.0f and fp32 %.0f GFLOP/s, read %.1f GB/s\n",
                std::string(kernels_.isa).c_str(), pool_.size(), peaks_.int8_ops * 1e-9,
                peaks_.float_ops * 1e-9, peaks_.fp32_ops * 1e-9, peaks_.read_bytes * 1e-9);
  }

  std::vector<float> normal(int64_t n) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(n);
    for (float& value : values) value = distribution(random_);
    return values;
  }

  Matrix matrix(const LinearShape& s) {
    // Random rows, repeated: quantizing hundreds of MB would take longer than the measurement.
    const int64_t distinct = std::min<int64_t>(s.n, 256), bytes = row_bytes(s.type, s.cols);
    std::vector<uint8_t> blocks(distinct * bytes);
    if (dtype_traits(s.type).is_written)
      quantize_rows(s.type, normal(distinct * s.cols).data(), distinct, s.cols, blocks.data());
    else
      fill_blocks(dtype_traits(s.type), blocks);
    Matrix m;
    m.panels = {s.type, s.n, s.cols, panel_parts(s.type, s.cols).bytes, nullptr, kernels_.layout};
    m.storage = AlignedBuffer(m.panels.panel_count() * m.panels.panel_bytes);
    uint8_t* out = m.storage.data();
    pool_.parallel_for(m.panels.panel_count(), 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t p = begin; p < end; ++p)
        pack_panel(m.panels, blocks.data(), distinct, p % (distinct / kPanelRows),
                   out + p * m.panels.panel_bytes);
    });
    m.panels.data = out;
    return m;
  }

  /// Any integers, with a usual d (and m).
  void fill_blocks(const DTypeTraits& traits, std::vector<uint8_t>& blocks) {
    for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(random_());
    for (size_t at = d_offset(traits.type); at < blocks.size(); at += traits.block_bytes)
      for (int half = 0; half <= int{traits.format.has_minimum}; ++half)
        blocks[at + 2 * half + 1] = 0x2a;  // 0.05 .. 0.06
  }

  struct Activations {
    AlignedBuffer values;
    std::vector<float> scales;
    std::vector<int32_t> corrections32, corrections16;
    QuantizedRows rows;
  };
  Activations activations(int64_t rows, int64_t cols, int planes = 1) {
    Activations a{AlignedBuffer(planes * rows * cols),
                  std::vector<float>(rows * cols / 32),
                  std::vector<int32_t>(planes * rows * cols / 32),
                  std::vector<int32_t>(planes * rows * cols / 16),
                  {}};
    a.rows = {rows,
              cols,
              planes,
              a.values.as<int8_t>(),
              a.scales.data(),
              a.corrections32.data(),
              a.corrections16.data()};
    kernels_.quantize_rows(normal(rows * cols).data(), cols, rows, a.rows, 0);
    return a;
  }

  /// The last row of `out` against the generic kernel: a fast wrong answer is no result.
  void check_last_row(const PanelMatrix& w, const QuantizedRows& x, const std::vector<float>& out) const {
    std::vector<float> expected(w.rows * x.rows);
    AlignedBuffer scratch(matmul_scratch_bytes(w.cols));
    const int64_t panels = std::min<int64_t>(w.panel_count(), 64);
    select_kernels("generic").matmul_q8(w, x, {0, panels, x.rows - 1, x.rows},
                                        {expected.data(), w.rows, nullptr, Store::Overwrite},
                                        scratch.as<std::byte>());
    const int64_t begin = (x.rows - 1) * w.rows;
    if (std::memcmp(out.data() + begin, expected.data() + begin, std::min(w.rows, panels * kPanelRows) * 4) !=
        0) {
      std::fprintf(stderr, "matmul_q8 of %s differs from the generic one\n",
                   std::string(kernels_.isa).c_str());
      std::exit(1);
    }
  }

  Timing time_matmul(const PanelMatrix& w, const QuantizedRows& x, int64_t panels_per_task,
                     int64_t rows_per_task) {
    std::vector<float> out(w.rows * x.rows);
    std::vector<AlignedBuffer> scratch;
    for (int i = 0; i < pool_.size(); ++i) scratch.emplace_back(matmul_scratch_bytes(w.cols));
    const int64_t tasks = (w.panel_count() + panels_per_task - 1) / panels_per_task;
    const Timing t = time_of([&] {
      for (int64_t m = 0; m < x.rows; m += rows_per_task)
        pool_.parallel_for(tasks, 1, [&](int64_t begin, int64_t end, int thread) {
          kernels_.matmul_q8(w, x,
                             {begin * panels_per_task, std::min(end * panels_per_task, w.panel_count()), m,
                              std::min(m + rows_per_task, x.rows)},
                             {out.data(), w.rows, nullptr, Store::Overwrite},
                             scratch[thread].as<std::byte>());
        });
    });
    check_last_row(w, x, out);
    return t;
  }

  void matmul_many_rows(const LinearShape& s) {
    const int64_t rows = 1024;
    const std::string name = "matmul_q8 " + std::string(dtype_traits(s.type).name) + " M " +
                             std::to_string(rows) + " N " + std::to_string(s.n) + " K " +
                             std::to_string(s.cols);
    if (!wanted(name)) return;
    const Matrix w = matrix(s);
    const Activations x = activations(rows, s.cols);
    report(name, 2.0 * rows * s.n * s.cols, "Gop/s", peaks_.int8_ops, time_matmul(w.panels, x.rows, 4, 512));
  }

  void matmul_groups(const LinearShape& s) {
    const int64_t rows = 1024;
    const std::string name = std::string("matmul_groups ") + std::string(dtype_traits(s.type).name) + " M " +
                             std::to_string(rows) + " N " + std::to_string(s.n) + " K " +
                             std::to_string(s.cols);
    if (!wanted(name) || !kernels_.has_grouped_matmul) return;
    const Matrix w = matrix(s);
    GroupedRows x;
    x.rule = kernels_.group_rule;
    x.rows = rows;
    x.cols = s.cols;
    AlignedBuffer values(x.groups() * rows * kGroupColumns);
    std::vector<float> scales(x.groups() * rows), out(s.n * rows);
    std::vector<int32_t> corrections(scales.size());
    std::vector<int16_t> sums(scales.size() * kGroupSums);
    x.values = values.as<int8_t>();
    x.scales = scales.data();
    x.corrections = corrections.data();
    x.sums = sums.data();
    kernels_.quantize_groups(normal(rows * s.cols).data(), s.cols, rows, x, 0);
    std::vector<AlignedBuffer> scratch;
    for (int i = 0; i < pool_.size(); ++i) scratch.emplace_back(matmul_scratch_bytes(s.cols));
    const int64_t panels = w.panels.panel_count();
    const auto run = [&](const KernelTable& kernels, int64_t first, int64_t n, int64_t m, int64_t end,
                         float* to, int thread) {
      kernels.matmul_groups(w.panels, x, {first, std::min(first + n, panels), m, end},
                            {to, s.n, nullptr, Store::Overwrite}, scratch[thread].as<std::byte>());
    };
    const Timing t = time_of([&] {
      for (int64_t m = 0; m < rows; m += kMaxGroupedRows)
        pool_.parallel_for((panels + 3) / 4, 1, [&](int64_t begin, int64_t end, int thread) {
          for (int64_t i = begin; i < end; ++i)
            run(kernels_, i * 4, 4, m, std::min(m + kMaxGroupedRows, rows), out.data(), thread);
        });
    });
    std::vector<float> expected(out.size());
    run(select_kernels("generic"), 0, panels, rows - 1, rows, expected.data(), 0);
    if (std::memcmp(out.data() + (rows - 1) * s.n, expected.data() + (rows - 1) * s.n, s.n * 4) != 0) {
      std::fprintf(stderr, "%s differs from the generic one\n", name.c_str());
      std::exit(1);
    }
    report(name, 2.0 * static_cast<double>(rows * s.n * s.cols), "Gop/s", peaks_.int8_ops, t);
  }

  void matmul_few_rows(DType type, int64_t rows) {
    const int64_t cols = 1536, n = (600 << 20) / panel_parts(type, cols).bytes * kPanelRows;
    const std::string name = "matmul_q8 " + std::string(dtype_traits(type).name) + " M " +
                             std::to_string(rows) + ", 600 MB of weights";
    if (!wanted(name)) return;
    const Matrix w = matrix({type, n, cols});
    const Activations x = activations(rows, cols);
    report(name, static_cast<double>(w.panels.panel_count() * w.panels.panel_bytes), "GB/s ",
           peaks_.read_bytes, time_matmul(w.panels, x.rows, 16, rows));
  }

  /// Rows of so many streams: memory and arithmetic take about as long.
  void matmul_streams(DType type, int64_t rows, int planes) {
    const int64_t cols = 1536, n = (400 << 20) / panel_parts(type, cols).bytes * kPanelRows;
    const std::string name = "matmul_q8 " + std::string(dtype_traits(type).name) + " M " +
                             std::to_string(rows) + (planes == 2 ? ", 16 bits" : "") + ", 400 MB of weights";
    if (!wanted(name)) return;
    const Matrix w = matrix({type, n, cols});
    const Activations x = activations(rows, cols, planes);
    report(name, 2.0 * static_cast<double>(planes * rows * n * cols), "Gop/s", peaks_.int8_ops,
           time_matmul(w.panels, x.rows, 4, rows));
  }

  void gemm() {
    struct Shape {
      const char* name;
      int64_t rows, n, depth, repeat;
      DType type;  // of the panels; BF16: both sides, in pairs
    };
    // repeat: so many such products a timing, each thread on its own data
    const Shape shapes[] = {
        {"gemm_f32 ViT scores 96 x 512, depth 80", 96, 512, 80, 400, DType::F32},
        {"gemm_f32 ViT values 96 x 80, depth 512", 96, 80, 512, 400, DType::F32},
        {"gemm_f32 ViT values 96 x 80, depth 128", 96, 80, 128, 1600, DType::F32},
        {"gemm_f32 ViT scores 64 x 64, depth 80", 64, 64, 80, 4800, DType::F32},
        {"gemm_f32 linear 256 x 16, depth 1280", 256, 16, 1280, 400, DType::F32},
        {"gemm_f16 linear 256 x 64, depth 1280", 256, 64, 1280, 100, DType::F16},
        {"gemm_f16 prefill scores 96 x 64, depth 128", 96, 64, 128, 1600, DType::F16},
        {"gemm_f16 decode scores 6 x 64, depth 128", 6, 64, 128, 20000, DType::F16},
        {"gemm_f16 decode values 6 x 128, depth 64", 6, 128, 64, 20000, DType::F16},
        {"gemm_bf16_pairs ViT scores 96 x 512, depth 80", 96, 512, 80, 800, DType::BF16},
        {"gemm_bf16_pairs ViT values 96 x 80, depth 512", 96, 80, 512, 800, DType::BF16},
        {"gemm_bf16_pairs ViT values 96 x 80, depth 128", 96, 80, 128, 3200, DType::BF16}};
    for (const Shape& s : shapes) {
      const bool pairs = s.type == DType::BF16;
      if (!wanted(s.name) || (pairs && !kernels_.has_bf16_dot)) continue;
      const int64_t panels = (s.n + 15) / 16;
      const std::vector<float> a = normal(s.rows * s.depth), b = normal(panels * 16 * s.depth);
      std::vector<uint16_t> a16, b16;
      for (const float value : a) a16.push_back(f32_to_bf16(value));
      for (const float value : b) b16.push_back(pairs ? f32_to_bf16(value) : f32_to_f16(value));
      const auto call = [&](const KernelTable& kernels, float* out) {
        const MatmulOutput output{out, panels * 16, nullptr, Store::Overwrite};
        if (pairs)
          kernels.gemm_bf16_pairs(a16.data(), s.depth, b16.data(), 16 * s.depth, s.rows, s.n, s.depth,
                                  output);
        else if (s.type == DType::F16)
          kernels.gemm_f16(a.data(), s.depth, b16.data(), 16 * s.depth, s.rows, s.n, s.depth, output);
        else
          kernels.gemm_f32(a.data(), s.depth, b.data(), 16 * s.depth, s.rows, s.n, s.depth, output);
      };
      std::vector<std::vector<float>> out(pool_.size(), std::vector<float>(s.rows * panels * 16));
      const Timing t = time_of([&] {
        on_every_thread([&](int i) {
          for (int64_t r = 0; r < s.repeat; ++r) call(kernels_, out[i].data());
        });
      });
      std::vector<float> expected(out[0].size());
      call(select_kernels("generic"), expected.data());
      for (size_t i = 0; i < expected.size(); ++i) {
        if (!(std::fabs(out[0][i] - expected[i]) < 1e-3f * std::sqrt(static_cast<float>(s.depth)))) {
          std::fprintf(stderr, "%s: %g at %zu, expected %g\n", s.name, out[0][i], i, expected[i]);
          std::exit(1);
        }
      }
      report(s.name, 2.0 * s.rows * s.n * s.depth * s.repeat * pool_.size(), "GFLOP/s",
             pairs ? peaks_.float_ops : peaks_.fp32_ops, t);
    }
  }

  void rows() {
    const int64_t n = 5120, repeat = 400;
    const std::vector<float> x = normal(n), y = normal(n), scores = normal(512);
    std::vector<std::vector<float>> work(pool_.size(), x);
    const auto time_rows = [&](const char* name, int64_t length, const std::function<void(float*)>& call) {
      if (!wanted(name)) return;
      const Timing t = time_of([&] {
        on_every_thread([&](int i) {
          for (int64_t r = 0; r < repeat; ++r) {
            std::copy(x.begin(), x.begin() + length,
                      work[i].begin());  // in place: start from the same values
            call(work[i].data());
          }
        });
      });
      report(name, static_cast<double>(length) * repeat * pool_.size(), "G elements/s", 0.0, t);
    };
    time_rows("softmax_step of 512", 512, [&](float* p) {
      float maximum = -INFINITY, sum = 0.0f;
      kernels_.softmax_step(p, 512, 0.1f, &maximum, &sum);
    });
    std::vector<uint16_t> probabilities(10 * 512);
    time_rows("softmax_steps_bf16 of 10 x 512", 10 * 512, [&](float* p) {
      float maxima[10], sums[10] = {}, factors[10];
      std::fill_n(maxima, 10, -INFINITY);
      kernels_.softmax_steps_bf16(p, 512, 10, 512, 0.1f, maxima, sums, factors, probabilities.data(), 512);
    });
    time_rows("quick_gelu of 5120", n, [&](float* p) { kernels_.quick_gelu(p, n); });
    time_rows("silu_mul of 5120", n, [&](float* p) { kernels_.silu_mul(p, y.data(), n); });
    time_rows("gelu of 5120", n, [&](float* p) { kernels_.gelu(p, n); });
    time_rows("layer_norm of 1280", 1280,
              [&](float* p) { kernels_.layer_norm(p, y.data(), y.data(), 1e-6f, 1280, p); });
    time_rows("rms_norm of 1536", 1536, [&](float* p) { kernels_.rms_norm(p, y.data(), 1e-6f, 1536, p); });
    std::vector<Activations> quantized;
    for (int i = 0; i < pool_.size(); ++i) quantized.push_back(activations(1, n));
    if (!wanted("quantize_rows")) return;
    const Timing t = time_of([&] {
      on_every_thread([&](int i) {
        for (int64_t r = 0; r < repeat; ++r) kernels_.quantize_rows(x.data(), n, 1, quantized[i].rows, 0);
      });
    });
    report("quantize_rows of 5120", static_cast<double>(n) * repeat * pool_.size(), "G elements/s", 0.0, t);
  }

  void packing() {
    for (const DType type : {DType::F16, DType::Q8_0, DType::Q4_0, DType::Q6_K, DType::Q5_0, DType::Q4_K,
                             DType::Q5_K, DType::Q2_K, DType::Q3_K, DType::IQ4_NL, DType::IQ4_XS}) {
      const std::string name = "pack_panel " + std::string(dtype_traits(type).name);
      if (!wanted(name)) continue;
      const int64_t cols = 8960 / 256 * 256, n = 1536, bytes = n * row_bytes(type, cols);
      std::vector<uint8_t> blocks(bytes, 0x11);
      const PanelMatrix packed{type, n, cols, panel_parts(type, cols).bytes, nullptr, kernels_.layout};
      AlignedBuffer out(packed.panel_count() * packed.panel_bytes);
      report(name, static_cast<double>(bytes), "GB/s ", 0.0, time_of([&] {
               pool_.parallel_for(n / kPanelRows, 4, [&](int64_t begin, int64_t end, int) {
                 for (int64_t p = begin; p < end; ++p)
                   pack_panel(packed, blocks.data(), n, p, out.data() + p * packed.panel_bytes);
               });
             }));
    }
  }

  const KernelTable& kernels_;
  ThreadPool pool_;
  std::string only_;
  MachineLimits peaks_;
  std::mt19937 random_{1};
};

}  // namespace
}  // namespace qwen2vl::bench

int main(int argc, char** argv) {
  std::vector<std::string> isas;
  std::string only;
  int threads = qwen2vl::default_thread_count();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--threads" && i + 1 < argc)
      threads = std::atoi(argv[++i]);
    else if (argument == "--only" && i + 1 < argc)
      only = argv[++i];
    else
      isas.push_back(argument);
  }
  try {
    if (isas.empty())
      for (const auto* table : qwen2vl::cpu::supported_kernels())
        if (table->isa != "generic") isas.emplace_back(table->isa);
    for (const std::string& isa : isas)
      qwen2vl::bench::Bench(qwen2vl::cpu::select_kernels(isa), threads, only).run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_kernels: %s\n", error.what());
    return 1;
  }
  return 0;
}
