"""fastqat: quantization-aware training that costs nothing extra."""

from fastqat import functional, nn
from fastqat._version import __version__
from fastqat.batch_norm import reestimate_bn
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
    quantizer_parameters,
    remove,
    report,
    step,
)
from fastqat.ops.select import current_backend, status, use_backend
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
    "calibrate",
    "current_backend",
    "fake_quant_enabled",
    "functional",
    "nn",
    "prepare",
    "quantizer_parameters",
    "reestimate_bn",
    "remove",
    "report",
    "status",
    "step",
    "use_backend",
]
