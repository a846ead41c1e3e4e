// Prefill of bf16 on AMX. Tiles hold 16 rows of 16 sums; four of them, 32 rows by 32 columns, are summed up at a time.
//
// An item is 32 rows and up to SB keys. The matrix unit works on its own, so the products of two items run beside the
// softmax of a third: a stage interleaves, instruction by instruction, values of the item before and scores of the next
// one with the softmax of the present one.

#if HAS_AMX

constexpr int TR = 32;   // rows of an item
constexpr int TC = 32;   // columns that are summed up together
constexpr int SB = 256;  // keys of an item: fewer make the result, which is read and written per item, cost more

// Every tile is whole (operands are padded), so one configuration serves all tasks. It is let go at the end of a task:
// code that configures tiles for itself, as torch's does, finds them as if nobody else were here. No destructor does it:
// that would bring in what exceptions need, a weak symbol (tests/test_cpu_build.py).
AI void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// Rows [r, r + rows) of a task, keys k0 + [start, stop) of its sequence; start and stop are multiples of TC.
struct Item {
  int r, rows, k0, start, stop, index;
};

// The items of a task in order: blocks of KB keys, which all rows read while they lie in L2, then rows, then keys.
struct Items {
  const Row* rows;
  int count, end, block, r, k0, made = 0;

  Items(const Row* of, int n) : rows(of), count(n), end(of[n - 1].hi), block(of[0].lo / KB * KB), r(0), k0(block) {}

  bool next(Item* to) {
    for (; block < end; block += KB, r = 0, k0 = block)
      for (; r < count; r += TR, k0 = block) {
        const int n = least(TR, count - r), lo = rows[r].lo, hi = least(rows[r + n - 1].hi, block + KB);
        if (k0 + SB <= lo) k0 = lo / SB * SB;
        if (k0 >= hi) continue;
        *to = {r, n, k0, most(0, lo - k0) / TC * TC, static_cast<int>(round_up(least(hi - k0, SB), TC)), made++};
        k0 += SB;
        return true;
      }
    return false;
  }
};

struct AmxScratch {
  float *q, *o, *l, *s, *p, *m, *shift, *bias;
  Row* rows;
  static size_t bytes(const Job& j, int n) {
    const size_t padded = round_up(n, TR);
    return padded * (4 * (words_of<Amx>(j.dim) + columns_of<Amx>(j.dim_v) + VL + 2) + sizeof(Row)) + 2 * TR * SB * 6 +
           4 * KB + 4096;
  }
  AmxScratch(const Job& j, int n, char* base) {
    const size_t padded = round_up(n, TR);
    q = reinterpret_cast<float*>(base);
    o = q + padded * words_of<Amx>(j.dim);
    l = o + padded * columns_of<Amx>(j.dim_v);
    s = l + padded * VL;
    p = s + 2 * TR * SB;
    m = p + TR * SB;
    shift = m + padded;
    bias = shift + padded;
    rows = reinterpret_cast<Row*>(bias + KB);
  }
  float* scores(const Item& item) const { return s + (item.index & 1) * (TR * SB); }
  float* probabilities(const Item& item) const { return p + (item.index & 1) * (TR * SB / 2); }
};

// The products of a stage, one step (32 x 32 sums, 16 words deep) at a time, a step in four parts of one product each.
struct Products {
  const AmxScratch& at;
  const float *k, *v;  // packed
  int words, columns;
  Item value{}, score{};     // rows == 0: none
  int value_groups = 0;      // groups of TC columns
  int total = 0, done = 0;   // steps
  int group = 0, left = 0;   // groups opened, steps left of the present one
  bool first = false, load_sums = false, write = false;
  const float *a = nullptr, *b = nullptr;
  float *c = nullptr, *old = nullptr;  // sums of this group and of the one before
  int64_t lda = 0, ldb = 0, b_step = 0, ldc = 0, ld_old = 0;  // bytes, but b_step: floats

  Products(const AmxScratch& scratch, const Packed& kv, int w, int n)
      : at(scratch), k(reinterpret_cast<const float*>(kv.k)), v(reinterpret_cast<const float*>(kv.v)), words(w),
        columns(n) {}

  void begin(const Item& before, const Item& next) {
    value = before, score = next;
    value_groups = value.rows ? columns / TC : 0;
    const int score_groups = (score.stop - score.start) / TC;
    total = value_groups * ((value.stop - value.start) / TC) + score_groups * (words / 16);
    group = left = done = 0;
  }

