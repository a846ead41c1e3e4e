// One instruction set: everything above, compiled with its flags inside its own namespace, behind a table of functions.
// Before including, define ISA_NAME; after it the namespace vacpu::ISA_NAME holds `table`.
//
// Nothing of the standard library with code may be used below: a template instantiated here with AVX-512 and elsewhere
// without is one symbol, and the linker keeps either. tests/test_cpu_build.py looks for weak symbols.
#include "job.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vacpu {
namespace ISA_NAME {

#include "vec.hpp"
#include "tiles.hpp"
#include "logits.hpp"
#include "prefill.hpp"
#include "amx.hpp"
#include "decode.hpp"
#include "backward.hpp"
#include "probe.hpp"

#if HAS_DOT
// FP8 and int8 are exact in bf16.
AI bool pairs(const Job& j) { return j.q.type != F32 && j.q.type != F16 && j.k.type != F32 && j.k.type != F16; }
#endif

// Prefill of pairs: on AMX, or with bf16 dot products. Backward of pairs: Intel's processors with AMX make a bf16 dot
// product in four times the cycles of a multiply-add (a Xeon with AMX and avx512_fp16, 110 GFLOP/s against 220,
// 2026-11-30), so there it widens.
#if HAS_AMX
#define PICK(CALL, ...) return pairs(j) ? CALL<Amx>(__VA_ARGS__) : CALL<Fma>(__VA_ARGS__)
#define PICK_BACKWARD(CALL, ...) return CALL<Fma>(__VA_ARGS__)
#elif HAS_DOT
#define PICK(CALL, ...) return pairs(j) ? CALL<Dot>(__VA_ARGS__) : CALL<Fma>(__VA_ARGS__)
#define PICK_BACKWARD PICK
#else
#define PICK(CALL, ...) return CALL<Fma>(__VA_ARGS__)
#define PICK_BACKWARD PICK
#endif

static size_t packed_bytes_of(const Job& j, int n_k, bool values) { PICK(packed_bytes, j, n_k, values); }
static void pack_of(const Job& j, int b, int kv_head, int panel, Packed to) { PICK(pack, j, b, kv_head, panel, to); }
static TaskRows prefill_rows_of(const Job& j) { PICK(prefill_rows, j); }
static size_t prefill_scratch_of(const Job& j, int rows) { PICK(prefill_scratch, j, rows); }
static void prefill_of(const Job& j, const PrefillTask& t, char* scratch) { PICK(prefill, j, t, scratch); }

static size_t unit_bytes_of(const Job& j, int n_q, int n_k) { PICK_BACKWARD(unit_bytes, j, n_q, n_k); }
static void backward_pack_of(const Job& j, int b, int kv_head, int head, int panel, char* base) {
  PICK_BACKWARD(backward_pack, j, b, kv_head, head, panel, base);
}
static void backward_queries_of(const Job& j, int b, int kv_head, int head, int i0, int n, char* base, char* scratch) {
  PICK_BACKWARD(backward_queries, j, b, kv_head, head, i0, n, base, scratch);
}
static void backward_keys_of(const Job& j, int b, int kv_head, int k0, int n, char* base, char* scratch) {
  PICK_BACKWARD(backward_keys, j, b, kv_head, k0, n, base, scratch);
}

#define STRINGIFY(x) #x
#define NAME_OF(x) STRINGIFY(x)

extern const Isa table;
const Isa table = {
    NAME_OF(ISA_NAME), PK, HAS_DOT, CH, packed_bytes_of, pack_of, prefill_rows_of, prefill_scratch_of, prefill_of,
    DecodeScratch::bytes, partial_floats, decode, merge,
    BR, unit_bytes_of, backward_pack_of, Sweep::bytes, backward_queries_of, backward_keys_of,
    MR * NC * VL, probe_fma, probe_read,
};

}  // namespace ISA_NAME
}  // namespace vacpu
