"""THE list of fastqat operators: for each op its schema and the allocation of its results.

An op is declared once, here. From the declaration follow

- ``fastqat::<op>``      returns freshly allocated results,
- ``fastqat::<op>_out``  writes into tensors that the caller passes last, and returns ``()``,
- the fake (meta) kernels of both: :func:`allocate` works on fake and on real tensors alike.

A Python backend implements only the second form: ``def <op>(*arguments, *results) -> None``.

An op on many tensors, or one that keeps a state, has one form alone: it writes into tensors that the caller passes
last, and returns ``()``. See :data:`IN_PLACE_OPS`.

The arguments ``scale, zero_point, offset, qrange, axis, eps`` describe a quantization grid wherever they appear:

    scale       float32 [1] per tensor, or [C] with C = x.shape[axis]; the kernels use max(scale, eps)
    zero_point  float32 like scale, or None; used as clamp(rint(zero_point), qmin, qmax)    (zero-point grid)
    offset      float32 like scale, or None; excludes zero_point                            (offset grid)
    qrange      int32 [2]: qmin, qmax as data, so that another bit-width is not another graph
    axis        None (per tensor) or a dimension of x in [0, x.dim())

Groups are not known here: :mod:`fastqat.functional` views a grouped tensor as ``[C * groups, group_size]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NAMESPACE = "fastqat"
GRID = "Tensor scale, Tensor? zero_point, Tensor? offset, Tensor qrange, int? axis, float eps"


@dataclass(frozen=True)
class Op:
    """One operator: its name, arguments, result names, and the function that allocates the results."""

    name: str
    arguments: str
    results: tuple[str, ...]
    allocate: Callable[..., tuple[Tensor, ...]]

    @property
    def schema(self) -> str:
        """Schema of the form that returns its results."""
        returns = ", ".join(f"Tensor {r}" for r in self.results) if len(self.results) > 1 else "Tensor"
        return f"{self.name}({self.arguments}) -> " + (f"({returns})" if len(self.results) > 1 else returns)

    @property
    def out_schema(self) -> str:
        """Schema of the form that writes into given tensors."""
        outs = ", ".join(f"Tensor({chr(ord('a') + i)}!) {r}" for i, r in enumerate(self.results))
        return f"{self.name}_out({self.arguments}, {outs}) -> ()"


OPS: dict[str, Op] = {}

# One entry per tensor in every list. An empty tensor stands for "none": zero_points, offsets, and all that a tensor
# without tracking, estimator or dampening has no use for. axes: -1 is per tensor.
GRIDS = "Tensor[] scales, Tensor[] zero_points, Tensor[] offsets, Tensor[] qranges, int[] axes, float[] eps"
# Stochastic rounding: Philox with this seed and tensor id, at the tensor's step; tensor id -1 rounds to nearest.
NOISE = "int[] seeds, int[] tensor_ids, Tensor[] steps"

# The grid of one tensor that has one scale.
TENSOR_GRID = "Tensor scale, Tensor? zero_point, Tensor? offset, Tensor qrange, float eps"

# Schemas of the ops that only write into what they are given.
IN_PLACE_OPS: dict[str, str] = {
    # ys[i] = fake_quantize(xs[i]), frozen weights at their frozen code. `advance` False leaves the state as it is; else
    # what has changed is recorded where steps[i] is not the last tracked step (csrc/oscillation.h):
    #   momenta     of the averages; 0: not tracked, and the five tensors of the state are empty
    #   thresholds  float32 [1], 0 freezes none; use_average: freezes at the code of the average, not at the current one
    #   words       uint8 (up to 5 bits) or int16, like x: code - qmin, last direction, frozen (fastqat/ops/words.py)
    #   frequencies, averages   float32, like x: f and (average - code), both times (1 - momentum)^-t
    #   counts      int64 [5]: transitions, oscillations, frozen weights; transitions of the last tracked step; a
    #               number that is the caller's own
    #   clocks      float64 [3]: (1 - momentum)^-t, the last tracked step (-1: none), its threshold
    "multi_tensor_fake_quantize": (
        f"multi_tensor_fake_quantize(Tensor[] xs, {GRIDS}, {NOISE}, float[] momenta, int[] use_average, "
        "Tensor[] thresholds, bool advance, Tensor(a!)[] words, Tensor(b!)[] frequencies, Tensor(c!)[] averages, "
        "Tensor(d!)[] counts, Tensor(e!)[] clocks, Tensor(f!)[] ys) -> ()"
    ),
    # Gradients of it from one pass over (g, x, words). An empty dscale or dshift asks for none.
    #   estimators  see fastqat/ops/estimators.py; strengths: float32 [1]
    #   dampenings  float32 [1]: k, which adds k * (x - y) to dx where x lies in the range and is not frozen; 0 adds
    #               nothing
    "multi_tensor_fake_quantize_backward": (
        f"multi_tensor_fake_quantize_backward(Tensor[] gs, Tensor[] xs, {GRIDS}, {NOISE}, int[] rounded_masks, "
        "int[] lsq_grad_scales, int[] estimators, Tensor[] strengths, Tensor[] dampenings, Tensor[] words, "
        "Tensor(a!)[] dxs, Tensor(b!)[] dscales, Tensor(c!)[] dshifts) -> ()"
    ),
    # y = fake_quantize(x) with one scale, and what else one read of x can give: for activations, and for gradients.
    # Bits are in memory order: bit i % 8 of byte i // 8 belongs to the i-th element of y in memory; so does the i-th
    # number of Philox, and the i-th code. An empty tensor asks for nothing.
    #   clip        x is clamped to [0, clip] first: inf is a ReLU, 6 a ReLU6; 0 leaves x as it is
    #   rounded_mask as for the backward; tensor_id -1 rounds to nearest
    #   limit       float32 [1]; beyond, int64 [1], grows by the number of elements with |x| > limit
    #   low, high   float32 [1]; widened to hold the finite values of x
    #   inside      uint8 [ceil(n / 8)]: x passes its gradient
    #   above       uint8 [ceil(n / 8)]: x lies above the range; with rounded_mask, rounds above it
    #   codes       uint8 [ceil(n * code_bits / 8)]: the codes of y as pack() makes them
    #   y           like x, of any floating dtype
    "fake_quantize_tensor": (
        f"fake_quantize_tensor(Tensor x, {TENSOR_GRID}, float clip, bool rounded_mask, int seed, int tensor_id, "
        "Tensor step, Tensor limit, int code_bits, Tensor(a!) low, Tensor(b!) high, Tensor(c!) beyond, "
        "Tensor(d!) inside, Tensor(e!) above, Tensor(f!) codes, Tensor(g!) y) -> ()"
    ),
    # Gradients of it from its bits alone: dx = g inside, 0 outside; dscale (float32 [1], or empty) is qmax times the
    # sum of g above, which is PACT's where qmin and the zero point are 0. g: any strides; dx: dense, like y.
    "fake_quantize_tensor_backward": (
        "fake_quantize_tensor_backward(Tensor g, Tensor inside, Tensor above, Tensor qrange, Tensor(a!) dx, "
        "Tensor(b!) dscale) -> ()"
    ),
    # y from its codes, the same values. y: dense; codes: in its memory order.
    "dequantize_tensor": f"dequantize_tensor(Tensor codes, {TENSOR_GRID}, int code_bits, Tensor(a!) y) -> ()",
    # The range of the next step (csrc/ranges.h). Where `step` is not observed_step, or `always`: low and high become
    # momentum * low + (1 - momentum) * new_low, ...; new_low, new_high become inf, -inf; observed_step becomes step.
    # Then scale and zero_point (empty: a symmetric grid) are those of the range. All float32 [1]; steps int64 [1].
    "advance_range": (
        "advance_range(Tensor qrange, Tensor step, bool always, float momentum, Tensor(a!) low, Tensor(b!) high, "
        "Tensor(c!) new_low, Tensor(d!) new_high, Tensor(e!) observed_step, Tensor(f!) scale, "
        "Tensor(g!) zero_point) -> ()"
    ),
    # The interval [-limit, limit], limit = gamma * max|g|, of a gradient (LBT, section 4.3; csrc/ranges.h). low, high:
    # extremes of g. Where `step` is not observed_step, or `always`: gamma moves by +-stride, towards the fraction
    # alpha / (2 qmax + 1) of elements beyond the limit; beyond and seen, int64 [1], become 0. Then seen grows by numel,
    # and limit and scale = limit / qmax follow. gamma, limit, scale: float32 [1].
    "advance_interval": (
        "advance_interval(Tensor low, Tensor high, Tensor qrange, Tensor step, bool always, SymInt numel, float alpha, "
        "float stride, float smallest, Tensor(a!) gamma, Tensor(b!) beyond, Tensor(c!) seen, "
        "Tensor(d!) observed_step, Tensor(e!) limit, Tensor(f!) scale) -> ()"
    ),
    # first, second = fake_quantize(x) on two grids, from one read of x. scales, zero_points, offsets: float32 [2, C]
    # or, per tensor, [2, 1]; qranges: int32 [2, 2]; axis and eps as elsewhere. first, second: like x, of any floating
    # dtype.
    "fake_quantize_two_widths": (
        "fake_quantize_two_widths(Tensor x, Tensor scales, Tensor? zero_points, Tensor? offsets, Tensor qranges, "
        "int? axis, float eps, Tensor(a!) first, Tensor(b!) second) -> ()"
    ),
    # A weight of DoReFa at one bit-width, or at two from one read of it: u = tanh(x) / tanh(m), m = max|x|, on the grid
    # of n + 1 values from -1 to 1: (2 r - n) / n, r = 0 .. n. tanh is that of fastqat/ops/two_widths.py.
    #   low, high   float32 [1]: extremes of x as minmax finds them
    #   qmax        int32 [2]: n = 2^bits - 1 of first and of second
    #   sums        int64 [2, 2], or empty: for each width the sum of r, and that of r^2
    #   first, second   like x, of any floating dtype; an empty second asks for none
    "dorefa_fake_quantize": (
        "dorefa_fake_quantize(Tensor x, Tensor low, Tensor high, Tensor qmax, Tensor(a!) sums, Tensor(b!) first, "
        "Tensor(c!) second) -> ()"
    ),
    # Gradient of it, which is that of u at any bit-width, times factor (float32 [1], or empty: 1). g: any strides;
    # dx: like x. The elements with |x| = m share what passes through m.
    "dorefa_fake_quantize_backward": (
        "dorefa_fake_quantize_backward(Tensor g, Tensor x, Tensor low, Tensor high, Tensor factor, Tensor(a!) dx) -> ()"
    ),
}


def op(
    arguments: str, *results: str
) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., tuple[Tensor, ...]]]:
    """Declare an op named like the decorated function, which allocates its results."""

    def declare(allocate: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        OPS[allocate.__name__] = Op(allocate.__name__, arguments, results, allocate)
        return allocate

    return declare


@op(f"Tensor x, {GRID}, ScalarType? out_dtype", "y")
def fake_quantize(x, scale, zero_point, offset, qrange, axis, eps, out_dtype):
    """Quantize-dequantize x. y: like x, of out_dtype where one is given."""
    return (torch.empty_like(x, dtype=out_dtype or x.dtype),)


@op(f"Tensor g, Tensor x, {GRID}, bool rounded_mask, bool lsq_grad_scale, float clip", "dx", "dscale", "dshift")
def fake_quantize_backward(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, lsq_grad_scale, clip):
    """Gradients of fake_quantize from one pass over (g, x); of x clamped to [0, clip] first where clip is not 0.

    dx: like x; dscale: like scale; dshift: gradient of zero_point or offset, [0] where there is neither.
    """
    has_shift = zero_point is not None or offset is not None
    return torch.empty_like(x), torch.empty_like(scale), scale.new_empty(scale.numel() if has_shift else 0)


@op(f"Tensor g, Tensor x, {GRID}, bool rounded_mask", "dx")
def fake_quantize_backward_input(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask):
    """Gradient of x alone, for a grid that is not learned. dx: like x."""
    return (torch.empty_like(x),)


@op(f"Tensor x, {GRID}, ScalarType dtype", "codes")
def quantize(x, scale, zero_point, offset, qrange, axis, eps, dtype):
    """Integer codes of x. codes: like x, of the integer dtype."""
    return (torch.empty_like(x, dtype=dtype),)


@op(f"Tensor codes, {GRID}, ScalarType dtype", "y")
def dequantize(codes, scale, zero_point, offset, qrange, axis, eps, dtype):
    """Values of integer codes. y: like codes, of the floating dtype."""
    return (torch.empty_like(codes, dtype=dtype),)


@op("Tensor codes, int bits", "packed")
def pack(codes, bits):
    """Bit stream of the low `bits` bits of each code, the first in the lowest. packed: uint8 [ceil(n * bits / 8)]."""
    return (codes.new_empty((codes.numel() * bits + 7) // 8, dtype=torch.uint8),)


@op("Tensor packed, int bits, SymInt numel, bool signed", "codes")
def unpack(packed, bits, numel, signed):
    """Inverse of pack. codes: [numel], int8 (sign-extended) where signed, else uint8."""
    return (packed.new_empty(numel, dtype=torch.int8 if signed else torch.uint8),)


@op("Tensor x, int? axis", "low", "high")
def minmax(x, axis):
    """Smallest and largest finite value; +inf and -inf where there is none. low, high: float32 [C] or [1]."""
    shape = (1,) if axis is None else (x.shape[axis],)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@op("Tensor x, Tensor scales, Tensor? zero_points, Tensor qrange, int? axis", "errors")
def range_search(x, scales, zero_points, qrange, axis):
    """Squared errors of K candidate grids from one read of x; non-finite values do not count.

    scales, zero_points: float32 [K, C] or [K, 1]; errors: float32 like scales.
    """
    return (torch.empty_like(scales),)


@op("Tensor step, int seed, int tensor_id, SymInt numel", "u")
def philox_uniform(step, seed, tensor_id, numel):
    """Uniform numbers in [0, 1) of Philox4x32-10 with 24 bits each. step: int64 [1]; u: float32 [numel]."""
    return (step.new_empty(numel, dtype=torch.float32),)
