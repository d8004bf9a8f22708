#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/half.h"

using namespace qwen2vl;

namespace {

// The value of a finite float16 or bfloat16 from its definition.
double value_of(uint16_t half, int mantissa_bits, int bias) {
  const int exponent_bits = 15 - mantissa_bits;
  const int exponent = (half >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = half & ((1 << mantissa_bits) - 1);
  const double size = exponent == 0
                          ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                          : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return (half & 0x8000) != 0 ? -size : size;
}

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }

}  // namespace

TEST_CASE("every float16 widens to its value, and narrows back to itself") {
  for (uint32_t half = 0; half < 65536; ++half) {
    CAPTURE(half);
    const float wide = f16_to_f32(static_cast<uint16_t>(half));
    if ((half & 0x7c00) != 0x7c00) {
      REQUIRE(static_cast<double>(wide) == value_of(static_cast<uint16_t>(half), 10, 15));
      REQUIRE(std::signbit(wide) == ((half & 0x8000) != 0));
    } else if ((half & 0x3ff) == 0) {
      REQUIRE(wide == ((half & 0x8000) != 0 ? -1 : 1) * std::numeric_limits<float>::infinity());
    } else {
      REQUIRE(std::isnan(wide));
      REQUIRE(std::isnan(f16_to_f32(f32_to_f16(wide))));
      continue;
    }
    REQUIRE(f32_to_f16(wide) == half);
  }
}

TEST_CASE("between two float16 the nearer is taken, and of two as near the even one") {
  for (uint16_t half = 0; half < 0x7bff; ++half) {
    CAPTURE(half);
    const float low = f16_to_f32(half), high = f16_to_f32(static_cast<uint16_t>(half + 1));
    const float middle = (low + high) / 2;  // exact: float32 has the bits
    const auto even = static_cast<uint16_t>(half + (half & 1));
    REQUIRE(f32_to_f16(middle) == even);
    REQUIRE(f32_to_f16(-middle) == (even | 0x8000));
    REQUIRE(f32_to_f16(std::bit_cast<float>(bits(middle) - 1)) == half);
    REQUIRE(f32_to_f16(std::bit_cast<float>(bits(middle) + 1)) == half + 1);
  }
}

TEST_CASE("float16 ends in infinity and in zero") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(f32_to_f16(65519.996f) == 0x7bff);
  CHECK(f32_to_f16(65520.0f) == 0x7c00);
  CHECK(f32_to_f16(-3e38f) == 0xfc00);
  CHECK(f32_to_f16(infinity) == 0x7c00);
  CHECK(f32_to_f16(-infinity) == 0xfc00);
  CHECK(f32_to_f16(0x1p-25f) == 0);
  CHECK(f32_to_f16(-0x1p-25f) == 0x8000);
  CHECK(f32_to_f16(0x1.000002p-25f) == 1);
  CHECK(f32_to_f16(-0.0f) == 0x8000);
  CHECK(f32_to_f16(std::bit_cast<float>(0xff800001u)) == 0xfe00);  // a signalling NaN becomes quiet
}

TEST_CASE("bfloat16 is the upper half of a float32, rounded to nearest even") {
  for (uint32_t half = 0; half < 0x7f80; ++half) {
    CAPTURE(half);
    const auto narrow = static_cast<uint16_t>(half);
    REQUIRE(static_cast<double>(bf16_to_f32(narrow)) == value_of(narrow, 7, 127));
    REQUIRE(f32_to_bf16(bf16_to_f32(narrow)) == half);
    REQUIRE(f32_to_bf16(std::bit_cast<float>((half << 16) + 0x7fff)) == half);
    REQUIRE(f32_to_bf16(std::bit_cast<float>((half << 16) + 0x8000)) == half + (half & 1));
    REQUIRE(f32_to_bf16(std::bit_cast<float>(((half | 0x8000) << 16) + 0x8001)) == ((half + 1) | 0x8000));
  }
  CHECK(f32_to_bf16(std::numeric_limits<float>::infinity()) == 0x7f80);
  CHECK(f32_to_bf16(std::bit_cast<float>(0x7f800001u)) == 0x7fc0);
  CHECK(f32_to_bf16(std::bit_cast<float>(0xffffffffu)) == 0xffff);
}
