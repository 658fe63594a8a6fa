"""Where numbers stopped being finite: the first layer, found by running a batch once more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def first_non_finite(model: nn.Module, run: Callable[[], object]) -> str:
    """Say in words which layer first gives a number that is not finite.

    Args:
        model: the network, with the weights of the step in question. A network that draws random numbers draws new
            ones here, and its statistics of BN take the batch a second time: it is of no use for training afterwards.
        run: computes the batch again.
    """
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_watcher(name, module, found))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "no layer gave such a number when the batch was run again"


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that hold a number that is not finite."""
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    if not named:
        return []
    finite = torch.stack([p.detach().isfinite().all().cpu() for _, p in named]).tolist()
    return [name for (name, _), each in zip(named, finite, strict=True) if not each]


def _watcher(name: str, module: nn.Module, found: list[str]) -> Callable[..., None]:
    def watch(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if found or _finite(output):
            return
        weights = non_finite_parameters(module)
        cause = f"; so is its {weights[0]}" if weights else "" if all(map(_finite, inputs)) else "; so is its input"
        found.append(f"the first layer with a non-finite output is {name} ({type(module).__name__}{cause})")

    return watch


def _finite(value: object) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.detach().isfinite().all())
