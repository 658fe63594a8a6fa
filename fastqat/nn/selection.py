"""Which layers of a model get which quantizers: kinds, first and last, overrides by name, weights that layers share."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.following_weight import COMPUTED
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.spec import WEIGHT_OPTIONS, QConfig, QSpec
from fastqat.nn.twins import (
    TWINS,
    form_of_weight,
    layout,
    original_class,
    torch_layer,
    twin_type,
    weight_names,
    why_without_twin,
    without_values,
)
from fastqat.ops import checks

Override = QConfig | Mapping[str, Any] | None
CHOICE = "fake_quant_choice"  # attribute of every layer that prepare decided on


@dataclass(frozen=True)
class Choice:
    """What a layer gets: its quantizers (None leaves it in float), and what beside the configuration decided it."""

    config: QConfig | None
    note: str = ""


def names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module, in order of registration; a module registered twice has two."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def candidates(model: nn.Module) -> tuple[list[nn.Module], dict[nn.Module, str]]:
    """The layers that can be twins, in order of registration, and the other layers of these kinds: why not."""
    refused = {}
    for module in model.modules():
        if torch_layer(original_class(module)) is not None:
            reason = why_without_twin(module)
            if reason is not None:
                refused[module] = reason
    for attention in [m for m in refused if isinstance(m, nn.MultiheadAttention)]:
        refused[attention.out_proj] = f"{original_class(attention).__name__}, which holds it, may never call it"
    layers = [m for m in model.modules() if torch_layer(original_class(m)) is not None and m not in refused]
    return layers, refused


def choose(
    model: nn.Module, config: QConfig, first_last_bits: int | None, overrides: Mapping[str, Override] | None
) -> dict[nn.Module, Choice]:
    """What each layer gets that can be a twin.

    Raises:
        TypeError, ValueError: there is no such layer, a pattern matches none, an option is wrong, or two layers want
            different quantizers for one weight; the message names it.
    """
    layers, refused = candidates(model)
    names = names_of_modules(model)
    if not layers:
        kinds = ", ".join(cls.__name__ for cls in TWINS)
        why = "".join(f"; {names[m][0] or 'itself'}: {reason}" for m, reason in refused.items())
        got = f"{type(model).__name__} without any{why}"
        checks.fail(ValueError, "model", f"a model with layers that can be quantized ({kinds})", got)
    for layer in layers:
        lazy = without_values(layer)
        if lazy:
            got = "one without values: run the model once, or move it off the meta device"
            checks.fail(ValueError, f"layer {names[layer][0]!r}", f"a {lazy} to quantize", got)
    edges = _edges(model, layers, refused, first_last_bits)
    chosen = {layer: _choice(layer, config, first_last_bits, edges.get(layer, "")) for layer in layers}
    for pattern, override in (overrides or {}).items():
        matched = [layer for layer in layers if any(fnmatchcase(name, pattern) for name in names[layer])]
        if not matched:
            refuse_pattern("overrides", pattern, "can be quantized", [n for layer in layers for n in names[layer]])
        for layer in matched:
            base = _choice(layer, config, first_last_bits, edges.get(layer, ""))
            chosen[layer] = _overridden(layer, base, pattern, override)
    _check_shared_weights(chosen, names)
    return {layer: _with_note_of_form(layer, choice) for layer, choice in chosen.items()}


def _with_note_of_form(layer: nn.Module, choice: Choice) -> Choice:
    if choice.config is None or choice.config.weight is None or form_of_weight(layer) != COMPUTED:
        return choice
    return replace(choice, note="; ".join(filter(None, (choice.note, "what its forward makes of its weight"))))


def _edges(
    model: nn.Module, layers: list[nn.Module], refused: Mapping[nn.Module, str], first_last_bits: int | None
) -> dict[nn.Module, str]:
    """The first and the last layer, and those that share their weights; none for an end that stays in float."""
    if first_last_bits is None:
        return {}
    checks.bit_width(first_last_bits)
    able = set(layers)
    weighted = [m for m in model.modules() if m in able or m in refused or _is_other_layer(m)]
    ends = {"last": weighted[-1], "first": weighted[0]}
    edges = {layer: f"{end} layer" for end, layer in ends.items() if layer in able}
    _warn_of_float_ends(model, {end: layer for end, layer in ends.items() if layer not in able}, refused)
    for edge, note in list(edges.items()):
        weights = {id(getattr(edge, name)) for name in weight_names(edge)}
        for layer in layers:
            if any(id(getattr(layer, name)) in weights for name in weight_names(layer)):
                edges.setdefault(layer, f"weight of the {note}")
    return edges


def _is_other_layer(module: nn.Module) -> bool:
    """True for a module that computes with a weight of its own, as far as can be seen, and has no twin.

    Not a norm, and not one that holds layers: what that owns itself are tokens and positions.
    """
    if (
        isinstance(module, (FakeQuant, GradientFakeQuant, ParametrizationList))
        or "norm" in type(module).__name__.lower()
    ):
        return False
    if any(torch_layer(original_class(m)) is not None for m in module.modules()):
        return False
    own = module.parameters(recurse=False)
    return any(p.is_floating_point() and p.dim() > 1 and min(p.shape[:2]) > 1 for p in own if not is_lazy(p))


def _warn_of_float_ends(model: nn.Module, ends: Mapping[str, nn.Module], refused: Mapping[nn.Module, str]) -> None:
    names = names_of_modules(model)
    said = [
        f"the {end} layer {names[m][0]!r} stays in float ({refused.get(m, 'no quantized twin')})"
        for end, m in ends.items()
    ]
    if said:
        warnings.warn(
            f"first_last_bits: {', and '.join(reversed(said))}; no other layer gets these bits in its place. Name "
            "layers that shall have them with overrides",
            stacklevel=5,  # of the caller of prepare
        )


def _choice(layer: nn.Module, config: QConfig, first_last_bits: int | None, edge: str) -> Choice:
    """What a layer gets before overrides."""
    if edge:
        config = _changed(config, {"bits": first_last_bits})
    return Choice(_for_kind(layer, config), edge)


def _for_kind(layer: nn.Module, config: QConfig) -> QConfig | None:
    """Without activation and gradient where the layer has none to quantize; None if nothing is left."""
    if not twin_type(layer).takes_activation:
        config = replace(config, activation=None, gradient=None)
    return None if config.weight is config.activation is config.gradient is None else config


def _overridden(layer: nn.Module, base: Choice, pattern: str, override: Override) -> Choice:
    """What an override makes of a layer."""
    note = f"override {pattern!r}"
    if override is None:
        return Choice(None, note)
    if isinstance(override, QConfig):
        return Choice(_for_kind(layer, override), note)
    if not isinstance(override, Mapping):
        checks.fail(TypeError, f"overrides[{pattern!r}]", "a QConfig, a dict of QSpec options, or None", repr(override))
    options = [field.name for field in fields(QSpec)]
    for option in override:
        if option not in options:
            wanted = f"options of QSpec{_nearest(str(option), options)}"
            checks.fail(ValueError, f"overrides[{pattern!r}]", wanted, repr(option))
    return Choice(base.config and _changed(base.config, dict(override)), note)


def _changed(config: QConfig, changes: dict[str, Any]) -> QConfig:
    weight = config.weight and replace(config.weight, **changes)
    of_both = {name: value for name, value in changes.items() if name not in WEIGHT_OPTIONS}
    activation = config.activation and replace(config.activation, **of_both)
    of_gradient = {name: value for name, value in changes.items() if name == "bits"}
    gradient = config.gradient and replace(config.gradient, **of_gradient)
    return replace(config, weight=weight, activation=activation, gradient=gradient)


def _nearest(name: str, names: list[str]) -> str:
    """ ", nearest ..." for the names that come close, or nothing."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f", nearest {', '.join(map(repr, close))}" if close else ""


