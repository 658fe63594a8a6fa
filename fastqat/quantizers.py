"""The quantizers of the literature, as options of :class:`fastqat.QSpec`; all of them can be changed by keyword."""

from __future__ import annotations

from typing import Any

from fastqat.nn.spec import QSpec
from fastqat.ops import checks


def lsq(bits: int, **options: Any) -> QSpec:
    """LSQ: the scale is learned, its gradient divided by sqrt(N * qmax), where N elements share it.

    For weights and activations; the first tensors say whether codes are signed, and set the scale to 2 mean|x| /
    sqrt(qmax) (range="mean_abs"). What equals an end of the range counts as inside, where the paper counts it outside.

    Args:
        bits: 1 to 8.
        options: others of QSpec.

    Source: Esser et al., Learned Step Size Quantization (1902.08153), sections 2.1 and 2.2.
    """
    return _spec(options, bits=bits, learn="scale", grad_scale="lsq", ste_mask="unrounded", range="mean_abs")


def lsq_plus(bits: int, **options: Any) -> QSpec:
    """LSQ+ of activations: scale and offset are learned, both with the gradient factor of LSQ.

    The range begins where the squared error is least (range="mse").

    Args:
        bits: 1 to 8.
        options: others of QSpec.

    Source: Bhalgat et al., LSQ+ (2004.09576), section 3.
    """
    return _spec(
        options, bits=bits, symmetric=False, learn="scale+offset", grad_scale="lsq", ste_mask="unrounded", range="mse"
    )


def pact(bits: int, alpha: float | None = 6.0, **options: Any) -> QSpec:
    """PACT of activations: clipped to [0, alpha], where alpha is learned from what lies above it alone.

    The parameter is scale = alpha / (2^bits - 1), and its gradient 2^bits - 1 times that of alpha. What equals alpha
    passes its gradient to x, where the paper gives it to alpha. The penalty of the paper on alpha is weight decay.

    Args:
        bits: 1 to 8.
        alpha: where it begins; None is the range of the first tensors (range="mse").
        options: others of QSpec.

    Source: Choi et al., PACT (1805.06085), section 3.
    """
    return _spec(options, **_clipped(bits, alpha), estimator="pact")


def cg_pact(bits: int, alpha: float | None = 6.0, **options: Any) -> QSpec:
    """PACT with the gradient of alpha that rounding has, too: q(x / alpha) - x / alpha below alpha.

    It is LSQ's without its factor, times 2^bits - 1.

    Args:
        bits, alpha, options: as for :func:`pact`.

    Source: Jin et al., Towards Efficient Training for Neural Network Quantization (1912.10207).
    """
    return _spec(options, **_clipped(bits, alpha))


def dorefa_activation(bits: int, **options: Any) -> QSpec:
    """DoReFa of activations: clipped to [0, 1] and rounded to 2^bits levels; nothing is learned.

    Args:
        bits: 1 to 8.
        options: others of QSpec.

    Source: Zhou et al., DoReFa-Net (1606.06160), section 2.4.
    """
    return _spec(options, bits=bits, signed=False, ste_mask="unrounded", range="fixed", fixed_range=(0.0, 1.0))


def dorefa_weight(bits: int, *, rescale: str | None = None, **options: Any) -> QSpec:
    """DoReFa of weights: tanh(w) / max|tanh(w)|, rounded to 2^bits levels from -1 to 1; SAT's with a rescaling.

    The gradient goes through rounding as it is, and through tanh and the maximum. There is no level at 0.

    Args:
        bits: 2 to 8.
        rescale: None; "constant": the result has the standard deviation 1 / sqrt(output channels * size of the kernel),
            without a gradient through the factor (SAT, for layers that no batch normalization follows); "std": that of
            the weight.
        options: others of QSpec.

    Source: Zhou et al., DoReFa-Net (1606.06160), section 2.3; Jin et al., Towards Efficient Training for Neural Network
        Quantization (1912.10207). There, evaluation divides the bias by the factor instead; here it is the
        same function in training and evaluation.
    """
    grid = {"symmetric": False, "range": "fixed", "fixed_range": (-1.0, 1.0)}
    return _spec(options, bits=bits, normalize="tanh", rescale=rescale, **grid)


