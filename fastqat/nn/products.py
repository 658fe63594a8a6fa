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

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.gradient import GradientFakeQuant
from fastqat.nn.observe import RunningModules, storage_of

_BATCHED = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
_WITH_A_SUM = (torch.ops.aten.addmm, torch.ops.aten.baddbmm)  # whose first tensor is added
_GROUPED = {getattr(torch.ops.aten, name, None) for name in ("_grouped_mm",)} - {None}  # newer than torch 2.10


class Product(NamedTuple):
    """A kind of product.

    Attributes:
        module: the innermost that ran.
        parameters: names in the model of the Parameters that were factors, or of which alone a factor was computed.
        of_weight: False for a product of two activations, as far as its shape tells.
    """

    module: nn.Module
    parameters: tuple[str, ...]
    of_weight: bool


class Products:
    """Counts multiplications of matrix products and convolutions while its ``with`` block runs; not of quantizers.

    Args:
        model: whose modules the products are booked under.

    Attributes:
        count: multiply-accumulates by kind of product.
    """

    def __init__(self, model: nn.Module) -> None:
        self.count: Counter[Product] = Counter()
        self.modules = RunningModules(model)
        # By storage: a transposed or sliced Parameter is another tensor on the same one.
        self.names: dict[int, tuple[str, ...]] = {}
        for name, parameter in model.named_parameters():
            if not nn.parameter.is_lazy(parameter):
                self.names.setdefault(storage_of(parameter), (name,))
        self.made: list[Tensor] = []  # of Parameters alone; kept, as another tensor could get the place of one

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
        if not self.modules.stack or isinstance(self.modules.stack[-1], (FakeQuant, GradientFakeQuant)):
            return
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        macs = self._macs(func, y, args, kwargs)
        packet = getattr(func, "overloadpacket", None)
        factors = tensors if not macs else tensors[1:3] if packet in _WITH_A_SUM else tensors[:2]
        names = tuple(dict.fromkeys(name for x in factors for name in self.names.get(storage_of(x), ())))
        if macs:
            # A weight that a batch shares stands still where the batch moves on.
            of_weight = bool(names) or packet not in _BATCHED or any(x.dim() == 3 and x.stride(0) == 0 for x in factors)
            self.count[Product(self.modules.stack[-1], names, of_weight)] += macs
        elif isinstance(y, Tensor) and factors and all(storage_of(x) in self.names for x in factors):
            if storage_of(y) not in self.names:  # a copy in another order, a standardized weight
                self.names[storage_of(y)] = names
                self.made.append(y)

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
