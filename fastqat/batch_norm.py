"""Re-estimation of batch-normalisation statistics.

Weights that oscillate between two codes change the output of a layer from step to step, so that the moving averages of
training describe no network that ever was. The cure is to measure mean and variance anew, with the weights as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.observe import eagerly, evaluating, run_batch
from fastqat.ops import checks

PIECE = 2**18  # elements that are float64 at a time: a whole activation would take several times its memory


def reestimate_bn(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 50,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> int:
    """Replace the running statistics of batch normalisation by averages over some training batches.

    With B batches of n elements per channel, mean_b and var_b of each computed in float64 from the layer's input::

        running_mean = sum_b mean_b / B        running_var = sum_b var_b / B,  var_b with divisor n - 1

    The network runs in evaluation mode and without gradients: no dropout, and nothing of a quantizer changes, neither
    range nor time. Only layers of batch normalisation are in training mode: each one normalises with the statistics of
    its batch, as in training. A layer that is called several times for a batch averages over its calls. The mean of the
    variances is not the variance of all data: it leaves out how far the means of the batches lie apart.

    Nothing but ``running_mean`` and ``running_var`` changes, and these only once everything has been measured. A
    compiled model runs eagerly here, and is not compiled anew afterwards. In data-parallel training every process
    calls this with batches of its own, and all of them get the average over the batches of all; layers that normalise
    over all processes (SyncBatchNorm) need the same number of batches in each.

    Args:
        model: a module with BatchNorm1d to 3d or SyncBatchNorm, also within DistributedDataParallel or torch.compile.
        batches: of the training data, of the kinds that :func:`fastqat.calibrate` takes.
        num_batches: how many of them are taken; fewer where there are fewer.
        forward: runs the model on a batch of any other kind.

    Returns:
        The number of layers that have new statistics. Layers without running statistics need none and are left alone;
        where a model has no other, it is not run, a warning says so, and the number is 0.

    Raises:
        ValueError: no batch; a layer that saw none, or whose statistics are not finite, or that had a batch of one
            element per channel; a quantizer without a range. The message names it, and nothing has changed.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022.
    """
    if isinstance(num_batches, bool) or not isinstance(num_batches, int):
        checks.fail(TypeError, "num_batches", "an int", repr(num_batches))
    if num_batches < 1:
        checks.fail(ValueError, "num_batches", "at least 1", num_batches)
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module  # they would send buffers round, and run copies of the layers
    layers = _with_statistics(model)
    if not layers:
        warnings.warn(
            f"reestimate_bn: {type(model).__name__} has no batch normalisation with running statistics: "
            "nothing to re-estimate",
            stacklevel=2,
        )
        return 0
    _check_ranges(model)
    run = forward or run_batch
    averages = [_Average(name, layer) for name, layer in layers.items()]
    count = 0
    with torch.no_grad():
        with evaluating(model), eagerly(), _gathering(averages):
            for batch in itertools.islice(batches, num_batches):
                run(model, batch)
                count += 1
        _write(averages, count)
    return len(layers)


@contextlib.contextmanager
def reestimated(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 50,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Iterator[int]:
    """Evaluate with re-estimated statistics, and have everything back afterwards.

    Inside, the model is in evaluation mode. On leaving, also by an exception, the statistics, the count of batches and
    the mode of every module are what they were.

    Args:
        model, batches, num_batches, forward: see :func:`reestimate_bn`.

    Yields:
        The number of layers that have other statistics inside.

    Raises:
        TypeError, ValueError: see :func:`reestimate_bn`.
    """
    layers = _with_statistics(model).values()
    kept = [(layer, {k: b.clone() for k, b in layer.named_buffers(recurse=False)}) for layer in layers]
    with evaluating(model):
        try:
            yield reestimate_bn(model, batches, num_batches, forward=forward)
        finally:
            with torch.no_grad():
                for layer, buffers in kept:
                    for name, values in buffers.items():
                        getattr(layer, name).copy_(values)


def _with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    layers = {k: m for k, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    lazy = [name for name, layer in layers.items() if any(is_lazy(b) for b in layer.buffers())]
    if lazy:
        got = f"none yet for {', '.join(lazy)}: run the model once"
        checks.fail(ValueError, "model", "batch normalisation of known channels", got)
    return layers


def _check_ranges(model: nn.Module) -> None:
    """Check that every quantizer has a range: the first tensor would set it, here of all places."""
    quantizers = {k: m for k, m in model.named_modules() if isinstance(m, FakeQuant)}
    without = [name for name, q in quantizers.items() if not q.initialized and not q.is_idle()]
    if without:
        got = f"none for {', '.join(without)}: fastqat.calibrate(model, batches) sets them"
        checks.fail(ValueError, "model", "quantizers with ranges", got)


class _Average:
    """Sums of the statistics of one layer: of the means [C], of the variances [C], and the number of calls [1]."""

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        self.name, self.layer = name, layer
        self.buffer = layer.get_buffer("running_mean")
        self.channels = self.buffer.numel()
        self.sums = torch.zeros(2 * self.channels + 1, dtype=torch.float64, device=self.buffer.device)

    def add(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: take the input, [N, C, ...], into account."""
        x: Tensor = (*args, *kwargs.values())[0]
        if x.dim() < 2 or x.shape[1] != self.channels:
            return  # the layer itself says what is wrong with it
        synchronized = _is_synchronized(self.layer)
        if not synchronized and not x.numel():
            return  # an empty batch has no statistics, and the layer passes it through
        if not synchronized and x.numel() == self.channels:
            got = f"one, in an input of shape {list(x.shape)}"
            checks.fail(ValueError, "batches", f"more than one element per channel for {self.name}", got)
        mean, var = _moments(x, self._over_processes if synchronized else lambda sums: None)
        self.sums += torch.cat([mean, var, mean.new_ones(1)])

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, [C], in the dtype of the layer's buffers."""
        mean, var = (self.sums[:-1] / self.sums[-1]).to(self.buffer.dtype).chunk(2)
        return mean, var

    def _over_processes(self, sums: Tensor) -> None:
        dist.all_reduce(sums, group=getattr(self.layer, "process_group", None))


