// Scratch memory and threads for the driver.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "drive.h"

namespace vacpu {

// A buffer borrowed for one call, given back to a small pool after: page faults would cost more than packing.
class Lease {
 public:
  explicit Lease(size_t bytes);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  size_t size_;
};

ParallelFn parallel();

// Run fn(task, slot) for tasks 0..n-1 on up to `threads` threads, next task first; slot < threads is the thread's own.
template <class F> void share(int threads, int64_t n, const F& fn) {
  if (n < threads) threads = static_cast<int>(n);
  if (threads <= 1 || !parallel()) {
    for (int64_t i = 0; i < n; i++) fn(i, 0);
    return;
  }
  struct Shared {
    const F* fn;
    int64_t n;
    std::atomic<int64_t> next{0};
    std::atomic<int> slots{0};
  } shared;
  shared.fn = &fn;
  shared.n = n;
  auto body = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    const int slot = s.slots.fetch_add(1);
    for (int64_t i = s.next.fetch_add(1); i < s.n; i = s.next.fetch_add(1)) (*s.fn)(i, slot);
  };
  parallel()(body, &shared, static_cast<unsigned>(threads), 0);
}

}  // namespace vacpu
