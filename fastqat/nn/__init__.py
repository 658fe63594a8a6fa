"""Quantizers as modules, quantized layers, and the preparation of whole models."""

from fastqat.nn.attention import MultiheadAttention
from fastqat.nn.calibrate import calibrate
from fastqat.nn.coverage import Coverage
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.gradient import GradientFakeQuant, GradientQSpec
from fastqat.nn.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Embedding,
    Linear,
)
from fastqat.nn.past import PastRead, past_reads
from fastqat.nn.prepare import fake_quant_enabled, prepare, quantizer_parameters, remove
from fastqat.nn.report import Report, report
from fastqat.nn.scales import scales_at_floor
from fastqat.nn.spec import QConfig, QSpec
from fastqat.nn.timed import step
from fastqat.nn.together import quantize_weights_together
from fastqat.nn.tracking import Dampening, Oscillation

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Coverage",
    "Dampening",
    "Embedding",
    "FakeQuant",
    "GradientFakeQuant",
    "GradientQSpec",
    "Linear",
    "MultiheadAttention",
    "Oscillation",
    "PastRead",
    "QConfig",
    "QSpec",
    "Report",
    "calibrate",
    "fake_quant_enabled",
    "past_reads",
    "prepare",
    "quantize_weights_together",
    "quantizer_parameters",
    "remove",
    "report",
    "scales_at_floor",
    "step",
]
