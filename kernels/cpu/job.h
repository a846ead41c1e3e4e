// What a call is, and what an instruction set offers: plain data, shared by every file here.
//
// Nothing in this header may be a non-inline function or an instantiation of a standard template with code: it is
// compiled into files with different -m flags, and the linker keeps one copy of whatever has the same name.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vacpu {

enum Type : int { F32 = 0, BF16 = 1, F16 = 2, E4M3 = 3, E5M2 = 4, I8 = 5, BOOL = 6 };

constexpr int type_size(int type) { return type == F32 ? 4 : type == BF16 || type == F16 ? 2 : 1; }

// A tensor (batch or block, token, head, element): strides in elements, innermost 1.
struct Rows {
  const char* data = nullptr;
  int type = F32;
  int64_t batch = 0, token = 0, head = 0;
};

// A small table (batch, head) of factors; strides 0 where it does not vary; data null where it is not given.
struct Table {
  const char* data = nullptr;
  int type = F32;
  int64_t batch = 0, head = 0;
};

// attn_bias (batch, head, query, key), additive or boolean, never expanded: a stride is 0 where it does not vary.
struct Bias {
  const char* data = nullptr;
  int type = F32;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// One attention call. Lengths of a sequence b come from sequence().
struct Job {
  Rows q, k, v, dout, o;        // dout, o: backward only
  char* out = nullptr;          // (.., H, Dv) contiguous, out_type
  int out_type = F32;
  float* lse = nullptr;         // (B, H, Sq) or (H, Tq); may be null in forward
  const float* dlse = nullptr;  // backward, like lse but with its own strides; may be null
  int64_t lse_batch = 0, lse_head = 0;
  int64_t dlse_batch = 0, dlse_head = 0, dlse_token = 0;
  int batch = 0, heads = 0, kv_heads = 0, group = 1, dim = 0, dim_v = 0;
  int64_t seqlen_q = 0, seqlen_k = 0;  // dense sizes; of the packed tensors where cu_q is given
  const int32_t* cu_q = nullptr;
  const int32_t* cu_k = nullptr;
  const int32_t* table = nullptr;  // block table (batch, blocks), paged only
  int64_t table_batch = 0, table_blocks = 0, num_blocks = 0;
  const int32_t* used_k = nullptr;
  int block_size = 0;
  float scale = 1, softcap = 0;
  int64_t left = -1, right = -1;  // causal is right = 0
  Table slopes, sinks, q_descale, k_descale, v_descale;
  Bias bias;
  char *dq = nullptr, *dk = nullptr, *dv = nullptr;  // contiguous, out_type
  float* dbias = nullptr;                             // contiguous in bias's own shape, fp32, zeroed
  int64_t dbias_batch = 0, dbias_head = 0, dbias_query = 0, dbias_key = 0;
};

struct Sequence {
  int64_t q0, k0;  // first row of the packed tensors (0 where dense)
  int n_q, n_k;
};

static inline Sequence sequence(const Job& j, int b) {
  Sequence s;
  s.q0 = j.cu_q ? j.cu_q[b] : 0;
  s.n_q = j.cu_q ? j.cu_q[b + 1] - j.cu_q[b] : static_cast<int>(j.seqlen_q);
  s.k0 = j.cu_k ? j.cu_k[b] : 0;
  s.n_k = j.used_k ? j.used_k[b] : j.cu_k ? j.cu_k[b + 1] - j.cu_k[b] : static_cast<int>(j.seqlen_k);
  return s;
}

// Keys [lo, hi) that query i may see; causal and window are aligned with the last key (bottom right).
struct Span {
  int lo, hi;
};

static inline Span visible(const Job& j, const Sequence& s, int i) {
  const int64_t diagonal = static_cast<int64_t>(i) + s.n_k - s.n_q;
  int64_t lo = j.left < 0 ? 0 : diagonal - j.left, hi = j.right < 0 ? s.n_k : diagonal + j.right + 1;
  lo = lo < 0 ? 0 : lo > s.n_k ? s.n_k : lo;
  hi = hi > s.n_k ? s.n_k : hi < lo ? lo : hi;
  return {static_cast<int>(lo), static_cast<int>(hi)};
}

// Address of a row of a tensor that is indexed by sequence and position.
static inline const char* query_row(const Job& j, const Rows& t, const Sequence& s, int b, int i, int h) {
  const int64_t batch = j.cu_q ? 0 : b * t.batch;
  return t.data + (batch + (s.q0 + i) * t.token + h * t.head) * type_size(t.type);
}

static inline const char* key_row(const Job& j, const Rows& t, const Sequence& s, int b, int k, int h) {
  int64_t at;
  if (j.table) {
    const int64_t block = j.table[b * j.table_batch + k / j.block_size];
    at = block * t.batch + (k % j.block_size) * t.token;
  } else {
    at = (j.cu_k ? 0 : b * t.batch) + (s.k0 + k) * t.token;
  }
  return t.data + (at + h * t.head) * type_size(t.type);
}

// Keys and values of one (sequence, key head) in the layout that the multiplications read.
struct Packed {
  char* k;  // panels of keys, each [word][key]
  char* v;  // rows of keys (pairs of rows where products are of pairs), each [word of Dv, rounded up]
};

// Rows are (query, head of the group): row r of a key head is query r / group, head r % group.
struct PrefillTask {
  int b, kv_head, row, rows;
  Packed kv;
};

// Keys [k0, k1) of one sequence for key heads [h0, h1). `partial` receives unnormalised results, or null: write out.
struct DecodeTask {
  int b, h0, h1, k0, k1;
  float* partial;
};

// Query rows of a prefill task: a multiple of `tile`. Packed keys are read once per task from L2, so more is better
// until L2 is full.
struct TaskRows {
  int tile, task;
};

// The functions of one instruction set. `dot` tells whether 16-bit products are made in pairs (bf16 inputs).
struct Isa {
  const char* name;
  int panel;         // keys of a panel
  bool has_dot;
  int chunk;         // keys of a decode chunk: splits are multiples of it
  size_t (*packed_bytes)(const Job&, int n_k, bool values);
  void (*pack)(const Job&, int b, int kv_head, int panel, Packed);
  TaskRows (*prefill_rows)(const Job&);
  size_t (*prefill_scratch)(const Job&, int rows);
  void (*prefill)(const Job&, const PrefillTask&, char* scratch);
  size_t (*decode_scratch)(const Job&, int rows, int heads);
  size_t (*partial_floats)(const Job&, int rows);  // of one key head
  void (*decode)(const Job&, const DecodeTask&, char* scratch);
  void (*merge)(const Job&, int b, int kv_head, const float* partials, int splits, size_t stride);
  // Backward of one (sequence, key head), all of whose operands lie packed in `base`.
  int backward_rows;  // rows of a task
  size_t (*unit_bytes)(const Job&, int n_q, int n_k);
  void (*backward_pack)(const Job&, int b, int kv_head, int head, int panel, char* base);  // head -1: keys and values
  size_t (*backward_scratch)(const Job&);
  void (*backward_queries)(const Job&, int b, int kv_head, int head, int i0, int n, char* base, char* scratch);
  void (*backward_keys)(const Job&, int b, int kv_head, int k0, int n, char* base, char* scratch);
  // Probes: multiply-adds of one turn; turns; and reading.
  int turn;
  void (*probe_fma)(int64_t turns);
  void (*probe_read)(const char*, int64_t bytes, const char* next);
};

}  // namespace vacpu
