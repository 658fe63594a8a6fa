"""Ops on a weight that is wanted at two bit-widths."""

from fastqat.ops.two_widths import dorefa_fake_quantize, dorefa_fake_quantize_backward, fake_quantize_two_widths

__all__ = ["dorefa_fake_quantize", "dorefa_fake_quantize_backward", "fake_quantize_two_widths"]
