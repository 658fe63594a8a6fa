"""Multiplications of a model, counted module by module in one run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.observe import eagerly, evaluating, nothing_changes

_OF_ACTIVATIONS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)  # products of two activations, in whatever module


class Multiplications(NamedTuple):
    """Multiply-accumulates of one run of a model.

    Args:
        by_module: those of each module with its weights, without those of the modules within it.
        total: all of them, products of two activations too.
    """

    by_module: dict[nn.Module, int]
    total: int


def count_multiplications(model: nn.Module, run: Callable[[], object]) -> Multiplications:
    """Count the multiplications of a run, in evaluation mode and without a trace in the model.

    Args:
        model: any module.
        run: runs it.
    """
    names = {module: name for name, module in model.named_modules()}
    quantizers = [module for module in names if isinstance(module, FakeQuant)]
    with evaluating(model), eagerly(), nothing_changes(quantizers), _decomposed_attention():
        with FlopCounterMode(display=False) as counter:
            run()
    counts = counter.get_flop_counts()
    macs = {name: sum(n for op, n in by_op.items() if op not in _OF_ACTIVATIONS) // 2 for name, by_op in counts.items()}
    root = type(model).__name__
    own = {module: _own(macs, root, name, module) for module, name in names.items()}
    return Multiplications(own, counter.get_total_flops() // 2)


def _own(macs: dict[str, int], root: str, name: str, module: nn.Module) -> int:
    """Multiplications of a module without those of the modules within it."""

    def of(path: str) -> int:
        return macs.get(f"{root}.{path}" if path else root, 0)

    return of(name) - sum(of(f"{name}.{child}" if name else child) for child, _ in module.named_children())


@contextlib.contextmanager
def _decomposed_attention() -> Iterator[None]:
    """Keep torch's attention from its fused kernels, whose products nobody counts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
