#include "tensor.h"

namespace vacpu {
namespace {

// What the DLPack 1.x headers declare, as far as it is used: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void* allocator;
  void* from_object;
  void* to_object;
  int (*view)(void* object, DLTensor* out);
  void* current_stream;
};
constexpr int32_t CPU_DEVICE = 1;

PyObject *name_data_ptr, *name_stride, *name_shape, *name_device, *name_type, *name_exchange;

const DLPackExchangeAPI* exchange_of(PyTypeObject* type) {
  static PyTypeObject* known = nullptr;  // the GIL guards both
  static const DLPackExchangeAPI* api = nullptr;
  if (type == known) return api;
  const DLPackExchangeAPI* found = nullptr;
  PyObject* capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_exchange);
  if (capsule) {
    found = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  if (found && (found->major != 1 || !found->view)) found = nullptr;
  known = type;
  api = found;
  return found;
}

bool read_ints(PyObject* sequence, int64_t* to, int* n) {
  if (!sequence) return false;
  const Py_ssize_t size = PySequence_Size(sequence);
  bool good = size >= 0 && size <= 8;
  for (Py_ssize_t i = 0; good && i < size; i++) {
    PyObject* item = PySequence_GetItem(sequence, i);
    to[i] = item ? PyLong_AsLongLong(item) : 0;
    Py_XDECREF(item);
    good = !PyErr_Occurred();
  }
  Py_DECREF(sequence);
  *n = static_cast<int>(size);
  if (!good && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a tensor of more than 8 dimensions");
  return good;
}

bool read_by_methods(PyObject* object, Tensor* out) {
  PyObject* device = PyObject_GetAttr(object, name_device);
  PyObject* type = device ? PyObject_GetAttr(device, name_type) : nullptr;
  const bool on_cpu = type && PyUnicode_CompareWithASCIIString(type, "cpu") == 0;
  Py_XDECREF(type);
  Py_XDECREF(device);
  if (PyErr_Occurred()) return false;
  if (!on_cpu) {
    PyErr_SetString(PyExc_ValueError, "the CPU kernels got a tensor that is not on the CPU");
    return false;
  }
  PyObject* pointer = PyObject_CallMethodObjArgs(object, name_data_ptr, nullptr);
  if (!pointer) return false;
  out->data = static_cast<char*>(PyLong_AsVoidPtr(pointer));
  Py_DECREF(pointer);
  if (PyErr_Occurred()) return false;
  return read_ints(PyObject_GetAttr(object, name_shape), out->shape, &out->ndim) &&
         read_ints(PyObject_CallMethodObjArgs(object, name_stride, nullptr), out->stride, &out->ndim);
}

bool read_by_exchange(const DLPackExchangeAPI* api, PyObject* object, Tensor* out) {
  DLTensor t;
  if (api->view(object, &t)) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a tensor that DLPack cannot describe");
    return false;
  }
  if (t.device.device_type != CPU_DEVICE || t.ndim > 8) {
    PyErr_SetString(PyExc_ValueError, "the CPU kernels got a tensor that is not on the CPU");
    return false;
  }
  out->data = static_cast<char*>(t.data) + t.byte_offset;
  out->ndim = t.ndim;
  int64_t dense = 1;
  for (int i = t.ndim - 1; i >= 0; i--) {
    out->shape[i] = t.shape[i];
    out->stride[i] = t.strides ? t.strides[i] : dense;
    dense *= t.shape[i];
  }
  return true;
}

}  // namespace

bool prepare_tensors() {
  name_data_ptr = PyUnicode_InternFromString("data_ptr");
  name_stride = PyUnicode_InternFromString("stride");
  name_shape = PyUnicode_InternFromString("shape");
  name_device = PyUnicode_InternFromString("device");
  name_type = PyUnicode_InternFromString("type");
  name_exchange = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  return name_data_ptr && name_stride && name_shape && name_device && name_type && name_exchange;
}

bool read_tensor(PyObject* object, Tensor* out) {
  const DLPackExchangeAPI* api = exchange_of(Py_TYPE(object));
  if (!(api ? read_by_exchange(api, object, out) : read_by_methods(object, out))) return false;
  if (out->data) return true;
  for (int i = 0; i < out->ndim; i++)
    if (out->shape[i] == 0) return true;
  PyErr_SetString(PyExc_ValueError, "the CPU kernels got a tensor without memory (a fake or meta tensor)");
  return false;
}

}  // namespace vacpu
