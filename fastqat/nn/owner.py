"""Where a model and an optimizer hold the same parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer


class Place(NamedTuple):
    """Where a model and an optimizer hold the same parameter.

    Args:
        path: names of modules from the root on.
        name: of the parameter in the last of them.
        group, position: in the optimizer.
        is_frozen: it is not trained, and neither is anything else that the optimizer has.
    """

    path: tuple[str, ...]
    name: str
    group: int
    position: int
    is_frozen: bool = False

    def holds(self, root: nn.Module, optimizer: Optimizer) -> bool:
        """True if they still do, and train it."""
        module: nn.Module | None = root
        for child in self.path:
            module = module._modules.get(child)  # type: ignore[union-attr]  # never None before the last
            if module is None:
                return False
        mine = module._parameters.get(self.name)  # type: ignore[union-attr]
        groups = optimizer.param_groups
        if mine is None or self.group >= len(groups) or self.position >= len(groups[self.group]["params"]):
            return False
        theirs = groups[self.group]["params"][self.position]
        return (self.is_frozen or _is_trained(mine, theirs)) and (
            mine is theirs or _memory(mine) == _memory(theirs) != 0
        )


class GradientWrites(NamedTuple):
    """How often the gradient of a parameter was written: once a backward pass where it piles up, more if it is cleared.

    Args:
        path, name: as of :class:`Place`.
        writes: that many so far.
    """

    path: tuple[str, ...]
    name: str
    writes: int

    @classmethod
    def of(cls, root: nn.Module) -> GradientWrites | None:
        """Those of the first parameter that has a gradient now."""
        found = ((path, name, p.grad) for path, name, p in _places(root) if p.grad is not None)
        return next((cls(path, name, gradient._version) for path, name, gradient in found), None)

    def now(self, root: nn.Module) -> int:
        """That many by now; -1 where there is no gradient any more."""
        module: nn.Module | None = root
        for child in self.path:
            module = None if module is None else module._modules.get(child)
        parameter = None if module is None else module._parameters.get(self.name)
        return -1 if parameter is None or parameter.grad is None else parameter.grad._version


class Absence(NamedTuple):
    """What an optimizer that owned nothing of a model looked like, and for how many steps that was so."""

    params: tuple[int, ...]
    steps: int


def _is_trained(*tensors: Tensor) -> bool:
    return any(t.requires_grad for t in tensors)


def _memory(tensor: Tensor) -> int:
    """Address of the storage; 0 where there is none to compare (sharded, fake, freed)."""
    if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def looks_of(optimizer: Optimizer) -> tuple[int, ...]:
    """What changes with the parameters of an optimizer: number, first and last of each group."""
    groups = [group["params"] for group in optimizer.param_groups]
    return tuple(x for ps in groups if ps for x in (len(ps), id(ps[0]), id(ps[-1])))


def _places(root: nn.Module) -> Iterator[tuple[tuple[str, ...], str, nn.Parameter]]:
    """Path, name and value of every parameter of a model; faster than named_parameters, which joins names."""
    seen = {id(root)}
    stack: list[tuple[tuple[str, ...], nn.Module]] = [((), root)]
    while stack:
        path, module = stack.pop()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield path, name, parameter
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(((*path, name), child))


def common_place(root: nn.Module, optimizer: Optimizer) -> Place | None:
    """A place of a parameter that both have: the same object, or else the same memory.

    One that neither of them trains counts only for an optimizer that trains nothing: all that it has may be frozen,
    while what a frozen network shares with the optimizer of another one is no step of it.
    """
    theirs = [(g, i, p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    trains = any(p.requires_grad for *_, p in theirs)
    places = list(_places(root))
    for address in (id, _memory):  # the first is the faster one
        found = {a: (g, i, p) for g, i, p in theirs if (a := address(p))}
        for path, name, mine in places:
            group, position, other = found.get(address(mine), (0, 0, None))
            if other is not None and (_is_trained(mine, other) or not trains):
                return Place(path, name, group, position, not _is_trained(mine, other))
    return None


def has_gradients(root: nn.Module) -> bool:
    """True if a backward pass has reached a parameter of a model."""
    return any(p.grad is not None for *_, p in _places(root))
