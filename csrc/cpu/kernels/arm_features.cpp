#include "cpu/kernels/arm_features.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>
#endif

namespace qwen2vl::cpu {

#if defined(__aarch64__) && defined(__linux__)

ArmFeatures arm_features() {
  // The kernel's interface (asm/hwcap.h), which older headers do not have in full.
  constexpr unsigned long kAsimdDp = 1ul << 20;                  // AT_HWCAP
  constexpr unsigned long kI8mm = 1ul << 13, kBf16 = 1ul << 14;  // AT_HWCAP2
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  const bool dotprod = (first & kAsimdDp) != 0;
  return {dotprod, dotprod && (second & kI8mm) != 0 && (second & kBf16) != 0};
}

#elif defined(__aarch64__) && defined(__APPLE__)

ArmFeatures arm_features() {
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  const bool dotprod = has("hw.optional.arm.FEAT_DotProd");
  return {dotprod, dotprod && has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16")};
}

#elif defined(__aarch64__) && defined(_WIN32)

ArmFeatures arm_features() {
  // PF_ARM_V82_DP, V82_I8MM and V86_BF16_INSTRUCTIONS_AVAILABLE, the latter two of newer headers alone.
  const bool dotprod = IsProcessorFeaturePresent(43) != 0;
  return {dotprod, dotprod && IsProcessorFeaturePresent(66) != 0 && IsProcessorFeaturePresent(68) != 0};
}

#else

ArmFeatures arm_features() { return {}; }

#endif

}  // namespace qwen2vl::cpu
