// The ops of the CPU backend under their names, and the Python module whose import registers them.
#include <Python.h>

#include "ops.h"

#define FASTQAT_REGISTER(op)                 \
  m.impl(#op, TORCH_BOX(&fastqat::cpu::op)); \
  m.impl(#op "_out", TORCH_BOX(&fastqat::cpu::op##_out))

STABLE_TORCH_LIBRARY_IMPL(fastqat, CPU, m) {
  FASTQAT_REGISTER(fake_quantize);
  FASTQAT_REGISTER(fake_quantize_backward);
  FASTQAT_REGISTER(fake_quantize_backward_input);
  FASTQAT_REGISTER(quantize);
  FASTQAT_REGISTER(dequantize);
  FASTQAT_REGISTER(pack);
  FASTQAT_REGISTER(unpack);
  FASTQAT_REGISTER(minmax);
  FASTQAT_REGISTER(range_search);
  FASTQAT_REGISTER(philox_uniform);
  m.impl("multi_tensor_fake_quantize", TORCH_BOX(&fastqat::cpu::multi_tensor_fake_quantize));
  m.impl("multi_tensor_fake_quantize_backward", TORCH_BOX(&fastqat::cpu::multi_tensor_fake_quantize_backward));
}

PyMODINIT_FUNC PyInit__C() {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
