"""fastqat: quantization-aware training that costs nothing extra."""

from fastqat import functional, nn
from fastqat._version import __version__
from fastqat.batch_norm import reestimate_bn
from fastqat.hessian import ewgs_delta
from fastqat.nn import (
    Dampening,
    FakeQuant,
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
    step,
)
from fastqat.ops.select import current_backend, status, use_backend
from fastqat.oscillation import oscillation_summary
from fastqat.regularization import bin_regularization, dampening_loss
from fastqat.schedules import Schedule

__all__ = [
    "Dampening",
    "FakeQuant",
    "Oscillation",
    "QConfig",
    "QSpec",
    "Report",
    "Schedule",
    "__version__",
    "bin_regularization",
    "calibrate",
    "current_backend",
    "dampening_loss",
    "ewgs_delta",
    "fake_quant_enabled",
    "functional",
    "nn",
    "oscillation_summary",
    "prepare",
    "quantize_weights_together",
    "quantizer_parameters",
    "reestimate_bn",
    "remove",
    "report",
    "status",
    "step",
    "use_backend",
]
