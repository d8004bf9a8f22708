#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/printable.h"
#include "cpu/kernels/arm_features.h"
#include "cpu/kernels/isa_kernels.h"

#if defined(QWEN2VL_HAVE_AVX2) || defined(QWEN2VL_HAVE_AVX512)
#define QWEN2VL_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace qwen2vl::cpu {
namespace {

#ifdef QWEN2VL_X86

struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

/// Zeros for a leaf that the processor does not have.
CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  CpuidLeaf result;
#if defined(_MSC_VER)
  int registers[4];
  __cpuid(registers, 0);
  if (static_cast<uint32_t>(registers[0]) < leaf) return result;
  __cpuidex(registers, static_cast<int>(leaf), static_cast<int>(subleaf));
  result = {static_cast<uint32_t>(registers[0]), static_cast<uint32_t>(registers[1]),
            static_cast<uint32_t>(registers[2]), static_cast<uint32_t>(registers[3])};
#else
  __get_cpuid_count(leaf, subleaf, &result.eax, &result.ebx, &result.ecx, &result.edx);
#endif
  return result;
}

/// XCR0: the register sets that the operating system saves on a task switch. Needs the OSXSAVE bit.
uint64_t enabled_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

struct Features {
  bool avx2 = false;     ///< AVX2, FMA, F16C
  bool avxvnni = false;  ///< these and AVX-VNNI
  bool avx512 = false;   ///< AVX2's and and AVX-512 F, BW, DQ, VL, VNNI
  bool avx512_bf16 = false;
};

Features detect() {
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;         // leaf 1, ecx
  constexpr uint32_t kAvx2 = 1u << 5;                                                // leaf 7, ebx
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;  // leaf 7, ebx
  constexpr uint32_t kVnni = 1u << 11;                                               // leaf 7, ecx
  constexpr uint32_t kAvxVnni = 1u << 4, kBf16 = 1u << 5;                            // leaf 7.1, eax
  constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6;                              // XCR0
  const auto has = [](auto value, auto bits) { return (value & bits) == bits; };

  const CpuidLeaf leaf1 = cpuid(1), leaf7 = cpuid(7), leaf71 = cpuid(7, 1);
  if (!has(leaf1.ecx, kOsxsave)) return {};
  const uint64_t state = enabled_state();
  Features features;
  features.avx2 = has(leaf1.ecx, kFma | kF16c) && has(leaf7.ebx, kAvx2) && has(state, kYmmState);
  features.avxvnni = features.avx2 && has(leaf71.eax, kAvxVnni);
  features.avx512 =
      features.avx2 && has(leaf7.ebx, kF | kDq | kBw | kVl) && has(leaf7.ecx, kVnni) && has(state, kZmmState);
  features.avx512_bf16 = features.avx512 && has(leaf71.eax, kBf16);
  return features;
}

#endif  // QWEN2VL_X86

struct Registry {
  KernelTable generic, avx2, avxvnni, avx512, avx512_bf16, neon, dotprod, i8mm;
  std::vector<const KernelTable*> supported;

  Registry() {
    generic.isa = "generic";
    generic::add_quantize_rows(generic);
    generic::add_matmul_q8(generic);
    generic::add_grouped_matmul(generic);
    generic::add_gemm(generic);
    generic::add_bf16_dot(generic);
    generic::add_pair_panel(generic);
    generic::add_integer_gemm(generic);
    generic::add_rows(generic);
    generic::add_peaks(generic);
    supported.push_back(&generic);
#ifdef QWEN2VL_X86
    const Features features = detect();
#ifdef QWEN2VL_HAVE_AVX2
    if (features.avx2) {
      avx2 = generic;
      avx2.isa = "avx2";
      avx2::add_quantize_rows(avx2);
      avx2::add_matmul_q8(avx2);
      avx2::add_grouped_matmul(avx2);
      avx2::add_gemm(avx2);
      avx2::add_integer_gemm(avx2);
      avx2::add_rows(avx2);
      avx2::add_peaks(avx2);
      supported.insert(supported.begin(), &avx2);
    }
#endif
#ifdef QWEN2VL_HAVE_AVXVNNI
    if (features.avxvnni) {
      avxvnni = avx2;
      avxvnni.isa = "avxvnni";
      avxvnni::add_integer_gemm(avxvnni);
      avxvnni::add_matmul_q8(avxvnni);
      avxvnni::add_grouped_matmul(avxvnni);
      avxvnni::add_peaks(avxvnni);
      supported.insert(supported.begin(), &avxvnni);
    }
#endif
#ifdef QWEN2VL_HAVE_AVX512
    if (features.avx512) {
      avx512 = generic;
      avx512.isa = "avx512";
      avx512::add_quantize_rows(avx512);
      avx512::add_matmul_q8(avx512);
      avx512::add_grouped_matmul(avx512);
      avx512::add_gemm(avx512);
      avx512::add_integer_gemm(avx512);
      avx512::add_rows(avx512);
      avx512::add_peaks(avx512);
      supported.insert(supported.begin(), &avx512);
    }
#endif
#ifdef QWEN2VL_HAVE_AVX512_BF16
    if (features.avx512_bf16) {
      avx512_bf16 = avx512;
      avx512_bf16.isa = "avx512_bf16";
      avx512bf16::add_bf16_dot(avx512_bf16);
      avx512bf16::add_pair_panel(avx512_bf16);
      avx512bf16::add_peaks(avx512_bf16);
      supported.insert(supported.begin(), &avx512_bf16);
    }
#endif
#endif
#ifdef QWEN2VL_HAVE_NEON
    const ArmFeatures features = arm_features();
    neon = generic;
    neon.isa = "neon";
    neon::add_quantize_rows(neon);
    neon::add_matmul_q8(neon);
    neon::add_gemm(neon);
    neon::add_rows(neon);
    neon::add_peaks(neon);
    supported.insert(supported.begin(), &neon);
    if (features.dotprod) {
      dotprod = neon;
      dotprod.isa = "dotprod";
      dotprod::add_matmul_q8(dotprod);
      dotprod::add_peaks(dotprod);
      supported.insert(supported.begin(), &dotprod);
    }
    if (features.i8mm) {
      i8mm = dotprod;
      i8mm.isa = "i8mm";
      i8mm::add_matmul_q8(i8mm);
      i8mm::add_unpack_panel(i8mm);
      i8mm::add_bf16_dot(i8mm);
      i8mm::add_peaks(i8mm);
      supported.insert(supported.begin(), &i8mm);
    }
#endif
  }
};

}  // namespace

size_t matmul_scratch_bytes(int64_t cols) {
  const int64_t panel = cols * kPanelRows * static_cast<int64_t>(sizeof(float));
  // Four panels: a group of their columns and its scales, and the sums of all rows.
  const int64_t grouped = 4 * kPanelRows * (kGroupColumns + 4 * (1 + kMaxGroupedRows));
  return static_cast<size_t>(panel > grouped ? panel : grouped);
}

std::span<const KernelTable* const> supported_kernels() {
  static const Registry registry;
  return registry.supported;
}

const KernelTable& select_kernels(std::string_view isa) {
  const auto tables = supported_kernels();
  if (isa.empty()) return *tables.front();
  std::string names;
  for (const KernelTable* table : tables) {
    if (table->isa == isa) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw UnsupportedError("instruction set \"" + printable(isa) + "\": this build and processor support " +
                         names);
}

}  // namespace qwen2vl::cpu
