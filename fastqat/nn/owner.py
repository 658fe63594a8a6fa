"""Where a model and an optimizer hold the same parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer


class Place(NamedTuple):
    """Where a model and an optimizer hold the same parameter: names of modules from the root on, and two indices."""

    path: tuple[str, ...]
    name: str
    group: int
    position: int

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
        return _is_trained(mine, theirs) and (mine is theirs or _memory(mine) == _memory(theirs) != 0)


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
    """A place of a parameter that both have and train: the same object, or else the same memory."""
    theirs = [(g, i, p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    by_id = {id(p): (g, i, p) for g, i, p in theirs}
    places = list(_places(root))
    for path, name, mine in places:
        found = by_id.get(id(mine))
        if found is not None and mine.requires_grad:
            return Place(path, name, *found[:2])
    by_memory = {memory: (g, i, p) for g, i, p in theirs if (memory := _memory(p))}
    for path, name, mine in places:
        found = by_memory.get(_memory(mine))
        if found is not None and _is_trained(mine, found[2]):
            return Place(path, name, *found[:2])
    return None
