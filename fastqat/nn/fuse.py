"""ReLU and ReLU6 modules that the quantizer of the next layer computes in the same pass: which they are, and the swap.

A module is taken where its graph leaves no doubt: it is called once, and its output goes into one quantized layer and
nowhere else. The graph is that of ``torch.fx``, of the whole model or, where that cannot be traced, of the parts of it
that can be, each of which is taken to be called as a whole.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fastqat.nn.selection import names_of_modules
from fastqat.nn.spec import QConfig
from fastqat.nn.twins import original_class, torch_layer

KINDS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
NOTE = "fusion_note"  # attribute of every ReLU and ReLU6 that prepare was asked to fuse: why it was not, or ""
FUSED = "fused_activation"  # attribute of a layer: (the module that its quantizer computes,)

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedActivation(nn.Identity):
    """A ReLU or ReLU6 that the quantizer of the next layer computes: it passes its input through.

    Attributes:
        original: the class that it had before.
        fused_into: name of that layer in the model that was prepared.
    """

    original: type[nn.Module]
    fused_into: str

    def extra_repr(self) -> str:
        """What computes it."""
        return f"{self.original.__name__}, computed by the input quantizer of {self.fused_into}"


@dataclass(frozen=True)
class Fusion:
    """What becomes of a ReLU or ReLU6.

    Attributes:
        layer: whose quantizer computes it, or None.
        config: of that layer, with this activation in it.
        reason: why there is no such layer.
    """

    layer: nn.Module | None = None
    config: QConfig | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Graph:
    """What one mode of a model, or of a part of it, computes; names are those of the whole model."""

    part: str  # its name, or "the model"
    calls: dict[str, list[fx.Node]]  # of the modules that are looked at from outside
    names: dict[fx.Node, str]
    seen_by: dict[fx.Node, set[str]]  # modules that take a value or give it, at any depth
    kept: set[fx.Node]  # as an attribute of a module


def fusions(model: nn.Module, configs: Mapping[nn.Module, QConfig | None]) -> dict[nn.Module, Fusion]:
    """What can become of each ReLU and ReLU6 of a model, which stays as it is.

    Args:
        model: any module.
        configs: layer -> its quantizers, or None if it stays in float.
    """
    names = names_of_modules(model)
    found = [module for module in names if type(module) in KINDS]
    if not found:
        return {}
    graphs: dict[str, list[_Graph]] = {}  # name of a module -> the graphs of the smallest part that was traced
    try:
        for part, traced in _graphs(_skeleton(model), ""):
            graphs.update({name: traced for name in (n for m in found for n in names[m]) if name.startswith(part)})
    except Exception as error:  # an attribute that cannot be copied
        return {module: Fusion(reason=f"the model cannot be copied: {error}") for module in found}
    return {module: _judged(module, model, names, configs, graphs.get(names[module][0])) for module in found}


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy to trace, whose forward may change anything of it: with the same Parameters, and without hooks."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        memo.update({id(value): OrderedDict() for name, value in vars(module).items() if name.endswith("_hooks")})
    return copy.deepcopy(model, memo)


def _graphs(part: nn.Module, prefix: str) -> Iterator[tuple[str, list[_Graph]]]:
    """The graphs of a model in both modes, or of those parts of it that can be traced, by the prefix of their names."""
    if not any(type(module) in KINDS for module in part.modules()):
        return
    try:
        yield prefix, [_traced(part.train(mode), prefix) for mode in (True, False)]
    except Exception:  # anything that a forward may do with a value that is not there
        for name, child in part.named_children():
            yield from _graphs(child, f"{prefix}{name}.")


class _Tracer(fx.Tracer):
    """Records which modules see which values; layers with a twin are looked at from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_by: dict[fx.Node, set[nn.Module]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for what is looked at from outside."""
        return torch_layer(type(m)) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace one call."""
        result = super().call_module(m, forward, args, kwargs)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, fx.Proxy):
                self.seen_by.setdefault(value.node, set()).add(m)
        return result


def _traced(part: nn.Module, prefix: str) -> _Graph:
    tracer = _Tracer()
    with torch.random.fork_rng(devices=[]):
        graph = tracer.trace(part)
    names = {node: prefix + str(node.target) for node in graph.nodes if node.op == "call_module"}
    calls: dict[str, list[fx.Node]] = {}
    for node, name in names.items():
        calls.setdefault(name, []).append(node)
    paths = {module: prefix + name for name, module in part.named_modules()}
    seen_by = {node: {paths[m] for m in modules} for node, modules in tracer.seen_by.items()}
    values = tree_leaves([vars(module) for module in part.modules()])
    return _Graph(
        prefix[:-1] or "the model",
        calls,
        names,
        seen_by,
        {value.node for value in values if isinstance(value, fx.Proxy)},
    )