def refuse_pattern(argument: str, pattern: str, which: str, names: list[str]) -> None:
    """Raise a ValueError for a pattern that matches none of these names, of layers of which ``which`` is true."""
    below = [name for name in names if name.startswith(pattern.rstrip("*.") + ".")]
    hint = f"; {pattern.rstrip('*.')}.* matches {len(below)}" if below else ""
    wanted = f"a pattern that matches the name of a layer that {which}" + _nearest(pattern, names)
    checks.fail(ValueError, argument, wanted + hint, repr(pattern))


def _check_shared_weights(chosen: dict[nn.Module, Choice], names: dict[nn.Module, list[str]]) -> None:
    """One quantizer per Parameter: layers that quantize one weight must want the same, along the same axis."""
    seen: dict[int, tuple[str, QSpec, object]] = {}
    for layer, choice in chosen.items():
        spec = None if choice.config is None else choice.config.weight
        if spec is None or form_of_weight(layer) == COMPUTED:  # that is a tensor of its own
            continue
        name, where = names[layer][0], layout(layer)
        for weight_name in weight_names(layer):
            first, first_spec, first_where = seen.setdefault(id(getattr(layer, weight_name)), (name, spec, where))
            if first_spec != spec:
                got = f"{first_spec} and {spec}"
                checks.fail(ValueError, f"layers {first!r}, {name!r}", "one QSpec for the weight that they share", got)
            if first_where != where and spec.axis is not None:
                wanted = "axis=None for the weight that they share, whose output channels lie on different axes"
                checks.fail(ValueError, f"layers {first!r}, {name!r}", wanted, f"axis={spec.axis}")