def _is_synchronized(layer: _BatchNorm) -> bool:
    """True if a batch of this layer lies in all processes. Such classes have the name, not the class, in common."""
    named = any(kind.__name__ == "SyncBatchNorm" for kind in type(layer).__mro__)
    return named and dist.is_available() and dist.is_initialized()


def _moments(x: Tensor, add_up: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel, float64 [C]; x: [N, C, ...] of any floating dtype.

    The layer's own statistics would cost nothing, but are sums in float32 on some paths: off by 3e-5 of the variance,
    measured at 131,072 elements per channel.
    """
    dims = [0, *range(2, x.dim())]
    pieces = x.split(max(1, PIECE * len(x) // max(1, x.numel())))
    count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
    sums = torch.cat([torch.stack([piece.double().sum(dims) for piece in pieces]).sum(0), count])
    add_up(sums)
    mean, n = sums[:-1] / sums[-1], sums[-1]
    centre = mean.view([1, -1] + [1] * (x.dim() - 2))
    squares = torch.stack([(piece.double() - centre).square_().sum(dims) for piece in pieces]).sum(0)
    add_up(squares)
    return mean, squares / (n - 1)


@contextlib.contextmanager
def _gathering(averages: list[_Average]) -> Iterator[None]:
    """Let the layers normalise with the statistics of their batch, which are added up; they write none themselves."""
    tracking = {average.layer: average.layer.track_running_stats for average in averages}
    hooks = [average.layer.register_forward_pre_hook(average.add, with_kwargs=True) for average in averages]
    try:
        for layer in tracking:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, was in tracking.items():
            layer.track_running_stats = was
        for hook in hooks:
            hook.remove()


def _write(averages: list[_Average], count: int) -> None:
    """Check the averages of all processes, and only then replace the statistics."""
    if dist.is_available() and dist.is_initialized():
        for average in averages:
            dist.all_reduce(average.sums)
    blind = [average.name for average in averages if not average.sums[-1]]
    if blind:
        got = f"{count} batches, in which these saw none: {', '.join(blind)}"
        checks.fail(ValueError, "batches", "data for every batch normalisation", got)
    new = [(average.name, average.layer, *average.result()) for average in averages]
    broken = [name for name, _, mean, var in new if not (mean.isfinite() & var.isfinite()).all()]
    if broken:
        checks.fail(ValueError, "batches", "finite statistics", f"others in {', '.join(broken)}")
    for _, layer, mean, var in new:
        layer.get_buffer("running_mean").copy_(mean)
        layer.get_buffer("running_var").copy_(var)
