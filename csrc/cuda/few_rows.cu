// Products of few rows, in a file of their own: their kernels, of every type, take longest to compile.

#include <algorithm>
#include <string>

#include "cuda/kernels/few_rows.cuh"
#include "cuda/linear.h"

namespace qwen2vl::cuda {

void few_rows_linear(Context& ctx, const PackedLinear& linear, const FewInput& input, int64_t rows,
                     Finish finish, Epilogue epilogue) {
  const auto stage = ctx.stage(linear.name, linear.work(rows));
  epilogue.bias = linear.bias;
  for (const PackedMatrix& m : linear.parts) {
    // Enough warps that a matrix of few tiles is read by all of the chip; more would have too little to do.
    const int warps = m.units >= 64   ? 16
                      : m.tiles > 512 ? std::clamp(m.units / 6, 1, 4)
                                      : std::clamp(m.units / 3, 1, 8);
    FewRows p;
    p.m = m;
    p.rows = static_cast<int32_t>(rows);
    p.input = input.half;
    p.x = input.x;
    p.norm = input.norm;
    p.eps = input.eps;
    p.width = static_cast<int32_t>(linear.cols);
    p.finish = finish;
    p.epilogue = epilogue;
    const int row_tiles = rows <= 8 ? 1 : 4;
    // Rows of a layer of 29,568 inputs do not fit shared memory eight at a time.
    const bool shared = row_tiles == 1 && few_rows_shared_bytes(p, warps, 1, true) <=
                                              static_cast<int64_t>(ctx.properties.sharedMemPerBlockOptin);
    if (!shared && input.x != nullptr)
      throw UnsupportedError(std::string(linear.name) + ": " + std::to_string(linear.cols) +
                             " inputs are more than the CUDA backend normalizes in shared memory");
    const int64_t shared_bytes = few_rows_shared_bytes(p, warps, row_tiles, shared);
    visit_packed(m.type, [&]<DType T>() {
      const auto kernel = row_tiles == 4
                              ? (warps > 8 ? few_rows<T, 4, false, 512> : few_rows<T, 4, false, 256>)
                          : shared ? few_rows<T, 1, true, 512>
                                   : few_rows<T, 1, false, 512>;
      const int resident =
          ctx.resident_blocks(reinterpret_cast<const void*>(kernel), warps * 32, shared_bytes);
      const int at_once = tiles_at_once(T, row_tiles, 32 * warps), tiles = (m.tiles + at_once - 1) / at_once;
      const int turns = (tiles + resident - 1) / resident;
      launch(ctx.stream,
             {linear.name,
              dim3(static_cast<unsigned>((tiles + turns - 1) / turns),
                   static_cast<unsigned>((rows + 8 * row_tiles - 1) / (8 * row_tiles))),
              warps * 32, shared_bytes, true},
             kernel, p);
    });
  }
}

}  // namespace qwen2vl::cuda
