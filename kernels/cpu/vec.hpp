// Vectors of floats, written with the compiler's vector extensions, so that one text serves AVX-512, AVX2, NEON and
// SSE2; intrinsics only where an instruction has no such form. Included once per instruction set, inside its namespace.

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int NC = 4;  // vectors of a panel: 32 registers hold 6 x 4 sums
#else
constexpr int NC = 2;  // 16 registers
#endif
constexpr int MR = 6;          // rows of a register tile
constexpr int PK = NC * VL;    // keys of a panel

#define INLINE inline __attribute__((always_inline))
#define AI static INLINE
#define UNROLL _Pragma("GCC unroll 64")

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t vh_any __attribute__((vector_size(2 * VL), aligned(1), may_alias));
typedef uint8_t vb __attribute__((vector_size(VL)));
typedef uint8_t vb_any __attribute__((vector_size(VL), aligned(1), may_alias));
typedef int8_t vc __attribute__((vector_size(VL)));

constexpr float INF = __builtin_inff(), LOWEST = -__FLT_MAX__;
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

template <class T> AI T least(T a, T b) { return a < b ? a : b; }
template <class T> AI T most(T a, T b) { return a > b ? a : b; }
AI int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

AI vf set1(float x) { return x - vf{}; }
AI vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
AI void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
AI vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted: -ffp-contract=fast
// Hides from the compiler where x comes from. A vector that is read, changed and written back becomes a store of the
// changed lanes alone, which the next read of it has to wait for.
AI vf opaque(vf x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#endif
  return x;
}
AI vf vmax(vf a, vf b) { return a > b ? a : b; }
AI vi as_int(vf x) { return reinterpret_cast<vi>(x); }
AI vf as_float(vi x) { return reinterpret_cast<vf>(x); }
AI vf as_float(vu x) { return reinterpret_cast<vf>(x); }
// Into L2: what a chunk of decode fetches ahead does not fit L1, and into L1 it was 1.6 times slower (EPYC 9xx4, 32
// heads over 8 of 128, bf16, 4 x 4096 keys, one thread, 2026-11-24).
AI void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }
AI void prefetch_row(const char* row, int bytes) {
  for (int x = 0; x < bytes; x += 64) prefetch(row + x);
}

// Indices as template arguments, for shuffles of any width.
template <int... I> struct Lanes {};
template <int N, int... I> struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I> struct MakeLanes<0, I...> { typedef Lanes<I...> type; };
typedef MakeLanes<VL>::type AllLanes;

template <int... I> AI vi iota_of(Lanes<I...>) { return vi{I...}; }
AI vi iota() { return iota_of(AllLanes()); }

// Lanes of a and b in blocks of D: the blocks of even number of both, or the odd ones.
template <int D, int... I> AI vf even_blocks(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & D) ? VL + I - D : I)...);
}
template <int D, int... I> AI vf odd_blocks(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & D) ? VL + I : I + D)...);
}

template <int D> AI void transpose_step(vf* r) {
  UNROLL for (int i = 0; i < VL; i++) {
    if (i & D) continue;
    const vf a = r[i], b = r[i + D];
    r[i] = even_blocks<D>(a, b, AllLanes());
    r[i + D] = odd_blocks<D>(a, b, AllLanes());
  }
}

// VL x VL transpose in registers.
AI void transpose(vf* r) {
  transpose_step<1>(r);
  transpose_step<2>(r);
#if VL >= 8
  transpose_step<4>(r);
#endif
#if VL >= 16
  transpose_step<8>(r);
#endif
}

// Indices of shuffles that every vector unit has: within blocks of four lanes, and of whole blocks. `odd` is 0 or 1.
constexpr int unpack_single(int i, int odd) { return i / 4 * 4 + (i % 4) / 2 + 2 * odd + (i & 1) * VL; }
constexpr int unpack_double(int i, int odd) { return i / 4 * 4 + (i & 1) + 2 * odd + ((i % 4) / 2) * VL; }
constexpr int pick_block(int i, int odd) {
  return VL == 4 ? i : (i / 4 % (VL / 8) * 2 + odd) * 4 + i % 4 + (i / 4 / (VL / 8)) * VL;
}

template <int... I> AI vf add_singles(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, unpack_single(I, 0)...) + __builtin_shufflevector(a, b, unpack_single(I, 1)...);
}
template <int... I> AI vf add_doubles(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, unpack_double(I, 0)...) + __builtin_shufflevector(a, b, unpack_double(I, 1)...);
}
template <int... I> AI vf add_blocks(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, pick_block(I, 0)...) + __builtin_shufflevector(a, b, pick_block(I, 1)...);
}

// VL vectors -> one, whose lane i is the sum of vector i.
AI vf sums(vf* r) {
  UNROLL for (int i = 0; i < VL / 2; i++) r[i] = add_singles(r[2 * i], r[2 * i + 1], AllLanes());
  UNROLL for (int i = 0; i < VL / 4; i++) r[i] = add_doubles(r[2 * i], r[2 * i + 1], AllLanes());
#if VL >= 8
  UNROLL for (int i = 0; i < VL / 8; i++) r[i] = add_blocks(r[2 * i], r[2 * i + 1], AllLanes());
#endif
#if VL >= 16
  r[0] = add_blocks(r[0], r[1], AllLanes());
#endif
  return r[0];
}

