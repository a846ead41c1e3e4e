// The Python module `_cpu`: reads tensors and numbers into a Job, and runs it without the GIL.
#include "tensor.h"

#include <new>

#include "drive.h"
#include "scratch.h"

namespace {

using namespace vacpu;

// Positions of forward's arguments.
enum Arg {
  Q, K, V, OUT, LSE, CU_Q, CU_K, TABLE, USED_K, SLOPES, BIAS, SINKS, Q_DESCALE, K_DESCALE, V_DESCALE,
  TYPES, SCALE, SOFTCAP, LEFT, RIGHT, THREADS, ISA, FORWARD_ARGS,
  DOUT = FORWARD_ARGS, DLSE, DQ, DK, DV, DBIAS, BACKWARD_ARGS  // backward: OUT and LSE are what forward wrote
};

// Types of q, of k and v, of out, of attn_bias and of sinks, three bits each.
int type_at(int64_t types, int place) { return static_cast<int>(types >> (3 * place) & 7); }

Rows rows_of(const Tensor& t, int type, bool packed) {
  Rows r;
  r.data = t.data;
  r.type = type;
  r.batch = packed ? 0 : t.stride[0];
  r.token = t.stride[packed ? 0 : 1];
  r.head = t.stride[packed ? 1 : 2];
  return r;
}

bool table_of(PyObject* object, int type, Table* to) {
  if (object == Py_None) return true;
  Tensor t;
  if (!read_tensor(object, &t)) return false;
  to->data = t.data;
  to->type = type;
  to->head = t.ndim ? t.stride[t.ndim - 1] : 0;
  to->batch = t.ndim > 1 ? t.stride[0] : 0;
  return true;
}

bool ints_of(PyObject* object, const int32_t** to) {
  if (object == Py_None) return true;
  Tensor t;
  if (!read_tensor(object, &t)) return false;
  if (t.ndim != 1 || (t.shape[0] > 1 && t.stride[0] != 1)) {
    PyErr_SetString(PyExc_ValueError, "lengths must be contiguous int32 tensors of one dimension");
    return false;
  }
  *to = reinterpret_cast<const int32_t*>(t.data);
  return true;
}

bool read_numbers(PyObject* const* args, int64_t* types, Job* j) {
  *types = PyLong_AsLongLong(args[TYPES]);
  j->scale = static_cast<float>(PyFloat_AsDouble(args[SCALE]));
  j->softcap = static_cast<float>(PyFloat_AsDouble(args[SOFTCAP]));
  j->left = PyLong_AsLongLong(args[LEFT]);
  j->right = PyLong_AsLongLong(args[RIGHT]);
  return !PyErr_Occurred();
}

bool read_extras(PyObject* const* args, int64_t types, Job* j) {
  Tensor t;
  if (args[BIAS] != Py_None) {
    if (!read_tensor(args[BIAS], &t)) return false;
    int64_t stride[4];
    for (int i = 0; i < 4; i++) stride[i] = t.shape[i] == 1 ? 0 : t.stride[i];
    j->bias = {t.data, type_at(types, 3), stride[0], stride[1], stride[2], stride[3]};
  }
  return table_of(args[SLOPES], F32, &j->slopes) && table_of(args[SINKS], type_at(types, 4), &j->sinks) &&
         table_of(args[Q_DESCALE], F32, &j->q_descale) && table_of(args[K_DESCALE], F32, &j->k_descale) &&
         table_of(args[V_DESCALE], F32, &j->v_descale);
}

// q, k, v and lengths; `packed` is set where q is (T, H, D).
bool read_main(PyObject* const* args, int64_t types, Job* j, bool* packed) {
  Tensor q, k, v;
  if (!read_tensor(args[Q], &q) || !read_tensor(args[K], &k) || !read_tensor(args[V], &v)) return false;
  *packed = args[CU_Q] != Py_None;
  const bool paged = args[TABLE] != Py_None, packed_k = *packed && !paged;
  const int kv_type = type_at(types, 1);
  j->q = rows_of(q, type_at(types, 0), *packed);
  j->k = rows_of(k, kv_type, packed_k);
  j->v = rows_of(v, kv_type, packed_k);
  j->out_type = type_at(types, 2);
  j->heads = static_cast<int>(q.shape[q.ndim - 2]);
  j->dim = static_cast<int>(q.shape[q.ndim - 1]);
  j->kv_heads = static_cast<int>(k.shape[k.ndim - 2]);
  j->dim_v = static_cast<int>(v.shape[v.ndim - 1]);
  j->group = j->heads / j->kv_heads;
  j->batch = static_cast<int>(q.shape[0]);
  j->seqlen_q = q.shape[*packed ? 0 : 1];
  j->seqlen_k = k.shape[packed_k ? 0 : 1];
  if (!*packed) return true;
  Tensor cu, table;
  if (!read_tensor(args[CU_Q], &cu)) return false;
  j->batch = static_cast<int>(cu.shape[0]) - 1;
  if (paged) {
    if (!read_tensor(args[TABLE], &table)) return false;
    j->table = reinterpret_cast<const int32_t*>(table.data);
    j->table_batch = table.stride[0];
    j->table_blocks = table.shape[1];
    j->num_blocks = k.shape[0];
    j->block_size = static_cast<int>(k.shape[1]);
  }
  return ints_of(args[CU_Q], &j->cu_q) && ints_of(args[CU_K], &j->cu_k) && ints_of(args[USED_K], &j->used_k);
}

// lse (B, H, Sq) or (H, Tq), contiguous.
bool read_lse(PyObject* object, bool packed, Job* j) {
  Tensor lse;
  if (object == Py_None) return true;
  if (!read_tensor(object, &lse)) return false;
  j->lse = reinterpret_cast<float*>(lse.data);
  j->lse_head = j->seqlen_q;
  j->lse_batch = packed ? 0 : j->heads * j->seqlen_q;
  return true;
}

bool read_gradients(PyObject* const* args, int64_t types, bool packed, Job* j) {
  Tensor out, dout, dq, dk, dv, t;
  if (!read_tensor(args[OUT], &out) || !read_tensor(args[DOUT], &dout) || !read_tensor(args[DQ], &dq) ||
      !read_tensor(args[DK], &dk) || !read_tensor(args[DV], &dv))
    return false;
  j->o = rows_of(out, type_at(types, 2), packed);
  j->dout = rows_of(dout, type_at(types, 2), packed);
  j->dq = dq.data, j->dk = dk.data, j->dv = dv.data;
  if (args[DLSE] != Py_None) {
    if (!read_tensor(args[DLSE], &t)) return false;
    j->dlse = reinterpret_cast<const float*>(t.data);
    j->dlse_batch = packed ? 0 : t.stride[0];
    j->dlse_head = t.stride[packed ? 0 : 1];
    j->dlse_token = t.stride[packed ? 1 : 2];
  }
  if (args[DBIAS] != Py_None) {
    if (!read_tensor(args[DBIAS], &t)) return false;
    int64_t stride[4];
    for (int i = 0; i < 4; i++) stride[i] = t.shape[i] == 1 ? 0 : t.stride[i];
    j->dbias = reinterpret_cast<float*>(t.data);
    j->dbias_batch = stride[0], j->dbias_head = stride[1], j->dbias_query = stride[2], j->dbias_key = stride[3];
  }
  return true;
}

typedef const char* (*Work)(const Job&, const Isa&, int);

// Run without the GIL; turns what went wrong into a Python error.
PyObject* run(Work work, const Job& j, PyObject* const* args) {
  const long threads = PyLong_AsLong(args[THREADS]), isa = PyLong_AsLong(args[ISA]);
  if (PyErr_Occurred()) return nullptr;
  if (isa < 0 || isa >= isa_count()) {
    PyErr_SetString(PyExc_ValueError, "no such instruction set on this machine");
    return nullptr;
  }
  const char* wrong = nullptr;
  bool memory = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    wrong = work(j, isa_at(static_cast<int>(isa)), static_cast<int>(threads));
  } catch (const std::bad_alloc&) {
    memory = false;
  }
  Py_END_ALLOW_THREADS
  if (!memory) return PyErr_NoMemory();
  if (wrong) {
    PyErr_SetString(PyExc_ValueError, wrong);
    return nullptr;
  }
  Py_RETURN_NONE;
}

