"""What a quantized network costs to run: multiplications, bit operations, bytes of its weights, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.observe import eagerly, evaluating, nothing_changes, run_batch
from fastqat.nn.products import Products, decomposed_attention
from fastqat.nn.table import table
from fastqat.nn.twins import is_twin, original_class, torch_layer, weight_names
from fastqat.ops import checks

FLOAT_BITS = 32  # of what is not quantized


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs.

    Attributes:
        layer: its name; "" stands for products that no layer computes, which are those of float tensors.
        macs: multiply-accumulates for the example inputs, all calls together.
        weights: number of elements of its weights; those that it shares count for the first layer that has them.
        bits_weight, bits_activation: bit-widths; 32 where a tensor is not quantized. Those of the activation are of
            the tensor that the layer's own quantizer sees.
        weight_bits: bits of all its weights.
    """

    layer: str
    macs: int
    weights: int
    bits_weight: int
    bits_activation: int
    weight_bits: int

    @property
    def bit_operations(self) -> int:
        """bits_weight * bits_activation for each multiply-accumulate."""
        return self.macs * self.bits_weight * self.bits_activation

    @property
    def weight_compression_rate(self) -> float:
        """Bits of the weights in float32 to those that they have here."""
        return FLOAT_BITS * self.weights / self.weight_bits if self.weight_bits else 1.0


@dataclass(frozen=True)
class Cost:
    """What a model costs; ``print`` it for a table.

    Attributes:
        layers: each layer with a weight, in order of registration, and then what no layer computes.
        other_bytes: of parameters that are no weight of these: biases, scales, batch normalisation.
    """

    layers: tuple[LayerCost, ...]
    other_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates for the example inputs."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bit_operations(self) -> int:
        """Sum over the layers of bits_weight * bits_activation * macs."""
        return sum(layer.bit_operations for layer in self.layers)

    @property
    def weight_compression_rate(self) -> float:
        """Bits of all weights in float32 to those that they have here."""
        bits = sum(layer.weight_bits for layer in self.layers)
        return FLOAT_BITS * sum(layer.weights for layer in self.layers) / bits if bits else 1.0

    @property
    def model_bytes(self) -> int:
        """Bytes of all parameters, each weight packed into its bits."""
        return sum((layer.weight_bits + 7) // 8 for layer in self.layers) + self.other_bytes

    def __str__(self) -> str:
        heading = ("layer", "bits W/A", "weights", "MACs", "bit operations")
        rows = [
            (
                layer.layer or "(products of float tensors)",
                f"{layer.bits_weight}/{layer.bits_activation}",
                f"{layer.weights:,}" if layer.weights else "",
                f"{layer.macs:,}",
                layer.bit_operations,
            )
            for layer in self.layers
        ]
        weights = sum(layer.weights for layer in self.layers)
        rows.append(("in total", "", f"{weights:,}", f"{self.macs:,}", self.bit_operations))
        return (
            f"{table(heading, rows)}\n  weights compressed {self.weight_compression_rate:.2f} times; "
            f"{self.model_bytes:,} bytes of parameters, {self.other_bytes:,} of them no weights"
        )


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Count what a model computes for some inputs, and what its weights take.

    BitOPs = sum over layers of b_w * b_a * MACs; what is not quantized counts as 32 bits. Products that no layer
    computes, such as those of attention, have a line of their own. The model runs once, in evaluation mode, and stays
    as it is. Costs are those of all example inputs together: give a batch of one for those of one image.

    Args:
        model: any module, prepared or not.
        example_inputs: a batch, of the kinds that :func:`fastqat.calibrate` takes.

    Returns:
        The costs, by layer and in total.

    Raises:
        ValueError: the model has no layer with a weight.

    Source: FracBits (2007.02017), section 3; AdaQAT (2404.16876), section IV for the use as BitOPs and WCR.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if torch_layer(original_class(module)) and weight_names(module)]
    if not layers:
        checks.fail(ValueError, "model", "a module with Linear, Conv, Embedding or attention layers", "one without")
    quantizers = [module for module in names if isinstance(module, FakeQuant)]
    products = Products(model)
    with evaluating(model), eagerly(), nothing_changes(quantizers), decomposed_attention(), products:
        run_batch(model, example_inputs)
    macs = dict.fromkeys(layers, 0)
    for product, count in products.count.items():
        if product.module in macs and (product.of_weight or not isinstance(product.module, nn.MultiheadAttention)):
            macs[product.module] += count
    counted: set[int] = set()
    rows = [_layer_cost(layer, names[layer], macs[layer], counted) for layer in layers]
    rest = sum(products.count.values()) - sum(macs.values())
    if rest:
        rows.append(LayerCost("", rest, 0, FLOAT_BITS, FLOAT_BITS, 0))
    others = [p for p in model.parameters() if id(p) not in counted]
    return Cost(tuple(rows), sum(p.numel() * p.element_size() for p in others))


def _layer_cost(layer: Any, name: str, macs: int, counted: set[int]) -> LayerCost:
    """The cost of a layer; adds its weights to those that are counted."""
    quantizers = layer.weight_quantizers() if is_twin(layer) else {}
    activation = layer.activation_fake_quant if is_twin(layer) else None
    bits = {w: quantizers[w].bits if w in quantizers else FLOAT_BITS for w in weight_names(layer)}
    weights = {w: getattr(layer, w) for w in bits}
    sizes = {w: weight.numel() for w, weight in weights.items() if id(weight) not in counted}
    counted.update(id(weight) for weight in weights.values())
    return LayerCost(
        layer=name,
        macs=macs,
        weights=sum(sizes.values()),
        bits_weight=max(bits.values()),
        bits_activation=activation.bits if activation is not None else FLOAT_BITS,
        weight_bits=sum(size * bits[w] for w, size in sizes.items()),
    )