template <int D, int... I> AI vf swap_blocks(vf x, Lanes<I...>) { return __builtin_shufflevector(x, x, (I ^ D)...); }

AI float lane_max(vf x) {
#if VL >= 16
  x = vmax(x, swap_blocks<8>(x, AllLanes()));
#endif
#if VL >= 8
  x = vmax(x, swap_blocks<4>(x, AllLanes()));
#endif
  x = vmax(x, swap_blocks<2>(x, AllLanes()));
  return vmax(x, swap_blocks<1>(x, AllLanes()))[0];
}
AI float lane_sum(vf x) {
#if VL >= 16
  x += swap_blocks<8>(x, AllLanes());
#endif
#if VL >= 8
  x += swap_blocks<4>(x, AllLanes());
#endif
  x += swap_blocks<2>(x, AllLanes());
  return (x + swap_blocks<1>(x, AllLanes()))[0];
}

// 2^x for x <= 0 and for -inf. Degree 4 (relative error 2.6e-6) for probabilities that are rounded to bf16 next,
// degree 6 (1.9e-9 before rounding, measured 1 ulp after) for the rest; least-squares fits reweighted to minimax.
template <bool ROUGH> AI vf exp2v(vf x) {
#if defined(__AVX512DQ__)
  const vf r = _mm512_reduce_ps(x, 0x09);  // x - floor(x); scalef takes the floor itself
  vf p;
  if (ROUGH) {
    p = fma(set1(0.0135341605f), r, set1(0.0520114749f));
    p = fma(p, r, set1(0.241442748f));
    p = fma(p, r, set1(0.693003836f));
    p = fma(p, r, set1(1.00000259f));
  } else {
    p = fma(set1(0.000217022491f), r, set1(0.00124396897f));
    p = fma(p, r, set1(0.00967884079f));
    p = fma(p, r, set1(0.0554833421f));
    p = fma(p, r, set1(0.240229836f));
    p = fma(p, r, set1(0.693146984f));
    p = fma(p, r, set1(1.f));
  }
  return _mm512_scalef_ps(p, x);
#else
  const vf low = vmax(x, set1(-126.f)), shifted = low + set1(12582912.f);  // 1.5 * 2^23: rounds to an integer
  const vf r = low - (shifted - set1(12582912.f));
  vf p;
  if (ROUGH) {
    p = fma(set1(0.00957009667f), r, set1(0.0559178599f));
    p = fma(p, r, set1(0.24024745f));
    p = fma(p, r, set1(0.693121815f));
    p = fma(p, r, set1(0.999999261f));
  } else {
    p = fma(set1(0.000153458075f), r, set1(0.00133999312f));
    p = fma(p, r, set1(0.00961848897f));
    p = fma(p, r, set1(0.0555032878f));
    p = fma(p, r, set1(0.240226469f));
    p = fma(p, r, set1(0.693147206f));
    p = fma(p, r, set1(1.f));
  }
  const vf y = as_float(as_int(p) + (as_int(shifted) << 23));
  return x < set1(-126.f) ? vf{} : y;
#endif
}

// tanh: odd polynomial near 0 (relative error 1e-8), 1 - 2 / (e^2|y| + 1) beyond.
AI vf tanhv(vf y) {
  const vi sign = as_int(y) & static_cast<int32_t>(0x80000000u);
  const vf a = as_float(as_int(y) ^ sign), z = y * y;
  vf p = fma(set1(-0.00552853108f), z, set1(0.0204832266f));
  p = fma(p, z, set1(-0.0536929417f));
  p = fma(p, z, set1(0.133308995f));
  p = fma(p, z, set1(-0.333332629f));
  const vf near = fma(p * z, y, y);
  const vf e = exp2v<false>(a * set1(-2 * LOG2E));
  const vf far = as_float(as_int((set1(1.f) - e) / (set1(1.f) + e)) | sign);
  return a < set1(0.625f) ? near : far;
}

// ---- one vector of a stored type, as floats

// Integers to wider ones. GCC 12 makes five instructions of __builtin_convertvector where x86 has one: decode with AVX2
// spent a third of its time there.
#if defined(__AVX512F__)
AI vu wide(vh x) { return reinterpret_cast<vu>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x))); }
AI vu wide(vb x) { return reinterpret_cast<vu>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(x))); }
AI vi wide(vc x) { return reinterpret_cast<vi>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(x))); }
AI vh wide_half(vb x) { return reinterpret_cast<vh>(_mm256_cvtepu8_epi16(reinterpret_cast<__m128i>(x))); }
#elif defined(__AVX2__)
template <class B> AI __m128i eight_bytes(B x) {
  return _mm_set_epi64x(0, reinterpret_cast<long long>(x));
}
AI vu wide(vh x) { return reinterpret_cast<vu>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x))); }
AI vu wide(vb x) { return reinterpret_cast<vu>(_mm256_cvtepu8_epi32(eight_bytes(x))); }
AI vi wide(vc x) { return reinterpret_cast<vi>(_mm256_cvtepi8_epi32(eight_bytes(x))); }
AI vh wide_half(vb x) { return reinterpret_cast<vh>(_mm_cvtepu8_epi16(eight_bytes(x))); }
#else
AI vu wide(vh x) { return __builtin_convertvector(x, vu); }
AI vu wide(vb x) { return __builtin_convertvector(x, vu); }
AI vi wide(vc x) { return __builtin_convertvector(x, vi); }
AI vh wide_half(vb x) { return __builtin_convertvector(x, vh); }
#endif

