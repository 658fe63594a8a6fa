"""What a quantizer keeps: float32 through any change of the model's dtype, and the rules of its checkpoint.

A quantizer without a range has NaN for its scale: whatever averages that with a range has NaN, too, and cannot take it
for one. It saves the same keys as one with a range. Loading a float checkpoint, with no key of a quantizer, leaves it
uninitialized, with one warning for the whole load; what a dict does not mention stays as it is. A checkpoint with only
some of its keys is an error, and leaves the quantizer as it was. One that keeps shared tensors under one of their names
has ``eps`` alone under the others: there the rest are missing keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastqat.nn.timed import Timed

OPTIONAL = ("estimator_strength",)  # a checkpoint of another estimator has none: then it stays as it is
FINITE = ("scale", "zero_point", "offset", "range_low", "range_high")  # what a cast may not send to infinity

WRITTEN = -2  # no version of a tensor

_warned_loads: dict[str, list[str]] = {}  # kind of warning -> the load_state_dict call that was warned of


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; -1 of inference, which does not count it."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


class QuantizerState(Timed):
    """Base of quantizers: the tensors and the few numbers that they keep.

    Attributes:
        initialized: True once the range is set.
        bits_are_data: True where something changes the bit-width from step to step: that of a checkpoint is no news.
    """

    eps: float
    initialized: bool
    _bits: int
    layer_name: str | None

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.bits_are_data = False
        self._placeholder: tuple[int, int] | None = (
            None  # identity and version of the scale, as it was left without one
        )
        self._checked: tuple[int, ...] | None = None  # versions of the integers when they were last checked
        self._weight_came: bool | None = None  # whether the dict being loaded has the weight of its layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move with the model, but keep every dtype."""

        def keep_dtype(t: Tensor) -> Tensor:
            if is_lazy(t):  # has a device, and no values that fn could convert
                return t.to(fn(torch.empty(0, dtype=t.dtype, device=t.device)).device)
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        was_left = not self.was_written()
        super()._apply(keep_dtype, recurse)
        self._checked = None
        if was_left:
            self.note_placeholder()
        return self

    def note_placeholder(self) -> None:
        """Remember the scale as it is: what is written into it from now on is from outside."""
        scale: Any = self._scale_of_state()
        self._placeholder = None if scale is None else (id(scale), version_of(scale))

    def note_checked(self, versions: tuple[int, ...] | None) -> None:
        """Remember that the integers are right as they are now; past nn.Module, whose way to set attributes is long."""
        self.__dict__["_checked"] = versions

    def was_written(self) -> bool:
        """True if something else has written into the scale since the quantizer left it without a range."""
        scale = self._scale_of_state()
        if self._placeholder is None or scale is None or self.initialized:
            return False
        identity, version = self._placeholder
        return id(scale) == identity and version_of(scale) != version

    def _scale_of_state(self) -> Tensor | None:
        scale = self._parameters.get("scale", self._buffers.get("scale"))
        return None if scale is None or is_lazy(scale) else scale

    @torch.no_grad()
    def forget_range(self) -> None:
        """Be without a range: the next tensor sets it."""
        scale = self._scale_of_state()
        if scale is not None:
            scale.fill_(torch.nan)
        self.initialized = False
        self.note_placeholder()

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of a copy count from anew.
        return {**super().__getstate__(), "_placeholder": None, "_checked": None, "_left": not self.was_written()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        left = state.pop("_left", None)
        super().__setstate__(state)
        if left is None and not self.initialized:  # of an older file, where the scale was 1
            self.forget_range()
            return
        self.note_placeholder()
        if left is False and self._placeholder is not None:  # the copy has what was written, too
            self._placeholder = (self._placeholder[0], WRITTEN)

    def materialize(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Give the parameters their shape."""
        raise NotImplementedError

    def has_given_range(self) -> bool:
        """True if the range came from the user, not from data: a checkpoint without it leaves it as it is."""
        raise NotImplementedError

    def restore_codes(self) -> None:
        """Take the bit-width and the sign from the loaded qrange; ValueError where it is of another kind of grid."""
        raise NotImplementedError

    def _state_keys(self) -> list[str]:
        tensors = {**self._parameters, **self._buffers}
        return ["eps", *(name for name, t in tensors.items() if t is not None and name not in OPTIONAL)]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        lazy = {name: p for name, p in self._parameters.items() if p is not None and is_lazy(p)}
        if lazy:  # as torch's own lazy modules save them
            destination.update({prefix + name: p for name, p in lazy.items()})
            tensors = {**self._parameters, **self._buffers}.items()
            rest = {name: t for name, t in tensors if t is not None and name not in lazy}
            destination.update({prefix + name: t if keep_vars else t.detach() for name, t in rest.items()})
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "eps"] = torch.tensor([self.eps], dtype=torch.float64)

    def expect_range(self, weight_came: bool) -> None:
        """Called by the layer before a load: the dict has its weight, and without a range is of a float network."""
        self._weight_came = weight_came

    def is_left_out(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> bool:
        """True if a dict says nothing of the quantizer: no key of it, nor, without it, the weight of its layer.

        Of a quantizer that is in no layer it says nothing where other keys are missing, too.

        Args:
            state_dict, prefix: of the load.
            missing_keys: so far.
        """
        if any(key.startswith(prefix) for key in state_dict):
            return False
        return bool(missing_keys) if self._weight_came is None else not self._weight_came

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        left_out, self._weight_came = self.is_left_out(state_dict, prefix, missing_keys), None
        if left_out:
            return
        keys = self._state_keys()
        present = [key for key in keys if prefix + key in state_dict]
        scale = state_dict.get(prefix + "scale")
        if not present or (scale is not None and is_lazy(scale)):
            if not self.has_given_range():
                self.forget_range()
                if not present:
                    _warn_once("float", error_msgs, _FLOAT_CHECKPOINT)
            return
        if scale is not None and any(is_lazy(p) for p in self.parameters(recurse=False)):
            device = next(b.device for b in self.buffers(recurse=False))
            self.materialize(tuple(scale.shape), device)
            keys = self._state_keys()
        missing_keys += [prefix + "eps"] if prefix + "eps" not in state_dict else []
        absent = [key for key in keys if prefix + key not in state_dict]
        if present == ["eps"]:
            missing_keys += [prefix + key for key in absent]
            return
        fault = f"wanted all of its keys ({', '.join(keys)}) or none; got a checkpoint without {', '.join(absent)}"
        if not absent:
            state_dict, fault = self._as_saved(state_dict, prefix)
        if fault:
            error_msgs.append(f"quantizer {prefix.rstrip('.')!r}: {fault}")
            return
        lists = (missing_keys, unexpected_keys, error_msgs)
        self._take(state_dict, prefix, local_metadata, strict, *lists)

    def _as_saved(self, state_dict: dict[str, Any], prefix: str) -> tuple[dict[str, Any], str]:
        """The dict with the own tensors in their dtypes, and what forbids that, or nothing."""
        cast = dict(state_dict)
        for name, own in {**self._parameters, **self._buffers}.items():
            came = state_dict.get(prefix + name)
            if own is None or came is None or came.dtype == own.dtype:
                continue
            if not (own.is_floating_point() and came.is_floating_point()):
                return cast, f"{name}: wanted {own.dtype}, as it was saved; got {came.dtype}"
            cast[prefix + name] = kept = came.to(own.dtype)
            has_range = name != "scale" or not bool(kept.isnan().all())
            usable = kept.isfinite() & ((kept != 0) | (name != "scale"))  # one that was learned may be below zero
            if name in FINITE and has_range and not (kept.is_meta or bool(usable.all())):
                wanted = "finite values other than 0" if name == "scale" else "finite values"
                return cast, f"{name}: wanted {wanted}; got others, of a dict that was cast to {came.dtype}"
        return cast, ""

    def _take(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a dict with all keys; where that fails, put back what was there."""
        tensors = (dict(self._parameters), dict(self._buffers))
        values = [(t, t.detach().clone()) for each in tensors for t in each.values() if t is not None]
        before, failures, unexpected = self._bits, len(error_msgs), len(unexpected_keys)
        others = {k: v for k, v in state_dict.items() if k != prefix + "eps"}
        others.update({prefix + k: self._buffers[k] for k in OPTIONAL if self._buffers.get(k) is not None} | others)
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # What a module of its own has, like the tracker, is expected where the bit-width asks for it.
        more = [key[len(prefix) :] for key in unexpected_keys[unexpected:]]
        more = [key for key in more if "." not in key and key not in OPTIONAL]
        if more:
            error_msgs.append(
                f"quantizer {prefix.rstrip('.')!r}: wanted one of its kind; got {', '.join(more)} as well"
            )
        if len(error_msgs) == failures:
            try:
                self.restore_codes()
            except ValueError as error:
                error_msgs.append(f"quantizer {prefix.rstrip('.')!r}: {error}")
        if len(error_msgs) > failures:
            self._parameters.update(tensors[0])
            self._buffers.update(tensors[1])
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            self.note_placeholder()
            return
        children = tuple(f"{prefix}{name}." for name, child in self._modules.items() if child is not None)
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(children)]
        self._loaded(state_dict, prefix, before, error_msgs)

    def _loaded(self, state_dict: dict[str, Any], prefix: str, before: int, load: list[str]) -> None:
        """Take what no tensor of the module says: the floor of the scale, and whether there is a range."""
        eps = state_dict.get(prefix + "eps")
        if eps is not None and eps.dtype == torch.float64:  # a cast may have made it 0
            self.eps = float(eps)
        scale = self._scale_of_state()
        has_range = scale is None or scale.is_meta or not bool(scale.isnan().all())
        self.initialized = has_range
        self._checked = None
        if not has_range:
            self.forget_range()
        if self._bits != before and not self.bits_are_data:
            got = f"quantizer {prefix.rstrip('.')!r}: the checkpoint has {self._bits} bits, and the model had {before}"
            _warn_once("bits", load, f"{got}: it becomes the network of the checkpoint, and so do others of this load")


def take_bits_as_data(model: nn.Module) -> None:
    """Let the quantizers of a model take the bit-widths of a checkpoint without a word."""
    for module in model.modules():
        if isinstance(module, QuantizerState):
            module.bits_are_data = True


_FLOAT_CHECKPOINT = (
    "the checkpoint holds no state for the quantizers of this model: they stay uninitialized, and the first "
    "tensors or fastqat.calibrate(model, batches) set their ranges"
)


def _warn_once(kind: str, load: list[str], message: str) -> None:
    """Warn once per load_state_dict call, which hands the same list of errors to every module."""
    if _warned_loads.get(kind) is not load:
        _warned_loads[kind] = load
        warnings.warn(message, stacklevel=2)
