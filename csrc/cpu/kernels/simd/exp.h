#pragma once

// Needs the including instruction set's simd.h.

namespace qwen2vl::cpu {
namespace {

/// exp within 2 ulp, subnormal results included; exp(-inf) = 0, NaN stays NaN. The same bits on every
/// instruction set. x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) = 1 + r + r^2 q(r), q of degree 4 fitted for the
/// least maximum of the relative error (3e-9).
inline Vec exp(Vec x) {
  // Beyond these the result is infinity or 0 already; the order of operands lets NaN through.
  x = min(set1(89.0f), max(set1(-104.0f), x));
  const Vec n = round_even(mul(x, set1(0x1.715476p+0f)));
  // ln 2 = 0x1.63p-1 - 0x1.bd0106p-13: n times the short part is exact.
  Vec r = fma(n, set1(-0x1.63p-1f), x);
  r = fma(n, set1(0x1.bd0106p-13f), r);
  Vec q = set1(0x1.6a2434p-10f);
  q = fma(q, r, set1(0x1.1239e2p-7f));
  q = fma(q, r, set1(0x1.5558f2p-5f));
  q = fma(q, r, set1(0x1.555492p-3f));
  q = fma(q, r, set1(0x1.fffffcp-2f));
  const Vec p = add(set1(1.0f), fma(mul(r, r), q, r));
  // 2^n in two factors: n reaches -150 and 128, beyond a normal number's exponent.
  const IntVec exponent = to_int(n);
  const IntVec half = shift_right_signed(exponent, 1);
  const IntVec bias = set1_int(127);
  const Vec first_factor = as_float(shift_left(add(half, bias), 23));
  const Vec second_factor = as_float(shift_left(add(sub(exponent, half), bias), 23));
  return mul(mul(p, first_factor), second_factor);
}

}  // namespace
}  // namespace qwen2vl::cpu
