// Decode: few query rows per key head, keys and values read in place, in splits of fixed size that are merged after.
//
// One task walks a range of keys of one sequence over several key heads in three steps per chunk: scores, softmax,
// values. Each step prefetches what the next one reads, in address order, because hardware prefetchers do not follow
// a block table (software prefetch is worth 1.5 to 2 times there).

constexpr int CH = 16;       // keys of a chunk: 16, 32 and 64 are within 4 % of each other; 16 is a common block
constexpr int RT = 4;        // most rows of a register tile
constexpr int KT = VL / RT;  // keys of a register tile of scores: RT * KT sums fill the lanes of one vector

// 16-bit pairs are multiplied in place; anything else is widened to floats.
template <class P, int T> constexpr bool in_pairs = P::PAIR == 2 && T == BF16;

// Values in pairs come out of the registers in this order within each 32 columns (see pair_values).
#if HAS_DOT
AI void order_pairs(float* o, int n) {
  for (int d = 0; d + 2 * VL <= n; d += 2 * VL) {
    const vf low = load(o + d), high = load(o + d + VL);
    store(o + d, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
    store(o + d + VL,
          __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
  }
}
#else
AI void order_pairs(float*, int) {}
#endif

struct DecodeScratch {
  float *q, *s, *p, *o, *m, *l;
  int lda, ldo;
  static int stride(int dim) { return static_cast<int>(round_up(dim, 2 * VL)); }
  static size_t bytes(const Job& j, int rows, int heads) {
    return 4 * static_cast<size_t>(rows) * heads * (stride(j.dim) + stride(j.dim_v) + 2 * CH + VL + 1) + 1024;
  }
  DecodeScratch(const Job& j, int rows, int heads, char* base) : lda(stride(j.dim)), ldo(stride(j.dim_v)) {
    const size_t n = static_cast<size_t>(rows) * heads;
    q = reinterpret_cast<float*>(base);
    o = q + n * lda;
    s = o + n * ldo;
    p = s + n * CH;
    l = p + n * CH;
    m = l + n * VL;
  }
};

// Scores of N rows with KT keys; k[x] + offset is the row of key x.
template <class P, int T, int N> AI void score_keys(const float* q, int lda, const char* const* k, int64_t offset,
                                                    int dim, float* s) {
  constexpr bool PAIRS = in_pairs<P, T>;
  constexpr int STEP = PAIRS ? 2 * VL : VL;  // elements of a vector of words
  vf sum[RT * KT];
  UNROLL for (int i = 0; i < RT * KT; i++) sum[i] = vf{};
  const char* row[KT];
  UNROLL for (int x = 0; x < KT; x++) row[x] = k[x] + offset;
  int d = 0;
  for (; d + STEP <= dim; d += STEP) {
    vf key[KT];
    UNROLL for (int x = 0; x < KT; x++) {
      const char* p = row[x] + d * type_size(T);
      if constexpr (PAIRS) key[x] = load(reinterpret_cast<const float*>(p));
      else key[x] = load_as<T>(p);
    }
    UNROLL for (int y = 0; y < N; y++) {
      const vf query = load(q + y * lda + (PAIRS ? d / 2 : d));
      UNROLL for (int x = 0; x < KT; x++) {
        if constexpr (PAIRS) sum[y * KT + x] = P::mac(sum[y * KT + x], query, key[x]);
        else sum[y * KT + x] = fma(query, key[x], sum[y * KT + x]);
      }
    }
  }
  if (d < dim)
    for (int x = 0; x < KT; x++) {
      const char* p = row[x];
      if constexpr (PAIRS) {
        const vf key = load_words<P, T>(p, d, dim);
        UNROLL for (int y = 0; y < N; y++) sum[y * KT + x] = P::mac(sum[y * KT + x], load(q + y * lda + d / 2), key);
      } else {
        const vf key = load_part<T>(p + d * type_size(T), dim - d);
        UNROLL for (int y = 0; y < N; y++) sum[y * KT + x] = fma(load(q + y * lda + d), key, sum[y * KT + x]);
      }
    }
  alignas(64) float lanes[VL];
  store(lanes, sums(sum));
  UNROLL for (int y = 0; y < N; y++) UNROLL for (int x = 0; x < KT; x++) s[y * CH + x] = lanes[y * KT + x];
}

#if HAS_DOT
// Two rows of 32 bf16 -> pairs of their columns: columns 8i + 0..3 in `low`, 8i + 4..7 in `high`.
AI void pair_values(const char* a, const char* b, int n, vf& low, vf& high) {
  vf x, y;
  if (n >= 2 * VL) {
    x = load(reinterpret_cast<const float*>(a));
    y = load(reinterpret_cast<const float*>(b));
  } else {
    alignas(64) char copy[2][4 * VL] = {};
    __builtin_memcpy(copy[0], a, 2 * n);
    __builtin_memcpy(copy[1], b, 2 * n);
    x = load(reinterpret_cast<const float*>(copy[0]));
    y = load(reinterpret_cast<const float*>(copy[1]));
  }
  low = reinterpret_cast<vf>(_mm512_unpacklo_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
  high = reinterpret_cast<vf>(_mm512_unpackhi_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
}
#endif

// o[N rows][M vectors] += p * values, columns from d on; n keys. WHOLE: no column is past the end.
template <class P, int T, int N, int M, bool WHOLE> AI void add_values(const float* s, const float* p, const char* const* v,
                                                           int64_t offset, int d, int dim, int n, float* o, int ldo,
                                                           const char* const* next, int64_t next_offset, int next_bytes) {
  constexpr bool PAIRS = in_pairs<P, T>;
  constexpr int STEP = PAIRS ? 2 : 1;
  vf sum[N][M];
  UNROLL for (int y = 0; y < N; y++) UNROLL for (int x = 0; x < M; x++) sum[y][x] = load(o + y * ldo + d + VL * x);
  const int64_t at = offset + static_cast<int64_t>(d) * type_size(T);
  for (int k = 0; k < n; k += STEP) {
    vf value[M];
    const char* row = v[k] + at;
    if (next) {
      UNROLL for (int e = 0; e < STEP; e++)
        for (int x = 0; x < next_bytes; x += 64) prefetch(next[k + e] + next_offset + x);
    }
    if constexpr (PAIRS) {
#if HAS_DOT
      UNROLL for (int x = 0; x < M; x += 2)
        pair_values(row + x * VL * 2, v[k + 1] + at + x * VL * 2, WHOLE ? 2 * VL : dim - d - x * VL, value[x],
                    value[x + 1]);
#endif
    } else {
      UNROLL for (int x = 0; x < M; x++) {
        const char* at_x = row + x * VL * type_size(T);
        value[x] = WHOLE ? load_as<T>(at_x) : load_part<T>(at_x, dim - d - x * VL);
      }
    }
    UNROLL for (int y = 0; y < N; y++) {
      const vf weight = set1(PAIRS ? p[y * CH + k / 2] : s[y * CH + k]);
      UNROLL for (int x = 0; x < M; x++) {
        if constexpr (PAIRS) sum[y][x] = P::mac(sum[y][x], weight, value[x]);
        else sum[y][x] = fma(weight, value[x], sum[y][x]);
      }
    }
  }
  UNROLL for (int y = 0; y < N; y++) UNROLL for (int x = 0; x < M; x++) store(o + y * ldo + d + VL * x, sum[y][x]);
}

// Fold one chunk's scores into a row's maximum, sum and result; the scores become probabilities.
template <bool PAIRS> AI void fold_chunk(float* s, float* p, int n, float scale, float* m, float* l, float* o, int ldo) {
  vf top = load(s);
  for (int x = VL; x < n; x += VL) top = vmax(top, load(s + x));
  const float now = lane_max(top) * scale;
  vf sum = load(l);
  if (now > *m) {
    if (*m != -INF) {
      const vf factor = set1(exp2v<false>(set1(*m - now))[0]);
      sum *= factor;
      for (int d = 0; d < ldo; d += VL) store(o + d, load(o + d) * factor);
    }
    *m = now;
  }
  const vf by = set1(scale), minus = set1(*m == -INF ? 0.f : -*m);
  for (int x = 0; x < n; x += VL) {
    const vf e = exp2v<false>(fma(load(s + x), by, minus));
    sum += e;
    if constexpr (PAIRS) *reinterpret_cast<vh_any*>(reinterpret_cast<uint16_t*>(p) + x) = to_bf16(e);
    else store(s + x, e);
  }
  store(l, sum);
}

// Split rows into tiles of RT, 2 and 1.
#define FOR_ROWS(rows, ...)                                          \
  for (int y = 0; y < (rows);) {                                     \
    if ((rows) - y >= RT) { constexpr int N = RT; __VA_ARGS__; y += N; } \
    else if ((rows) - y >= 2) { constexpr int N = 2; __VA_ARGS__; y += N; } \
    else { constexpr int N = 1; __VA_ARGS__; y += N; }               \
  }

template <class P, int T> static __attribute__((noinline)) void score_chunk(
    const Job& j, const DecodeScratch& at, int rows, int h, int64_t offset, const char* const* k, int x) {
  const float* q = at.q + static_cast<int64_t>(h) * rows * at.lda;
  float* s = at.s + static_cast<int64_t>(h) * rows * CH + x;
  FOR_ROWS(rows, (score_keys<P, T, N>(q + y * at.lda, at.lda, k + x, offset, j.dim, s + y * CH)));
}

template <class P, int T> static __attribute__((noinline)) void value_chunk(
    const Job& j, const DecodeScratch& at, int rows, int h, int64_t offset, const char* const* v, int n,
    const char* const* next, int64_t next_offset) {
  const int64_t row = static_cast<int64_t>(h) * rows;
  float *s = at.s + row * CH, *p = at.p + row * CH, *o = at.o + row * at.ldo;
  constexpr int M = in_pairs<P, T> ? (NC / 2 * 2 ? NC / 2 * 2 : 2) : NC;
  const int width = in_pairs<P, T> ? 2 * VL : VL;
  // The keys of the next chunk, a part of each row with each block of columns.
  const int blocks = (at.ldo + M * VL - 1) / (M * VL), part = (j.dim * type_size(T) + blocks - 1) / blocks;
  FOR_ROWS(rows, {
    int d = 0;
    const char* const* ahead = y == 0 ? next : nullptr;
    int64_t from = next_offset;
    for (; d + M * VL <= j.dim_v; d += M * VL, from += part)
      add_values<P, T, N, M, true>(s + y * CH, p + y * CH, v, offset, d, j.dim_v, n, o + y * at.ldo, at.ldo, ahead,
                                   from, part);
    for (; d + M * VL <= round_up(j.dim_v, width); d += M * VL, from += part)
      add_values<P, T, N, M, false>(s + y * CH, p + y * CH, v, offset, d, j.dim_v, n, o + y * at.ldo, at.ldo, ahead,
                                    from, part);
    constexpr int W = in_pairs<P, T> ? 2 : 1;
    for (; d < j.dim_v; d += W * VL)
      add_values<P, T, N, W, false>(s + y * CH, p + y * CH, v, offset, d, j.dim_v, n, o + y * at.ldo, at.ldo, nullptr,
                                    0, 0);
  });
}

template <class P, int TK> static void decode_typed(const Job& j, const DecodeTask& t, char* base) {
  constexpr bool PAIRS = in_pairs<P, TK>;
  const Sequence s = sequence(j, t.b);
  const int rows = s.n_q * j.group, heads = t.h1 - t.h0;
  const DecodeScratch at(j, rows, heads, base);
  for (int h = 0; h < heads; h++)
    for (int r = 0; r < rows; r++) {
      const int64_t n = static_cast<int64_t>(h) * rows + r;
      const char* row = query_row(j, j.q, s, t.b, r / j.group, (t.h0 + h) * j.group + r % j.group);
      if constexpr (PAIRS) {
        FOR_TYPE(j.q.type, (copy_row<P, T>(at.q + n * at.lda, row, j.dim)));
      } else {
        FOR_TYPE(j.q.type, (copy_row<Fma, T>(at.q + n * at.lda, row, j.dim)));
      }
      for (int d = 0; d < at.ldo; d += VL) store(at.o + n * at.ldo + d, vf{});
      store(at.l + n * VL, vf{});
      at.m[n] = -INF;
    }
  const bool simple = plain(j);
  const int size = type_size(TK), bytes_v = j.dim_v * size;
  const bool tokens_outside = j.k.token >= j.k.head;  // (token, head) storage: address order is token by token
  const char *k[CH], *v[CH], *ahead[CH];
  auto rows_of = [&](const Rows& tensor, int first, const char** to) __attribute__((always_inline)) {
    // Past the last key its row again: finite wherever the row itself is, and multiplied by 0.
    for (int x = 0; x < CH; x++) to[x] = key_row(j, tensor, s, t.b, least(first + x, t.k1 - 1), 0);
  };
  if (t.k0 < t.k1) rows_of(j.k, t.k0, k);
  for (int c = t.k0; c < t.k1; c += CH) {
    const int n = least(CH, t.k1 - c), padded = static_cast<int>(round_up(n, VL));
    rows_of(j.v, c, v);
    const bool more = c + CH < t.k1;
    if (more) rows_of(j.k, c + CH, ahead);
    const int64_t step_k = j.k.head * size, step_v = j.v.head * size;
    auto scores = [&](int h, int x) __attribute__((always_inline)) {
      for (int e = 0; e < KT; e++) prefetch_row(v[x + e] + (t.h0 + h) * step_v, bytes_v);
      score_chunk<P, TK>(j, at, rows, h, (t.h0 + h) * step_k, k, x);
    };
    if (tokens_outside)
      for (int x = 0; x < padded; x += KT)
        for (int h = 0; h < heads; h++) scores(h, x);
    else
      for (int h = 0; h < heads; h++)
        for (int x = 0; x < padded; x += KT) scores(h, x);
    for (int h = 0; h < heads; h++) {
      const float scale = scale_of(j, t.b, t.h0 + h);
      for (int r = 0; r < rows; r++) {
        const int64_t at_row = static_cast<int64_t>(h) * rows + r;
        Row row = row_of(j, s, t.b, r / j.group, (t.h0 + h) * j.group + r % j.group);
        row.hi = least(row.hi, t.k1);
        float *from = at.s + at_row * CH, *to = at.p + at_row * CH;
        if (simple) hide_ends(row, c, padded, from);
        else logits(j, row, scale, c, padded, s.n_k, from, nullptr);
        fold_chunk<PAIRS>(from, to, padded, simple ? scale * LOG2E : 1.f, at.m + at_row, at.l + at_row * VL,
                          at.o + at_row * at.ldo, at.ldo);
      }
    }
    for (int h = 0; h < heads; h++)
      value_chunk<P, TK>(j, at, rows, h, (t.h0 + h) * step_v, v, static_cast<int>(round_up(n, PAIRS ? 2 : 1)),
                         more ? ahead : nullptr, (t.h0 + h) * step_k);
    if (more) __builtin_memcpy(k, ahead, sizeof k);
  }
  for (int h = 0; h < heads; h++)
    for (int r = 0; r < rows; r++) {
      const int64_t n = static_cast<int64_t>(h) * rows + r;
      float* o = at.o + n * at.ldo;
      const float total = lane_sum(load(at.l + n * VL));
      if (PAIRS) order_pairs(o, at.ldo);
      if (t.partial) {
        float* to = t.partial + n * (at.ldo + 2);
        __builtin_memcpy(to, o, 4 * at.ldo);
        to[at.ldo] = at.m[n];
        to[at.ldo + 1] = total;
      } else {
        finish_row(j, s, t.b, r / j.group, (t.h0 + h) * j.group + r % j.group, o, at.m[n], total);
      }
    }
}

static void decode(const Job& j, const DecodeTask& t, char* base) {
#if HAS_DOT && !HAS_AMX  // where AMX is, widening is 1.05 to 1.09 times faster: isa.hpp
  if (j.q.type == BF16 && j.k.type == BF16) return decode_typed<Dot, BF16>(j, t, base);
#endif
  FOR_TYPE(j.k.type, decode_typed<Fma, T>(j, t, base));
}

static size_t partial_floats(const Job& j, int rows) {
  return static_cast<size_t>(rows) * (DecodeScratch::stride(j.dim_v) + 2);
}

// Merge the partial results of one key head; `stride` floats from one split to the next.
static void merge(const Job& j, int b, int kv_head, const float* partials, int splits, size_t stride) {
  const Sequence s = sequence(j, b);
  const int rows = s.n_q * j.group, ldo = DecodeScratch::stride(j.dim_v);
  for (int r = 0; r < rows; r++) {
    const float* part = partials + static_cast<size_t>(r) * (ldo + 2);
    float m = -INF, total = 0;
    for (int x = 0; x < splits; x++) m = most(m, part[x * stride + ldo]);
    if (m != -INF)
      for (int x = 0; x < splits; x++) total += exp2v<false>(set1(part[x * stride + ldo] - m))[0] * part[x * stride + ldo + 1];
    // The first split's place takes the sum: nobody reads it again.
    float* into = const_cast<float*>(part);
    for (int d = 0; d < ldo; d += VL) {
      vf sum{};
      if (m != -INF)
        for (int x = 0; x < splits; x++)
          sum = fma(exp2v<false>(set1(part[x * stride + ldo] - m)), load(part + x * stride + d), sum);
      store(into + d, sum);
    }
    finish_row(j, s, b, r / j.group, kv_head * j.group + r % j.group, into, m, total);
  }
}
