"""fastqat: quantization-aware training that costs nothing extra."""

from fastqat import functional, nn, quantizers
from fastqat._version import __version__
from fastqat.activation_statistics import activation_statistics
from fastqat.adaqat import AdaQAT
from fastqat.averaging import AveragedModel
from fastqat.batch_norm import reestimate_bn
from fastqat.bit_widths import BitWidths, bit_widths, set_bit_widths
from fastqat.bn_ranges import bn_ranges
from fastqat.compression import SavedActivations, compress_saved_activations
from fastqat.cost import Cost, cost
from fastqat.hessian import ewgs_delta
from fastqat.nn import (
    Coverage,
    Dampening,
    FakeQuant,
    GradientFakeQuant,
    GradientQSpec,
    Oscillation,
    QConfig,
    QSpec,
    Report,
    calibrate,
    fake_quant_enabled,
    prepare,
    quantize_weights_together,
    quantizer_parameters,
    remove,
    report,
    scales_at_floor,
    step,
)
from fastqat.ops.select import current_backend, status, use_backend
from fastqat.oscillation import oscillation_summary
from fastqat.parameter_groups import parameter_groups
from fastqat.regularization import bin_regularization, dampening_loss
from fastqat.schedules import Schedule
from fastqat.traffic import Traffic, memory_traffic
from fastqat.transition_rate import TransitionRate, TransitionRateScheduler

__all__ = [
    "AdaQAT",
    "AveragedModel",
    "BitWidths",
    "Cost",
    "Coverage",
    "Dampening",
    "FakeQuant",
    "GradientFakeQuant",
    "GradientQSpec",
    "Oscillation",
    "QConfig",
    "QSpec",
    "Report",
    "SavedActivations",
    "Schedule",
    "Traffic",
    "TransitionRate",
    "TransitionRateScheduler",
    "__version__",
    "activation_statistics",
    "bin_regularization",
    "bit_widths",
    "bn_ranges",
    "calibrate",
    "compress_saved_activations",
    "cost",
    "current_backend",
    "dampening_loss",
    "ewgs_delta",
    "fake_quant_enabled",
    "functional",
    "memory_traffic",
    "nn",
    "oscillation_summary",
    "parameter_groups",
    "prepare",
    "quantize_weights_together",
    "quantizer_parameters",
    "quantizers",
    "reestimate_bn",
    "remove",
    "report",
    "scales_at_floor",
    "set_bit_widths",
    "status",
    "step",
    "use_backend",
]
