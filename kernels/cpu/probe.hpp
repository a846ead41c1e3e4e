// What the machine gives at best, measured with the same vectors and threads as the kernels: benchmarks/cpu.py.

// `turns` times MR x NC independent multiply-adds of a vector.
static void probe_fma(int64_t turns) {
  vf sum[MR * NC];
  UNROLL for (int i = 0; i < MR * NC; i++) sum[i] = set1(static_cast<float>(i));
  volatile float seed = 0.999f;
  const vf a = set1(seed), b = set1(1 - seed);
  for (int64_t t = 0; t < turns; t++) {
    UNROLL for (int i = 0; i < MR * NC; i++) sum[i] = fma(sum[i], a, b);
  }
  vf all{};
  UNROLL for (int i = 0; i < MR * NC; i++) all += sum[i];
  volatile float sink = lane_sum(all);
  (void)sink;
}

// Read bytes (a multiple of 256), fetching `ahead` bytes early; past the end of this block from `next`.
static void probe_read(const char* p, int64_t bytes, const char* next) {
  constexpr int64_t AHEAD = 4096;
  vi a{}, b{}, c{}, d{};
  auto at = [&](int64_t i) __attribute__((always_inline)) { return as_int(load(reinterpret_cast<const float*>(p + i))); };
  for (int64_t i = 0; i < bytes; i += 256) {
    if (next) {
      const char* from = i + AHEAD < bytes ? p + i + AHEAD : next + (i + AHEAD - bytes) % bytes;
      UNROLL for (int x = 0; x < 256; x += 64) prefetch(from + x);
    }
    UNROLL for (int x = 0; x < 256; x += 16 * VL) {
      a ^= at(i + x);
      b ^= at(i + x + 4 * VL);
      c ^= at(i + x + 8 * VL);
      d ^= at(i + x + 12 * VL);
    }
  }
  volatile int32_t sink = (a ^ b ^ c ^ d)[0];
  (void)sink;
}
