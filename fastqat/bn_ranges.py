"""Ranges of activations without data: from the parameters of the batch normalisation that they come from."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fastqat.autograd import CLIPS, activated
from fastqat.nn.calibrate import called_quantizers
from fastqat.nn.fake_quant import FakeQuant
from fastqat.nn.observe import eagerly, evaluating, nothing_changes, run_batch
from fastqat.ops import checks

# Functions whose results lie between the values of each channel, and those that mix or move the channels.
_WITHIN = {"contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "dropout", "alpha_dropout"}
_WITHIN |= {f"dropout{d}d" for d in (1, 2, 3)}
_WITHIN |= {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for d in (1, 2, 3)}
_ACROSS = {"flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "mean"}
INPUT = "the input of the model, or a parameter"
_CLAMPS = {"relu": (0.0, None), "relu6": (0.0, 6.0)}
_BOUNDS = {"hardtanh": (("min_val", -1.0), ("max_val", 1.0)), "clamp": (("min", None), ("max", None))}
_BOUNDS["clip"] = _BOUNDS["clamp"]


@dataclass(frozen=True)
class _Range:
    """Where the values of a tensor lie: bounds of each channel, its dimension 1, or of all where there is one."""

    low: Tensor
    high: Tensor

    def clamped(self, low: float | None, high: float | None) -> _Range:
        return _Range(self.low.clamp(low, high), self.high.clamp(low, high))

    def of_all(self) -> _Range:
        return _Range(self.low.amin(0, keepdim=True), self.high.amax(0, keepdim=True))

    def joined(self, other: _Range) -> _Range:
        return _Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))


@torch.no_grad()
def bn_ranges(
    model: nn.Module,
    example: Any,
    *,
    deviations: float = 6.0,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, str]:
    """Set the ranges of activation quantizers behind batch normalisation, without data.

    With gamma and beta of the channels, and a deviations::

        low = min(beta - a |gamma|)      high = max(beta + a |gamma|)

    clipped as the activation functions between the two do (ReLU, ReLU6, hardtanh, clamp). Pooling, reshaping,
    concatenation and dropout may be between them, too. A quantizer of channels (axis 1) gets those
    of each channel.

    Args:
        model: a module that contains quantizers; it runs once, eagerly and in evaluation mode, unquantized.
        example: a batch as for :func:`fastqat.calibrate`, of any values: zeros will do.
        deviations: a, in standard deviations.
        forward: runs the model on a batch of any other kind.

    Returns:
        The quantizers that did not get a range, by name, each with the reason: what its input comes from, where that is
        not a batch normalisation alone. A warning names those that have no range at all, which
        :func:`fastqat.calibrate` would give to all.

    Raises:
        ValueError: there is no quantizer of activations, or deviations is not positive.

    Source: White Paper on Neural Network Quantization (2106.08295), section 3.1, BN-based range setting.
    """
    if not deviations > 0:
        checks.fail(ValueError, "deviations", "a positive number", deviations)
    called, of_weights = called_quantizers(model)
    wanted = {q: name for name, q in called.items() if q.range != "fixed" and q not in of_weights}
    if not wanted:
        checks.fail(ValueError, "model", "a model with quantizers of activations", type(model).__name__)
    origins = _Origins(deviations)
    every = [m for m in model.modules() if isinstance(m, FakeQuant)]
    with evaluating(model), eagerly(), nothing_changes(every):
        for q in wanted:
            q.__dict__["forward"] = origins.observer(q)  # nothing_changes removes it
        with origins:
            (forward or run_batch)(model, example)
    left = {}
    for q, name in wanted.items():
        found = origins.of_quantizer.get(q, "the model does not call it with this example")
        if isinstance(found, str):
            left[name] = found
        else:
            q.set_range(found.low, found.high)
    lost = "; ".join(f"{name}: {left[name]}" for q, name in wanted.items() if name in left and not q.initialized)
    if lost:
        wanted_input = "quantizers behind a batch normalisation, or with a range"
        warnings.warn(f"bn_ranges: wanted {wanted_input}; got {lost}", stacklevel=2)
    return left


class _Origins(TorchFunctionMode):
    """Follows the outputs of batch normalisation through a forward, tensor by tensor."""

    def __init__(self, deviations: float) -> None:
        super().__init__()
        self.deviations = deviations
        self.known: Any = WeakIdKeyDictionary()  # tensor -> _Range, or the function that made it
        self.of_quantizer: dict[FakeQuant, _Range | str] = {}

    def observer(self, quantizer: FakeQuant) -> Callable[..., Tensor]:
        """A forward that notes where its input lies, and passes it on."""

        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            found = self.known.get(x, INPUT)
            clip, before = CLIPS[quantizer.activation], self.of_quantizer.get(quantizer)
            if isinstance(found, _Range):
                found = found.clamped(0.0, clip) if clip else found
                found = _as_wanted(found, x, quantizer)
            if isinstance(found, _Range) and isinstance(before, _Range):  # called before: both
                found = found.joined(before)
            self.of_quantizer[quantizer] = before if isinstance(before, str) else found
            return activated(x, clip)

        return forward

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and note where its result lies."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        origin = self._range(func, name, args, kwargs) or f"{name}, which is no batch normalisation"
        if isinstance(origin, str) and name in _WITHIN | _ACROSS | _CLAMPS.keys() | _BOUNDS.keys():
            origin = self.known.get(args[0], INPUT) if args and isinstance(args[0], Tensor) else INPUT
        changed = args[:1] if name == "setitem" else result if isinstance(result, (tuple, list)) else (result,)
        for tensor in changed:
            if isinstance(tensor, Tensor):
                self.known[tensor] = origin
        return result

    def _range(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Range | None:
        """Where the result of a function lies, if that is known."""
        if func is F.batch_norm:
            return self._normalised(*args, **kwargs)
        x = args[0] if args else kwargs.get("input")
        if name in ("cat", "concat", "concatenate"):
            parts = [self.known.get(part) for part in x] if isinstance(x, (tuple, list)) else []
            known = [part.of_all() for part in parts if isinstance(part, _Range)]
            return functools.reduce(_Range.joined, known) if parts and len(known) == len(parts) else None
        found = self.known.get(x) if isinstance(x, Tensor) else None
        if not isinstance(found, _Range):
            return None
        if name in _CLAMPS:
            return found.clamped(*_CLAMPS[name])
        if name in _BOUNDS:
            return found.clamped(*_bounds(name, args, kwargs))
        if name in _WITHIN:
            return found
        return found.of_all() if name in _ACROSS else None

    def _normalised(
        self,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Any = None,
        bias: Any = None,
        *_: Any,
        **__: Any,
    ) -> _Range:
        """Of the output of torch.nn.functional.batch_norm, whose arguments these are."""
        beta = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device) if bias is None else bias.detach().float()
        spread = torch.ones_like(beta) if weight is None else weight.detach().float().abs()
        return _Range(beta - self.deviations * spread, beta + self.deviations * spread)


def _bounds(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float | None, float | None]:
    """The two bounds of a function that clamps; none where they are tensors."""
    found = []
    for place, (keyword, default) in enumerate(_BOUNDS[name], 1):
        bound = args[place] if len(args) > place else kwargs.get(keyword, default)
        found.append(bound if isinstance(bound, (int, float)) else None)
    return found[0], found[1]


def _as_wanted(found: _Range, x: Tensor, quantizer: FakeQuant) -> _Range | str:
    """The bounds of each scale of a quantizer, or why they are not known."""
    if quantizer.axis is None:
        return found.of_all()
    if quantizer.axis % x.dim() == 1 and quantizer.group_size is None and len(found.low) == x.shape[1]:
        return found
    return (
        f"axis={quantizer.axis}, group_size={quantizer.group_size}: bounds are known of axis 1, or of the whole tensor"
    )
