// Backward of prefill. Probabilities are rebuilt from the log-sum-exp; with dP = dO V^T and delta = rowsum(dO * O) - dlse
// the gradient of a logit is dS = P * (dP - delta). Two sweeps share one code: over rows of queries (dq, dbias) with
// keys as columns, and over rows of keys (dk, dv) with queries as columns. Each result has one writer, so the bits are
// the same on every run; the price is that S and dP are multiplied twice.

// A matrix of n rows, packed both ways: [panel][word][PK] to multiply with, [row / PAIR][dim] to sum up.
struct Side {
  float *panel, *rows;
};

template <class P> AI int64_t panel_floats(int n, int dim) { return round_up(n, PK) * words_of<P>(dim); }
template <class P> AI int64_t rows_floats(int n, int dim) { return round_up(n, PK) / P::PAIR * round_up(dim, VL); }

// Everything packed of one (sequence, key head).
template <class P> struct Packs {
  Side k, v;         // v: panel only
  Side q, dout;      // per head of the group, one after the other
  float *lse, *delta;
  int n_q, n_k, q_stride;  // q_stride: padded queries of a head
  int64_t q_panel, q_rows, do_panel, do_rows;  // floats of one head
  char* end;

  Packs(const Job& j, const Sequence& s, char* base) : n_q(s.n_q), n_k(s.n_k) {
    q_stride = static_cast<int>(round_up(n_q, PK));
    q_panel = panel_floats<P>(n_q, j.dim), q_rows = rows_floats<P>(n_q, j.dim);
    do_panel = panel_floats<P>(n_q, j.dim_v), do_rows = rows_floats<P>(n_q, j.dim_v);
    float* at = reinterpret_cast<float*>(base);
    auto take = [&](int64_t n) __attribute__((always_inline)) {
      float* here = at;
      at += round_up(n, 16);
      return here;
    };
    k.panel = take(panel_floats<P>(n_k, j.dim));
    k.rows = take(rows_floats<P>(n_k, j.dim));
    v.panel = take(panel_floats<P>(n_k, j.dim_v));
    v.rows = nullptr;
    q.panel = take(q_panel * j.group);
    q.rows = take(q_rows * j.group);
    dout.panel = take(do_panel * j.group);
    dout.rows = take(do_rows * j.group);
    lse = take(static_cast<int64_t>(q_stride) * j.group);
    delta = take(static_cast<int64_t>(q_stride) * j.group);
    end = reinterpret_cast<char*>(at);
  }
};

template <class P> static size_t unit_bytes(const Job& j, int n_q, int n_k) {
  Sequence s{0, 0, n_q, n_k};
  alignas(64) static char none[64];
  return Packs<P>(j, s, none).end - none;
}

// Rows [first, first + PK) of a tensor as pointers, null past n.
template <class At> AI void pointers(const char** to, int first, int n, const At& at) {
  for (int i = 0; i < PK; i++) to[i] = first + i < n ? at(first + i) : nullptr;
}

template <class P> AI void pack_side(const Side& to, int type, const char* const* rows, int first, int dim) {
  if (to.panel)
    FOR_TYPE(type, (pack_panel<P, T>(to.panel + static_cast<int64_t>(first) * words_of<P>(dim), rows, dim, PK)));
  if (to.rows)
    FOR_TYPE(type, (pack_rows<P, T>(to.rows + static_cast<int64_t>(first) / P::PAIR * round_up(dim, VL), rows, dim, PK)));
}

