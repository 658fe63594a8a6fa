"""Computing the input of a quantizer again, instead of keeping it for the gradient of a learned range.

Behind BatchNorm and ReLU it need not be kept: BatchNorm keeps its own input anyway, and the same operations on it give
the same bits again. So the twins of these modules mark their results with a recipe: the tensors that are kept
elsewhere, and what to compute of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastqat import one_tensor
from fastqat.autograd import _FakeQuantizeBackward, apply_plainly

_RECIPE = "_fastqat_recipe"  # attribute of a tensor
# Of a chain of residual blocks every third result is kept: without a bound the last would take all of them to compute.
MOST_SUMS = 2


@dataclass(eq=False)
class Recipe:
    """How to compute a tensor again.

    Args:
        compute: of the tensors.
        tensors: that are alive until the backward pass, detached; None for one that is not there.
        result: the tensor, which it does not keep alive.
        sums: additions of two tensors in it.
        kept: True where one of the tensors may be kept for this alone.
    """

    compute: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    result: weakref.ref[Tensor]
    sums: int = 0
    kept: bool = False

    def __post_init__(self) -> None:
        self.versions = self._versions()
        self.version = cast(Tensor, self.result())._version

    def _versions(self) -> list[int]:
        return [t._version for t in self.tensors if t is not None]

    def holds(self, changes: int = 0) -> bool:
        """True if nothing was changed in place since; or, of the result, as often as it is said."""
        result = self.result()
        return result is not None and result._version == self.version + changes and self.unchanged()

    def unchanged(self) -> bool:
        """True if its tensors were not changed in place since."""
        return self.versions == self._versions()


def mark(y: Tensor, compute: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], **options: Any) -> Recipe:
    detached = tuple(None if t is None else t.detach() for t in tensors)
    recipe = Recipe(compute, detached, weakref.ref(y), **options)
    setattr(y, _RECIPE, recipe)
    node: Any = y.grad_fn
    if node is not None:  # a sum knows its operands by what made them
        node.metadata[_RECIPE] = weakref.ref(recipe)
    return recipe


def recipe_of(x: Tensor) -> Recipe | None:
    """The recipe of a tensor, where there is one that holds."""
    if torch.compiler.is_compiling():  # what is compiled has graphs instead of tensors, and recomputes by itself
        return None
    recipe: Recipe | None = getattr(x, _RECIPE, None)
    return recipe if recipe is not None and recipe.holds() else _recipe_of_sum(x)


def _recipe_of_sum(x: Tensor) -> Recipe | None:
    """The recipe of a sum of two marked tensors, as it stands behind a residual connection."""
    node = x.grad_fn
    if node is None or node.name() != "AddBackward0" or getattr(node, "_saved_alpha", 1) != 1:
        return None
    operands = [_operand(source, x) for source, _ in node.next_functions]
    if len(operands) != 2:
        return None
    first, second = operands
    if first is None or second is None or (first.kept and second.kept) or first.sums + second.sums >= MOST_SUMS:
        return None
    compute = partial(_sum, first.compute, second.compute, len(first.tensors))
    sums, kept = first.sums + second.sums + 1, first.kept or second.kept
    return mark(x, compute, (*first.tensors, *second.tensors), sums=sums, kept=kept)


def _operand(source: Any, total: Tensor) -> Recipe | None:
    """The recipe of what a node of the graph made, which went into a sum, where both look alike."""
    reference = None if source is None else source.metadata.get(_RECIPE)
    recipe: Recipe | None = None if reference is None else reference()
    operand = None if recipe is None else recipe.result()
    if recipe is None or operand is None or operand.shape != total.shape or operand.dtype != total.dtype:
        return None
    # x += y leaves x changed once, as the sum that it is now.
    return recipe if recipe.holds(changes=int(operand is total)) else None


def _sum(first: Callable[..., Tensor], second: Callable[..., Tensor], count: int, *tensors: Tensor | None) -> Tensor:
    return first(*tensors[:count]) + second(*tensors[count:])


def saves_for_backward(x: Tensor) -> bool:
    """True where something is saved of x that can be saved in fewer bytes."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return torch.is_grad_enabled() and x.requires_grad and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Mixin of the twins of BatchNorm, whose results are marked."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch's layer, once: the running statistics have no part in computing it again."""
        y = super().forward(input)
        if saves_for_backward(y) and y.dtype == input.dtype:
            fixed = not self.training and self.running_mean is not None
            statistics = (self.running_mean, self.running_var) if fixed else (None, None)
            mark(y, partial(_normalized, self.eps), (input, self.weight, self.bias, *statistics))
        return y


def _normalized(
    eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, eps)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` whose result can be computed again."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` whose result can be computed again."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` whose result can be computed again."""


def refuse_second_derivative() -> None:
    """Raise in a backward pass of which a graph is wanted."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "compress_saved_activations: wanted a backward pass without create_graph=True (what it keeps has no second "
            "derivative); got one with it. The remove() of what it returned undoes it."
        )


class _Learned(torch.autograd.Function):
    """Quantization with a learned range and one scale, which computes its input again where there is a recipe."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, offset, qrange, options, grad_scale, compute, *tensors):
        grid = one_tensor.Grid(scale, zero_point, offset, qrange)
        made = one_tensor.quantized(x, grid, None, options)
        ctx.save_for_backward(*grid, *((x,) if compute is None else tensors))
        ctx.options, ctx.grad_scale, ctx.compute, ctx.others = options, grad_scale, compute, 4 + len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(made.codes)
        return made.y, made.codes

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * (4 + ctx.others)
        refuse_second_derivative()
        scale, zero_point, offset, qrange, *tensors = ctx.saved_tensors  # read once: see fastqat.autograd
        with torch.no_grad():
            x = tensors[0] if ctx.compute is None else ctx.compute(*tensors)
        eps, clip, rounded, *_ = ctx.options
        lsq = ctx.grad_scale == "lsq"
        factor = None if lsq else ctx.grad_scale
        dx, dscale, dshift = _FakeQuantizeBackward.forward(
            g, x, scale, zero_point, offset, qrange, None, None, eps, rounded, lsq, factor, clip, True
        )
        shifts = (None, dshift) if offset is not None else (dshift, None)
        return dx, dscale, *shifts, *(None,) * ctx.others


def fake_quantize_learned(
    x: Tensor, grid: one_tensor.Grid, options: one_tensor.Options, grad_scale: float | str | None
) -> tuple[Tensor, Tensor]:
    """Fake quantization with a learned range and one scale, which saves nothing of x that a recipe can give.

    Args:
        x, grid, options: as for :func:`fastqat.one_tensor.quantized`.
        grad_scale: as for :func:`fastqat.functional.fake_quantize`.

    Returns:
        y, and its packed codes where options ask for them.
    """
    recipe = recipe_of(x)
    compute, tensors = (None, ()) if recipe is None else (recipe.compute, recipe.tensors)
    arguments = (x, *grid, options, grad_scale, compute, *tensors)
    return _Learned.apply(*arguments) if torch.compiler.is_compiling() else apply_plainly(_Learned, arguments)
