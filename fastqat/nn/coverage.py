"""Coverage: which share of a model is quantized, what kinds of modules stay in float and why, and the warning of it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.observe import eagerly, evaluating, nothing_changes, run_inputs
from fastqat.nn.products import Product, Products, decomposed_attention
from fastqat.nn.selection import CHOICE, candidates
from fastqat.nn.twins import original_class, torch_layer
from fastqat.ops import checks

LEAST = 0.95  # share below which prepare warns
ACTIVATIONS = "products of two activations"


@dataclass(frozen=True)
class LeftKind:
    """Modules of one class that stay in float for one reason.

    Attributes:
        kind: their class before ``prepare``.
        modules: how many there are.
        parameters: numbers in Parameters of their own.
        multiplications: those that they compute with the example inputs.
        reason: why they stay in float.
    """

    kind: str
    modules: int
    parameters: int
    multiplications: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The share of a model that is quantized; ``str`` of it is that of the multiplications, where they were counted.

    Attributes:
        parameters: share of all numbers in Parameters, 0 to 1, that are weights with a quantizer.
        multiplications: share of all multiplications with the example inputs, 0 to 1, whose weight has a quantizer;
            with activations alone quantized, whose activation has one. A product of two activations counts as float.
            None without example inputs, or where nothing multiplies.
        left: what stays in float, by kind, the largest share first.
    """

    parameters: float
    multiplications: float | None
    left: tuple[LeftKind, ...]

    def __str__(self) -> str:
        if self.multiplications is None:
            return f"{percent(self.parameters)} of the parameters"
        return f"{percent(self.multiplications)} of the multiplications"


def percent(share: float) -> str:
    """A share with one digit, rounded down: 100 is all."""
    return f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"


def reasons_in_float(model: nn.Module) -> dict[nn.Module, str]:
    """Why each module with Parameters that no quantizer takes stays in float; those of quantizers are not among them.

    A layer that quantizes its activation alone is not among them.
    """
    layers, refused = candidates(model)
    able, reasons = set(layers), {}
    for module in model.modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        quantized = isinstance(module, QuantizedLayer) and any(True for _ in module.quantizers())
        if not own or quantized or isinstance(module, (FakeQuant, nn.utils.parametrize.ParametrizationList)):
            continue
        choice = getattr(module, CHOICE, None)
        if module in refused:
            reasons[module] = refused[module]
        elif module not in able:
            reasons[module] = "no quantized twin: " + ", ".join(own)
        else:
            reasons[module] = choice.note if choice else "not prepared"
    return reasons


