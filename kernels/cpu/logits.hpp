// From products of queries and keys to logits: scale, softcap, ALiBi, bias and masks, for one query row.

// The query and the head of the group that row r of a key head is.
struct Place {
  int i, g;
};
AI Place place_of(const Job& j, int r) {
  if (j.group == 1) return {r, 0};  // a division takes as long as a row of 16 scores
  return {r / j.group, r % j.group};
}

// What a row (query i, head h) of a sequence is subject to.
struct Row {
  int i, h, lo, hi;    // visible keys [lo, hi)
  int64_t diagonal;    // the key that query i is aligned with
  float slope;         // in units of log2
  const char* bias;    // row of attn_bias, or null
};

AI float table_at(const Table& t, int b, int h) {
  return load_scalar(t.type, t.data + (b * t.batch + h * t.head) * type_size(t.type));
}

// softmax_scale with the factors of quantised queries and keys.
AI float scale_of(const Job& j, int b, int kv_head) {
  float scale = j.scale;
  if (j.q_descale.data) scale *= table_at(j.q_descale, b, kv_head);
  if (j.k_descale.data) scale *= table_at(j.k_descale, b, kv_head);
  return scale;
}

AI bool plain(const Job& j) { return j.softcap == 0 && !j.slopes.data && !j.bias.data; }

AI Row row_of(const Job& j, const Sequence& s, int b, int i, int h) {
  Row row;
  row.i = i;
  row.h = h;
  row.diagonal = static_cast<int64_t>(i) + s.n_k - s.n_q;
  const Span span = visible(j, s, i);
  row.lo = span.lo;
  row.hi = span.hi;
  row.slope = j.slopes.data ? LOG2E * table_at(j.slopes, b, h) : 0;
  row.bias = nullptr;
  if (j.bias.data)
    row.bias = j.bias.data + (b * j.bias.batch + h * j.bias.head + i * j.bias.query) * type_size(j.bias.type);
  return row;
}

// n lanes of attn_bias, `stride` elements apart, in units of log2.
AI vf bias_lanes(int type, const char* p, int64_t stride, int n) {
  const int as = type == BOOL ? I8 : type;
  alignas(64) char copy[4 * VL] = {};
  if (stride != 1) {
    const int64_t size = type_size(type);
    for (int x = 0; x < least(n, VL); x++) __builtin_memcpy(copy + x * size, p + x * stride * size, size);
    p = copy;
  }
  const vf bias = load_typed(as, p, n);
  if (type == BOOL) return bias != vf{} ? vf{} : set1(-INF);
  // A finite bias stays finite in units of log2: masks are often filled with the lowest number of a dtype.
  const vf scaled = bias * set1(LOG2E);
  return scaled == set1(-INF) && bias != scaled ? set1(LOWEST) : scaled;
}

// exp2(x - lse), which rounding of two huge numbers must not carry beyond 1.
AI vf probability(vf x, vf lse) {
  const vf difference = x - lse;
  return exp2v<false>(difference > vf{} ? vf{} : difference);
}

AI vf hide(vf x, const Row& row, int k) {
  const vi key = iota() + k;
  return key >= row.lo && key < row.hi ? x : set1(-INF);
}

// One vector of logits in units of log2, without the mask. Lane x stands `distance` + x from the diagonal, and its bias
// lies x * `bias_stride` elements from `bias` (null for none; n lanes exist). `cap_slope` receives the derivative of the
// softcap if it is not null.
AI vf logit(const Job& j, vf product, float scale, float slope, int64_t distance, const char* bias, int64_t bias_stride,
            int n, vf* cap_slope) {
  vf x;
  if (j.softcap != 0) {
    const vf t = tanhv(product * set1(scale / j.softcap));
    if (cap_slope) *cap_slope = set1(1.f) - t * t;
    x = t * set1(j.softcap * LOG2E);
  } else {
    x = product * set1(scale * LOG2E);
  }
  if (slope != 0) {
    const vf away = __builtin_convertvector(iota() + static_cast<int32_t>(distance), vf);
    x -= set1(slope) * (away < vf{} ? -away : away);
  }
  if (bias) x += bias_lanes(j.bias.type, bias, bias_stride, n);
  return x;
}

// A query with keys k..; and a key with queries i.. of the head that `row` is a row of.
AI vf row_logit(const Job& j, const Row& row, vf product, float scale, int k, int n_k, vf* cap_slope) {
  const char* bias = row.bias ? row.bias + k * j.bias.key * type_size(j.bias.type) : nullptr;
  return logit(j, product, scale, row.slope, k - row.diagonal, bias, j.bias.key, least(VL, n_k - k), cap_slope);
}
AI vf column_logit(const Job& j, const Row& row, vf product, float scale, int key, int i, int n_q, vf* cap_slope) {
  const int64_t query = i - row.i;
  const int size = type_size(j.bias.type);
  const char* bias = row.bias ? row.bias + (key * j.bias.key + query * j.bias.query) * size : nullptr;
  return logit(j, product, scale, row.slope, row.diagonal + query - key, bias, j.bias.query, least(VL, n_q - i),
               cap_slope);
}

// Hide alone, where the plain scale is applied later.
AI void hide_ends(const Row& row, int k0, int n, float* s) {
  if (row.lo <= k0 && row.hi >= k0 + n) return;
  for (int x = 0; x < n; x += VL)
    if (row.lo > k0 + x || row.hi < k0 + x + VL) store(s + x, opaque(hide(load(s + x), row, k0 + x)));
}

// Whether attn_bias is the same for all rows of a key head, as the mask of a padded batch is.
AI bool shared_bias(const Job& j) {
  return j.bias.data && j.bias.query == 0 && (j.bias.head == 0 || j.group == 1);
}

// The shared bias of keys [k0, k0 + n), in units of log2, in whole vectors.
static __attribute__((noinline)) void copy_shared_bias(const Job& j, int b, int h, int k0, int n, float* to) {
  const int64_t size = type_size(j.bias.type);
  const char* from = j.bias.data + (b * j.bias.batch + h * j.bias.head + k0 * j.bias.key) * size;
  for (int x = 0; x < n; x += VL)
    store(to + x, bias_lanes(j.bias.type, from + x * j.bias.key * size, j.bias.key, n - x));
}

// Rewrite s[0..n) (n a multiple of VL), products with keys k0.., as logits in units of log2, hidden ones -inf.
// `shared`: the bias of these keys where it is shared, else null.
static __attribute__((noinline)) void logits(const Job& j, const Row& row, float scale, int k0, int n, int n_k,
                                             float* s, const float* shared) {
  if (shared && j.softcap == 0 && row.slope == 0) {
    const vf by = set1(scale * LOG2E);
    for (int x = 0; x < n; x += VL) store(s + x, fma(load(s + x), by, load(shared + x)));
    return hide_ends(row, k0, n, s);
  }
  for (int x = 0; x < n; x += VL) {
    vf logit = row_logit(j, row, load(s + x), scale, k0 + x, n_k, nullptr);
    if (shared) logit += load(shared + x);
    store(s + x, hide(logit, row, k0 + x));
  }
}