def lbt_weight(bits: int, **options: Any) -> QSpec:
    """Weights of LBT: 2^bits - 1 levels on [-b, b] counted from -b, with b learned from 3 standard deviations on.

    The parameter is scale = b / (2^(bits-1) - 1), and its gradient 2^(bits-1) - 1 times that of b.

    Args:
        bits: 2 to 8.
        options: others of QSpec.

    Source: Kim et al., Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients (ECCV 2024);
    Lee et al., EWGS (2104.00903).
    """
    return _spec(
        options,
        bits=bits,
        restricted=True,
        count_from="lowest",
        learn="scale",
        ste_mask="unrounded",
        range="std",
    )


def lbt_activation(bits: int, *, signed: bool | None = None, **options: Any) -> QSpec:
    """Activations of LBT: 2^bits levels on [0, b], with b learned from 3 std(x) / sqrt(1 - 2/pi) on.

    The divisor makes the standard deviation that of the normal distribution whose positive half x has.

    Args:
        bits: 1 to 8; from 2 on where signed.
        signed: True for the grid of :func:`lbt_weight`, for tensors with negative values. None leaves it to the first
            tensors: where one has a negative value, the grid has a level more, -2^(bits-1), and halves go to even codes
            counted from 0.
        options: others of QSpec.

    Source: as for :func:`lbt_weight`.
    """
    if signed:
        return lbt_weight(bits, **options)
    return _spec(options, bits=bits, signed=signed, learn="scale", ste_mask="unrounded", range="std")


def trs_weight(bits: int, *, learn: bool = False, **options: Any) -> QSpec:
    """Weights of TRS: codes of clip(2^(bits-1) w / s), divided by 2^(bits-1), with s = 3 standard deviations.

    The result is not multiplied by s: a batch normalization behind the layer takes that in, and dw = g / s inside the
    range. The parameter is scale = s / 2^(bits-1); it is the divisor down to eps, where the paper has |s| + 1e-6.

    Args:
        bits: 2 to 8. The paper's weights of 1 bit are signs, -s and s, which is another grid: there is none here.
        learn: False keeps s where it begins, which a scheduled rate of transitions wants; True learns it, as the
            paper does without such a schedule. The gradient of the parameter is 2^(bits-1) times that of s.
        options: others of QSpec; restricted=True has no code -2^(bits-1), an option of the paper's code.

    Raises:
        ValueError: 1 bit.

    Source: Lee et al., Scheduling Weight Transitions for Quantization-Aware Training (2404.19248), section 3.
    """
    return _spec(options, **_in_units(bits), learn="scale" if learn else None)


def trs_activation(bits: int, *, signed: bool | None = None, **options: Any) -> QSpec:
    """Activations of TRS: codes of clip(2^bits x / s), divided by 2^bits; s is learned from 3 std / sqrt(1 - 2/pi) on.

    The parameter is scale = s / 2^bits, and its gradient 2^bits times that of s.

    Args:
        bits: 2 to 8. The paper's activations of 1 bit are in units of the highest code: there are none here.
        signed: False as in the paper. None leaves it to the first tensors: where one has a negative value, the grid is
            that of :func:`trs_weight`, and s begins at 3 std.
        options: others of QSpec.

    Raises:
        ValueError: 1 bit.

    Source: as for :func:`trs_weight`.
    """
    return _spec(options, **_in_units(bits), signed=signed, learn="scale")


def _in_units(bits: int) -> dict[str, Any]:
    """Options of codes in units of a range whose end is a step above the highest of them."""
    if bits == 1:
        checks.fail(ValueError, "bits", "2 to 8: TRS has other grids for 1 bit, which are not there", bits)
    return {"bits": bits, "normalize": "range", "ste_mask": "unrounded", "range": "std_open"}


def _clipped(bits: int, alpha: float | None) -> dict[str, Any]:
    """Options of a learned range [0, alpha]."""
    start = {"range": "mse"} if alpha is None else {"range": "fixed", "fixed_range": (0.0, alpha)}
    return {"bits": bits, "signed": False, "learn": "scale", "ste_mask": "unrounded", **start}


def _spec(options: dict[str, Any], **recipe: Any) -> QSpec:
    """The recipe with what the user changes of it."""
    return QSpec(**{**recipe, **options})
