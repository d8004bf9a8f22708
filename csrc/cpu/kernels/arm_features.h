#pragma once

namespace qwen2vl::cpu {

/// What an aarch64 processor has beyond Armv8.0, by its operating system's word; nothing elsewhere.
struct ArmFeatures {
  bool dotprod = false;  ///< FEAT_DotProd
  bool i8mm = false;     ///< FEAT_I8MM and FEAT_BF16, which came together
};

ArmFeatures arm_features();

}  // namespace qwen2vl::cpu
