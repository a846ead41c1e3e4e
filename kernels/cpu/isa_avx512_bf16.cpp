#define ISA_NAME avx512_bf16
#include "isa.hpp"
