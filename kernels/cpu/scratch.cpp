#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace vacpu {
namespace {

struct Buffer {
  char* data;
  size_t size;
};

constexpr size_t KEEP_BYTES = size_t{256} << 20;  // kept in all between calls
constexpr size_t KEEP_BUFFERS = 16;
constexpr size_t GRAIN = size_t{64} << 10;

std::mutex mutex;
std::vector<Buffer>& pool() {
  static std::vector<Buffer>* buffers = new std::vector<Buffer>;  // never destroyed: threads may outlive the module
  return *buffers;
}
size_t kept = 0;
ParallelFn parallel_fn = nullptr;

}  // namespace

void set_parallel(ParallelFn fn) { parallel_fn = fn; }
ParallelFn parallel() { return parallel_fn; }

size_t kept_bytes() {
  std::lock_guard<std::mutex> lock(mutex);
  return kept;
}

// The smallest kept buffer that is large enough; else a new one.
Lease::Lease(size_t bytes) : data_(nullptr), size_((bytes + GRAIN - 1) / GRAIN * GRAIN) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    std::vector<Buffer>& buffers = pool();
    size_t best = buffers.size();
    for (size_t i = 0; i < buffers.size(); i++)
      if (buffers[i].size >= size_ && (best == buffers.size() || buffers[i].size < buffers[best].size)) best = i;
    if (best < buffers.size()) {
      data_ = buffers[best].data;
      size_ = buffers[best].size;
      kept -= size_;
      buffers[best] = buffers.back();
      buffers.pop_back();
    }
  }
  if (!data_) data_ = static_cast<char*>(std::aligned_alloc(GRAIN, size_));
  if (!data_) throw std::bad_alloc();
}

Lease::~Lease() {
  std::lock_guard<std::mutex> lock(mutex);
  std::vector<Buffer>& buffers = pool();
  // A larger one replaces the smallest, so that a growing decode does not keep every size it had.
  while (!buffers.empty() && (buffers.size() >= KEEP_BUFFERS || kept + size_ > KEEP_BYTES)) {
    size_t least = 0;
    for (size_t i = 1; i < buffers.size(); i++)
      if (buffers[i].size < buffers[least].size) least = i;
    kept -= buffers[least].size;
    std::free(buffers[least].data);
    buffers[least] = buffers.back();
    buffers.pop_back();
  }
  if (size_ > KEEP_BYTES) {
    std::free(data_);
    return;
  }
  kept += size_;
  buffers.push_back({data_, size_});
}

}  // namespace vacpu