// Pack panel `panel` of the keys (head < 0) or of the queries of one head of the group.
template <class P> static void backward_pack(const Job& j, int b, int kv_head, int head, int panel, char* base) {
  const Sequence s = sequence(j, b);
  const Packs<P> to(j, s, base);
  const int first = panel * PK;
  const char* rows[PK];
  if (head < 0) {
    pointers(rows, first, s.n_k, [&](int i) { return key_row(j, j.k, s, b, i, kv_head); });
    pack_side<P>(to.k, j.k.type, rows, first, j.dim);
    pointers(rows, first, s.n_k, [&](int i) { return key_row(j, j.v, s, b, i, kv_head); });
    pack_side<P>(to.v, j.v.type, rows, first, j.dim_v);
    return;
  }
  const int h = kv_head * j.group + head;
  const Side q{to.q.panel + head * to.q_panel, to.q.rows + head * to.q_rows};
  const Side d{to.dout.panel + head * to.do_panel, to.dout.rows + head * to.do_rows};
  pointers(rows, first, s.n_q, [&](int i) { return query_row(j, j.q, s, b, i, h); });
  pack_side<P>(q, j.q.type, rows, first, j.dim);
  pointers(rows, first, s.n_q, [&](int i) { return query_row(j, j.dout, s, b, i, h); });
  pack_side<P>(d, j.dout.type, rows, first, j.dim_v);
  for (int i = first; i < first + PK; i++) {
    float *lse = to.lse + head * to.q_stride + i, *delta = to.delta + head * to.q_stride + i;
    *lse = INF;  // exp2(x - inf) = 0: a row without keys adds nothing
    *delta = 0;
    if (i >= s.n_q) continue;
    const int64_t at = j.cu_q ? s.q0 + i : i;
    const float value = j.lse[(j.cu_q ? 0 : b * j.lse_batch) + h * j.lse_head + at];
    if (value != -INF) *lse = value * LOG2E;
    const char *o = query_row(j, j.o, s, b, i, h), *g = rows[i - first];
    vf sum{};
    for (int x = 0; x < j.dim_v; x += VL)
      sum += load_typed(j.o.type, o + x * type_size(j.o.type), j.dim_v - x) *
             load_typed(j.dout.type, g + x * type_size(j.dout.type), j.dim_v - x);
    *delta = lane_sum(sum);
    if (j.dlse) *delta -= j.dlse[(j.cu_q ? 0 : b * j.dlse_batch) + h * j.dlse_head + at * j.dlse_token];
  }
}

// Scratch of a sweep over BR rows: the rows as words, sums, and the scores of a row tile.
constexpr int BR = 96;
struct Sweep {
  float *a, *c, *s, *dp, *p, *ds, *sum1, *sum2;
  static size_t bytes(const Job& j) {
    const size_t d = round_up(j.dim, VL), e = round_up(j.dim_v, VL);
    return 4 * (BR * 2 * (d + e) + 4 * MR * KB) + 4096;
  }
  Sweep(const Job& j, char* base) {
    const size_t d = round_up(j.dim, VL), e = round_up(j.dim_v, VL);
    a = reinterpret_cast<float*>(base);
    c = a + BR * d;
    sum1 = c + BR * e;
    sum2 = sum1 + BR * d;
    s = sum2 + BR * e;
    dp = s + MR * KB;
    p = dp + MR * KB;
    ds = p + MR * KB;
  }
};

// A row tile's words for `n` rows, read from a typed tensor.
template <class P, class At> AI void copy_rows(float* to, int lda, int n, int type, int dim, const At& at) {
  for (int r = 0; r < round_up(n, MR); r++) {
    if (r < n) { FOR_TYPE(type, (copy_row<P, T>(to + r * lda, at(r), dim))); }
    else for (int w = 0; w < lda; w += VL) store(to + r * lda + w, vf{});
  }
}

template <class P> AI void score_block(const float* a, int lda, const float* panels, int words, int start, int stop,
                                       float* to) {
  for (int x = start; x < stop; x += PK)
    score_tile<P, NC>(a, lda, panels + static_cast<int64_t>(x) * words, PK, words, to + x, KB);
}

AI void zero(float* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(float)); }

