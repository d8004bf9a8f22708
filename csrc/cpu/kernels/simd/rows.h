#pragma once

// Kernels on rows of float32, written once; needs the including instruction set's simd.h.

#include <math.h>

#include "cpu/kernels/kernel_table.h"
#include "cpu/kernels/simd/exp.h"
#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu {
namespace {

/// How the loops below touch memory: whole vectors, or the first `n` lanes of the last one.
struct WholeVector {
  Vec load(const float* p, Vec) const { return cpu::load(p); }
  void store(float* p, Vec v) const { cpu::store(p, v); }
  void store_f16(uint16_t* p, Vec v) const { cpu::store_f16(p, v); }
};
struct FirstLanes {
  int64_t n;
  Vec load(const float* p, Vec fill) const { return load_first(p, n, fill); }
  void store(float* p, Vec v) const { store_first(p, v, n); }
  void store_f16(uint16_t* p, Vec v) const { store_first_f16(p, v, n); }
};

template <typename Body>
inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, WholeVector{});
  if (i < n) body(i, FirstLanes{n - i});
}

inline float sum_of_squares(const float* x, float centre, int64_t n) {
  const Vec c = set1(centre);
  Vec sum = set1(0.0f);
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const Vec d = sub(lanes.load(x + i, c), c);
    sum = fma(d, d, sum);
  });
  return reduce_add(sum);
}

inline void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  const Vec inverse = set1(1.0f / sqrtf(sum_of_squares(x, 0.0f, n) / static_cast<float>(n) + eps));
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const Vec zero = set1(0.0f);
    lanes.store(out + i, mul(mul(lanes.load(x + i, zero), inverse), lanes.load(weight + i, zero)));
  });
}

inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                       float* out) {
  const Vec zero = set1(0.0f);
  Vec sum = zero;
  for_each_vector(n, [&](int64_t i, auto lanes) { sum = add(sum, lanes.load(x + i, zero)); });
  const float mean = reduce_add(sum) / static_cast<float>(n);
  const Vec centre = set1(mean);
  const Vec inverse = set1(1.0f / sqrtf(sum_of_squares(x, mean, n) / static_cast<float>(n) + eps));
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const Vec normal = mul(sub(lanes.load(x + i, zero), centre), inverse);
    lanes.store(out + i, fma(normal, lanes.load(weight + i, zero), lanes.load(bias + i, zero)));
  });
}

/// x * sigmoid(slope * x)
inline Vec sigmoid_gate(Vec x, float slope) { return div(x, add(set1(1.0f), exp(mul(set1(-slope), x)))); }

inline void silu_mul(float* gate, const float* up, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const Vec zero = set1(0.0f);
    lanes.store(gate + i, mul(sigmoid_gate(lanes.load(gate + i, zero), 1.0f), lanes.load(up + i, zero)));
  });
}

inline void quick_gelu(float* x, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto lanes) {
    lanes.store(x + i, sigmoid_gate(lanes.load(x + i, set1(0.0f)), 1.702f));
  });
}

inline void rope(float* x, const float* cos, const float* sin, int64_t half) {
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Vec zero = set1(0.0f);
    const Vec a = lanes.load(x + i, zero), b = lanes.load(x + half + i, zero);
    const Vec c = lanes.load(cos + i, zero), s = lanes.load(sin + i, zero);
    lanes.store(x + i, sub(mul(a, c), mul(b, s)));
    lanes.store(x + half + i, add(mul(b, c), mul(a, s)));
  });
}

inline float softmax_step(float* scores, int64_t n, float scale, float* maximum, float* sum) {
  // Four maxima and sums each: one alone would wait for itself.
  const Vec lowest = set1(-INFINITY), factor = set1(scale);
  const int64_t whole = n / (4 * kLanes) * (4 * kLanes);
  Vec top[4] = {set1(*maximum), lowest, lowest, lowest};
  for (int64_t i = 0; i < whole; i += 4 * kLanes) {
    QWEN2VL_UNROLL
    for (int j = 0; j < 4; ++j) top[j] = max(top[j], mul(load(scores + i + j * kLanes), factor));
  }
  for_each_vector(n - whole, [&](int64_t i, auto lanes) {
    top[0] = max(top[0], mul(lanes.load(scores + whole + i, lowest), factor));
  });
  const float old_maximum = *maximum;
  const float new_maximum = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
  if (new_maximum == -INFINITY) {  // all masked so far: exp(-inf - -inf) would be NaN
    for_each_vector(n, [&](int64_t i, auto lanes) { lanes.store(scores + i, set1(0.0f)); });
    return 1.0f;
  }
  const Vec offset = set1(new_maximum);
  Vec total[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (int64_t i = 0; i < whole; i += 4 * kLanes) {
    QWEN2VL_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Vec p = exp(sub(mul(load(scores + i + j * kLanes), factor), offset));
      store(scores + i + j * kLanes, p);
      total[j] = add(total[j], p);
    }
  }
  for_each_vector(n - whole, [&](int64_t i, auto lanes) {
    const Vec p = exp(sub(mul(lanes.load(scores + whole + i, lowest), factor), offset));
    lanes.store(scores + whole + i, p);
    total[0] = add(total[0], p);
  });
  const float rescale = first(exp(set1(old_maximum - new_maximum)));
  *maximum = new_maximum;
  *sum = *sum * rescale + reduce_add(add(add(total[0], total[1]), add(total[2], total[3])));
  return rescale;
}

inline float block_maxima(const float* x, int64_t n, float* maxima) {
  const Vec zero = set1(0.0f);
  Vec largest = zero;
  for (int64_t b = 0; b < n / kBlock32; ++b) {
    Vec block = zero;
    QWEN2VL_UNROLL
    for (int64_t i = 0; i < kBlock32; i += kLanes) {
      const Vec v = load(x + b * kBlock32 + i);
      block = max(max(v, sub(zero, v)), block);
    }
    maxima[b] = reduce_max(block);
    largest = max(block, largest);
  }
  return reduce_max(largest);
}

inline float sum_capped(const float* x, float cap, int64_t n) {
  const Vec limit = set1(cap), zero = set1(0.0f);
  Vec sum = zero;
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const Vec v = lanes.load(x + i, zero);
    sum = add(sum, min(max(v, sub(zero, v)), limit));
  });
  return reduce_add(sum);
}

inline void scale_row(float* x, float factor, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto lanes) {
    lanes.store(x + i, mul(lanes.load(x + i, set1(0.0f)), set1(factor)));
  });
}

inline void add_row(float* y, const float* x, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const Vec zero = set1(0.0f);
    lanes.store(y + i, add(lanes.load(y + i, zero), lanes.load(x + i, zero)));
  });
}

inline void convert_f32_to_f16(const float* x, uint16_t* out, int64_t n) {
  for_each_vector(n, [&](int64_t i, auto lanes) { lanes.store_f16(out + i, lanes.load(x + i, set1(0.0f))); });
}

/// gelu stays generic: the erf of the C library, once per merged patch.
inline void set_row_kernels(KernelTable& table) {
  table.rms_norm = rms_norm;
  table.layer_norm = layer_norm;
  table.silu_mul = silu_mul;
  table.quick_gelu = quick_gelu;
  table.rope = rope;
  table.softmax_step = softmax_step;
  table.block_maxima = block_maxima;
  table.sum_capped = sum_capped;
  table.scale_row = scale_row;
  table.add_row = add_row;
  table.convert_f32_to_f16 = convert_f32_to_f16;
}

}  // namespace
}  // namespace qwen2vl::cpu
