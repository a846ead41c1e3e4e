// Reading a torch tensor without torch's headers: the DLPack C exchange API of its type where it has one (torch 2.9 and
// newer, 0.1 us a tensor), else its Python methods (0.5 us). Limited API of Python 3.10.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

#include "job.h"

namespace vacpu {

struct Tensor {
  char* data = nullptr;
  int ndim = 0;
  int64_t shape[8] = {}, stride[8] = {};
};

// Prepare names; returns false with a Python error set.
bool prepare_tensors();

// Read a CPU tensor with memory behind it. Returns false with a Python error set, for one that has none (meta, fake).
bool read_tensor(PyObject* object, Tensor* out);

}  // namespace vacpu
