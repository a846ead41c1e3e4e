// Products: how operands are packed into 32-bit words, the register tiles, and packing itself.
//
// Dot multiplies pairs of bf16 (one word = two elements), Fma single floats. A tile multiplies MR rows of words with a
// panel [word][PK] (scores) or with rows of words (values); both keep MR x NC vectors of sums in registers. Amx takes
// the same layout as Dot, padded to whole tiles: amx.hpp.

// PAIR: elements of a word. WORDS, COLUMNS: a panel's words and the columns of packed rows are multiples of these.
// KEYS: the last keys are packed up to a multiple of this. NARROW: a last panel of fewer keys is no wider than they are,
// so that it fills its lines and leaves L1 to others.
struct Fma {
  static constexpr int PAIR = 1, WORDS = 1, COLUMNS = VL, KEYS = 1;
  static constexpr bool NARROW = true;
  AI vf mac(vf c, vf a, vf b) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
#define HAS_DOT 1
struct Dot {
  static constexpr int PAIR = 2, WORDS = 1, COLUMNS = VL, KEYS = 2;
  static constexpr bool NARROW = true;
  AI vf mac(vf c, vf a, vf b) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#else
#define HAS_DOT 0
#endif

#if defined(__AMX_BF16__)
#define HAS_AMX 1
struct Amx {
  static constexpr int PAIR = 2, WORDS = 16, COLUMNS = 32, KEYS = 32;
  static constexpr bool NARROW = false;
};
#else
#define HAS_AMX 0
#endif

// Two vectors of floats -> one vector of bf16 pairs in element order.
#if HAS_DOT
AI vf pack_pairs(vf first, vf second) { return reinterpret_cast<vf>(_mm512_cvtne2ps_pbh(second, first)); }
#endif

// One vector of words from elements [at, dim) of a row.
template <class P, int T> AI vf load_words(const char* row, int at, int dim) {
  if constexpr (P::PAIR == 1) {
    return load_part<T>(row + static_cast<int64_t>(at) * type_size(T), dim - at);
  } else {
#if HAS_DOT
    const char* p = row + static_cast<int64_t>(at) * type_size(T);
    if (T == BF16 && dim - at >= 2 * VL) return load(reinterpret_cast<const float*>(p));
    return pack_pairs(load_part<T>(p, dim - at), load_part<T>(p + VL * type_size(T), dim - at - VL));
#endif
  }
}

template <class P> AI int words_of(int dim) {
  return static_cast<int>(round_up((dim + P::PAIR - 1) / P::PAIR, P::WORDS));
}
template <class P> AI int columns_of(int dim) { return static_cast<int>(round_up(dim, P::COLUMNS)); }
template <class P> AI int padded_words(int dim) { return static_cast<int>(round_up(words_of<P>(dim), VL)); }

// Copy a row of any type as words, zero up to a multiple of VL words.
template <class P, int T> AI void copy_row(float* to, const char* row, int dim) {
  for (int w = 0; w < padded_words<P>(dim); w += VL) store(to + w, load_words<P, T>(row, w * P::PAIR, dim));
}

// Call fn<P, T> for a run-time type.
#define FOR_TYPE(type, ...)                                    \
  switch (type) {                                              \
    case F32: { constexpr int T = F32; __VA_ARGS__; break; }   \
    case BF16: { constexpr int T = BF16; __VA_ARGS__; break; } \
    case F16: { constexpr int T = F16; __VA_ARGS__; break; }   \
    case E4M3: { constexpr int T = E4M3; __VA_ARGS__; break; } \
    case E5M2: { constexpr int T = E5M2; __VA_ARGS__; break; } \
    default: { constexpr int T = I8; __VA_ARGS__; break; }     \
  }

// Floats from one word of a panel to the next, of which n keys are left.
template <class P> AI int width_of(int n) { return P::NARROW && n < PK ? static_cast<int>(round_up(n, VL)) : PK; }

// A panel of n keys: rows[i] (null: zeros) -> to[word][key], whole vectors of keys.
template <class P, int T> static void pack_panel(float* to, const char* const* rows, int dim, int n) {
  const int words = words_of<P>(dim), width = width_of<P>(n);
  auto fetch = [&](int j) {
    for (int i = 0; i < VL && j < n; i++)
      if (rows[j + i]) prefetch_row(rows[j + i], dim * type_size(T));
  };
  fetch(0);
  for (int j = 0; j < n; j += VL) {
    fetch(j + VL);
    for (int w = 0; w < words; w += VL) {
      vf r[VL];
      UNROLL for (int i = 0; i < VL; i++) r[i] = rows[j + i] ? load_words<P, T>(rows[j + i], w * P::PAIR, dim) : vf{};
      transpose(r);
      const int m = least(VL, words - w);
      for (int i = 0; i < m; i++) store(to + static_cast<int64_t>(w + i) * width + j, r[i]);
    }
  }
}

// Up to VL elements as the bits of bf16 numbers.
template <int T> AI vu load_bf16(const char* p, int n) {
  if (T == BF16 && n >= VL) return wide(*reinterpret_cast<const vh_any*>(p));
  return wide(to_bf16(load_part<T>(p, n)));
}

// Rows for the second product: [row / PAIR][padded dim] words; with pairs, word = (row 2i, row 2i + 1) of one column.
template <class P, int T> static void pack_rows(float* to, const char* const* rows, int dim, int n) {
  const int columns = columns_of<P>(dim);
  const int64_t size = type_size(T);
  auto fetch = [&](int first, int end) {
    for (int k = first; k < least(end, n); k++)
      if (rows[k]) prefetch_row(rows[k], dim * type_size(T));
  };
  fetch(0, 8);
  for (int k = 0; k < n; k += P::PAIR) {
    fetch(k + 8, k + 8 + P::PAIR);
    for (int d = 0; d < columns; d += VL) {
      float* at = to + static_cast<int64_t>(k / P::PAIR) * columns + d;
      if constexpr (P::PAIR == 1) {
        store(at, rows[k] ? load_part<T>(rows[k] + d * size, dim - d) : vf{});
      } else {
        const vu low = rows[k] ? load_bf16<T>(rows[k] + d * size, dim - d) : vu{};
        const vu high = rows[k + 1] ? load_bf16<T>(rows[k + 1] + d * size, dim - d) : vu{};
        store(at, as_float(low | high << 16));
      }
    }
  }
}

// c[MR][N vectors of keys] = rows (stride lda words) * panel.
template <class P, int N> static __attribute__((noinline)) void score_tile(const float* a, int lda, const float* panel,
                                                                           int width, int words, float* c, int ldc) {
  vf sum[MR][N];
  UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < N; j++) sum[i][j] = vf{};
  // A pointer for each row: an index made from i * lda took two more instructions for each broadcast.
  const float* row[MR];
  UNROLL for (int i = 0; i < MR; i++) row[i] = a + static_cast<int64_t>(i) * lda;
  for (int64_t w = 0; w < words; w++, panel += width) {
    vf b[N];
    UNROLL for (int j = 0; j < N; j++) b[j] = load(panel + VL * j);
    UNROLL for (int i = 0; i < MR; i++) {
      const vf x = set1(row[i][w]);
      UNROLL for (int j = 0; j < N; j++) sum[i][j] = P::mac(sum[i][j], x, b[j]);
    }
  }
  UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < N; j++) store(c + i * ldc + VL * j, sum[i][j]);
}

