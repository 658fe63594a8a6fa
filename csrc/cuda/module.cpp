// The Python module fastqat._C_cuda. Importing it registers the kernels; it tells what they were built for.
#ifndef FASTQAT_CUDA_ON_HOST
#include <Python.h>

#include <exception>

#include "devices.h"

namespace {

PyObject* capabilities(PyObject*, PyObject*) {
  try {
    PyObject* list = PyList_New(0);
    for (int capability : fastqat::cuda::capabilities()) {
      PyObject* number = PyLong_FromLong(capability);
      PyList_Append(list, number);
      Py_DECREF(number);
    }
    return list;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef functions[] = {{"capabilities", capabilities, METH_NOARGS, "Capability of each visible GPU, 90 for 9.0."},
                           {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  PyObject* made = PyModule_Create(&module);
  if (made) {
    PyModule_AddStringConstant(made, "architectures", FASTQAT_CUDA_ARCHITECTURES);
    PyModule_AddIntConstant(made, "ptx", FASTQAT_CUDA_PTX);
    PyModule_AddStringConstant(made, "compiler", FASTQAT_CUDA_COMPILER);
  }
  return made;
}
#endif
