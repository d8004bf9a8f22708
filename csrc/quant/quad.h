#pragma once

#include <cstdint>

namespace qwen2vl {

inline constexpr int kLanes = 4;

// Four floats, which is a register of every machine's baseline; comparisons give a mask for `select`. Loops
// over plain arrays would do, but GCC makes shuffles of them.
#if defined(__GNUC__)

using Quad = float __attribute__((vector_size(4 * kLanes)));
using QuadMask = int32_t __attribute__((vector_size(4 * kLanes)));

inline Quad all(float value) { return Quad{value, value, value, value}; }
inline Quad select(QuadMask mask, Quad a, Quad b) { return mask ? a : b; }

#else

struct QuadMask {
  bool lane[kLanes];
};
struct Quad {
  float lane[kLanes];

  float operator[](int k) const { return lane[k]; }
  float& operator[](int k) { return lane[k]; }
};

template <typename Result, typename Operand, typename Fn>
Result by_lane(const Operand& a, const Operand& b, const Fn& fn) {
  Result result;
  for (int k = 0; k < kLanes; ++k) result.lane[k] = fn(a.lane[k], b.lane[k]);
  return result;
}
inline Quad operator+(Quad a, Quad b) {
  return by_lane<Quad>(a, b, [](float x, float y) { return x + y; });
}
inline Quad operator-(Quad a, Quad b) {
  return by_lane<Quad>(a, b, [](float x, float y) { return x - y; });
}
inline Quad operator*(Quad a, Quad b) {
  return by_lane<Quad>(a, b, [](float x, float y) { return x * y; });
}
inline Quad operator/(Quad a, Quad b) {
  return by_lane<Quad>(a, b, [](float x, float y) { return x / y; });
}
inline Quad& operator+=(Quad& a, Quad b) { return a = a + b; }
inline QuadMask operator<(Quad a, Quad b) {
  return by_lane<QuadMask>(a, b, [](float x, float y) { return x < y; });
}
inline QuadMask operator>(Quad a, Quad b) { return b < a; }
inline QuadMask operator&(QuadMask a, QuadMask b) {
  return by_lane<QuadMask>(a, b, [](bool x, bool y) { return x && y; });
}

inline Quad all(float value) { return {{value, value, value, value}}; }
inline Quad select(QuadMask mask, Quad a, Quad b) {
  Quad result;
  for (int k = 0; k < kLanes; ++k) result[k] = mask.lane[k] ? a[k] : b[k];
  return result;
}

#endif

inline Quad min(Quad a, Quad b) { return select(b < a, b, a); }
inline Quad max(Quad a, Quad b) { return select(b > a, b, a); }
inline Quad magnitude(Quad a) { return max(a, all(0) - a); }

}  // namespace qwen2vl
