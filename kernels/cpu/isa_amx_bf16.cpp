#define ISA_NAME amx_bf16
#include "isa.hpp"
