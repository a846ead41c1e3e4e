// Prefill: packed keys and values, blocks of query rows, online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).

// Keys of a block: scores of a row tile and the block's packed keys and values stay in L1 and L2. With AVX-512 1 MiB of
// L2 (EPYC 9xx4, Zen 5); machines that stop at AVX2 have half of it (EPYC 7xx3, 128 wide in fp32: 256 keys were 1.1
// times faster, 2026-11-27).
constexpr int KB = NC == 4 ? 512 : 256;

template <class P> static size_t packed_bytes(const Job& j, int n_k, bool values) {
  const int64_t keys = round_up(n_k, PK);
  const int64_t words = values ? keys / P::PAIR * columns_of<P>(j.dim_v) : keys * words_of<P>(j.dim);
  return static_cast<size_t>(words) * 4;
}

// Pack panel `panel` of the keys and values of one key head; keys past the end are never read: zeros where products
// take them in (P::KEYS), else left out.
template <class P> static void pack(const Job& j, int b, int kv_head, int panel, Packed to) {
  const Sequence s = sequence(j, b);
  const int first = panel * PK, n = static_cast<int>(round_up(least(PK, s.n_k - first), P::KEYS));
  const char *k[PK], *v[PK];
  for (int i = 0; i < round_up(n, VL); i++) {
    const bool inside = first + i < s.n_k;
    k[i] = inside ? key_row(j, j.k, s, b, first + i, kv_head) : nullptr;
    v[i] = inside ? key_row(j, j.v, s, b, first + i, kv_head) : nullptr;
  }
  float* panel_to = reinterpret_cast<float*>(to.k) + static_cast<int64_t>(first) * words_of<P>(j.dim);
  float* rows_to = reinterpret_cast<float*>(to.v) + static_cast<int64_t>(first) / P::PAIR * columns_of<P>(j.dim_v);
  FOR_TYPE(j.k.type, (pack_panel<P, T>(panel_to, k, j.dim, n)));
  FOR_TYPE(j.v.type, (pack_rows<P, T>(rows_to, v, j.dim_v, n)));
}

// A task's scratch.
template <class P> struct PrefillScratch {
  float *q, *o, *s, *p, *m, *l, *bias;
  static size_t bytes(const Job& j, int rows) {
    const size_t padded = round_up(rows, MR);
    return 4 * (padded * (padded_words<P>(j.dim) + round_up(j.dim_v, VL) + VL + VL) + 2 * MR * KB + KB) + 4096;
  }
  PrefillScratch(const Job& j, int rows, char* base) {
    const size_t padded = round_up(rows, MR);
    q = reinterpret_cast<float*>(base);
    o = q + padded * padded_words<P>(j.dim);
    l = o + padded * round_up(j.dim_v, VL);
    s = l + padded * VL;
    p = s + MR * KB;
    bias = p + MR * KB;
    m = bias + KB;
  }
};

// One row of a tile: scores s of keys [k0 + a, k0 + n) -> words p, updating maximum and sums; returns the factor for o.
template <class P> AI float softmax_row(const float* s, float* p, int a, int n, float scale, float* m, float* l) {
  vf top0 = load(s + a), top1 = load(s + a + VL);
  for (int x = a + 2 * VL; x < n; x += 2 * VL) {
    top0 = vmax(top0, load(s + x));
    top1 = vmax(top1, load(s + x + VL));
  }
  const float old = *m, now = most(old, lane_max(vmax(top0, top1)) * scale);
  const float shift = now == -INF ? 0.f : now;
  const float factor = old == -INF ? 0.f : old == now ? 1.f : exp2v<false>(set1(old - shift))[0];
  *m = now;
  vf sum0 = load(l) * set1(factor), sum1{};
  const vf by = set1(scale), minus = set1(-shift);
  for (int x = a; x < n; x += 2 * VL) {
    const vf e0 = exp2v<P::PAIR == 2>(fma(load(s + x), by, minus));
    const vf e1 = exp2v<P::PAIR == 2>(fma(load(s + x + VL), by, minus));
    store_words<P>(p, x, e0, e1);
    sum0 += e0;
    sum1 += e1;
  }
  store(l, sum0 + sum1);
  return factor;
}

// Write one finished row: out and lse, with the sink and the factor of quantised values.
AI void finish_row(const Job& j, const Sequence& s, int b, int i, int h, const float* o, float m, float total) {
  float weight = 1, top = m;
  if (j.sinks.data) {
    const float sink = table_at(j.sinks, b, h) * LOG2E;
    top = most(m, sink);
    if (top == -INF) top = 0;
    weight = m == -INF ? 0.f : exp2v<false>(set1(m - top))[0];
    total = total * weight + exp2v<false>(set1(sink - top))[0];
  }
  const float inverse = total > 0 ? weight / total : total == 0 ? 0.f : total;  // NaN stays
  const float by = j.v_descale.data ? inverse * table_at(j.v_descale, b, h / j.group) : inverse;
  const int64_t row = (j.cu_q ? s.q0 + i : b * j.seqlen_q + i) * j.heads + h;
  char* out = j.out + row * j.dim_v * type_size(j.out_type);
  for (int d = 0; d < j.dim_v; d += VL)
    store_typed(j.out_type, out + d * type_size(j.out_type), load(o + d) * set1(by), j.dim_v - d);
  if (j.lse) {
    const int64_t at = (j.cu_q ? 0 : b * j.lse_batch) + h * j.lse_head + s.q0 + i;
    j.lse[at] = total == 0 ? -INF : (top + __builtin_log2f(total)) * LN2;
  }
}

