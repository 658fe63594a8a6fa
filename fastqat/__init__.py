"""fastqat: quantization-aware training that costs nothing extra."""

from fastqat import functional, nn
from fastqat._version import __version__
from fastqat.nn import FakeQuant, QConfig, QSpec, calibrate, prepare, quantizer_parameters, step
from fastqat.ops.select import current_backend, status, use_backend

__all__ = [
    "FakeQuant",
    "QConfig",
    "QSpec",
    "__version__",
    "calibrate",
    "current_backend",
    "functional",
    "nn",
    "prepare",
    "quantizer_parameters",
    "status",
    "step",
    "use_backend",
]