// Scores with keys [start, stop) of panels that hold n keys from key 0 on (start is a multiple of PK), whole vectors of
// them.
template <class P> AI void score_tiles(const float* a, int lda, const float* panels, int words, int start, int stop,
                                       int n, float* c, int ldc) {
  int x = start;
  for (; x + PK - VL < stop; x += PK)
    score_tile<P, NC>(a, lda, panels + static_cast<int64_t>(x) * words, width_of<P>(n - x), words, c + x, ldc);
  if (x >= stop) return;
  const float* panel = panels + static_cast<int64_t>(x) * words;
  const int vectors = (stop - x + VL - 1) / VL, width = width_of<P>(n - x);
  if (vectors == 1) score_tile<P, 1>(a, lda, panel, width, words, c + x, ldc);
#if defined(__AVX512F__) || defined(__aarch64__)
  if (vectors == 2) score_tile<P, 2>(a, lda, panel, width, words, c + x, ldc);
  if (vectors == 3) score_tile<P, 3>(a, lda, panel, width, words, c + x, ldc);
#endif
}

// o[MR][N vectors] = factor * o + p[MR][words] * rows (stride ldv words). A block is summed on its own and then added:
// one chain of sums through thousands of keys was five times as far off as PyTorch's result in fp32.
template <class P, int N> static __attribute__((noinline)) void value_tile(const float* p, int ldp, const float* v,
                                                                           int ldv, int words, float* o, int ldo,
                                                                           const float* factor) {
  vf sum[MR][N];
  UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < N; j++) sum[i][j] = vf{};
  const float* row[MR];
  UNROLL for (int i = 0; i < MR; i++) row[i] = p + static_cast<int64_t>(i) * ldp;
  for (int64_t w = 0; w < words; w++, v += ldv) {
    vf b[N];
    UNROLL for (int j = 0; j < N; j++) b[j] = load(v + VL * j);
    UNROLL for (int i = 0; i < MR; i++) {
      const vf x = set1(row[i][w]);
      UNROLL for (int j = 0; j < N; j++) sum[i][j] = P::mac(sum[i][j], x, b[j]);
    }
  }
  UNROLL for (int i = 0; i < MR; i++) {
    const vf by = set1(factor ? factor[i] : 1.f);
    UNROLL for (int j = 0; j < N; j++) {
      float* to = o + i * ldo + VL * j;
      store(to, fma(load(to), by, sum[i][j]));
    }
  }
}

// All columns of a row tile.
template <class P> AI void value_tiles(const float* p, int ldp, const float* v, int ldv, int words, float* o, int ldo,
                                       const float* factor) {
  int d = 0;
  for (; d + NC * VL <= ldv; d += NC * VL) value_tile<P, NC>(p, ldp, v + d, ldv, words, o + d, ldo, factor);
  const int rest = (ldv - d) / VL;
  if (rest == 1) value_tile<P, 1>(p, ldp, v + d, ldv, words, o + d, ldo, factor);
#if defined(__AVX512F__) || defined(__aarch64__)
  if (rest == 2) value_tile<P, 2>(p, ldp, v + d, ldv, words, o + d, ldo, factor);
  if (rest == 3) value_tile<P, 3>(p, ldp, v + d, ldv, words, o + d, ldo, factor);
#endif
}

// Write a row of probabilities or score gradients as words.
template <class P> AI void store_words(float* to, int at, vf x, vf y) {
  if constexpr (P::PAIR == 1) {
    store(to + at, x);
    store(to + at + VL, y);
  } else {
#if HAS_DOT
    store(to + at / 2, pack_pairs(x, y));
#endif
  }
}
