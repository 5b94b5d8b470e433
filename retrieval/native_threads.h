// Threads of the compiled kernels: a few for one call, which ends when all have ended.

#pragma once

#include <cstdint>
#include <thread>
#include <vector>

template <class Run>
void on_threads(int64_t threads, Run run) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (auto& other : others) other.join();
}
