from fastqat.ops.one_tensor import dequantize_tensor  # noqa: F401
