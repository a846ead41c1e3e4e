#include <algorithm>
#include <vector>

#include "drive.h"
#include "plan.h"
#include "scratch.h"

namespace vacpu {
namespace {

struct Unit {
  int b, kv_head, n_q, n_k;
  int64_t work;
  size_t bytes;
  char* base;
};

// One task: queries of a head (head >= 0) or keys, from `first` on. Tasks of one slot add to the same part of dbias and
// run one after the other.
struct Task {
  int unit, head, first;
  int64_t slot;
};

struct Plan {
  std::vector<Task> packs, queries, keys;
};

int64_t slot_of(const Job& j, const Unit& u, int head, int i0) {
  const int64_t b = j.dbias_batch ? u.b : 0, h = j.dbias_head ? u.kv_head * j.group + head : 0;
  return (b * j.heads + h) * (j.seqlen_q + 1) + (j.dbias_query ? i0 : 0);
}

Plan plan(const Job& j, const Isa& isa, const std::vector<Unit>& units) {
  Plan p;
  for (int u = 0; u < static_cast<int>(units.size()); u++) {
    const Unit& unit = units[u];
    for (int x = 0; x * isa.panel < unit.n_k; x++) p.packs.push_back({u, -1, x, 0});
    for (int head = 0; head < j.group; head++)
      for (int x = 0; x * isa.panel < unit.n_q; x++) p.packs.push_back({u, head, x, 0});
    for (int k = 0; k < unit.n_k; k += isa.backward_rows) p.keys.push_back({u, -1, k, 0});
    for (int head = 0; head < j.group; head++)
      for (int i = (unit.n_q - 1) / isa.backward_rows * isa.backward_rows; i >= 0; i -= isa.backward_rows)
        p.queries.push_back({u, head, i, j.dbias ? slot_of(j, unit, head, i) : static_cast<int64_t>(p.queries.size())});
  }
  std::stable_sort(p.queries.begin(), p.queries.end(), [](const Task& a, const Task& b) { return a.slot < b.slot; });
  return p;
}

void run_group(const Job& j, const Isa& isa, std::vector<Unit> units, int threads) {
  size_t bytes = 0;
  int64_t work = 0;
  for (const Unit& u : units) bytes += u.bytes, work += u.work;
  threads = useful_threads(work * 3, threads);
  const size_t each = whole_pages(isa.backward_scratch(j));
  const Lease lease(bytes + each * threads);
  char* at = lease.data() + each * threads;
  for (Unit& u : units) u.base = at, at += u.bytes;
  const Plan p = plan(j, isa, units);
  std::vector<size_t> starts;  // of each slot among the query tasks
  for (size_t i = 0; i < p.queries.size(); i++)
    if (!i || p.queries[i].slot != p.queries[i - 1].slot) starts.push_back(i);
  starts.push_back(p.queries.size());
  share(threads, p.packs.size(), [&](int64_t i, int) {
    const Task& t = p.packs[i];
    const Unit& u = units[t.unit];
    isa.backward_pack(j, u.b, u.kv_head, t.head, t.first, u.base);
  });
  const int64_t slots = static_cast<int64_t>(starts.size()) - 1;
  share(threads, slots + p.keys.size(), [&](int64_t n, int slot) {
    char* scratch = lease.data() + slot * each;
    if (n >= slots) {
      const Task& t = p.keys[n - slots];
      const Unit& u = units[t.unit];
      isa.backward_keys(j, u.b, u.kv_head, t.first, std::min(isa.backward_rows, u.n_k - t.first), u.base, scratch);
      return;
    }
    for (size_t i = starts[n]; i < starts[n + 1]; i++) {
      const Task& t = p.queries[i];
      const Unit& u = units[t.unit];
      isa.backward_queries(j, u.b, u.kv_head, t.head, t.first, std::min(isa.backward_rows, u.n_q - t.first), u.base,
                           scratch);
    }
  });
}

}  // namespace

// dq, dk and dv must be zero where no sequence lies (rows past the last one).
const char* backward(const Job& j, const Isa& isa, int threads) {
  if (const char* wrong = check(j)) return wrong;
  std::vector<Unit> units;
  size_t bytes = 0;
  auto flush = [&] {
    if (!units.empty()) run_group(j, isa, units, threads);
    units.clear();
    bytes = 0;
  };
  for (int b = 0; b < j.batch; b++) {
    const Sequence s = sequence(j, b);
    const int64_t work = static_cast<int64_t>(s.n_q) * s.n_k * j.group * (j.dim + j.dim_v);
    const size_t need = whole_pages(isa.unit_bytes(j, s.n_q, s.n_k));
    for (int h = 0; h < j.kv_heads; h++) {
      if (bytes + need > PACK_LIMIT) flush();
      units.push_back({b, h, s.n_q, s.n_k, work, need, nullptr});
      bytes += need;
    }
  }
  flush();
  return nullptr;
}

}  // namespace vacpu
