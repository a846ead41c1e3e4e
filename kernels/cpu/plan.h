// What planning a forward and a backward share.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "job.h"

namespace vacpu {

// Packed keys and values in flight; a call with more goes through in groups of key heads.
constexpr size_t PACK_LIMIT = size_t{64} << 20;
// A thread more for each of these multiply-adds: about 5 us of work, twice what waking one costs.
constexpr int64_t WORK_OF_A_THREAD = 1 << 18;

inline size_t whole_pages(size_t bytes) { return (bytes + 4095) & ~size_t{4095}; }

inline int useful_threads(int64_t work, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + work / WORK_OF_A_THREAD));
}

// Null, or which of the lengths and block ids is wrong: nothing outside the tensors is ever read.
const char* check(const Job& j);

}  // namespace vacpu
