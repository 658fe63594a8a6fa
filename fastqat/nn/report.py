"""``report``: what of a model is quantized and how, what was left in float and why, and whether each quantizer runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fastqat.nn.coverage import Coverage, coverage_of, reasons_in_float
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.fuse import NOTE, FusedActivation
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.layers import QuantizedLayer
from fastqat.nn.observe import Calls, FloatOperations, eagerly, evaluating, nothing_changes, run_inputs
from fastqat.nn.past import PastRead, past_reads
from fastqat.nn.scales import count_at_floor
from fastqat.nn.selection import CHOICE, names_of_modules
from fastqat.nn.table import collapsed, table
from fastqat.nn.twins import original_class


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer of one layer.

    Attributes:
        layer, kind: name of the layer in the model, and its class before ``prepare``.
        tensor: what is quantized: "weight", "input", "output", "gradient", or the name of another weight.
        bits, qmin, qmax, grid, axis, group_size, range, learn: see :class:`fastqat.QSpec`.
        scales: how many there are; None, like qmin and qmax, where the first tensor decides.
        initialized: the range is set.
        shared_with: other layers that use the same quantizer.
        note: what decided it, beside the configuration.
        runs: its calls with the example inputs; None without them. A shared one is called for each of its layers.
        at_floor: scales that are not above eps, see :func:`fastqat.scales_at_floor`.
    """

    layer: str
    kind: str
    tensor: str
    bits: int
    qmin: int | None
    qmax: int | None
    grid: str
    axis: int | None
    group_size: int | None
    range: str
    learn: str | None
    scales: int | None
    initialized: bool
    shared_with: tuple[str, ...]
    note: str
    runs: int | None
    at_floor: int = 0


@dataclass(frozen=True)
class FloatRow:
    """A module with Parameters that are left in float: its name, class, number of parameters, and the reason."""

    layer: str
    kind: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class OperationRow:
    """Sums or products of floating tensors outside layers: where, in what class, which, and how many calls."""

    layer: str
    kind: str
    operation: str
    calls: int


