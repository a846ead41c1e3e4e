// What both kernels need before they can start, made on the device from the ends of the groups: no host waits for offs.

#pragma once

#include <cuda_runtime.h>
#include <cstdint>

#define VLLM_ACCEL_EXPORT extern "C" __attribute__((visibility("default")))

namespace grouped {

// Operands of one launch: a (T, K) by rows, b (E, K, N), out (T, N) by rows; strides in elements.
struct Operands {
  char const* a;
  char const* b;
  char* out;
  float const* a_scale;  // (T, ceil(K / 128)) contiguous, or null
  float const* b_scale;  // (E, ceil(N / 128), ceil(K / 128)) contiguous, or null
  int32_t const* offs;
  int64_t a_stride, b_group, b_stride, out_stride, rows;
  int32_t groups, n, k;
};

// The end of group `e`: whatever offs holds, ends rise and stay within the rows that exist.
__device__ inline int64_t end_of(Operands const& o, int e) {
  int64_t end = 0;
  for (int j = 0; j <= e; ++j) {
    int64_t const given = o.offs[j];
    end = given > end ? given : end;
  }
  return end < o.rows ? end : o.rows;
}

// Block 0 lets `Describe` write the arguments of every group; the others clear the rows past the last group.
template <class Describe>
__global__ void prepare(Operands o, Describe describe, int out_bytes) {
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e < o.groups; e += blockDim.x) {
      int64_t const start = e == 0 ? 0 : end_of(o, e - 1);
      describe(o, e, start, static_cast<int>(end_of(o, e) - start));
    }
    return;
  }
  int64_t const first = end_of(o, o.groups - 1);
  int const width = o.n * out_bytes;  // a multiple of 16, as out_stride is
  for (int64_t row = first + blockIdx.x - 1; row < o.rows; row += gridDim.x - 1) {
    char* line = o.out + row * o.out_stride * out_bytes;
    for (int i = threadIdx.x * 16; i < width; i += blockDim.x * 16) {
      *reinterpret_cast<int4*>(line + i) = make_int4(0, 0, 0, 0);
    }
  }
}

constexpr int kThreads = 256;
constexpr int kClearing = 64;  // blocks that clear rows

// Parts of the workspace, each at a multiple of 256 bytes.
struct Carve {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* made = reinterpret_cast<T*>(at);
    at += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return made;
  }
};

}  // namespace grouped

// A launch gets everything through one struct: kernels/cutlass/library.py has the same.
struct VllmAccelGroupedGemm {
  void const* a;
  void const* b;
  void* out;
  void const* a_scale;
  void const* b_scale;
  void const* offs;
  void* workspace;
  void* stream;
  int64_t a_stride, b_group, b_stride, out_stride, rows, workspace_bytes;
  int32_t groups, n, k, sms;
};

inline grouped::Operands operands_of(VllmAccelGroupedGemm const& g) {
  return {static_cast<char const*>(g.a),        static_cast<char const*>(g.b),        static_cast<char*>(g.out),
          static_cast<float const*>(g.a_scale), static_cast<float const*>(g.b_scale), static_cast<int32_t const*>(g.offs),
          g.a_stride, g.b_group, g.b_stride, g.out_stride, g.rows, g.groups, g.n, g.k};
}
