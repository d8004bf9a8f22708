#include <doctest/doctest.h>

#include <set>
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
      KvPages cache(config, Precision::Fast);
      const PageHandle page = cache.make();
      const Floats k = random_floats(2, head_dim, 3), v = random_floats(2, head_dim, 4);
      const int64_t slot = 17;
      cache.write(*kernels, page, 1, slot, k.data(), v.data());
      for (int64_t head = 0; head < 2; ++head) {
        const auto* keys = reinterpret_cast<const uint16_t*>(cache.keys(page, 1, head));
        const auto* values = reinterpret_cast<const uint16_t*>(cache.values(page, 1, head));
        for (int64_t d = 0; d < head_dim; ++d) {
          CHECK(keys[cache.key_panel_elements(1) + d * kPanelRows + 1] == f32_to_f16(k[head * head_dim + d]));
          CHECK(values[d / kPanelRows * cache.value_panel_elements() + slot * kPanelRows + d % kPanelRows] ==
                f32_to_f16(v[head * head_dim + d]));
        }
      }
    }
  }
}

TEST_CASE("pages come zeroed, stay where they are and give whole slabs back") {
  const KernelTable& kernels = *supported_kernels().front();
  KvPages cache(config_of(16), Precision::Exact);
  const auto value = [&](PageHandle page) {
    return reinterpret_cast<const float*>(cache.values(page, 1, 1))[3];
  };
  std::vector<PageHandle> pages;
  const auto fill = [&](PageHandle page, float x) {
    CHECK(value(page) == 0.0f);
    const Floats row(32, x);
    cache.write(kernels, page, 1, 0, row.data(), row.data());
  };
  for (int i = 0; i < 21; ++i) {
    pages.push_back(cache.make());
    fill(pages.back(), static_cast<float>(i));
  }
  CHECK(std::set(pages.begin(), pages.end()).size() == 21);
  CHECK(cache.slab_bytes() == 24 * cache.page_bytes());
  // Every third one is given back and taken anew: nothing of it is left, the others are as they were.
  for (int i = 0; i < 21; i += 3) cache.free(pages[i]);
  for (int i = 0; i < 21; i += 3) fill(pages[i] = cache.make(), static_cast<float>(i));
  for (int i = 0; i < 21; ++i) CHECK(value(pages[i]) == static_cast<float>(i));
  CHECK(cache.slab_bytes() == 24 * cache.page_bytes());

  const PageHandle copy = cache.make();
  cache.copy(pages[5], copy);
  CHECK(value(copy) == 5.0f);
  cache.free(copy);
  for (int i = 8; i < 21; ++i) cache.free(pages[i]);
  CHECK(cache.slab_bytes() == 8 * cache.page_bytes());
  for (int i = 0; i < 8; ++i) CHECK(value(pages[i]) == static_cast<float>(i));
}

}  // namespace
}  // namespace qwen2vl::cpu
