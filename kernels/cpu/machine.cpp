// Which instruction sets this machine has, best first.
#include <vector>

#include "drive.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vacpu {

#if defined(__x86_64__)
#if !defined(WITHOUT_AMX)
namespace amx_bf16 { extern const Isa table; }
#endif
namespace avx512_bf16 { extern const Isa table; }
namespace avx512 { extern const Isa table; }
namespace avx2 { extern const Isa table; }
#endif
namespace portable { extern const Isa table; }

namespace {

#if defined(__x86_64__)

struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

// Linux keeps the 8 KiB of tiles of a thread only for processes that asked for it, once for all threads; it refuses
// where a signal stack is too small. torch asks the same for its own products.
bool amx_granted() {
#if defined(__linux__) && !defined(WITHOUT_AMX)
  constexpr unsigned TILES = 1u << 24, BF16 = 1u << 22, OSXSAVE = 1u << 27, STATES = 3u << 17;
  if ((Cpuid(7, 0).d & (TILES | BF16)) != (TILES | BF16) || !(Cpuid(1, 0).c & OSXSAVE)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & STATES) != STATES) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

// Intel's processors since Sapphire Rapids have dot products of bf16 that take four times the cycles of a multiply-add
// of as many floats: widening is twice as fast.
bool slow_dot() {
  constexpr unsigned FP16 = 1u << 23;
  return __builtin_cpu_is("intel") && (Cpuid(7, 0).d & FP16);
}

#endif

const std::vector<const Isa*>& instruction_sets() {
  static const std::vector<const Isa*> found = [] {
    std::vector<const Isa*> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool dot = avx512 && __builtin_cpu_supports("avx512bf16");
#if !defined(WITHOUT_AMX)
    if (dot && amx_granted()) list.push_back(&amx_bf16::table);
#endif
    if (dot && !slow_dot()) list.push_back(&avx512_bf16::table);
    if (avx512) list.push_back(&avx512::table);
    if (dot && slow_dot()) list.push_back(&avx512_bf16::table);
    if (avx2) list.push_back(&avx2::table);
#endif
    list.push_back(&portable::table);
    return list;
  }();
  return found;
}

}  // namespace

int isa_count() { return static_cast<int>(instruction_sets().size()); }
const Isa& isa_at(int index) { return *instruction_sets()[index]; }

}  // namespace vacpu
