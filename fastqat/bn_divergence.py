"""How far the running statistics of batch normalisation are from those of the network as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastqat.batch_norm import reestimated
from fastqat.oscillation import kind_of_layer


@dataclass(frozen=True)
class Divergence:
    """What :func:`bn_divergence` finds of one layer.

    Attributes:
        layer: name of the layer of batch normalisation.
        after: name of the convolution or linear layer whose output it normalises; "" if it normalises something else.
        kind: of that layer: "depthwise", "pointwise", "convolution", "linear", or "other".
        channels: number of them.
        mean, largest: Kullback-Leibler divergence over the channels, in nats.
    """

    layer: str
    after: str
    kind: str
    channels: int
    mean: float
    largest: float


def bn_divergence(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 50,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> list[Divergence]:
    """Measure how far the running statistics of batch normalisation are from those of the population.

    With the statistics of the population (p), as :func:`fastqat.reestimate_bn` finds them, and the running ones (r),
    each as a normal distribution, eps added to both variances, a channel has::

        KL(p || r) = ( ln(var_r / var_p) + (var_p + (mean_p - mean_r)^2) / var_r - 1 ) / 2

    Args:
        model, batches, num_batches, forward: see :func:`fastqat.reestimate_bn`; the model stays as it is.

    Returns:
        one row per layer with running statistics, in order of registration; none, and nothing is run, without any.

    Raises:
        TypeError, ValueError: see :func:`fastqat.reestimate_bn`.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022.
    """
    layers = {k: m for k, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not layers:
        return []
    running = {name: _statistics(layer) for name, layer in layers.items()}
    before = _Predecessors(model)
    try:
        with reestimated(model, batches, num_batches, forward=forward):
            population = {name: _statistics(layer) for name, layer in layers.items()}
    finally:
        before.stop()
    rows = []
    for name, layer in layers.items():
        divergence = gaussian_divergence(*population[name], *running[name])
        after, kind = before.found.get(layer, ("", "other"))
        mean, largest = torch.stack([divergence.mean(), divergence.max()]).tolist()
        rows.append(Divergence(name, after, kind, divergence.numel(), mean, largest))
    return rows


def gaussian_divergence(mean_p: Tensor, var_p: Tensor, mean_q: Tensor, var_q: Tensor) -> Tensor:
    """KL(p || q) of normal distributions, element by element, in nats.

    Args:
        mean_p, var_p, mean_q, var_q: of one shape, the variances positive.
    """
    return ((var_q / var_p).log() + (var_p + (mean_p - mean_q) ** 2) / var_q - 1) / 2


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean, and variance as the layer divides by it: float64 [C]; copies."""
    mean, var = (layer.get_buffer(f"running_{name}").to(torch.float64, copy=True) for name in ("mean", "var"))
    return mean, var + layer.eps


class _Predecessors:
    """Finds the layer whose output each batch normalisation gets, while the model runs, by the tensor that it gets."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[nn.Module, tuple[str, str]] = {}
        self._last: tuple[Any, str, nn.Module] | None = None
        self._hooks = []
        for name, module in model.named_modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                self._hooks.append(module.register_forward_hook(self._remember(name)))
            elif isinstance(module, _BatchNorm):
                self._hooks.append(module.register_forward_pre_hook(self._look))

    def _remember(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            self._last = (output, name, module)

        return hook

    def _look(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._last is not None and args and args[0] is self._last[0]:
            _, name, module = self._last
            self.found[layer] = (name, kind_of_layer(module))

    def stop(self) -> None:
        """Remove the hooks."""
        self._last = None
        for hook in self._hooks:
            hook.remove()
