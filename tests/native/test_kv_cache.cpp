#include <doctest/doctest.h>

#include <vector>

#include "base/half.h"
#include "cpu/kv_cache.h"
#include "kernel_testing.h"

namespace qwen2vl::cpu {
namespace {

TextConfig config_of(int64_t head_dim) {
  TextConfig config;
  config.num_hidden_layers = 2;
  config.num_attention_heads = config.num_key_value_heads = 2;
  config.head_dim = head_dim;
  return config;
}

TEST_CASE("the cache keeps f16 of what is written, on every instruction set") {
  for (const KernelTable* kernels : supported_kernels()) {
    CAPTURE(kernels->isa);
    for (const int64_t head_dim : {20, 128, 300}) {
      const TextConfig config = config_of(head_dim);
      PagedKvCache cache(config, Precision::Fast);
      cache.reserve(kPageCells + 18);
      const Floats k = random_floats(2, head_dim, 3), v = random_floats(2, head_dim, 4);
      const int64_t slot = 17;
      cache.write(*kernels, 1, kPageCells + slot, k.data(), v.data());
      for (int64_t head = 0; head < 2; ++head) {
        const auto* keys = reinterpret_cast<const uint16_t*>(cache.keys(1, 1, head));
        const auto* values = reinterpret_cast<const uint16_t*>(cache.values(1, 1, head));
        for (int64_t d = 0; d < head_dim; ++d) {
          CHECK(keys[cache.key_panel_elements(1) + d * kPanelRows + 1] == f32_to_f16(k[head * head_dim + d]));
          CHECK(values[d / kPanelRows * cache.value_panel_elements() + slot * kPanelRows + d % kPanelRows] ==
                f32_to_f16(v[head * head_dim + d]));
        }
      }
    }
  }
}

TEST_CASE("pages come zeroed and stay where they are while the cache grows and shrinks") {
  const KernelTable& kernels = *supported_kernels().front();
  const TextConfig config = config_of(16);
  PagedKvCache cache(config, Precision::Exact);
  const auto value = [&](int64_t page) {
    return reinterpret_cast<const float*>(cache.values(page, 1, 1))[3];
  };
  const auto append = [&](int64_t pages) {
    const int64_t first = cache.size() / kPageCells;
    cache.reserve(pages * kPageCells);
    for (int64_t page = first; page < first + pages; ++page) {
      CHECK(value(page) == 0.0f);
      const Floats row(32, static_cast<float>(page + 1));
      cache.write(kernels, 1, page * kPageCells, row.data(), row.data());
    }
    cache.commit(pages * kPageCells);
  };
  append(21);
  const int64_t page_bytes = cache.allocated_bytes() / 21;
  const uint8_t* first = cache.keys(0, 0, 0);
  for (const int64_t kept : {17, 16, 8, 1}) {
    cache.truncate(kept * kPageCells);
    CHECK(cache.allocated_bytes() == kept * page_bytes);
    append(21 - kept);
    CHECK(cache.keys(0, 0, 0) == first);
    for (int64_t page = 0; page < 21; ++page) CHECK(value(page) == static_cast<float>(page + 1));
  }
  CHECK_THROWS(cache.truncate(21 * kPageCells + 1));
}

}  // namespace
}  // namespace qwen2vl::cpu