@dataclass(frozen=True)
class ActivationRow:
    """A ReLU or ReLU6 that ``prepare`` was asked to fuse: the layer whose quantizer computes it, or "" and why not."""

    activation: str
    kind: str
    layer: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`report` finds; ``str`` of it is the table to read.

    Attributes:
        quantizers: one row for each quantizer of each layer.
        left_in_float: modules with Parameters that no quantizer takes.
        operations: what runs in float between layers; None without example inputs.
        quantized_parameters, parameters: how many numbers have a quantizer, and how many there are.
        activations: what has become of each ReLU and ReLU6 where ``prepare`` was asked to fuse them.
        coverage: the share that is quantized, and the kinds that are not.
        past: what reads a quantized weight past its quantizer. Without example inputs: what else holds it.
    """

    quantizers: tuple[QuantizerRow, ...]
    left_in_float: tuple[FloatRow, ...]
    operations: tuple[OperationRow, ...] | None
    quantized_parameters: int
    parameters: int
    activations: tuple[ActivationRow, ...] = ()
    coverage: Coverage = Coverage(0.0, None, ())
    past: tuple[PastRead, ...] = ()

    @property
    def widths(self) -> str:
        """Bit-widths as in "W4A8", where all weights and all activations share one each; else nothing."""
        weights = {row.bits for row in self.quantizers if row.tensor.endswith("weight")}
        activations = {row.bits for row in self.quantizers if row.tensor in ("input", "output")}
        if len(weights) > 1 or len(activations) > 1:
            return ""
        return "".join(f"{letter}{n}" for letter, bits in (("W", weights), ("A", activations)) for n in bits)

    @property
    def never_ran(self) -> tuple[QuantizerRow, ...]:
        """The quantizers that the example inputs did not reach: something goes past their layer."""
        return tuple(row for row in self.quantizers if row.runs == 0)

    def _at_floor(self) -> str:
        low = [row for row in self.quantizers if row.at_floor]
        return ", ".join(f"{row.at_floor} of {row.scales} in {row.layer or '(model)'} ({row.tensor})" for row in low)

    def __str__(self) -> str:
        layers = len({row.layer for row in self.quantizers})
        share = f"{self.quantized_parameters:,} of {self.parameters:,} parameters"
        of = f"{self.widths} of {self.coverage}" if self.widths else str(self.coverage)
        parts = [f"Quantized: {layers} layers, {len(self.quantizers)} quantizers, {share}; {of}"]
        parts.append(_quantizer_table(self.quantizers))
        if any(row.at_floor for row in self.quantizers):
            parts.append(f"SCALES AT THEIR FLOOR: {self._at_floor()}: what they quantize is 0 or next to it.")
        if self.activations:
            fused = sum(bool(row.layer) for row in self.activations)
            parts.append(f"Fused into the quantizer behind: {fused} of {len(self.activations)} ReLU and ReLU6")
            kept = [(row.activation, row.kind, row.reason, 1) for row in self.activations if not row.layer]
            parts.append(table(("module", "kind", "why not", "modules"), collapsed(kept)))
        parts.append(f"Left in float: {len(self.left_in_float)} modules with parameters of their own")
        rows = [(row.layer, row.kind, row.reason, row.parameters) for row in self.left_in_float]
        parts.append(table(("module", "kind", "why", "parameters"), collapsed(rows)))
        if self.operations is None:
            parts.append(
                "Not run: example inputs would show what stays in float between layers, and that each quantizer runs."
            )
        else:
            calls = sum(row.calls for row in self.operations)
            parts.append(f"Left in float: {calls} sums and products of tensors outside these layers")
            rows = [(row.layer, row.kind, row.operation, row.calls) for row in self.operations]
            parts.append(table(("in", "kind", "operation", "calls"), collapsed(rows)))
            lost = "".join(f"\n  {row.layer or '(model)'}: {row.tensor}" for row in self.never_ran)
            parts.append(f"NEVER RAN with these inputs:{lost}" if lost else "Every quantizer ran with these inputs.")
        if self.past:
            past = [(p.module, p.kind, p.parameter, p.operation, p.calls) for p in self.past]
            found = table(("module", "kind", "parameter", "operation", "calls"), past)
            parts.append(f"READ PAST ITS QUANTIZER, in float:\n{found}")
        return "\n\n".join(part for part in parts if part)


def report(model: nn.Module, example_inputs: Any = None) -> Report:
    """Say what of a model is quantized and how, and what was left in float and why.

    With example inputs the model runs three times, eagerly, in evaluation mode, without gradients and without any
    change to it. Only then can the report say whether each quantizer runs (a module may use the weight of a layer and
    never call it), which share of the multiplications is quantized, which sums and products of tensors stay in float,
    and what reads a quantized weight past its quantizer.

    Args:
        model: any module, prepared or not.
        example_inputs: a tensor; a tuple or list of positional arguments; or a mapping of keyword arguments.
    """
    names = names_of_modules(model)
    quantizers = {m: found for m, found in names.items() if isinstance(m, (FakeQuant, GradientFakeQuant))}
    calls, operations = Calls(quantizers), None
    if example_inputs is not None:
        operations = FloatOperations(model)
        with evaluating(model), eagerly(), nothing_changes(quantizers), calls, operations:
            run_inputs(model, example_inputs)
    runs = calls.count if operations is not None else {}
    rows = tuple(_quantizer_rows(names, runs))
    quantized = {id(w): w for m in names if isinstance(m, QuantizedLayer) for w in m.quantized_parameters()}
    parameters = {id(p): p for m in names if not isinstance(m, FakeQuant) for p in m.parameters(recurse=False)}
    return Report(
        rows,
        tuple(_float_rows(model, names)),
        None if operations is None else tuple(_operation_rows(operations, names)),
        sum(w.numel() for w in quantized.values()),
        sum(0 if is_lazy(p) else p.numel() for p in parameters.values()),
        tuple(_activation_rows(names)),
        coverage_of(model, example_inputs),
        past_reads(model, example_inputs),
    )


def _activation_rows(names: dict[nn.Module, list[str]]) -> Iterator[ActivationRow]:
    for module, found in names.items():
        if hasattr(module, NOTE):
            kind, layer = type(module), ""
            if isinstance(module, FusedActivation):
                kind, layer = module.original, module.fused_into
            yield ActivationRow(found[0], kind.__name__, layer, module.__dict__[NOTE])


def _quantizer_rows(names: dict[nn.Module, list[str]], runs: dict[Any, int]) -> list[QuantizerRow]:
    users: dict[nn.Module, list[str]] = {}
    found: list[tuple[nn.Module, str, Any]] = []
    for module in names:
        if isinstance(module, QuantizedLayer):
            for tensor, quantizer in module.quantizers():
                found.append((module, tensor, quantizer))
                users.setdefault(quantizer, []).append(names[module][0])
    # Those that the user placed: called in a forward, or registered as a parametrization.
    found += [(m, "tensor", m) for m in names if isinstance(m, FakeQuant) and m not in users]
    return [_quantizer_row(names[m], m, tensor, q, users.get(q, []), runs) for m, tensor, q in found]


def _quantizer_row(
    names: list[str], module: nn.Module, tensor: str, q: Any, users: list[str], runs: dict[Any, int]
) -> QuantizerRow:
    choice = getattr(module, CHOICE, None)
    after = f"with {q.activation}" if q.activation else ""
    known = q.initialized or q.signed is not None or q.restricted or not q.symmetric
    low, growing = count_at_floor(q), "grows from zero" if getattr(q, "growing", False) else ""
    also = f"also {', '.join(names[1:])}" if len(names) > 1 and module is not q else ""
    return QuantizerRow(
        layer=names[0],
        kind=original_class(module).__name__,
        tensor=tensor,
        bits=q.bits,
        qmin=q.codes[0] if known else None,
        qmax=q.codes[1] if known else None,
        grid=q.grid_kind,
        axis=q.axis,
        group_size=q.group_size,
        range=q.range if getattr(q, "normalize", None) != "tanh" else "max|tanh|",
        learn=q.learn,
        scales=None if is_lazy(q.scale) else q.scale.numel(),
        initialized=q.initialized,
        shared_with=tuple(name for name in users if name != names[0]),
        note="; ".join(filter(None, (choice.note if choice else "", after, also, growing))),
        runs=runs.get(q),
        at_floor=low,
    )


def _float_rows(model: nn.Module, names: dict[nn.Module, list[str]]) -> list[FloatRow]:
    rows = []
    for module, reason in reasons_in_float(model).items():
        count = sum(0 if is_lazy(p) else p.numel() for p in module.parameters(recurse=False))
        rows.append(FloatRow(names[module][0], original_class(module).__name__, count, reason))
    return rows


def _operation_rows(operations: FloatOperations, names: dict[nn.Module, list[str]]) -> list[OperationRow]:
    order = {module: index for index, module in enumerate(names)}
    found = sorted(operations.count.items(), key=lambda item: order[item[0][0]])
    return [
        OperationRow(names[module][0], original_class(module).__name__, operation, calls)
        for (module, operation), calls in found
    ]


def _quantizer_table(rows: tuple[QuantizerRow, ...]) -> str:
    cells = []
    for row in rows:
        axis = "tensor" if row.axis is None else f"axis {row.axis}"
        axis += f" / {row.group_size}" if row.group_size is not None else ""
        shared = f"shared with {', '.join(row.shared_with)}" if row.shared_with else ""
        note = "; ".join(filter(None, (row.note, shared, "" if row.initialized else "no range yet")))
        learn = f", learns {row.learn}" if row.learn else ""
        ran = "" if row.runs is None else str(row.runs)
        codes = "" if row.qmin is None else f"{row.qmin}..{row.qmax} "
        how = (row.tensor, str(row.bits), codes + row.grid, axis, row.range + learn, ran, note)
        cells.append((row.layer, row.kind, *how, 1))
    heading = ("layer", "kind", "tensor", "bits", "codes", "one scale per", "range", "runs", "note", "layers")
    return table(heading, collapsed(cells))