// dq, and dbias where wanted, of queries [i0, i0 + n) of one head.
template <class P> static void backward_queries(const Job& j, int b, int kv_head, int head, int i0, int n, char* base,
                                                char* scratch) {
  const Sequence s = sequence(j, b);
  const Packs<P> packs(j, s, base);
  const Sweep w(j, scratch);
  const int h = kv_head * j.group + head, words = words_of<P>(j.dim), words_v = words_of<P>(j.dim_v);
  const int lda = padded_words<P>(j.dim), ldc = padded_words<P>(j.dim_v), ldo = static_cast<int>(round_up(j.dim, VL));
  copy_rows<P>(w.a, lda, n, j.q.type, j.dim, [&](int r) { return query_row(j, j.q, s, b, i0 + r, h); });
  copy_rows<P>(w.c, ldc, n, j.dout.type, j.dim_v, [&](int r) { return query_row(j, j.dout, s, b, i0 + r, h); });
  zero(w.sum1, static_cast<int64_t>(BR) * ldo);
  zero(w.ds, MR * KB);
  const float scale = scale_of(j, b, kv_head), value_scale = j.v_descale.data ? table_at(j.v_descale, b, kv_head) : 1;
  const float *lse = packs.lse + head * packs.q_stride + i0, *delta = packs.delta + head * packs.q_stride + i0;
  for (int k0 = visible(j, s, i0).lo / KB * KB; k0 < visible(j, s, i0 + n - 1).hi; k0 += KB)
    for (int r = 0; r < n; r += MR) {
      const int rows = least(MR, n - r);
      const int start = most(0, visible(j, s, i0 + r).lo - k0) / PK * PK;
      const int stop = least(KB, visible(j, s, i0 + r + rows - 1).hi - k0);
      if (stop <= start) continue;
      score_block<P>(w.a + r * lda, lda, packs.k.panel + static_cast<int64_t>(k0) * words, words, start, stop, w.s);
      score_block<P>(w.c + r * ldc, ldc, packs.v.panel + static_cast<int64_t>(k0) * words_v, words_v, start, stop, w.dp);
      const int end = static_cast<int>(round_up(stop, 2 * VL));
      for (int y = 0; y < rows; y++) {
        const Row row = row_of(j, s, b, i0 + r + y, h);
        float* dbias = nullptr;
        if (j.dbias) dbias = j.dbias + b * j.dbias_batch + h * j.dbias_head + row.i * j.dbias_query;
        for (int x = start; x < end; x += 2 * VL) {
          vf both[2];
          UNROLL for (int e = 0; e < 2; e++) {
            const int at = y * KB + x + e * VL, key = k0 + x + e * VL;
            vf cap = set1(1.f);
            const vf logit_ = hide(row_logit(j, row, load(w.s + at), scale, key, s.n_k, &cap), row, key);
            const vf p = probability(logit_, set1(lse[r + y]));
            const vf gradient = p * (load(w.dp + at) * set1(value_scale) - set1(delta[r + y]));
            if (dbias) {
              for (int z = 0; z < VL && key + z < row.hi; z++) dbias[(key + z) * j.dbias_key] += gradient[z];
            }
            both[e] = gradient * cap;
          }
          store_words<P>(w.ds + y * (KB / P::PAIR), x, both[0], both[1]);
        }
      }
      value_tiles<P>(w.ds + start / P::PAIR, KB / P::PAIR,
                     packs.k.rows + static_cast<int64_t>((k0 + start) / P::PAIR) * ldo, ldo,
                     (stop - start + P::PAIR - 1) / P::PAIR, w.sum1 + r * ldo, ldo, nullptr);
    }
  for (int r = 0; r < n; r++) {
    const int64_t at = (j.cu_q ? s.q0 + i0 + r : b * j.seqlen_q + i0 + r) * j.heads + h;
    for (int d = 0; d < j.dim; d += VL)
      store_typed(j.out_type, j.dq + at * j.dim * type_size(j.out_type) + d * type_size(j.out_type),
                  load(w.sum1 + r * ldo + d) * set1(scale), j.dim - d);
  }
}

// Queries [first, last) that may see some key of [k0, k1).
AI Span seen_by(const Job& j, const Sequence& s, int k0, int k1) {
  // Key k is seen by query i iff -left <= k - (i + n_k - n_q) <= right.
  const int64_t shift = static_cast<int64_t>(s.n_k) - s.n_q;
  const int64_t first = j.right < 0 ? 0 : k0 - shift - j.right, last = j.left < 0 ? s.n_q : k1 - 1 - shift + j.left + 1;
  const int64_t lo = least<int64_t>(most<int64_t>(first, 0), s.n_q);
  return {static_cast<int>(lo), static_cast<int>(most<int64_t>(lo, least<int64_t>(last, s.n_q)))};
}

