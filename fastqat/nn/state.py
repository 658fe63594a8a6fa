"""What a quantizer keeps: float32 through any change of the model's dtype, and the rules of its checkpoint.

A quantizer whose range is not set saves nothing. Loading a checkpoint with no key of a quantizer leaves it
uninitialized, with one warning for the whole load; a checkpoint with only some of its keys is an error. One that
keeps shared tensors under one of their names has ``eps`` alone under the others: there the rest are missing keys.
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

_warned_load: list[str] | None = None  # identifies the load_state_dict call that was warned of


class QuantizerState(Timed):
    """Base of quantizers: the tensors and the few numbers that they keep."""

    eps: float
    initialized: bool

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move with the model, but keep every dtype."""

        def keep_dtype(t: Tensor) -> Tensor:
            if is_lazy(t):  # has a device, and no values that fn could convert
                return t.to(fn(torch.empty(0, device=t.device)).device)
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

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
        if not self.initialized:
            return
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "eps"] = torch.tensor([self.eps], dtype=torch.float64)

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
        keys = self._state_keys()
        present = [key for key in keys if prefix + key in state_dict]
        if not present:
            if not self.has_given_range():
                self.initialized = False
                _warn_once(error_msgs)
            return
        scale = state_dict.get(prefix + "scale")
        if scale is not None and any(is_lazy(p) for p in self.parameters(recurse=False)):
            device = next(b.device for b in self.buffers(recurse=False))
            self.materialize(tuple(scale.shape), device)
            keys = self._state_keys()
        missing_keys += [prefix + "eps"] if prefix + "eps" not in state_dict else []
        absent = [key for key in keys if prefix + key not in state_dict]
        if present == ["eps"]:
            missing_keys += [prefix + key for key in absent]
            return
        if absent:
            error_msgs.append(
                f"quantizer {prefix.rstrip('.')!r}: wanted all of its keys ({', '.join(keys)}) or none; "
                f"got a checkpoint without {', '.join(absent)}"
            )
        others = {k: v for k, v in state_dict.items() if k != prefix + "eps"}
        others.update({prefix + k: self._buffers[k] for k in OPTIONAL if self._buffers.get(k) is not None} | others)
        failures = len(error_msgs)
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if len(error_msgs) == failures and not absent:
            try:
                self.restore_codes()
            except ValueError as error:
                error_msgs.append(f"quantizer {prefix.rstrip('.')!r}: {error}")
                return
            # What this module has since the bit-width was restored is expected.
            children = tuple(f"{prefix}{name}." for name, child in self._modules.items() if child is not None)
            unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(children)]
            self.eps = float(state_dict[prefix + "eps"])
            self.initialized = True


def _warn_once(load: list[str]) -> None:
    """Warn once per load_state_dict call, which hands the same list of errors to every module."""
    global _warned_load
    if _warned_load is not load:
        _warned_load = load
        warnings.warn(
            "the checkpoint holds no state for the quantizers of this model: they stay uninitialized, and the first "
            "tensors or fastqat.calibrate(model, batches) set their ranges",
            stacklevel=2,
        )
