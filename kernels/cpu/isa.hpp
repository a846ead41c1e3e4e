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
#include "decode.hpp"
#include "backward.hpp"
#include "probe.hpp"

AI bool pairs(const Job& j) {
#if HAS_DOT
  // FP8 and int8 are exact in bf16.
  return j.q.type != F32 && j.q.type != F16 && j.k.type != F32 && j.k.type != F16;
#else
  (void)j;
  return false;
#endif
}

#if HAS_DOT
#define PICK(CALL_DOT, CALL_FMA) return pairs(j) ? CALL_DOT : CALL_FMA
#else
#define PICK(CALL_DOT, CALL_FMA) return CALL_FMA
#endif

static size_t packed_bytes_of(const Job& j, int n_k, bool values) {
  PICK(packed_bytes<Dot>(j, n_k, values), packed_bytes<Fma>(j, n_k, values));
}
static void pack_of(const Job& j, int b, int kv_head, int panel, Packed to) {
  PICK(pack<Dot>(j, b, kv_head, panel, to), pack<Fma>(j, b, kv_head, panel, to));
}
static size_t prefill_scratch_of(const Job& j, int rows) {
  PICK(PrefillScratch<Dot>::bytes(j, rows), PrefillScratch<Fma>::bytes(j, rows));
}
static void prefill_of(const Job& j, const PrefillTask& t, char* scratch) {
  PICK(prefill<Dot>(j, t, scratch), prefill<Fma>(j, t, scratch));
}

static size_t unit_bytes_of(const Job& j, int n_q, int n_k) {
  PICK(unit_bytes<Dot>(j, n_q, n_k), unit_bytes<Fma>(j, n_q, n_k));
}
static void backward_pack_of(const Job& j, int b, int kv_head, int head, int panel, char* base) {
  PICK(backward_pack<Dot>(j, b, kv_head, head, panel, base), backward_pack<Fma>(j, b, kv_head, head, panel, base));
}
static void backward_queries_of(const Job& j, int b, int kv_head, int head, int i0, int n, char* base, char* scratch) {
  PICK(backward_queries<Dot>(j, b, kv_head, head, i0, n, base, scratch),
       backward_queries<Fma>(j, b, kv_head, head, i0, n, base, scratch));
}
static void backward_keys_of(const Job& j, int b, int kv_head, int k0, int n, char* base, char* scratch) {
  PICK(backward_keys<Dot>(j, b, kv_head, k0, n, base, scratch), backward_keys<Fma>(j, b, kv_head, k0, n, base, scratch));
}

#define STRINGIFY(x) #x
#define NAME_OF(x) STRINGIFY(x)

extern const Isa table;
const Isa table = {
    NAME_OF(ISA_NAME), PK, MR, HAS_DOT, CH, packed_bytes_of, pack_of, prefill_scratch_of, prefill_of,
    DecodeScratch::bytes, partial_floats, decode, merge,
    BR, unit_bytes_of, backward_pack_of, Sweep::bytes, backward_queries_of, backward_keys_of,
    MR * NC * VL, probe_fma, probe_read,
};

}  // namespace ISA_NAME
}  // namespace vacpu