bool count_is(Py_ssize_t n, Py_ssize_t wanted) {
  if (n != wanted) PyErr_Format(PyExc_TypeError, "takes %zd arguments, not %zd", wanted, n);
  return n == wanted;
}

PyObject* py_forward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Job j;
  int64_t types;
  bool packed;
  Tensor out;
  if (!count_is(n, FORWARD_ARGS) || !read_numbers(args, &types, &j) || !read_main(args, types, &j, &packed) ||
      !read_extras(args, types, &j) || !read_lse(args[LSE], packed, &j) || !read_tensor(args[OUT], &out))
    return nullptr;
  j.out = out.data;
  return run(forward, j, args);
}

PyObject* py_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Job j;
  int64_t types;
  bool packed;
  if (!count_is(n, BACKWARD_ARGS) || !read_numbers(args, &types, &j) || !read_main(args, types, &j, &packed) ||
      !read_extras(args, types, &j) || !read_lse(args[LSE], packed, &j) || !read_gradients(args, types, packed, &j))
    return nullptr;
  return run(backward, j, args);
}

// probe_fma(turns, threads, isa) -> multiply-adds done.
PyObject* py_probe_fma(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (!count_is(n, 3)) return nullptr;
  const long long turns = PyLong_AsLongLong(args[0]);
  const long threads = PyLong_AsLong(args[1]), isa = PyLong_AsLong(args[2]);
  if (PyErr_Occurred()) return nullptr;
  const Isa& with = isa_at(static_cast<int>(isa));
  Py_BEGIN_ALLOW_THREADS
  share(static_cast<int>(threads), threads, [&](int64_t, int) { with.probe_fma(turns); });
  Py_END_ALLOW_THREADS
  return PyLong_FromLongLong(turns * threads * with.turn);
}