template <class P> AI TaskRows prefill_rows(const Job&) { return {MR, 192}; }
template <class P> AI size_t prefill_scratch(const Job& j, int rows) { return PrefillScratch<P>::bytes(j, rows); }

template <class P> static void prefill(const Job& j, const PrefillTask& t, char* base) {
  const Sequence s = sequence(j, t.b);
  const PrefillScratch<P> at(j, t.rows, base);
  const int words = words_of<P>(j.dim), lda = padded_words<P>(j.dim), ldv = static_cast<int>(round_up(j.dim_v, VL));
  const int padded = static_cast<int>(round_up(t.rows, MR));
  for (int r = 0; r < padded; r++) {
    float* to = at.q + static_cast<int64_t>(r) * lda;
    if (r < t.rows) {
      const Place at_r = place_of(j, t.row + r);
      const int h = t.kv_head * j.group + at_r.g;
      // Rows of one head lie a token apart, which hardware does not fetch ahead: 9 % of a call at 512 keys.
      if (r + 8 < t.rows)
        prefetch_row(query_row(j, j.q, s, t.b, place_of(j, t.row + r + 8).i, h), j.dim * type_size(j.q.type));
      const char* row = query_row(j, j.q, s, t.b, at_r.i, h);
      FOR_TYPE(j.q.type, (copy_row<P, T>(to, row, j.dim)));
    } else {
      for (int w = 0; w < lda; w += VL) store(to + w, vf{});
    }
    for (int d = 0; d < ldv; d += VL) store(at.o + static_cast<int64_t>(r) * ldv + d, vf{});
    store(at.l + r * VL, vf{});
    at.m[r] = -INF;
  }
  const float scale = scale_of(j, t.b, t.kv_head);
  const bool simple = plain(j), shared = shared_bias(j);
  auto span_of = [&](int r) { return visible(j, s, place_of(j, t.row + r).i); };
  const int begin = span_of(0).lo / KB * KB, end = span_of(t.rows - 1).hi;
  for (int k0 = begin; k0 < end; k0 += KB) {
    if (shared) copy_shared_bias(j, t.b, t.kv_head * j.group, k0, least(KB, s.n_k - k0), at.bias);
    for (int r = 0; r < t.rows; r += MR) {
      const int rows = least(MR, t.rows - r);
      const int stop = least(span_of(r + rows - 1).hi - k0, KB), start = most(0, span_of(r).lo - k0) / PK * PK;
      if (stop <= start) continue;
      const float* panels = reinterpret_cast<const float*>(t.kv.k) + static_cast<int64_t>(k0) * words;
      score_tiles<P>(at.q + static_cast<int64_t>(r) * lda, lda, panels, words, start, stop, s.n_k - k0, at.s, KB);
      const int n = static_cast<int>(round_up(stop, 2 * VL));
      float factor[MR] = {1, 1, 1, 1, 1, 1};
      bool rescale = false;
      for (int y = 0; y < rows; y++) {
        const Place place = place_of(j, t.row + r + y);
        Row row = row_of(j, s, t.b, place.i, t.kv_head * j.group + place.g);
        if (shared) row.bias = nullptr;
        float* scores = at.s + y * KB;
        if (simple) hide_ends(row, k0 + start, n - start, scores + start);
        else logits(j, row, scale, k0 + start, n - start, s.n_k, scores + start, shared ? at.bias + start : nullptr);
        factor[y] = softmax_row<P>(scores, at.p + y * (KB / P::PAIR), start, n, simple ? scale * LOG2E : 1.f,
                                   at.m + r + y, at.l + (r + y) * VL);
        rescale |= factor[y] != 1.f;
      }
      for (int y = rows; y < MR; y++)  // rows that only fill the last tile
        for (int x = start / P::PAIR; x < n / P::PAIR; x += VL) store(at.p + y * (KB / P::PAIR) + x, vf{});
      const float* values = reinterpret_cast<const float*>(t.kv.v) + static_cast<int64_t>((k0 + start) / P::PAIR) * ldv;
      value_tiles<P>(at.p + start / P::PAIR, KB / P::PAIR, values, ldv, (stop - start + P::PAIR - 1) / P::PAIR,
                     at.o + static_cast<int64_t>(r) * ldv, ldv, rescale ? factor : nullptr);
    }
  }
  for (int r = 0; r < t.rows; r++) {
    const Place place = place_of(j, t.row + r);
    finish_row(j, s, t.b, place.i, t.kv_head * j.group + place.g, at.o + static_cast<int64_t>(r) * ldv, at.m[r],
               lane_sum(load(at.l + r * VL)));
  }
}