AI vf widen(vu x) { return as_float(x << 16); }

AI vf from_half(vh x) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x));
#else
  const vu h = wide(x), rest = h & 0x7fff;
  const vf scaled = as_float(rest << 13) * set1(0x1p112f);  // also right for subnormals
  const vu special = reinterpret_cast<vu>(rest >= 0x7c00) & 0x7f800000;
  return as_float(reinterpret_cast<vu>(scaled) | special | (h & 0x8000) << 16);
#endif
}

AI vf from_e4m3(vb x) {
  const vu u = wide(x), rest = u & 0x7f;
  const vf scaled = as_float(rest << 20) * set1(0x1p120f);
  const vu nan = reinterpret_cast<vu>(rest == 0x7f) & 0x7fc00000;
  return as_float(reinterpret_cast<vu>(scaled) | nan | (u & 0x80) << 24);
}

template <int T> AI vf load_as(const void* p) {
  if (T == F32) return load(static_cast<const float*>(p));
  if (T == BF16) return widen(wide(*static_cast<const vh_any*>(p)));
  if (T == F16) return from_half(*static_cast<const vh_any*>(p));
  const vb x = *static_cast<const vb_any*>(p);
  if (T == E4M3) return from_e4m3(x);
  if (T == E5M2) return from_half(wide_half(x) << 8);
  return __builtin_convertvector(wide(reinterpret_cast<vc>(x)), vf);
}

// The first n elements of a vector, zeros after them; reads nothing past them.
template <int T> AI vf load_part(const void* p, int n) {
  if (n >= VL) return load_as<T>(p);
  alignas(64) char copy[4 * VL] = {};
#if defined(__AVX512F__)  // a call of memcpy takes as long as what follows
  const __mmask16 there = static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0);
  if constexpr (type_size(T) == 4) _mm512_store_ps(copy, _mm512_maskz_loadu_ps(there, p));
  else if constexpr (type_size(T) == 2)
    _mm256_store_si256(reinterpret_cast<__m256i*>(copy), _mm256_maskz_loadu_epi16(there, p));
  else _mm_store_si128(reinterpret_cast<__m128i*>(copy), _mm_maskz_loadu_epi8(there, p));
#else
  if (n > 0) __builtin_memcpy(copy, p, n * type_size(T));
#endif
  return load_as<T>(copy);
}

AI vf load_typed(int type, const void* p, int n) {
  switch (type) {
    case F32: return load_part<F32>(p, n);
    case BF16: return load_part<BF16>(p, n);
    case F16: return load_part<F16>(p, n);
    case E4M3: return load_part<E4M3>(p, n);
    case E5M2: return load_part<E5M2>(p, n);
    default: return load_part<I8>(p, n);
  }
}

AI float load_scalar(int type, const void* p) { return load_typed(type, p, 1)[0]; }

AI vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(x));
#else
  const vu u = reinterpret_cast<vu>(x);
  const vu even = u + 0x7fff + ((u >> 16) & 1);
  return __builtin_convertvector((x == x ? even : (u | 0x400000)) >> 16, vh);
#endif
}

AI vh to_half(vf x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtps_ph(x, 0));
#elif defined(__F16C__)
  return reinterpret_cast<vh>(_mm256_cvtps_ph(x, 0));
#else
  const vu u = reinterpret_cast<vu>(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  const vu normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  const vu tiny = reinterpret_cast<vu>(as_float(a) + set1(0.5f)) - 0x3f000000;  // the addition rounds
  const vu big = a > 0x7f800000 ? vu{} + 0x7e00 : vu{} + 0x7c00;
  const vu small = a < 0x38800000 ? tiny : normal;
  return __builtin_convertvector((a >= 0x477ff000 ? big : small) | sign, vh);
#endif
}

// Store n elements as out_type (fp32, bf16 or fp16).
AI void store_typed(int type, char* p, vf x, int n) {
  if (type == F32) {
    if (n >= VL) return store(reinterpret_cast<float*>(p), x);
    __builtin_memcpy(p, &x, 4 * n);
    return;
  }
  const vh y = type == BF16 ? to_bf16(x) : to_half(x);
  if (n >= VL) *reinterpret_cast<vh_any*>(p) = y;
  else __builtin_memcpy(p, &y, 2 * n);
}
