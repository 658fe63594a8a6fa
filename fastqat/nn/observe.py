"""What a model does while it runs: in evaluation mode, with calls counted, and the operations between its layers."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.own_forward import OwnForward
from fastqat.nn.twins import original_class, torch_layer

# Names of torch's functions and Tensor's methods, without the underscores around them.
_WITH_A_WEIGHT = {"linear", "embedding", "conv1d", "conv2d", "conv3d"}
_WITH_A_WEIGHT |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear", "embedding_bag"}
_PRODUCTS = {"matmul", "mm", "bmm", "mv", "dot", "inner", "addmm", "addbmm", "baddbmm", "einsum", "tensordot"}
_FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_FUSED |= {"native_multi_head_attention", "transformer_encoder_layer_fwd"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "addcmul", "addcdiv", "lerp"}
_SPELLINGS = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div"}
_SPELLINGS |= {"rsub": "sub", "rmatmul": "matmul"}  # with a number or an array on the left


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and give every module of it back the mode that it had, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def eagerly() -> contextlib.AbstractContextManager[Any]:
    """Run compiled models eagerly: their code passes by hooks, and would be compiled anew for whoever observes."""
    if "torch._dynamo" not in sys.modules:  # nothing has imported the compiler: nothing is compiled
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def run_inputs(model: nn.Module, example_inputs: Any) -> object:
    """Run a model on example inputs: a tensor, positional arguments (tuple, list), or a mapping of keyword ones."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*([example_inputs] if isinstance(example_inputs, Tensor) else example_inputs))


def run_batch(model: nn.Module, batch: Any) -> object:
    """Run a model on a batch, whose tensors are moved to the model's device.

    Args:
        model: any module.
        batch: a tensor; (inputs, targets), of which only the inputs are used; or a mapping of keyword arguments.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    if isinstance(batch, Mapping):
        return model(**{name: moved(x) for name, x in batch.items()})
    return model(moved(batch[0] if isinstance(batch, (tuple, list)) else batch))


class Calls:
    """Counts the forward calls of modules while its ``with`` block runs.

    Args:
        modules: what is counted.

    Attributes:
        count: calls so far, by module.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.count = dict.fromkeys(modules, 0)

    def __enter__(self) -> Calls:
        self.hooks = [module.register_forward_pre_hook(self._add) for module in self.count]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def _add(self, module: nn.Module, _: object) -> None:
        self.count[module] += 1


class RunningModules:
    """The modules of a model whose forward is running, outermost first, while its ``with`` block runs.

    Args:
        model: whose modules are watched.

    Attributes:
        stack: the modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stack: list[nn.Module] = []

    def __enter__(self) -> RunningModules:
        self.hooks = []
        for module in self.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks, and runs as a part of what holds it
            self.hooks.append(module.register_forward_pre_hook(lambda m, _: self.stack.append(m)))
            self.hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def _leave(self) -> None:
        self.stack.pop()  # without a result: a hook's replaces the module's output


class ModuleAwareMode(TorchFunctionMode):
    """Base of modes that see each function of torch, and know the modules whose forward is running.

    Args:
        model: whose modules are watched.

    Attributes:
        running: the modules, outermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = RunningModules(model)
        self.running = self.modules.stack

    def __enter__(self) -> Any:
        self.modules.__enter__()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.modules.__exit__(kind, error, trace)


class FloatOperations(ModuleAwareMode):
    """Counts sums and products of floating tensors that no layer with a twin computes, while its ``with`` block runs.

    Those are what stays in float between quantized layers: residual additions, products of attention, and functions
    like ``F.linear`` called with a Parameter.

    Args:
        model: whose modules the operations are booked under.

    Attributes:
        count: calls by (innermost module that ran, name of the operation).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.count: Counter[tuple[nn.Module, str]] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one call."""
        kwargs = kwargs or {}
        if self.running:
            module, name = self.running[-1], _operation(func, (*args, *kwargs.values()))
            own = name in _WITH_A_WEIGHT and torch_layer(original_class(module)) is not None
            own = own or (isinstance(module, OwnForward) and name in _PRODUCTS)  # with its quantized weight
            if name is not None and not own and not isinstance(module, FakeQuant):
                self.count[module, name] += 1
        return func(*args, **kwargs)


def _operation(func: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
    """The name of a sum or product of floating tensors; None for everything else."""
    name = getattr(func, "__name__", "").strip("_")
    name = _SPELLINGS.get(name, name)
    if name in _WITH_A_WEIGHT | _PRODUCTS | _FUSED:
        return name
    operands = [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0]
    return name if name in _ELEMENTWISE and len(operands) > 1 else None


@contextlib.contextmanager
def nothing_changes(quantizers: Iterable[Any]) -> Iterator[None]:
    """Run quantizers without a trace: switched on, but without a range they pass their tensor and set none."""
    enabled = {q: q.fake_quant_enabled for q in quantizers}
    try:
        for q in enabled:
            q.fake_quant_enabled = True
            if not q.initialized:
                q.forward = _pass  # type: ignore[assignment]  # the instance's, before that of the class
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for q, was in enabled.items():
            q.fake_quant_enabled = was
            q.__dict__.pop("forward", None)


def _pass(x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return x if out_dtype is None else x.to(out_dtype)


def storage_of(x: Tensor) -> int:
    """The same number for tensors that share memory; that of the tensor itself where it has none to share."""
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without one, as sparse ones are
        return -id(x)
