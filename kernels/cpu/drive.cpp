#include "drive.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "plan.h"
#include "scratch.h"

namespace vacpu {

namespace {

// Up to this many rows (queries x heads of a group) keys are read in place; beyond, packing pays.
constexpr int DECODE_ROWS = 16;
// Keys of one decode task. Fixed, so that the bits of a sequence do not depend on the batch or on threads; 16 partial
// results at 8192 keys cost 1 % of the reading.
constexpr int SPLIT = 512;
// Packed keys and values in flight for each thread: they still lie in L2 when they are multiplied (16 heads of 512 keys
// on AMX: 1.15 times faster than with all heads packed first, Xeon with 2 MiB of L2, 2026-11-30).
constexpr size_t PACK_OF_A_THREAD = size_t{1} << 20;

// Keys and values of a key head that are no more than this when packed are packed by the task that multiplies them, in
// scratch of its own: they never leave its L1 and L2, and there is one round of threads instead of two. With one thread
// 1.2 times faster at 17 tokens of 12 heads of 64 in fp32 and at 64 in bf16 (Xeon with AMX, 2026-11-30).
constexpr size_t PACK_OF_A_TASK = size_t{256} << 10;

// Rows past the last packed sequence belong to none.
void clear_tail(const Job& j) {
  const int64_t end = j.cu_q ? j.cu_q[j.batch] : j.seqlen_q, rest = j.seqlen_q - end;
  if (!j.cu_q || rest <= 0) return;
  const size_t row = static_cast<size_t>(j.heads) * j.dim_v * type_size(j.out_type);
  std::memset(j.out + end * row, 0, rest * row);
  if (j.lse)
    for (int h = 0; h < j.heads; h++)
      std::fill(j.lse + h * j.lse_head + end, j.lse + h * j.lse_head + j.seqlen_q,
                -std::numeric_limits<float>::infinity());
}

Span all_visible(const Job& j, const Sequence& s) {
  const Span first = visible(j, s, 0), last = visible(j, s, s.n_q - 1);
  return {first.lo, std::max(first.lo, last.hi)};
}

struct Decoding {
  std::vector<DecodeTask> tasks;
  std::vector<int64_t> partials;  // of each task, in floats from the start of all; -1 where it writes the result
  struct Merge {
    int b, splits;
    size_t first, stride;  // floats
  };
  std::vector<Merge> merges;
  size_t floats = 0;
  int rows = 0, heads = 0;
  int64_t work = 0;
};

Decoding plan_decode(const Job& j, const Isa& isa, const std::vector<int>& sequences, int threads) {
  Decoding d;
  size_t splits = 0;
  for (int b : sequences) {
    const Sequence s = sequence(j, b);
    const Span span = all_visible(j, s);
    splits += span.hi > span.lo ? (span.hi - 1) / SPLIT - span.lo / SPLIT + 1 : 1;
    d.work += static_cast<int64_t>(span.hi - span.lo) * s.n_q * j.heads * (j.dim + j.dim_v);
  }
  threads = useful_threads(d.work, threads);
  // All key heads in one task where there are tasks enough: blocks of a cache are then read in address order.
  const int want = threads > 1 ? 4 * threads : 1;
  const int parts = std::min<int>(j.kv_heads, static_cast<int>((want + splits - 1) / splits));
  d.heads = (j.kv_heads + parts - 1) / parts;
  for (int b : sequences) {
    const Sequence s = sequence(j, b);
    const Span span = all_visible(j, s);
    const int rows = s.n_q * j.group;
    d.rows = std::max(d.rows, rows);
    const int first = span.lo / SPLIT, last = span.hi > span.lo ? (span.hi - 1) / SPLIT : first;
    const size_t of_head = isa.partial_floats(j, rows), stride = of_head * j.kv_heads;
    const bool split = last > first;
    if (split) d.merges.push_back({b, last - first + 1, d.floats, stride});
    for (int x = first; x <= last; x++)
      for (int h = 0; h < j.kv_heads; h += d.heads) {
        DecodeTask t{b, h, std::min(h + d.heads, j.kv_heads), 0, 0, nullptr};
        t.k0 = std::max(x * SPLIT, span.lo / isa.chunk * isa.chunk);
        t.k1 = std::max(t.k0, std::min((x + 1) * SPLIT, span.hi));
        d.tasks.push_back(t);
        d.partials.push_back(split ? static_cast<int64_t>(d.floats + (x - first) * stride + h * of_head) : -1);
      }
    if (split) d.floats += stride * (last - first + 1);
  }
  return d;
}

void run_decode(const Job& j, const Isa& isa, const std::vector<int>& sequences, int threads) {
  Decoding d = plan_decode(j, isa, sequences, threads);
  threads = useful_threads(d.work, threads);
  const size_t each = whole_pages(isa.decode_scratch(j, d.rows, d.heads));
  const Lease lease(each * threads + whole_pages(d.floats * 4));
  float* partials = reinterpret_cast<float*>(lease.data() + each * threads);
  for (size_t i = 0; i < d.tasks.size(); i++)
    if (d.partials[i] >= 0) d.tasks[i].partial = partials + d.partials[i];
  share(threads, d.tasks.size(), [&](int64_t i, int slot) { isa.decode(j, d.tasks[i], lease.data() + slot * each); });
  const int64_t merges = static_cast<int64_t>(d.merges.size()) * j.kv_heads;
  share(threads, merges, [&](int64_t i, int) {
    const Decoding::Merge& m = d.merges[i / j.kv_heads];
    const int h = static_cast<int>(i % j.kv_heads);
    const size_t of_head = m.stride / j.kv_heads;
    isa.merge(j, m.b, h, partials + m.first + h * of_head, m.splits, m.stride);
  });
}

struct PrefillUnit {
  int b, kv_head, rows, panels;
  int64_t work;
  size_t k_bytes, v_bytes;
};

// Rows of a task: fewer where there are few in all, so that every thread has some.
int step_of(const TaskRows& of, int64_t rows, int threads) {
  int step = of.task;
  while (step > std::max(of.tile, 24) && rows < static_cast<int64_t>(step) * threads * 4)
    step = (step / 2 + of.tile - 1) / of.tile * of.tile;
  return step;
}

void run_group(const Job& j, const Isa& isa, const PrefillUnit* units, int count, int threads) {
  int64_t work = 0, rows = 0;
  size_t packed_bytes = 0;
  std::vector<int64_t> ends;  // panels up to and with each unit
  for (int u = 0; u < count; u++) {
    work += units[u].work;
    rows += units[u].rows;
    packed_bytes += whole_pages(units[u].k_bytes) + whole_pages(units[u].v_bytes);
    ends.push_back((u ? ends.back() : 0) + units[u].panels);
  }
  threads = useful_threads(work, threads);
  const int step = step_of(isa.prefill_rows(j), rows, threads);
  const size_t each = whole_pages(isa.prefill_scratch(j, step));
  const Lease lease(each * threads + packed_bytes);
  std::vector<Packed> packed;
  std::vector<PrefillTask> tasks;
  char* at = lease.data() + each * threads;
  for (int u = 0; u < count; u++) {
    packed.push_back({at, at + whole_pages(units[u].k_bytes)});
    at += whole_pages(units[u].k_bytes) + whole_pages(units[u].v_bytes);
    for (int r = (units[u].rows - 1) / step * step; r >= 0; r -= step)  // the longest of a causal unit first
      tasks.push_back({units[u].b, units[u].kv_head, r, std::min(step, units[u].rows - r), packed.back()});
  }
  share(threads, ends.back(), [&](int64_t i, int) {
    const size_t u = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
    const int panel = static_cast<int>(i - (u ? ends[u - 1] : 0));
    isa.pack(j, units[u].b, units[u].kv_head, panel, packed[u]);
  });
  share(threads, tasks.size(), [&](int64_t i, int slot) { isa.prefill(j, tasks[i], lease.data() + slot * each); });
}

// Sequences of few keys: a task packs the keys and values of one key head, then multiplies them.
void run_short(const Job& j, const Isa& isa, const std::vector<int>& sequences, int threads) {
  const int64_t causal = j.right >= 0 ? 2 : 1;
  int64_t work = 0, rows = 0;
  int most = 0;
  size_t k_bytes = 0, v_bytes = 0;
  for (int b : sequences) {
    const Sequence s = sequence(j, b);
    work += static_cast<int64_t>(s.n_q) * j.heads * s.n_k * (j.dim + j.dim_v) / causal;
    rows += static_cast<int64_t>(s.n_q) * j.heads;
    most = std::max(most, s.n_q * j.group);
    k_bytes = std::max(k_bytes, whole_pages(isa.packed_bytes(j, s.n_k, false)));
    v_bytes = std::max(v_bytes, whole_pages(isa.packed_bytes(j, s.n_k, true)));
  }
  threads = useful_threads(work, threads);
  // All rows of a key head in one task where there are enough of them; else the keys are packed again for each part.
  const int64_t heads = static_cast<int64_t>(sequences.size()) * j.kv_heads;
  const TaskRows of = isa.prefill_rows(j);
  const bool whole = threads == 1 || heads >= 4 * threads;
  const int step = whole ? of.task : step_of(of, rows, threads);
  std::vector<PrefillTask> tasks;
  for (int b : sequences) {
    const int n = sequence(j, b).n_q * j.group, part = whole ? n : step;
    for (int h = 0; h < j.kv_heads; h++)
      for (int r = 0; r < n; r += part) tasks.push_back({b, h, r, std::min(part, n - r), {}});
  }
  const size_t scratch = whole_pages(isa.prefill_scratch(j, std::min(most, step)));
  const size_t each = scratch + k_bytes + v_bytes;
  const Lease lease(each * threads);
  // Heads side by side go to one thread: shared out one by one, two threads want the same pages and pairs of lines, and
  // 12 heads of 64, 17 tokens in fp32, took 1.5 times as long (Xeon with AMX, 2026-11-30).
  const int64_t count = tasks.size();
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(j.kv_heads, count / (4 * threads)));
  share(threads, (count + run - 1) / run, [&](int64_t part, int slot) {
    char* base = lease.data() + slot * each;
    for (int64_t i = part * run; i < std::min(count, (part + 1) * run); i++) {
      PrefillTask t = tasks[i];
      t.kv = {base + scratch, base + scratch + k_bytes};
      const int n_k = sequence(j, t.b).n_k;
      for (int panel = 0; panel * isa.panel < n_k; panel++) isa.pack(j, t.b, t.kv_head, panel, t.kv);
      for (const int end = t.row + t.rows; t.row < end; t.row += step) {
        t.rows = std::min(step, end - t.row);
        isa.prefill(j, t, base);
      }
    }
  });
}

void run_long(const Job& j, const Isa& isa, const std::vector<int>& sequences, int threads) {
  std::vector<PrefillUnit> units;
  for (int b : sequences) {
    const Sequence s = sequence(j, b);
    const Span span = all_visible(j, s);
    const int64_t causal = j.right >= 0 ? 2 : 1;
    const int64_t work = static_cast<int64_t>(s.n_q) * j.group * (span.hi - span.lo) * (j.dim + j.dim_v) / causal;
    for (int h = 0; h < j.kv_heads; h++)
      units.push_back({b, h, s.n_q * j.group, (s.n_k + isa.panel - 1) / isa.panel, work,
                       isa.packed_bytes(j, s.n_k, false), isa.packed_bytes(j, s.n_k, true)});
  }
  std::stable_sort(units.begin(), units.end(),
                   [](const PrefillUnit& a, const PrefillUnit& b) { return a.work > b.work; });
  const size_t limit = std::min(PACK_LIMIT, PACK_OF_A_THREAD * std::max(threads, 1));
  for (size_t first = 0; first < units.size();) {
    size_t last = first, bytes = 0;
    for (; last < units.size(); last++) {
      bytes += whole_pages(units[last].k_bytes) + whole_pages(units[last].v_bytes);
      if (last > first && bytes > limit) break;
    }
    run_group(j, isa, &units[first], static_cast<int>(last - first), threads);
    first = last;
  }
}

void run_prefill(const Job& j, const Isa& isa, const std::vector<int>& sequences, int threads) {
  std::vector<int> few_keys, many_keys;
  for (int b : sequences) {
    const int n_k = sequence(j, b).n_k;
    const size_t bytes = isa.packed_bytes(j, n_k, false) + isa.packed_bytes(j, n_k, true);
    (bytes <= PACK_OF_A_TASK ? few_keys : many_keys).push_back(b);
  }
  if (!few_keys.empty()) run_short(j, isa, few_keys, threads);
  if (!many_keys.empty()) run_long(j, isa, many_keys, threads);
}

}  // namespace