  INLINE void open() {
    old = c, ld_old = ldc, write = group > 0, load_sums = group < value_groups;
    if (load_sums) {
      left = (value.stop - value.start) / TC;
      a = at.probabilities(value) + value.start / 2;
      lda = SB * 2;
      b = v + static_cast<int64_t>((value.k0 + value.start) / 2) * columns + group * TC;
      ldb = columns * 4;
      b_step = 16 * static_cast<int64_t>(columns);
      c = at.o + static_cast<int64_t>(value.r) * columns + group * TC;
      ldc = columns * 4;
    } else {
      const int x = score.start + (group - value_groups) * TC, key = score.k0 + x;
      left = words / 16;
      a = at.q + static_cast<int64_t>(score.r) * words;
      lda = words * 4;
      b = k + static_cast<int64_t>(key / PK * PK) * words + key % PK;
      ldb = PK * 4;
      b_step = 16 * PK;
      c = at.scores(score) + x;
      ldc = SB * 4;
    }
    group++;
  }

#define SUMS(i, p, ld) (p + ((i) & 1) * 16 + ((i) >> 1) * 4 * (ld))
  // The sums of a group are written when the next one takes their tile: by then they are there.
#define START_SUMS(i)                                         \
  if (first) {                                                \
    if (write) _tile_stored(i, SUMS(i, old, ld_old), ld_old); \
    if (load_sums) _tile_loadd(i, SUMS(i, c, ldc), ldc);      \
    else _tile_zero(i);                                       \
  }
  INLINE void part0() {
    first = left == 0;
    if (first) open();
    START_SUMS(0)
    _tile_loadd(4, a, lda);
    _tile_loadd(6, b, ldb);
    _tile_dpbf16ps(0, 4, 6);
  }
  INLINE void part1() {
    START_SUMS(1)
    _tile_loadd(7, b + 16, ldb);
    _tile_dpbf16ps(1, 4, 7);
  }
  INLINE void part2() {
    START_SUMS(2)
    _tile_loadd(5, a + 4 * lda, lda);
    _tile_dpbf16ps(2, 5, 6);
  }
  INLINE void part3() {
    START_SUMS(3)
    _tile_dpbf16ps(3, 5, 7);
    a += 16;
    b += b_step;
    left--;
    done++;
  }

  void until(int n) {
    while (done < n) part0(), part1(), part2(), part3();
  }

  void finish() {
    until(total);
    if (!total) return;
    _tile_stored(0, SUMS(0, c, ldc), ldc);
    _tile_stored(1, SUMS(1, c, ldc), ldc);
    _tile_stored(2, SUMS(2, c, ldc), ldc);
    _tile_stored(3, SUMS(3, c, ldc), ldc);
  }
};

// Fetches the next block of keys and values into L2 while this one is multiplied, some lines with each row.
struct Ahead {
  const char *k, *v;
  int key_bytes, value_bytes, keys;  // bytes of a key, and how many keys there are
  int of = -1;
  const char *from = nullptr, *from_v = nullptr, *end = nullptr;

  INLINE void block(int k0, int rows) {
    if (k0 == of || !rows) return;
    of = k0;
    const int n = k0 < keys ? least(KB, keys - k0) : 0;
    from = k + static_cast<int64_t>(k0) * key_bytes;
    from_v = v + static_cast<int64_t>(k0) * value_bytes;
    end = from + static_cast<int64_t>(n) * key_bytes;
  }
  INLINE void some() {
    if (from >= end) return;
    UNROLL for (int i = 0; i < 4; i++) {
      prefetch(from + 64 * i);
      prefetch(from_v + 64 * i);
    }
    from += 256;
    from_v += 256;
  }
};

// The maximum of a row follows its scores only where they leave it behind by this many powers of two: probabilities
// up to 2^8 are as exact as any others, and the result needs no rescaling.
constexpr float LAZY = 8;

// Scores s of keys [a, n) -> bf16 probabilities p, updating maximum and sums; returns the factor for the result.
// Between the exponentials products are done up to `steps`, one instruction at a time: no reordering reaches further.
INLINE float softmax_lazy(const float* s, float* p, int a, int n, float scale, float* m, float* shift, float* l,
                          Products& products, int steps) {
  products.until(steps - (n - a) / 128);
  vf top0 = load(s + a), top1 = load(s + a + VL);
  for (int x = a + 2 * VL; x < n; x += 2 * VL) {
    top0 = vmax(top0, load(s + x));
    top1 = vmax(top1, load(s + x + VL));
  }
  top0 = vmax(top0, top1) * set1(scale);
  float factor = 1;
  if (__builtin_expect(_mm512_cmp_ps_mask(top0, set1(*m + LAZY), _CMP_GT_OQ) != 0, 0)) {
    const float old = *m, now = lane_max(top0);
    factor = old == -INF ? 0.f : exp2v<false>(set1(old - now))[0];
    *m = *shift = now;
    store(l, load(l) * set1(factor));
  }
  const vf by = set1(scale), minus = set1(-*shift);
  vf sum0 = load(l), sum1{};
  auto exponentials = [&](int x) __attribute__((always_inline)) {
    const vf e0 = exp2v<true>(fma(load(s + x), by, minus)), e1 = exp2v<true>(fma(load(s + x + VL), by, minus));
    store(p + x / 2, pack_pairs(e0, e1));
    sum0 += e0;
    sum1 += e1;
  };
  int x = a;
  for (; x + 128 <= n && products.done < steps; x += 128) {
    products.part0();
    exponentials(x);
    products.part1();
    exponentials(x + 32);
    products.part2();
    exponentials(x + 64);
    products.part3();
    exponentials(x + 96);
  }
  for (; x < n; x += 2 * VL) exponentials(x);
  products.until(steps);
  store(l, sum0 + sum1);
  return factor;
}