// dk and dv of keys [k0, k0 + n), summed over the heads of the group.
template <class P> static void backward_keys(const Job& j, int b, int kv_head, int k0, int n, char* base,
                                             char* scratch) {
  const Sequence s = sequence(j, b);
  const Packs<P> packs(j, s, base);
  const Sweep w(j, scratch);
  const int words = words_of<P>(j.dim), words_v = words_of<P>(j.dim_v);
  const int lda = padded_words<P>(j.dim), ldc = padded_words<P>(j.dim_v);
  const int ldk = static_cast<int>(round_up(j.dim, VL)), ldv = static_cast<int>(round_up(j.dim_v, VL));
  copy_rows<P>(w.a, lda, n, j.k.type, j.dim, [&](int r) { return key_row(j, j.k, s, b, k0 + r, kv_head); });
  copy_rows<P>(w.c, ldc, n, j.v.type, j.dim_v, [&](int r) { return key_row(j, j.v, s, b, k0 + r, kv_head); });
  zero(w.sum1, static_cast<int64_t>(BR) * ldk);
  zero(w.sum2, static_cast<int64_t>(BR) * ldv);
  zero(w.p, MR * KB);
  zero(w.ds, MR * KB);
  const float scale = scale_of(j, b, kv_head), value_scale = j.v_descale.data ? table_at(j.v_descale, b, kv_head) : 1;
  const Span all = seen_by(j, s, k0, k0 + n);
  for (int head = 0; head < j.group; head++) {
    const float *q_panel = packs.q.panel + head * packs.q_panel, *q_rows = packs.q.rows + head * packs.q_rows;
    const float *d_panel = packs.dout.panel + head * packs.do_panel, *d_rows = packs.dout.rows + head * packs.do_rows;
    const float *lse = packs.lse + head * packs.q_stride, *delta = packs.delta + head * packs.q_stride;
    const int h = kv_head * j.group + head;
    const Row any = s.n_q ? row_of(j, s, b, 0, h) : Row{};
    for (int i0 = all.lo / KB * KB; i0 < all.hi; i0 += KB)
      for (int r = 0; r < n; r += MR) {
        const int rows = least(MR, n - r);
        const Span tile = seen_by(j, s, k0 + r, k0 + r + rows);
        const int start = most(0, tile.lo - i0) / PK * PK, stop = least(KB, tile.hi - i0);
        if (stop <= start) continue;
        score_block<P>(w.a + r * lda, lda, q_panel + static_cast<int64_t>(i0) * words, words, start, stop, w.s);
        score_block<P>(w.c + r * ldc, ldc, d_panel + static_cast<int64_t>(i0) * words_v, words_v, start, stop, w.dp);
        const int end = static_cast<int>(round_up(stop, 2 * VL));
        for (int y = 0; y < rows; y++) {
          const int key = k0 + r + y;
          const Span seen = seen_by(j, s, key, key + 1);
          for (int x = start; x < end; x += 2 * VL) {
            vf p[2], ds[2];
            UNROLL for (int e = 0; e < 2; e++) {
              const int at = y * KB + x + e * VL, i = i0 + x + e * VL;
              vf cap = set1(1.f);
              const vf l = column_logit(j, any, load(w.s + at), scale, key, i, s.n_q, &cap);
              const vi query = iota() + i;
              const vf shown = query >= seen.lo && query < seen.hi ? l : set1(-INF);
              p[e] = probability(shown, load(lse + i));
              ds[e] = p[e] * (load(w.dp + at) * set1(value_scale) - load(delta + i)) * cap;
            }
            store_words<P>(w.p + y * (KB / P::PAIR), x, p[0], p[1]);
            store_words<P>(w.ds + y * (KB / P::PAIR), x, ds[0], ds[1]);
          }
        }
        const int count = (stop - start + P::PAIR - 1) / P::PAIR;
        const int64_t from = static_cast<int64_t>(i0 + start) / P::PAIR;
        value_tiles<P>(w.p + start / P::PAIR, KB / P::PAIR, d_rows + from * ldv, ldv, count, w.sum2 + r * ldv, ldv, nullptr);
        value_tiles<P>(w.ds + start / P::PAIR, KB / P::PAIR, q_rows + from * ldk, ldk, count, w.sum1 + r * ldk, ldk, nullptr);
      }
  }
  const int size = type_size(j.out_type);
  for (int r = 0; r < n; r++) {
    const int64_t at = (j.cu_k ? s.k0 + k0 + r : b * j.seqlen_k + k0 + r) * j.kv_heads + kv_head;
    for (int d = 0; d < j.dim; d += VL)
      store_typed(j.out_type, j.dk + (at * j.dim + d) * size, load(w.sum1 + r * ldk + d) * set1(scale), j.dim - d);
    for (int d = 0; d < j.dim_v; d += VL)
      store_typed(j.out_type, j.dv + (at * j.dim_v + d) * size, load(w.sum2 + r * ldv + d) * set1(value_scale), j.dim_v - d);
  }
}
