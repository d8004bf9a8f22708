#pragma once

#include "cpu/kernels/kernel_table.h"

namespace qwen2vl::cpu {

/// What a machine can do at most in a second, all threads together: the floors of every stage follow from it.
struct MachineLimits {
  double int8_ops = 0;    ///< of 8-bit dot products; a multiply and an add are two
  double float_ops = 0;   ///< of the fastest floating-point dot products that the instruction set has
  double fp32_ops = 0;    ///< of float32 multiply-adds
  double read_bytes = 0;  ///< of memory that is in no cache
};

/// Runs each of the loops for `seconds` on `n_threads` threads and takes the best round: what else the
/// machine does only makes rounds slower. Takes 512 MiB of memory for the reads.
MachineLimits measure_limits(const KernelTable& kernels, int n_threads, double seconds);

}  // namespace qwen2vl::cpu
