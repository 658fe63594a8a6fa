"""Stand-in until the kernels are written: the reference."""

from fastqat.ops.multi_tensor import multi_tensor_fake_quantize, multi_tensor_fake_quantize_backward

__all__ = ["multi_tensor_fake_quantize", "multi_tensor_fake_quantize_backward"]