def _judged(
    activation: nn.Module,
    model: nn.Module,
    names: Mapping[nn.Module, list[str]],
    configs: Mapping[nn.Module, QConfig | None],
    graphs: list[_Graph] | None,
) -> Fusion:
    """Whether one of them can be fused; both modes of the model must agree."""
    if graphs is None:
        return Fusion(reason="no part of the model that holds it can be traced")
    if len(names[activation]) > 1:
        return Fusion(reason=f"it is also {', '.join(names[activation][1:])}")
    targets = set()
    for graph in graphs:
        target, reason = _target(names[activation][0], model, graph)
        if reason:
            return Fusion(reason=reason)
        targets.add(target)
    if len(targets) > 1:
        return Fusion(reason="another layer takes its output in training than in evaluation")
    name = targets.pop()
    layer = model.get_submodule(name)
    config = configs.get(layer)
    if config is None or config.activation is None or config.activation_on != "input":
        return Fusion(reason=f"{name}, which takes its output, has no quantizer of its input")
    if isinstance(layer, nn.MultiheadAttention) or len(names[layer]) > 1:
        return Fusion(reason=f"{name}, which takes its output, takes other inputs too")
    if config.activation.activation is not None:
        return Fusion(reason=f"the quantizer of {name} has an activation already")
    try:
        spec = replace(config.activation, activation=KINDS[type(activation)])
        return Fusion(layer, replace(config, activation=spec))
    except (TypeError, ValueError) as error:
        return Fusion(reason=f"the quantizer of {name}: {error}")


def _target(name: str, model: nn.Module, graph: _Graph) -> tuple[str, str]:
    """Name of the one layer that takes the output of an activation, or the reason why there is none."""
    calls = graph.calls.get(name, [])
    if len(calls) != 1:
        return "", "no call of it is seen" if not calls else f"it is called {len(calls)} times"
    (call,) = calls
    if call in graph.kept:
        return "", "a module keeps its output"
    if len(call.users) != 1:
        return "", f"its output has {len(call.users)} users"
    (user,) = call.users
    target = graph.names.get(user)
    if target is None:
        function = getattr(user.target, "__name__", user.target)
        return "", f"its output is that of {graph.part}" if user.op == "output" else f"{function} takes its output"
    if len(user.all_input_nodes) > 1 or len(graph.calls[target]) > 1:
        return "", f"{target}, which takes its output, takes other inputs too"
    hooked = sorted(n for n in graph.seen_by[call] if _has_hooks(model.get_submodule(n)))
    if hooked:
        return "", f"hooks of {', '.join(hooked)} see its output"
    if getattr(model.get_submodule(name), "inplace", False) and not _owns_its_input(call, model, graph):
        return "", "it works in place, on what others may hold"
    return target, ""


def _owns_its_input(call: fx.Node, model: nn.Module, graph: _Graph) -> bool:
    """True if an activation is the only one to see what it changes: the output of a layer or a norm, which is new."""
    source = call.all_input_nodes[0]
    name = graph.names.get(source)
    if name is None or len(source.users) > 1 or source in graph.kept:
        return False
    module = model.get_submodule(name)
    is_new = torch_layer(original_class(module)) is not None or isinstance(module, _NORMS)
    return is_new and not any(_has_hooks(model.get_submodule(n)) for n in graph.seen_by[source])


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def fuse(found: Mapping[nn.Module, Fusion], names: Mapping[nn.Module, str]) -> None:
    """Make each module that a quantizer computes an identity, in place, and note why the others stay.

    Args:
        found: by :func:`fusions`.
        names: of the layers.
    """
    for activation, fusion in found.items():
        setattr(activation, NOTE, fusion.reason)
        if fusion.layer is not None:
            activation.original = type(activation)  # type: ignore[assignment]  # not a Tensor or Module
            activation.fused_into = names[fusion.layer]  # type: ignore[assignment]
            activation.__class__ = FusedActivation
            setattr(fusion.layer, FUSED, (activation,))  # in a tuple, so that it is no sub-module of the layer


def unfuse(module: nn.Module) -> None:
    """Give a module back what :func:`fuse` changed of it, in place: an activation its class, a layer's its own."""
    for activation in module.__dict__.pop(FUSED, ()):
        unfuse(activation)
    module.__dict__.pop(NOTE, None)
    if isinstance(module, FusedActivation):
        module.__class__ = module.__dict__.pop("original")
        module.__dict__.pop("fused_into")
