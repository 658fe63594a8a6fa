"""Linear layers and convolutions that keep the codes of their input for the gradient of their weight, not the input.

A quantized input has at most 2^bits values: its codes, packed, say as much as it does in bits/32 of the memory. Their
backward passes call what torch's own call, on the same values and strides: gradients are equal bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastqat import one_tensor
from fastqat.autograd import apply_plainly
from fastqat.nn.recompute import fake_quantize_learned, refuse_second_derivative


class Codes(NamedTuple):
    """A quantized tensor as its codes.

    Args:
        packed: uint8, as :func:`fastqat.one_tensor.quantized` makes them.
        grid, options: that they were made with.
    """

    packed: Tensor
    grid: one_tensor.Grid
    options: one_tensor.Options


class Keep:
    """What a call of a quantizer shall save, and the codes that it made.

    Args:
        code_bits: of the codes that the layer wants; 0: none, only what a learned range needs is saved in fewer bytes.
    """

    def __init__(self, code_bits: int) -> None:
        self.code_bits = code_bits
        self.y: Tensor | None = None
        self.version = 0
        self._codes: Codes | None = None

    def codes_of(self, y: Tensor) -> Codes | None:
        """The codes of what the call returned; None where none were made, or a hook changed it."""
        unchanged = y is self.y and (torch.compiler.is_compiling() or y._version == self.version)
        return self._codes if unchanged else None

    def quantize(
        self, x: Tensor, grid: one_tensor.Grid, options: one_tensor.Options, observed: one_tensor.Observed
    ) -> Tensor:
        """Quantize x as :func:`fastqat.one_tensor.fake_quantize_tensor` does."""
        options = options._replace(code_bits=self.code_bits)
        return self._kept(grid, options, one_tensor.fake_quantize_tensor(x, grid, None, options, observed))

    def quantize_learned(
        self, x: Tensor, grid: one_tensor.Grid, options: one_tensor.Options, grad_scale: float | str | None
    ) -> Tensor:
        """Quantize x with a learned range, as :func:`fastqat.nn.recompute.fake_quantize_learned` does."""
        options = options._replace(code_bits=self.code_bits)
        return self._kept(grid, options, fake_quantize_learned(x, grid, options, grad_scale))

    def _kept(self, grid: one_tensor.Grid, options: one_tensor.Options, made: tuple[Tensor, Tensor]) -> Tensor:
        self.y, packed = made
        if not torch.compiler.is_compiling():
            self.version = self.y._version
        self._codes = Codes(packed, grid, options) if self.code_bits else None
        return self.y


def _save(ctx: Any, x: Tensor, weight: Tensor | None, codes: tuple[Any, ...]) -> None:
    """Save a weight, and the codes where the gradient of the weight is wanted."""
    packed, options, *grid = codes
    ctx.save_for_backward(packed if ctx.needs_input_grad[1] else None, *grid, weight)
    ctx.options, ctx.like, ctx.dtype = options, (x.shape, x.stride()), x.dtype
    ctx.set_materialize_grads(False)


def _restored(ctx: Any) -> tuple[Tensor | None, Tensor | None]:
    """x, where the gradient of the weight is wanted, and the weight that was saved."""
    refuse_second_derivative()
    packed, *grid, weight = ctx.saved_tensors  # read once: see fastqat.autograd
    if packed is None:
        return None, weight
    return one_tensor.dequantized(packed, one_tensor.Grid(*grid), ctx.options, ctx.like, ctx.dtype), weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *codes):
        _save(ctx, x, weight if ctx.needs_input_grad[0] else None, codes)
        ctx.weight_by_columns = _is_column_major(weight.shape[::-1], weight.stride()[::-1])
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 9
        x, weight = _restored(ctx)
        shape, strides = ctx.like
        rows = g.reshape(-1, g.shape[-1])
        dx = dweight = dbias = None
        # The products, and the order of their factors, of torch: it looks at how those of the forward pass lie.
        if weight is not None:
            by_columns = len(shape) == 2 and _is_column_major(shape, strides)
            dx = (weight.t().mm(rows.t()).t() if by_columns else rows.mm(weight)).view(shape)
        if x is not None:
            x = x.reshape(-1, shape[-1])
            dweight = rows.t().mm(x) if ctx.weight_by_columns else x.t().mm(rows).t()
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias, *(None,) * 6


def _is_column_major(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    return strides[0] == 1 and strides[1] == shape[0]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, options, *codes):
        _save(ctx, x, weight, codes)
        ctx.convolution, ctx.bias_sizes = options, None if bias is None else list(bias.shape)
        return torch.convolution(x, weight, bias, *options)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 10
        x, weight = _restored(ctx)
        if x is None:  # its values are not looked at, its shape and strides are
            x = torch.empty_strided(*ctx.like, dtype=ctx.dtype, device=g.device)
        wanted = list(ctx.needs_input_grad[:3])
        convolution = torch.ops.aten.convolution_backward
        return *convolution(g, x, weight, ctx.bias_sizes, *ctx.convolution, wanted), *(None,) * 7


def _in_dtype_of_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors as autocast hands them to the layer."""
    device_type = tensors[0].device.type  # type: ignore[union-attr]  # the input is there
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _apply(function: type[torch.autograd.Function], arguments: tuple[Any, ...], codes: Codes) -> Any:
    arguments = (*arguments, codes.packed, codes.options, *codes.grid)
    return function.apply(*arguments) if torch.compiler.is_compiling() else apply_plainly(function, arguments)


def linear(x: Tensor, codes: Codes | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, which keeps the codes of x where there are any.

    Args:
        x: [..., in_features], quantized.
        codes: of x, or None.
        weight: [out_features, in_features].
        bias: [out_features] or None.
    """
    if codes is None or x.dim() < 2:  # of a vector torch makes other products
        return F.linear(x, weight, bias)
    return _apply(_Linear, _in_dtype_of_autocast(x, weight, bias), codes)


def zero_padding(layer: Any) -> tuple[int, ...] | None:
    """The padding of a convolution in numbers, None where it is none of zeros on both sides alike."""
    if layer.padding_mode != "zeros":
        return None
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)


def convolution(
    layer: Any, x: Tensor, codes: Codes, weight: Tensor, output_padding: tuple[int, ...] | None = None
) -> Tensor:
    """The convolution of a layer, which keeps the codes of x.

    Args:
        layer: with a :func:`zero_padding`; only its options and its bias are used.
        x: [N, in_channels, *size] or [in_channels, *size], quantized.
        codes: of x.
        weight: [out_channels, in_channels/groups, *kernel], or as a transposed convolution has it.
        output_padding: of a transposed convolution; None for others.
    """
    padding, none = zero_padding(layer), (0,) * len(layer.kernel_size)
    options = (layer.stride, padding, layer.dilation, output_padding is not None, output_padding or none, layer.groups)
    tensors = _in_dtype_of_autocast(x, weight, layer.bias)
    if x.dim() == weight.dim():
        return _apply(_Convolution, (*tensors, options), codes)
    return _apply(_Convolution, (tensors[0].unsqueeze(0), *tensors[1:], options), codes).squeeze(0)
