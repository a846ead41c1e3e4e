#define ISA_NAME avx512
#include "isa.hpp"
