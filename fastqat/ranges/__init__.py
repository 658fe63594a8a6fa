"""Range estimators: from the tensors that a quantizer sees to the scale and zero point of its grid.

Each estimator observes any number of tensors, takes in what estimators of other processes have observed, and then gives
one grid. Source of all: White Paper on Neural Network Quantization (2106.08295), section 3.1.
"""

from __future__ import annotations

from fastqat.ops import checks
from fastqat.ops.grids import grid_from_range, moving_average
from fastqat.ranges.extremes import Estimator, GridSpec, MinMax, Percentile, RunningMinMax, rows_of
from fastqat.ranges.logits import CrossEntropy
from fastqat.ranges.moments import Moments
from fastqat.ranges.processes import gathered, joined, merged
from fastqat.ranges.search import HistogramSearch, MeanSquaredError, fractions, step_sizes

ESTIMATORS = ("minmax", "running_minmax", "percentile", "mse", "sqnr", "std", "std_open", "mean_abs")
SYMMETRIC = ("std", "std_open", "mean_abs")  # give no zero point
OF_LOGITS = ("cross_entropy",)  # make sense for the logits of a classifier alone, with one scale

__all__ = [
    "ESTIMATORS",
    "OF_LOGITS",
    "CrossEntropy",
    "Estimator",
    "GridSpec",
    "HistogramSearch",
    "MeanSquaredError",
    "MinMax",
    "Moments",
    "Percentile",
    "RunningMinMax",
    "estimator",
    "gathered",
    "grid_from_range",
    "joined",
    "merged",
    "moving_average",
    "rows_of",
]


def estimator(name: str, spec: GridSpec, *, momentum: float, percentile: float, once: bool = False) -> Estimator:
    """Make a range estimator by its name.

    Args:
        name: one of :data:`ESTIMATORS` or :data:`OF_LOGITS`.
        spec: of the quantizer.
        momentum: of "running_minmax".
        percentile: of "percentile".
        once: it will observe one tensor alone, and give its grid while that is unchanged.
    """
    checks.choice("range", name, (*ESTIMATORS, *OF_LOGITS))
    if name == "minmax":
        return MinMax(spec)
    if name == "running_minmax":
        return RunningMinMax(spec, momentum)
    if name == "percentile":
        return Percentile(spec, percentile)
    if name in SYMMETRIC:
        return Moments(spec, name)
    if name == "cross_entropy":
        return CrossEntropy(spec)
    if name == "sqnr":
        return HistogramSearch(spec, step_sizes, bins=512, beyond=3.0)
    return MeanSquaredError(spec) if once else HistogramSearch(spec, fractions, bins=2**15, beyond=1.0)