// probe_read(k, v, table, block_bytes, threads, isa): read blocks of k and v in the order of an int32 table.
// With table None both are read from end to end.
PyObject* py_probe_read(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor k, v, table;
  if (!count_is(n, 6) || !read_tensor(args[0], &k) || !read_tensor(args[1], &v)) return nullptr;
  const bool paged = args[2] != Py_None;
  if (paged && !read_tensor(args[2], &table)) return nullptr;
  const long long block = PyLong_AsLongLong(args[3]);
  const long threads = PyLong_AsLong(args[4]), isa = PyLong_AsLong(args[5]);
  if (PyErr_Occurred()) return nullptr;
  const Isa& with = isa_at(static_cast<int>(isa));
  const int32_t* order = reinterpret_cast<const int32_t*>(table.data);
  const int64_t count = paged ? table.shape[0] : threads;
  Py_BEGIN_ALLOW_THREADS
  share(static_cast<int>(threads), threads, [&](int64_t t, int) {
    for (int64_t x = count * t / threads; x < count * (t + 1) / threads; x++) {
      const int64_t at = (paged ? order[x] : x) * block, after = paged ? order[(x + 1) % count] * block : at;
      with.probe_read(k.data + at, block, paged ? v.data + at : nullptr);
      with.probe_read(v.data + at, block, paged ? k.data + after : nullptr);
    }
  });
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyObject* py_instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyTuple_New(isa_count());
  for (int i = 0; names && i < isa_count(); i++) {
    PyObject* name = PyUnicode_FromString(isa_at(i).name);
    if (!name || PyTuple_SetItem(names, i, name)) return nullptr;
  }
  return names;
}

// What tells these sources from those of another day.
PyObject* py_sources(PyObject*, PyObject*) { return PyUnicode_FromString(SOURCES); }

PyObject* py_set_parallel(PyObject*, PyObject* address) {
  void* fn = PyLong_AsVoidPtr(address);
  if (PyErr_Occurred()) return nullptr;
  set_parallel(reinterpret_cast<ParallelFn>(fn));
  Py_RETURN_NONE;
}

PyObject* py_kept_bytes(PyObject*, PyObject*) { return PyLong_FromSize_t(kept_bytes()); }

PyMethodDef METHODS[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_forward)), METH_FASTCALL, nullptr},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_backward)), METH_FASTCALL, nullptr},
    {"probe_fma", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_probe_fma)), METH_FASTCALL, nullptr},
    {"probe_read", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(py_probe_read)), METH_FASTCALL, nullptr},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, nullptr},
    {"sources", py_sources, METH_NOARGS, nullptr},
    {"set_parallel", py_set_parallel, METH_O, nullptr},
    {"kept_bytes", py_kept_bytes, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cpu() {
  if (!prepare_tensors()) return nullptr;
  return PyModule_Create(&MODULE);
}
