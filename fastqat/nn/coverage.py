"""Coverage: the share of a network that is quantized, and what the rest is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.multiplications import Multiplications, count_multiplications
from fastqat.nn.observe import run_inputs
from fastqat.nn.selection import CHOICE, candidates, names_of_modules
from fastqat.nn.twins import original_class, weight_names
from fastqat.ops import checks

LEAST = 0.95  # share below which ``prepare`` warns
_NAMED = 3  # kinds that a message names


@dataclass(frozen=True)
class FloatKind:
    """Modules of one class that are left in float for one reason.

    Attributes:
        kind: their class; "" stands for products of two activations.
        reason: why they are in float.
        modules: how many they are.
        parameters: numbers in their own Parameters; those that they share count once.
        multiplications: multiply-accumulates with the example inputs; None without them.
        chosen: the user's overrides left them in float.
    """

    kind: str
    reason: str
    modules: int
    parameters: int
    multiplications: int | None
    chosen: bool = False

    def __str__(self) -> str:
        counts = [f"{self.parameters:,} parameters"] if self.parameters else []
        counts += [f"{self.multiplications:,} multiplications"] if self.multiplications else []
        name = f"{self.modules} x {self.kind}" if self.kind else "attention and other products of two activations"
        return f"{name} ({', '.join(counts)}: {self.reason})"


@dataclass(frozen=True)
class Coverage:
    """What share of a network is quantized; ``str`` of it is the share to print beside bit-widths.

    Attributes:
        parameters: share of all parameters that are no quantizer's own, 0 to 1.
        multiplications: share of all multiplications with the example inputs, those of two activations too; None
            without example inputs.
        left: what is left in float, largest first.
        bits: "W4A8" where all weights, and all activations, have one bit-width; "W4-8A8" for several; "" where there
            is no quantizer.
    """

    parameters: float
    multiplications: float | None
    left: tuple[FloatKind, ...]
    bits: str = ""

    def __str__(self) -> str:
        if self.multiplications is None:
            return f"{percent(self.parameters)} of the parameters"
        return f"{percent(self.multiplications)} of the multiplications"


def percent(share: float) -> str:
    """A share for people, never rounded up to all: "99.2 %"."""
    return f"{min(share * 100, 100.0 if share == 1 else 99.9):.1f} %"


def coverage_of(model: nn.Module, example_inputs: Any = None) -> Coverage:
    """Find what share of a model is quantized.

    A layer counts if its weight has a quantizer, or where only activations are quantized, its activation.

    Args:
        model: any module, prepared or not.
        example_inputs: as for :func:`fastqat.report`; with them the model runs once, in evaluation mode and without a
            trace in it.
    """
    counts = None
    if example_inputs is not None:
        counts = count_multiplications(model, lambda: run_inputs(model, example_inputs))
    entries = list(_entries(model, counts))
    total = sum(entry.parameters for entry in entries)
    quantized = sum(entry.parameters for entry in entries if entry.is_quantized)
    share = None
    if counts is not None:
        done = sum(entry.multiplications for entry in entries if entry.is_quantized)
        share = done / counts.total if counts.total else 1.0
    left = sorted(
        _left(entries, counts, _of_activations(entries, counts)),
        key=lambda kind: (-(kind.multiplications or 0), -kind.parameters),
    )
    if counts is None or not counts.total:
        left.sort(key=lambda kind: -kind.parameters)
    return Coverage(quantized / total if total else 1.0, share, tuple(left), _bits(model))


@dataclass(frozen=True)
class _Entry:
    """A part of the parameters of one module, its multiplications, and what became of them."""

    kind: str
    reason: str
    parameters: int
    matrices: int  # of the parameters, those of two dimensions and more
    multiplications: int
    is_quantized: bool
    chosen: bool = False


def _entries(model: nn.Module, counts: Multiplications | None) -> Iterator[_Entry]:
    """Each module once; each Parameter once, quantized if any layer quantizes it."""
    names = names_of_modules(model)
    layers, refused = candidates(model)
    able = set(layers)
    quantized = {id(p) for m in names if isinstance(m, QuantizedLayer) and _counts(m) for p in _weights(m)}
    seen: set[int] = set()
    for module in names:
        if isinstance(module, (FakeQuant, ParametrizationList)):
            continue
        own = {n: p for n, p in module._parameters.items() if p is not None and id(p) not in seen and not is_lazy(p)}
        seen.update(map(id, own.values()))
        covered = isinstance(module, QuantizedLayer) and _counts(module)
        multiplications = counts.by_module.get(module, 0) if counts else 0
        kind = original_class(module).__name__
        reason, chosen = _reason(module, able, refused)
        for is_quantized in (True, False):
            part = [p for p in own.values() if (id(p) in quantized) == is_quantized]
            macs = multiplications if covered == is_quantized else 0
            if part or macs:
                sizes = sum(p.numel() for p in part)
                matrices = sum(p.numel() for p in part if p.dim() > 1)
                why = "its biases are not quantized" if covered else reason
                yield _Entry(kind, why, sizes, matrices, macs, is_quantized, chosen)


def _weights(layer: Any) -> list[nn.Parameter]:
    parameters = [layer._parameters.get(name) for name in weight_names(layer)]
    return [p for p in parameters if p is not None]


def _counts(layer: Any) -> bool:
    """True if a layer is quantized as it was asked for: its weight, or its activation where no weight is."""
    choice = getattr(layer, CHOICE, None)
    if choice is not None and choice.config is not None and choice.config.weight is None:
        return layer.activation_fake_quant is not None
    return bool(layer.weight_quantizers())


def _reason(module: nn.Module, able: set[nn.Module], refused: dict[nn.Module, str]) -> tuple[str, bool]:
    """Why a module is in float, and whether an override said so."""
    choice = getattr(module, CHOICE, None)
    if module in refused:
        return refused[module], False
    if module in able:
        chosen = choice is not None and choice.note.startswith("override")
        return (choice.note if choice and choice.note else "not prepared"), chosen
    used = ", ".join(name for name, p in module._parameters.items() if p is not None)
    return (f"no quantized layer takes its {used}" if used else "it multiplies by weights of others"), False


def _of_activations(entries: list[_Entry], counts: Multiplications | None) -> int:
    """Multiplications that no module makes with its weights: products of two activations."""
    return 0 if counts is None else counts.total - sum(entry.multiplications for entry in entries)


def _left(entries: list[_Entry], counts: Multiplications | None, of_activations: int) -> Iterator[FloatKind]:
    groups: dict[tuple[str, str, bool], list[_Entry]] = {}
    for entry in entries:
        if not entry.is_quantized:
            groups.setdefault((entry.kind, entry.reason, entry.chosen), []).append(entry)
    for (kind, reason, chosen), found in groups.items():
        macs = sum(entry.multiplications for entry in found)
        yield FloatKind(kind, reason, len(found), sum(e.parameters for e in found), macs if counts else None, chosen)
    if of_activations > 0:
        yield FloatKind("", "they stay in float", 1, 0, of_activations)


def _bits(model: nn.Module) -> str:
    weights: set[int] = set()
    activations: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            weights.update(q.bits for q in module.weight_quantizers().values())
            if module.activation_fake_quant is not None:
                activations.add(module.activation_fake_quant.bits)
    parts = [
        f"{letter}{min(found)}" + (f"-{max(found)}" if len(found) > 1 else "")
        for letter, found in (("W", weights), ("A", activations))
        if found
    ]
    return "".join(parts)


def least_share(option: Any) -> float | None:
    """The share that the option ``coverage`` of ``prepare`` asks for; None asks for none.

    Raises:
        TypeError, ValueError: it is no such option.
    """
    if option is None:
        return None
    if isinstance(option, str):
        checks.choice("coverage", option, ("warn", "error"))
        return LEAST
    if isinstance(option, bool) or not isinstance(option, (int, float)):
        checks.fail(TypeError, "coverage", "'warn', 'error', None or a share", repr(option))
    if not 0 < option <= 1:
        checks.fail(ValueError, "coverage", "a share in (0, 1]", option)
    return float(option)


def check_coverage(model: nn.Module, option: Any, example_inputs: Any = None) -> None:
    """Warn, or raise an error, where less of a prepared model is quantized than the option asks for.

    The share of the parameters is that of matrices and larger tensors: biases and norms are never quantized. What the
    user's overrides left in float is not held against it.

    Args:
        model: prepared.
        option: "warn", "error", a share, or None, see :func:`fastqat.prepare`.
        example_inputs: as for :func:`fastqat.report`; without them the parameters alone are looked at.

    Raises:
        ValueError: with "error"; the message names the share, and the largest kinds that are left in float.

    Warns:
        UserWarning: with "warn" or a share; the same message.
    """
    least = least_share(option)
    if least is None:
        return
    counts = None
    if example_inputs is not None:
        counts = count_multiplications(model, lambda: run_inputs(model, example_inputs))
    entries = list(_entries(model, counts))
    judged = [entry for entry in entries if not entry.chosen]
    rest = _of_activations(entries, counts)
    shares = {"parameters": _share([(e.matrices, e.is_quantized) for e in judged], 0)}
    if counts is not None:
        shares["multiplications"] = _share([(e.multiplications, e.is_quantized) for e in judged], rest)
    missed = {name: share for name, share in shares.items() if share < least}
    if not missed:
        return
    kinds = list(_left([entry for entry in judged if entry.matrices or entry.multiplications], counts, rest))
    by_parameters = "multiplications" not in missed
    kinds.sort(key=lambda kind: -(kind.parameters if by_parameters else kind.multiplications or 0))
    named = "; ".join(str(kind) for kind in kinds[:_NAMED])
    got = " and ".join(f"{percent(share)} of the {name}" for name, share in missed.items())
    wanted = f"at least {percent(least)} of the network quantized"
    cure = "coverage=None, or a lower share, accepts it"
    if option == "error":
        checks.fail(ValueError, "coverage", f"{wanted} ({cure})", f"{got}; in float: {named}")
    warnings.warn(f"prepare: wanted {wanted}; got {got}. In float: {named}. {cure}", stacklevel=3)


def _share(parts: list[tuple[int, bool]], rest: int) -> float:
    total = sum(size for size, _ in parts) + rest
    return sum(size for size, is_quantized in parts if is_quantized) / total if total else 1.0
