"""Following a weight through a forward that nobody here wrote, to the products that it is handed to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastqat.ops import checks

# What a tensor that was made of the weight alone is.
AS_IS = "as it is"  # its values in their order: itself, in another dtype, or with other dimensions behind the first
TRANSPOSED = "transposed"  # a matrix of them, with rows and columns changed
COMPUTED = "computed"
CHANGED = "changed"  # of a weight: its forward writes into it before a product takes it
FORM = "weight_form"  # attribute of a twin with a forward of its own: what its products take
SOURCES = "transposed_sources"  # another one: see FollowedWeight.sources
WARNED = "warned_of_no_product"  # and another: it was said that a call had none

# Whose attribute .T (or .mT, .H, .mH) a forward takes.
MADE, INPUT, OTHER = "made", "input", "other"

GROUPED = -1  # output channels as a transposed convolution has them: on dimension 1, within each group


class Place(NamedTuple):
    """An argument of a product that may be a weight.

    Args:
        position, keyword: of the argument.
        channels: the dimension of the output channels of a weight that stands there, or GROUPED.
    """

    position: int
    keyword: str
    channels: int


_PRODUCTS: dict[str, tuple[Place, ...]] = {
    "linear": (Place(1, "weight", 0),),
    **{f"conv{n}d": (Place(1, "weight", 0),) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": (Place(1, "weight", GROUPED),) for n in (1, 2, 3)},
    "embedding": (Place(1, "weight", 0), Place(0, "weight", 0)),  # torch.embedding takes the table first
    "matmul": (Place(1, "other", 1), Place(0, "input", 0)),
    "rmatmul": (Place(0, "self", 1), Place(1, "other", 0)),
    "mm": (Place(1, "mat2", 1), Place(0, "input", 0)),
    "mv": (Place(0, "input", 0),),
    "addmm": (Place(2, "mat2", 1), Place(1, "mat1", 0)),
}
# Of the rows of an embedding's table; others cut a weight up in this way before they use it.
_LOOKUPS = {"getitem": (Place(0, "input", 0),), "index_select": (Place(0, "input", 0),)}
_OF_MATRICES = {"matmul", "rmatmul", "mm", "mv", "addmm"}  # products of two activations, too
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"}
_RESHAPES = {"view", "view_as", "reshape", "reshape_as", "flatten", "squeeze", "unsqueeze"}
_TRANSPOSES = {"t", "transpose", "swapaxes", "swapdims", "permute", "adjoint"}
_CHANGES = {"setitem", *(name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_"))}
_CHANGES |= {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


def _names_of_functions() -> dict[object, str]:
    """The functions above, with the names that they have there: as functions, methods and operators."""
    names: dict[object, str] = {}
    for name in (*_PRODUCTS, *_LOOKUPS, *_CASTS, *_RESHAPES, *_TRANSPOSES, *_CHANGES):
        for holder in (torch, F, torch._C._nn, Tensor, operator):
            for spelling in (name, f"__{name}__"):
                function = getattr(holder, spelling, None)
                if callable(function):
                    names[function] = name
    return names


_ATTRIBUTES = {getattr(Tensor, name).__get__: "transpose" for name in ("T", "mT", "H", "mH")}
_NAMES: dict[object, str] = {**_names_of_functions(), **_ATTRIBUTES}


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among some values, and in lists and tuples among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def channels_first(weight: Tensor, channels: int, groups: int) -> Tensor:
    """A weight as its quantizer sees it, [output channels, ...], a view where it can be. It is its own inverse.

    Args:
        weight: as a product takes it.
        channels: see :class:`Place`.
        groups: of a transposed convolution.
    """
    if channels == GROUPED:
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.t() if channels == 1 else weight


class FollowedWeight(TorchFunctionMode):
    """Knows, while its ``with`` block runs, which tensors were made of a weight alone, and which of the inputs.

    Where a product takes a tensor that was made of the weight, :meth:`handed` says what it takes instead.

    Args:
        roots: the weight, or what it is computed of, each with one of AS_IS and COMPUTED.
        inputs: tensors that the forward was given.
        looked_up: True for a table, whose rows may be taken by an index.
        sources: as an eager run of this forward found them; None where there was none.

    Attributes:
        taken: the form of the weight, or of what was made of it, that each product took.
        sources: whose ``.T`` the forward takes: "made" of the weight, of an "input", or of an "other" tensor. The
            tracer of torch.compile shows functions, and no attributes: what it is one of is known from here.
    """

    def __init__(
        self,
        roots: list[tuple[Tensor, str]],
        inputs: list[Tensor],
        looked_up: bool = False,
        sources: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.sources = sources
        self.products = {**_PRODUCTS, **_LOOKUPS} if looked_up else _PRODUCTS
        self.made, self.forms = [t for t, _ in roots], [form for _, form in roots]
        self.roots = len(roots)
        self.inputs = list(inputs)
        self.elsewhere: list[Tensor] = []  # results of other functions, where attributes must be told from them
        self.taken: list[str] = []

    def handed(self, tensor: Tensor, form: str, place: Place) -> Tensor:
        """What a product takes instead of a tensor that was made of the weight."""
        raise NotImplementedError

    def met(self, function: Callable[..., Any]) -> None:
        """Called where a function that is no such product takes the weight, or what was made of it, with an input."""

    def took_attribute(self, of: str) -> None:
        """Called where a function is one of the attributes that ``sources`` are about."""

    def form_of(self, tensor: object) -> str | None:
        """What a tensor that was made of the weight alone is; None for others."""
        if self._is_input(tensor):
            return None
        for known, form in zip(self.made, self.forms, strict=True):
            if known is tensor:
                return form
        return None

    def _is_input(self, tensor: object) -> bool:
        return any(known is tensor for known in self.inputs)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        name = _NAMES.get(func, "")
        place = self._place(name, args, kwargs)
        if place is None:
            result = func(*args, **kwargs)
            self._note(func, name, args, kwargs, result)
            return result
        if place.position < len(args):
            args = (*args[: place.position], self._handed(args[place.position], place), *args[place.position + 1 :])
        else:
            kwargs = {**kwargs, place.keyword: self._handed(kwargs[place.keyword], place)}
        result = func(*args, **kwargs)
        self.inputs += tensors_in([result])
        return result

    def _handed(self, tensor: Tensor, place: Place) -> Tensor:
        form = self.form_of(tensor)
        assert form is not None
        self.taken.append(form)
        return self.handed(tensor, form, place)

    def _place(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Place | None:
        """Where a product takes what was made of the weight; None where it takes none, or this is no product."""
        if name in _OF_MATRICES and torch.compiler.is_compiling():
            for x in tensors_in((*args, *kwargs.values())):
                self._find_attribute(x)
        for place in self.products.get(name, ()):
            weight = args[place.position] if place.position < len(args) else kwargs.get(place.keyword)
            if not isinstance(weight, Tensor) or self.form_of(weight) is None:
                continue
            others = [x for x in tensors_in((*args, *kwargs.values())) if x is not weight]
            if name not in _OF_MATRICES:  # its input may come from nowhere: positions that the forward counts
                return None if others and self.form_of(others[0]) is not None else place
            if weight.dim() == 2 and any(self._is_input(x) for x in others):
                return place
        return None

    def _find_attribute(self, tensor: Tensor) -> None:
        """Note what a matrix is that no function made, and that is no tensor of the layer: ``.T`` of something."""
        if tensor.dim() != 2 or any(x is tensor for x in (*self.made, *self.inputs, *self.elsewhere)):
            return
        if self.sources is not None and MADE not in self.sources:
            self.inputs += [tensor] * (INPUT in self.sources and any(_are_reversed(x, tensor) for x in self.inputs))
            return
        found = [(t, form) for t, form in zip(self.made, self.forms, strict=True) if _are_reversed(t, tensor)]
        computed = [each for each in found if each[1] == COMPUTED]
        if len(computed or found) > 1 or (found and self.sources != (MADE,)):
            raise RuntimeError(
                "torch.compile of a layer with a forward of its own: wanted .t() or .transpose() of its tensors; got "
                ".T of one of several"
            )
        for _, form in computed or found:
            self._mark(tensor, COMPUTED if form == COMPUTED else TRANSPOSED if form == AS_IS else AS_IS)

    def _note(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Note what a function made."""
        operands = tensors_in((*args, *kwargs.values()))
        forms = [self.form_of(x) for x in operands]
        results = operands[:1] if name == "setitem" else tensors_in([result])
        is_input = any(self._is_input(x) for x in operands)
        if func in _ATTRIBUTES:
            self.took_attribute(INPUT if is_input else OTHER if forms[0] is None else MADE)
        if is_input:
            self.inputs += [x for x in results if not self._is_input(x)]
            if results and any(form is not None for form in forms):
                self.met(func)
        elif any(form is not None for form in forms):
            source, form = next((x, form) for x, form in zip(operands, forms, strict=True) if form is not None)
            for made in results:
                self._mark(made, COMPUTED if name in _CHANGES else self._form_after(name, source, form, made))
        elif torch.compiler.is_compiling():
            self.elsewhere += results

    def _mark(self, tensor: Tensor, form: str) -> None:
        for i, known in enumerate(self.made):
            if known is tensor:
                if i >= self.roots:  # the weight itself stays the weight, whatever its forward writes into it
                    self.forms[i] = form
                return
        self.made.append(tensor)
        self.forms.append(form)

    def _form_after(self, name: str, source: Tensor, form: str, made: Tensor) -> str:
        """What a function makes of a tensor of a form."""
        if form == COMPUTED:
            return COMPUTED
        if made is source or (name in _CASTS and made.shape == source.shape and made.dtype in checks.FLOAT_DTYPES):
            return form
        if form == AS_IS and name in _RESHAPES and made.shape[:1] == source.shape[:1]:
            return AS_IS
        if name in _TRANSPOSES and source.dim() == 2 and _are_reversed(source, made):
            return AS_IS if form == TRANSPOSED else TRANSPOSED
        return COMPUTED


def is_unchanged(weight: Tensor, before: Tensor) -> bool:
    """True if a weight has the values that it had before, as far as it has values."""
    return bool(((weight == before) | before.isnan()).all())


def _are_reversed(a: Tensor, b: Tensor) -> bool:
    return a.dim() == 2 and tuple(b.shape) == tuple(a.shape)[::-1] and b.stride() == a.stride()[::-1]
