#define ISA_NAME avx2
#include "isa.hpp"
