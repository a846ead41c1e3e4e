#define ISA_NAME portable
#include "isa.hpp"