const char* check(const Job& j) {
  for (int b = 0; b < j.batch; b++) {
    if (j.cu_q && (j.cu_q[b] < 0 || j.cu_q[b + 1] < j.cu_q[b] || j.cu_q[b + 1] > j.seqlen_q))
      return "cu_seqlens_q must not decrease, and end within the tensor";
    if (j.cu_k && (j.cu_k[b] < 0 || j.cu_k[b + 1] < j.cu_k[b] || j.cu_k[b + 1] > j.seqlen_k))
      return "cu_seqlens_k must not decrease, and end within the tensor";
    if (!j.table) continue;
    const int64_t used = j.used_k[b];
    if (used < 0 || used > j.table_blocks * j.block_size) return "seqused_k must fit into the block table";
    for (int64_t x = 0; x * j.block_size < used; x++) {
      const int32_t block = j.table[b * j.table_batch + x];
      if (block < 0 || block >= j.num_blocks) return "block_table names a block that is not in the cache";
    }
  }
  return nullptr;
}

const char* forward(const Job& j, const Isa& isa, int threads) {
  if (const char* wrong = check(j)) return wrong;
  clear_tail(j);
  std::vector<int> few, many;
  for (int b = 0; b < j.batch; b++) {
    const int n_q = sequence(j, b).n_q;
    if (n_q) (static_cast<int64_t>(n_q) * j.group <= DECODE_ROWS ? few : many).push_back(b);
  }
  if (!few.empty()) run_decode(j, isa, few, threads);
  if (!many.empty()) run_prefill(j, isa, many, threads);
  return nullptr;
}

}  // namespace vacpu
