"""The trace of the Hessian, and the strength of the estimator EWGS that follows from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastqat import functional
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.observe import eagerly, evaluating
from fastqat.ops import checks


def hessian_traces(
    loss: Tensor, tensors: Sequence[Tensor], *, probes: int = 50, tolerance: float = 1e-3, seed: int = 0
) -> list[float]:
    """Estimate, for each of some tensors, the trace of the Hessian of a loss by them: the mean of v * (H v).

    The signs v are random, and drawn for all tensors at once: a probe is one second derivative, whatever their number.

    Args:
        loss: one number, whose graph can be differentiated twice.
        tensors: what it depends on.
        probes: at most that many.
        tolerance: ends it where no mean has changed by a larger part of itself.
        seed: of the signs; torch's own random numbers are left alone.

    Returns:
        One trace per tensor; 0 for one that the loss does not depend on.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
    """
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    return _traces(gradients, tensors, probes, tolerance, seed)


def _traces(
    gradients: Sequence[Tensor], tensors: Sequence[Tensor], probes: int, tolerance: float, seed: int
) -> list[float]:
    generators = {t.device: torch.Generator(t.device).manual_seed(seed) for t in tensors}
    sums, means = [0.0] * len(tensors), [math.nan] * len(tensors)
    for count in range(1, probes + 1):
        signs = [_signs(t, generators[t.device]) for t in tensors]
        products = _products(gradients, tensors, signs)
        sums = [total + product for total, product in zip(sums, products, strict=True)]
        before, means = means, [total / count for total in sums]
        if all(abs(new - old) <= tolerance * abs(old) for new, old in zip(means, before, strict=True)):
            break
    return means


def _signs(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, t.shape, generator=generator, device=t.device).to(t.dtype) * 2 - 1


def _products(gradients: Sequence[Tensor], tensors: Sequence[Tensor], signs: Sequence[Tensor]) -> list[float]:
    """v * (H v) for each tensor."""
    curved = [(g, v) for g, v in zip(gradients, signs, strict=True) if g.requires_grad]  # others are constant
    if not curved:
        return [0.0] * len(tensors)
    outputs, vectors = zip(*curved, strict=True)
    rows = torch.autograd.grad(outputs, tensors, vectors, retain_graph=True, materialize_grads=True)
    return [float((v.double() * row.double()).sum()) for v, row in zip(signs, rows, strict=True)]


def ewgs_delta(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    num_batches: int = 3,
    probes: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Measure the strength delta that each quantizer with the estimator EWGS should have.

    With the gradient g and the Hessian H of the loss by the N elements of a quantized tensor, in steps of its grid::

        delta = max(0, mean over the batches of (tr(H) / N) / (3 * std(g)))

    In units of the whole range of the grid, where the source states it, it is qmax - qmin times as large. A
    quantizer that is called several times for a batch takes the mean over its calls. The model runs eagerly and in
    evaluation mode, with straight-through gradients; nothing of it changes. To use what comes::

        for name, delta in fastqat.ewgs_delta(model, batches, loss).items():
            model.get_submodule(name).estimator_strength.fill_(delta)

    Args:
        model: with quantizers of ``estimator="ewgs"``, whose ranges are set.
        batches: of the training data.
        loss: returns the loss of the model on a batch, one number that can be differentiated twice.
        num_batches: how many of them are taken; fewer where there are fewer.
        probes, tolerance, seed: see :func:`hessian_traces`.

    Returns:
        delta by the name of the quantizer; 0 where the gradient does not vary, as in a tensor of one element.

    Raises:
        ValueError: no quantizer with this estimator, one without a range or that does not run, one with normalize
            (DoReFa, TRS), no batch, or a loss that is not one finite number.

    Source: Lee, Kim, Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021. Departures: the model
        runs in evaluation mode, and one probe serves all tensors.
    """
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuant)}
    found: dict[str, list[float]] = {name: [] for name, q in quantizers.items() if q.estimator == "ewgs"}
    if not found:
        got = f"{type(model).__name__} without any"
        checks.fail(ValueError, "model", "a model with quantizers of estimator='ewgs'", got)
    others = [f"{name} ({q.normalize})" for name, q in quantizers.items() if q.normalize is not None]
    if others:
        checks.fail(ValueError, "model", "quantizers without normalize", f"{', '.join(others)}")
    without = [name for name, q in quantizers.items() if not q.initialized and not q.is_idle()]
    if without:
        got = f"none for {', '.join(without)}: fastqat.calibrate(model, batches) sets them"
        checks.fail(ValueError, "model", "quantizers with ranges", got)
    with evaluating(model), eagerly(), torch.enable_grad():
        for batch in itertools.islice(batches, num_batches):
            with _shifted(quantizers, tuple(found)) as shifts:
                value = loss(model, batch)
            for name, delta in _deltas(value, shifts, probes, tolerance, seed):
                found[name].append(delta)
    silent = [name for name, deltas in found.items() if not deltas]
    if silent:
        checks.fail(ValueError, "batches", "batches that every quantizer sees", f"none seen by {', '.join(silent)}")
    return {name: max(0.0, sum(deltas) / len(deltas)) for name, deltas in found.items()}


