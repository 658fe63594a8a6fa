// The ops of the CPU backend under their names, and the Python module whose import registers them.
#include <Python.h>

#include "ops.h"
// After it.
#include "../register.h"

STABLE_TORCH_LIBRARY_IMPL(fastqat, CPU, m) { FASTQAT_REGISTER_ALL(m); }

PyMODINIT_FUNC PyInit__C() {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
