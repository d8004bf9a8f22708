#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/prompt_lookup.h"

using namespace qwen2vl;

namespace {

constexpr int64_t kContext = 256;  // cells of a sequence at most
constexpr int kDrawn = 6;          // tokens of an answer
constexpr int kRounds = 4;         // of every thread
const Progress kQuiet = [](int64_t, int64_t) {};

ModelOptions two_threads() {
  ModelOptions options;
  options.backend.n_threads = 2;
  return options;
}

/// Every third begins as the others of its kind do, for more than a page.
Prompt prompt(const Engine& engine, int seed) {
  std::vector<int64_t> ids;
  for (int i = 0; i < 70 + 5 * seed; ++i) ids.push_back((i < 66 ? seed % 3 : seed) * 31 % 200 + i % 50);
  return Prompt(engine.config(), ids, {}, kContext);
}

/// What is likely to follow so many tokens drawn of a sequence.
using Guess = std::function<std::vector<int32_t>(size_t sequence, size_t drawn)>;

/// The greedy tokens after each prompt, whose rows are computed in shared steps, `chunk` of a prompt.
std::vector<std::vector<int32_t>> answers(Engine& engine, const std::vector<Prompt>& prompts, int64_t chunk,
                                          const Guess& guess = {}, int* steps = nullptr) {
  std::vector<Sequence> sequences(prompts.size());
  std::vector<std::vector<int32_t>> drawn(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    sequences[i].n_ctx = kContext;
    engine.adopt(sequences[i], prompts[i]);
    engine.begin(sequences[i], prompts[i], {});
  }
  Sampler greedy{{}};
  for (;;) {
    std::vector<StepRows> batch;
    for (size_t i = 0; i < prompts.size(); ++i)
      if (sequences[i].waiting() > 0)
        batch.push_back({&sequences[i], std::min(chunk, sequences[i].waiting())});
    if (batch.empty()) break;
    engine.step(batch, kQuiet);
    if (steps != nullptr) ++*steps;
    for (size_t i = 0; i < prompts.size(); ++i) {
      while (sequences[i].waiting() == 0 && drawn[i].size() < kDrawn) {
        drawn[i].push_back(engine.sample(sequences[i], greedy));
        if (drawn[i].size() == kDrawn) break;
        engine.push(sequences[i], drawn[i].back());
      }
      if (guess && !drawn[i].empty() && drawn[i].size() < kDrawn)
        engine.guess(sequences[i], guess(i, drawn[i].size()));
    }
  }
  for (Sequence& sequence : sequences) engine.abandon(std::move(sequence));
  return drawn;
}

/// The tower's rows of a still, a piece in each turn.
std::vector<float> seen(Engine& engine, const std::vector<uint8_t>& pixels, const GridTHW& grid) {
  const VisionConfig& vision = *engine.config().vision;
  std::vector<float> levels(static_cast<size_t>(vision.in_channels) * 256);
  for (size_t i = 0; i < levels.size(); ++i) levels[i] = static_cast<float>(i % 256) / 128 - 1;
  std::vector<float> out(static_cast<size_t>(vision_cells(grid, vision) * vision.hidden_size));
  std::unique_ptr<VisionPass> pass;
  for (bool done = false; !done;) {
    Engine::Turn turn(engine);
    if (!pass) pass = turn.backend.begin_vision({grid, nullptr, pixels.data(), levels.data()}, out.data());
    done = pass->advance(0, kQuiet);
  }
  Engine::Turn turn(engine);
  pass.reset();
  return out;
}

}  // namespace

TEST_CASE("what is guessed changes no answer") {
  Engine engine(QWEN2VL_DEMO_MODEL, two_threads(), kQuiet);
  const std::vector<Prompt> prompts{prompt(engine, 0), prompt(engine, 1), prompt(engine, 2)};
  int plain = 0;
  const auto expected = answers(engine, prompts, kContext, {}, &plain);
  for (size_t right = 0; right < kDrawn; ++right) {
    engine.forget();
    int steps = 0;
    const Guess guess = [&](size_t i, size_t at) {
      std::vector<int32_t> tokens(expected[i].begin() + static_cast<std::ptrdiff_t>(at), expected[i].end());
      for (size_t j = right; j < tokens.size(); ++j) tokens[j] = (tokens[j] + 1) % 200;
      return tokens;
    };
    CHECK(answers(engine, prompts, kContext, guess, &steps) == expected);
    CHECK(steps ==
          plain - (kDrawn - 1) + (kDrawn - 1 + static_cast<int>(right)) / (static_cast<int>(right) + 1));
  }
}

TEST_CASE("what followed before is looked up") {
  using Tokens = std::vector<int32_t>;
  CHECK(look_up(Tokens{1, 2, 3, 4, 5, 9, 1, 2, 3}, 3) == Tokens{4, 5, 9});
  CHECK(look_up(Tokens{6, 1, 2, 1, 2}, 4) == Tokens{1, 2, 1, 2});
  CHECK(look_up(Tokens{8, 2, 3, 7, 1, 2, 3}, 2) == Tokens{7, 1});
  for (const Tokens& tokens : {Tokens{}, Tokens{1}, Tokens{1, 1}, Tokens{1, 2, 3, 4, 1, 3}})
    CHECK(look_up(tokens, 4).empty());
  CHECK(look_up(Tokens{1, 1, 1, 1}, 0).empty());
}

TEST_CASE("threads that share an engine get what each would get alone, and give every page back") {
  constexpr int kThreads = 4;
  Engine engine(QWEN2VL_DEMO_MODEL, two_threads(), kQuiet);
  std::vector<std::vector<Prompt>> prompts(kThreads);
  for (int t = 0; t < kThreads; ++t) prompts[t] = {prompt(engine, t), prompt(engine, t + kThreads)};
  std::vector<std::vector<std::vector<int32_t>>> alone;
  for (const auto& of_thread : prompts) {
    alone.push_back(answers(engine, of_thread, kContext));
    engine.forget();
  }

  const GridTHW grid{1, 8, 8};
  const auto side = static_cast<size_t>(8 * engine.config().vision->patch_size);
  std::vector<uint8_t> pixels(side * side * static_cast<size_t>(engine.config().vision->in_channels));
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<uint8_t>(i * 7);

  std::atomic<int> wrong{0}, at_work{kThreads + 1};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round)
        if (answers(engine, prompts[t], 30 + 10 * t) != alone[t]) ++wrong;
      --at_work;
    });
  threads.emplace_back([&] {  // loads the tower meanwhile
    const std::vector<float> first = seen(engine, pixels, grid);
    for (int round = 0; round < kRounds; ++round)
      if (seen(engine, pixels, grid) != first) ++wrong;
    --at_work;
  });
  const int64_t room = 20 * 64 * engine.cell_bytes();  // of 16 pages at work, and copies
  for (int i = 0; at_work > 0; ++i) {                  // what may be asked for, and changed, at any time
    engine.set_cache_bytes(i % 2 == 0 ? room : 2 * room);
    if (i % 4 == 0) engine.forget();
    if (engine.cache_bytes() > 2 * room || engine.idle_pages() < 0 || engine.backend().weight_bytes() <= 0)
      ++wrong;
    std::this_thread::yield();
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  engine.forget();
  CHECK(engine.idle_pages() == 0);
  CHECK(engine.cache_bytes() == 0);
}
