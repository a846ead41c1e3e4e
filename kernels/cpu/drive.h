// The driver: plans a call, shares it out among threads, and keeps scratch memory between calls.
#pragma once
#include <cstdint>

#include "job.h"

namespace vacpu {

typedef void (*ParallelFn)(void (*)(void*), void*, unsigned, unsigned);

// GOMP_parallel of the OpenMP runtime that torch has loaded; null runs everything on the calling thread.
void set_parallel(ParallelFn fn);

// Instruction sets that this machine has, best first.
int isa_count();
const Isa& isa_at(int index);

// Return null, or what is wrong with the call (values inside tensors).
const char* forward(const Job& job, const Isa& isa, int threads);
const char* backward(const Job& job, const Isa& isa, int threads);

// Bytes of scratch that are kept for later calls, and how many buffers.
size_t kept_bytes();

}  // namespace vacpu
