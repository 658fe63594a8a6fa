"""Multiplications of a model, counted while it runs: by the module that ran, and whether a weight is a factor."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastqat.nn.observe import RunningModules

_BATCHED = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
_GROUPED = {getattr(torch.ops.aten, name, None) for name in ("_grouped_mm",)} - {None}  # newer than torch 2.10


class Product(NamedTuple):
    """A kind of product: the innermost module that ran, and the Parameters that were factors (name in the model).

    ``of_weight`` is False for a product of two activations, as far as its shape tells.
    """

    module: nn.Module
    parameters: tuple[str, ...]
    of_weight: bool


class Products:
    """Counts multiplications of matrix products and convolutions while its ``with`` block runs.

    Args:
        model: whose modules the products are booked under.

    Attributes:
        count: multiply-accumulates by kind of product.
    """

    def __init__(self, model: nn.Module) -> None:
        self.count: Counter[Product] = Counter()
        self.modules = RunningModules(model)
        # By storage: a transposed or sliced Parameter is another tensor on the same one.
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters():
            if not nn.parameter.is_lazy(parameter):
                self.names.setdefault(_storage(parameter), []).append(name)

    def __enter__(self) -> Products:
        self.modules.__enter__()
        self.mode = _EveryOperation(self)
        self.mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mode.__exit__(kind, error, trace)
        self.modules.__exit__(kind, error, trace)

    def add(self, func: Any, y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an operation that gave y, if it multiplies."""
        macs = self._macs(func, y, args, kwargs)
        if macs and self.modules.stack:
            factors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            names = dict.fromkeys(name for x in factors for name in self.names.get(_storage(x), [])[:1])
            batched = getattr(func, "overloadpacket", None) in _BATCHED
            # A weight that a batch shares stands still where the batch moves on.
            of_weight = bool(names) or not batched or any(x.dim() == 3 and x.stride(0) == 0 for x in factors)
            self.count[Product(self.modules.stack[-1], tuple(names), of_weight)] += macs

    def _macs(self, func: Any, y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        packet = getattr(func, "overloadpacket", None)
        if packet in _GROUPED:  # each row of x meets one of the matrices: y has as many elements as sums were taken
            return int(y.numel() * args[0].shape[-1])
        return int(flop_registry[packet](*args, **kwargs, out_val=y)) // 2 if packet in flop_registry else 0


class _EveryOperation(TorchDispatchMode):
    """Shows every operation to what counts products."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self.products = products

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func.overloadpacket not in flop_registry:
            with self:  # an operation of several, like the attention of torch, shows its products
                y = func.decompose(*args, **kwargs)
            if y is not NotImplemented:
                return y
        y = func(*args, **kwargs)
        self.products.add(func, y, args, kwargs)
        return y


def _storage(x: Tensor) -> int:
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without one, as sparse ones are
        return -id(x)


@contextlib.contextmanager
def decomposed_attention() -> Iterator[None]:
    """Keep torch's attention from its fused kernels, whose products nobody counts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