template <> INLINE TaskRows prefill_rows<Amx>(const Job&) { return {TR, 384}; }
template <> INLINE size_t prefill_scratch<Amx>(const Job& j, int rows) { return AmxScratch::bytes(j, rows); }

template <> void prefill<Amx>(const Job& j, const PrefillTask& t, char* base) {
  const bool simple = plain(j), shared = shared_bias(j);
  int biased = -1;  // block of keys whose bias lies in scratch
  const Sequence s = sequence(j, t.b);
  const AmxScratch at(j, t.rows, base);
  const int words = words_of<Amx>(j.dim), columns = columns_of<Amx>(j.dim_v);
  for (int r = 0; r < t.rows; r++) {
    const Place place = place_of(j, t.row + r);
    const int i = place.i, h = t.kv_head * j.group + place.g;
    if (r + 8 < t.rows)
      prefetch_row(query_row(j, j.q, s, t.b, place_of(j, t.row + r + 8).i, h), j.dim * type_size(j.q.type));
    const char* row = query_row(j, j.q, s, t.b, i, h);
    FOR_TYPE(j.q.type, (copy_row<Amx, T>(at.q + static_cast<int64_t>(r) * words, row, j.dim)));
    for (int d = 0; d < columns; d += VL) store(at.o + static_cast<int64_t>(r) * columns + d, vf{});
    store(at.l + r * VL, vf{});
    at.m[r] = -INF;
    at.shift[r] = 0;
    at.rows[r] = row_of(j, s, t.b, i, h);
    if (shared) at.rows[r].bias = nullptr;
  }
  const float scale = scale_of(j, t.b, t.kv_head), by = simple ? scale * LOG2E : 1.f;
  Products products(at, t.kv, words, columns);
  Items items(at.rows, t.rows);
  Item before{}, now{}, next{};
  configure_tiles();
  Ahead ahead{t.kv.k, t.kv.v, words * 4, columns * 2, items.end};
  for (items.next(&next); before.rows || now.rows || next.rows;) {
    products.begin(before, next);
    ahead.block(now.k0 / KB * KB + KB, now.rows);
    float factor[TR];
    bool rescale = false;
    const int block = now.k0 / KB * KB;
    if (shared && now.rows && block != biased)
      copy_shared_bias(j, t.b, t.kv_head * j.group, biased = block, least(KB, s.n_k - block), at.bias);
    float *scores = at.scores(now), *to = at.probabilities(now);
    for (int y = 0; y < now.rows; y++, scores += SB, to += SB / 2) {
      const int r = now.r + y;
      const Row& row = at.rows[r];
      ahead.some();
      if (simple) hide_ends(row, now.k0 + now.start, now.stop - now.start, scores + now.start);
      else
        logits(j, row, scale, now.k0 + now.start, now.stop - now.start, s.n_k, scores + now.start,
               shared ? at.bias + (now.k0 - block + now.start) : nullptr);
      factor[y] = softmax_lazy(scores, to, now.start, now.stop, by, at.m + r, at.shift + r, at.l + r * VL,
                               products, products.total * (y + 1) / now.rows);
      rescale |= factor[y] != 1.f;
    }
    products.finish();
    if (rescale)
      for (int y = 0; y < now.rows; y++) {
        float* o = at.o + static_cast<int64_t>(now.r + y) * columns;
        for (int d = 0; d < columns; d += VL) store(o + d, load(o + d) * set1(factor[y]));
      }
    before = now, now = next;
    if (!items.next(&next)) next = Item{};
  }
  _tile_release();
  for (int r = 0; r < t.rows; r++)
    finish_row(j, s, t.b, at.rows[r].i, at.rows[r].h, at.o + static_cast<int64_t>(r) * columns, at.m[r],
               lane_sum(load(at.l + r * VL)));
}

#endif