@contextmanager
def _shifted(quantizers: dict[str, FakeQuant], names: tuple[str, ...]) -> Iterator[list[tuple[str, Tensor]]]:
    """Add a shift of zero, in steps of the grid, to what the quantizers of these names give; collect the shifts."""
    shifts: list[tuple[str, Tensor]] = []

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(quantizer: FakeQuant, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if not quantizer.fake_quant_enabled:
                return y
            y = _straight_through(quantizer, args[0], y)
            if name not in names:
                return y
            shifts.append((name, torch.zeros_like(y, dtype=torch.float32, requires_grad=True)))
            return y + (_steps(quantizer, y) * shifts[-1][1]).to(y.dtype)

        return hook

    with ExitStack() as stack:
        for name, quantizer in quantizers.items():
            # Weights that are quantized together leave those with hooks to their quantizers.
            stack.enter_context(quantizer.register_forward_hook(hook_of(name)))
        yield shifts


def _grid(quantizer: FakeQuant) -> dict[str, Any]:
    qmin, qmax = quantizer.codes
    options = {"axis": quantizer.axis, "group_size": quantizer.group_size, "eps": quantizer.eps}
    return {"scale": quantizer.scale.detach(), "qmin": qmin, "qmax": qmax, **options}


def _straight_through(quantizer: FakeQuant, x: Tensor, y: Tensor) -> Tensor:
    """The values of y with a gradient that can be differentiated again, which that of an estimator cannot."""
    parameters: dict[str, Any] = {"zero_point": quantizer.zero_point, "offset": quantizer.grid_offset()}
    parameters = {name: None if p is None else p.detach() for name, p in parameters.items()}
    through = functional.fake_quantize(
        x, **_grid(quantizer), **parameters, ste_mask=quantizer.ste_mask, out_dtype=y.dtype
    )
    return y.detach() + (through - through.detach())


def _steps(quantizer: FakeQuant, y: Tensor) -> Tensor:
    """The scale of each element: what a level of 1 stands for."""
    return functional.dequantize(torch.ones_like(y, dtype=torch.int32), **_grid(quantizer))


def _deltas(
    loss: Tensor, shifts: list[tuple[str, Tensor]], probes: int, tolerance: float, seed: int
) -> Iterator[tuple[str, float]]:
    """delta of each call."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.isfinite().all():
        got = f"{list(loss.shape)}" if isinstance(loss, Tensor) and loss.numel() != 1 else loss
        checks.fail(ValueError, "loss", "one finite number", got)
    if not shifts:
        return
    tensors = [shift for _, shift in shifts]
    gradients = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
    traces = _traces(gradients, tensors, probes, tolerance, seed)
    for (name, shift), gradient, trace in zip(shifts, gradients, traces, strict=True):
        spread = float(gradient.detach().double().std()) if shift.numel() > 1 else 0.0
        yield name, trace / shift.numel() / (3 * spread) if spread else 0.0
