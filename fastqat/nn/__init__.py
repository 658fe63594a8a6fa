"""Quantizers as modules, quantized layers, and the preparation of whole models."""

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import Conv2d, Linear
from fastqat.nn.prepare import calibrate, prepare, quantizer_parameters
from fastqat.nn.spec import QConfig, QSpec
from fastqat.nn.timed import step

__all__ = ["Conv2d", "FakeQuant", "Linear", "QConfig", "QSpec", "calibrate", "prepare", "quantizer_parameters", "step"]