class _Count:
    """Sums of a model by module: those that are quantized, and those that are not.

    Args:
        model: prepared or not.
        example_inputs: None counts no multiplications.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.reasons = reasons_in_float(model)
        self.covered = _covered_layers(model)
        self.own = {module: _own_parameters(module) for module in model.modules() if not isinstance(module, FakeQuant)}
        self.weights = {id(w) for m in self.covered for w in _weights_of(m)}
        self.products = {} if example_inputs is None else _products_of(model, example_inputs)

    def takes(self, product: Product) -> bool:
        """True if one factor is the quantized weight of a layer."""
        attention = isinstance(product.module, nn.MultiheadAttention)
        return product.module in self.covered and (product.of_weight or not attention)

    def reason(self, module: nn.Module, products: Iterable[Product] = ()) -> str:
        """Why a module, or these products of it, are in float."""
        if module in self.reasons and not self.reasons[module].startswith("no quantized twin"):
            return self.reasons[module]
        prefix = f"{self.names[module]}." if self.names[module] else ""
        taken = dict.fromkeys(name.removeprefix(prefix) for p in products for name in p.parameters)
        own = (name for name, _ in module.named_parameters(recurse=False))
        names = [re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in taken or own]
        names = list(dict.fromkeys(names))
        return f"parameter{'s' if len(names) > 1 else ''} {', '.join(names)} that it uses directly"


def _covered_layers(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight has a quantizer; where no weight has one, those whose activation has."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    with_weight: set[Any] = {layer for layer in layers if layer.weight_quantizers()}
    return with_weight or {layer for layer in layers if layer.activation_fake_quant is not None}  # type: ignore[misc]


def _weights_of(layer: Any) -> list[nn.Parameter]:
    """The weights of a layer that count as quantized."""
    return layer.quantized_parameters() or [getattr(layer, name, None) for name in layer.weight_names]


def coverage_of(model: nn.Module, example_inputs: Any = None) -> Coverage:
    """The share of a model that is quantized.

    Args:
        model: any module, prepared or not.
        example_inputs: as of :func:`fastqat.report`; the model runs once with them, and stays as it is.
    """
    count = _Count(model, example_inputs)
    total = {id(p): p for own in count.own.values() for p in own}
    quantized = {id(w): w for m in count.covered for w in m.quantized_parameters()}  # type: ignore[operator]
    parameters = sum(w.numel() for w in quantized.values()) / max(1, sum(p.numel() for p in total.values()))
    macs = sum(count.products.values())
    taken = sum(n for product, n in count.products.items() if count.takes(product))
    return Coverage(parameters, taken / macs if macs else None, _left(count))


def _left(count: _Count) -> tuple[LeftKind, ...]:
    """What stays in float by class and reason, the largest share first."""
    of_module: dict[nn.Module, list[Product]] = {}
    for product in count.products:
        if not count.takes(product):
            of_module.setdefault(product.module, []).append(product)
    sums: dict[tuple[str, str], list[int]] = {}
    seen = set(count.weights)

    def add(module: nn.Module, reason: str, parameters: int, products: Iterable[Product]) -> None:
        entry = sums.setdefault((original_class(module).__name__, reason), [0, 0, 0])
        for i, n in enumerate((1, parameters, sum(count.products[p] for p in products))):
            entry[i] += n

    for module in count.own:
        products = of_module.get(module, [])
        own = []
        if module in count.reasons:
            own = [p for p in count.own[module] if id(p) not in seen]
            seen.update(map(id, own))
        size = sum(p.numel() for p in own)
        # Those of two activations in a module that holds other weights too are a row of their own.
        layer = torch_layer(original_class(module)) is not None and not isinstance(module, nn.MultiheadAttention)
        with_weight = [p for p in products if p.parameters or layer]
        if len(with_weight) < len(products):
            add(module, ACTIVATIONS, 0, [p for p in products if p not in with_weight])
        if with_weight or size:
            add(module, count.reason(module, with_weight), size, with_weight)
    macs = max(1, sum(count.products.values()))
    numbers = max(1, sum(p.numel() for p in {id(p): p for own in count.own.values() for p in own}.values()))
    rows = [LeftKind(kind, found[0], found[1], found[2], reason) for (kind, reason), found in sums.items()]
    return tuple(sorted(rows, key=lambda r: -max(r.multiplications / macs, r.parameters / numbers)))


def _products_of(model: nn.Module, example_inputs: Any) -> dict[Product, int]:
    """Multiplications of one run."""
    quantizers = [m for m in model.modules() if isinstance(m, (FakeQuant, GradientFakeQuant))]
    products = Products(model)
    with evaluating(model), eagerly(), nothing_changes(quantizers), decomposed_attention(), products:
        run_inputs(model, example_inputs)
    return dict(products.count)


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if not is_lazy(p)]


def least_share(option: object) -> float | None:
    """The share below which ``prepare`` speaks, or None: "warn", "error", None, or a number in (0, 1]."""
    wanted = '"warn", "error", None, or a number in (0, 1]'
    if option is None:
        return None
    if isinstance(option, str):
        if option not in ("warn", "error"):
            checks.fail(ValueError, "coverage", wanted, repr(option))
        return LEAST
    if isinstance(option, bool) or not isinstance(option, (int, float)):
        checks.fail(TypeError, "coverage", wanted, repr(option))
    elif not 0 < option <= 1:
        checks.fail(ValueError, "coverage", wanted, option)
    else:
        return float(option)
    return None


def check_coverage(model: nn.Module, example_inputs: Any, least: float | None, raises: bool = False) -> None:
    """Warn, or raise a ValueError, where less of a prepared model is quantized than a share; None asks for none.

    Layers that the user's overrides left in float, and Parameters of one dimension, are not held against it.
    """
    if least is None:
        return
    count = _Count(model, example_inputs)
    excused = {m for m in count.own if hasattr(m, CHOICE) and m not in count.covered}
    weights = {id(p): p for m in count.own if m not in excused for p in count.own[m] if p.dim() > 1}
    for layer in count.covered:  # what else it has are biases, of any shape
        for p in count.own[layer]:
            if id(p) not in count.weights:
                weights.pop(id(p), None)
    held = sum(p.numel() for p in weights.values())
    macs = {p: n for p, n in count.products.items() if p.module not in excused}
    shares = {
        "multiplications": (sum(n for p, n in macs.items() if count.takes(p)), sum(macs.values())),
        "parameters of two dimensions or more": (
            sum(p.numel() for i, p in weights.items() if i in count.weights),
            held,
        ),
    }
    below = {noun: part / whole for noun, (part, whole) in shares.items() if whole and part < least * whole}
    if below:
        text = _text(below, least, [row for row in _left(count) if _is_large(row, count, excused)], example_inputs)
        if raises:
            raise ValueError(text)
        warnings.warn(text, stacklevel=3)  # of the caller of prepare


def _is_large(row: LeftKind, count: _Count, excused: set[nn.Module]) -> bool:
    """True for what a warning can be about: not norms, and not what the user left in float."""
    if any(m in excused and count.reasons.get(m) == row.reason for m in count.own):
        return False
    matrices = any(p.dim() > 1 for m, own in count.own.items() if original_class(m).__name__ == row.kind for p in own)
    return bool(row.multiplications) or (bool(row.parameters) and matrices)


def _text(below: dict[str, float], least: float, left: list[LeftKind], example_inputs: Any) -> str:
    got = " and ".join(f"{percent(share)} of the {noun}" for noun, share in below.items())
    kinds = []
    for row in left[:3]:
        numbers = f"{row.parameters:,} parameters"
        if example_inputs is not None:
            numbers += f", {row.multiplications:,} multiplications"
        kinds.append(f"{row.modules} x {row.kind} ({numbers}): {row.reason}")
    named = "; ".join(kinds) or "other parameters of quantized layers"
    return (
        f"coverage: wanted {percent(least)} quantized; got {got}. Largest kinds left in float: {named}. "
        "See fastqat.report(model, inputs); a lower share, or none, takes the model as it is"
    )
