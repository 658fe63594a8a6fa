"""What a layer moves through memory when its output is quantized: with a range that is known before, and with one that
is taken from the output itself.

A static range (fixed, learned, in hindsight) lets a layer write its output quantized, straight from its accumulators. A
dynamic one (current or running min-max) is known only when the last accumulator is: all are written, and read again to
be quantized. After Fournarakis and Nagel, In-Hindsight Quantization Range Estimation (CVPR workshops 2021).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.observe import eagerly, evaluating, nothing_changes, run_batch
from fastqat.nn.twins import original_class, torch_layer
from fastqat.ops import checks


class Traffic(NamedTuple):
    """Bytes that one forward pass of a layer moves.

    Args:
        static: with a range that is known before the output.
        dynamic: with one that is taken from the output.
    """

    static: float
    dynamic: float

    @property
    def overhead(self) -> float:
        """What a dynamic range moves beyond a static one, as a share of that."""
        return self.dynamic / self.static - 1


def layer_traffic(weights: int, inputs: int, outputs: int, *, bits: int = 8, accumulator_bits: int = 32) -> Traffic:
    """Bytes that a layer moves.

    static = (W + I + O) b / 8;  dynamic = (W + I) b / 8 + O (2 b_acc + b) / 8

    Args:
        weights, inputs, outputs: numbers of elements W, I and O.
        bits: b, of all three tensors.
        accumulator_bits: b_acc, of the output before it is quantized.

    Raises:
        TypeError, ValueError: bits is not from 1 to 8.
    """
    checks.bit_width(bits)
    static = (weights + inputs + outputs) * bits / 8
    return Traffic(static, static + outputs * 2 * accumulator_bits / 8)


def memory_traffic(model: nn.Module, batch: Any, *, bits: int = 8, accumulator_bits: int = 32) -> dict[str, Traffic]:
    """Bytes that each linear layer and convolution of a model moves in one forward pass.

    The model is run once, in evaluation mode, and stays as it is; on the meta device that costs nothing.

    Args:
        model: any module.
        batch: a tensor; (inputs, targets), of which only the inputs are used; or a mapping of keyword arguments.
        bits, accumulator_bits: see :func:`layer_traffic`.

    Returns:
        Traffic by the name of the layer, in the order of registration; that of a layer which is called several times
        is the sum, and one that is never called is missing.

    Raises:
        TypeError, ValueError: bits is not from 1 to 8.
    """
    checks.bit_width(bits)
    found: dict[nn.Module, Traffic] = {}

    def count(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> None:
        tensors: list[Any] = [layer.weight, *arguments, *named.values()]
        sizes = tensors[0].numel(), tensors[1].numel(), y.numel()
        new = layer_traffic(*sizes, bits=bits, accumulator_bits=accumulator_bits)
        old = found.get(layer, Traffic(0, 0))
        found[layer] = Traffic(old.static + new.static, old.dynamic + new.dynamic)

    layers = {name: module for name, module in model.named_modules() if _computes_products(module)}
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuant)]
    hooks = [module.register_forward_hook(count, with_kwargs=True) for module in layers.values()]
    try:
        with evaluating(model), eagerly(), nothing_changes(quantizers), torch.no_grad():
            run_batch(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[module] for name, module in layers.items() if module in found}


def _computes_products(module: nn.Module) -> bool:
    kind = torch_layer(original_class(module))
    return kind is not None and not issubclass(kind, (nn.Embedding, nn.MultiheadAttention))
