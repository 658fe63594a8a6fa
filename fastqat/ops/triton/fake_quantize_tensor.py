from fastqat.ops.one_tensor import fake_quantize_tensor, fake_quantize_tensor_backward  # noqa: F401
