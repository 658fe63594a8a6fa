"""Oscillation tracking, freezing and dampening of a quantized weight: their options, and the state of the first two."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastqat.multi_tensor import STATE
from fastqat.ops import checks, words
from fastqat.schedules import Schedule

AGGREGATES = ("sum", "mean", "kernel_mean")
# The last of the counts. It is odd and beyond 2^53, so that no average of it, in floats or in integers, is itself: it
# shows where something has averaged integers, words among them.
SEAL = 2**62 + 1
_KEPT_DTYPES = {  # besides the words, as a file may hold them
    "scaled_frequency": (torch.float32, torch.float64),
    "scaled_average": (torch.float32, torch.float64),
    "counts": (torch.int64,),
    "clock": (torch.float64,),
}


@dataclass(frozen=True)
class Oscillation:
    """Track how often the code of each weight reverses its direction; freeze the weights where it does too often.

    With the code c^t of a weight at the optimizer step t, and o^t = 1 where it changes against its last change::

        f^t = m * o^t + (1 - m) * f^(t-1)         e^t = m * c^t + (1 - m) * e^(t-1)

    A weight with f^t above the threshold is frozen at rint(e^(t-1)): from the next step on it has that code for good,
    gets no gradient, and adds gradient * code to that of the scale, which goes on learning.

    Args:
        momentum: m, in (0, 1).
        freeze_threshold: a number, or a :class:`fastqat.Schedule` of the optimizer steps; None only tracks, and so
            does 0. The averages begin where the threshold first is not 0.
        use_average: False freezes at the current code instead of the averaged one.
        max_bits: quantizers of more bits are neither tracked nor frozen.

    Raises:
        TypeError, ValueError: naming the option, what was wanted, and what came.

    Warns:
        UserWarning: the threshold is below 2 * momentum, so that one or two oscillations freeze a weight.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, Algorithm 1. Departure
        from the released code: a frozen code never changes again.
    """

    momentum: float = 0.01
    freeze_threshold: float | Schedule | None = None
    use_average: bool = True
    max_bits: int = 4

    def __post_init__(self) -> None:
        _number("momentum", self.momentum)
        if not 0 < self.momentum < 1:
            checks.fail(ValueError, "momentum", "a number in (0, 1)", self.momentum)
        checks.bit_width(self.max_bits)
        threshold = _value_or_schedule("freeze_threshold", self.freeze_threshold or 0.0)
        lowest = min((v for v in threshold if v > 0), default=0.0)
        if max(threshold) > 1 or min(threshold) < 0:
            checks.fail(ValueError, "freeze_threshold", "values from 0 to 1", max(threshold, key=abs))
        if 0 < lowest < 2 * self.momentum:
            warnings.warn(
                f"freeze_threshold {lowest:g} is below 2 x momentum = {2 * self.momentum:g}: a weight freezes after "
                "one or two oscillations",
                stacklevel=3,
            )

    @property
    def freezes(self) -> bool:
        """True if the threshold ever is not 0."""
        return max(_value_or_schedule("freeze_threshold", self.freeze_threshold or 0.0)) > 0


@dataclass(frozen=True)
class Dampening:
    """Pull each weight to the middle of its bin, by a gradient that the backward pass of its quantizer adds::

        L = lambda * AGG( (sg[w_hat] - clip(w, s * n, s * p))^2 )        dL/ds = 0

    The same as adding :func:`fastqat.dampening_loss` to the loss, at no cost; a frozen weight gets none. It is added
    once in each backward pass through the quantizer, and knows of no factor on the loss: where a loss is scaled
    (``torch.amp.GradScaler``), or its gradient accumulated over passes, scale the weight alike, or add the loss.

    Args:
        weight: lambda, a number or a :class:`fastqat.Schedule` of the optimizer steps.
        aggregate: AGG: "sum", "mean", or "kernel_mean" (the sum over the output channels of the means of each).

    Raises:
        TypeError, ValueError: naming the option, what was wanted, and what came.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 4.1.
    """

    weight: float | Schedule = 0.1
    aggregate: str = "kernel_mean"

    def __post_init__(self) -> None:
        if min(_value_or_schedule("weight", self.weight)) < 0:
            checks.fail(ValueError, "weight", "values that are not negative", self.weight)
        checks.choice("aggregate", self.aggregate, AGGREGATES)

    def factor(self, weight: Tensor) -> float:
        """What (w_hat - w)^2 of one weight of a tensor [C_out, ...] counts."""
        count = max(weight.numel(), 1)
        kernels = weight.shape[0] if weight.dim() else 1
        return {"sum": 1.0, "mean": 1.0 / count, "kernel_mean": kernels / count}[self.aggregate]


def value_at(value: float | Schedule, step: Tensor) -> Tensor:
    """A number or a schedule at steps, int64 of any shape: float32 likewise, [1] for a number, on their device."""
    if isinstance(value, Schedule):
        return value.tensor(step)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # a fake or traced tensor must not be kept
        return torch.full((1,), value, dtype=torch.float32, device=step.device)
    return _constant(float(value), step.device)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=device)


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        checks.fail(TypeError, name, "a number", repr(value))


def _value_or_schedule(name: str, value: Any) -> tuple[float, ...]:
    """The values between which a number or a schedule stays."""
    if isinstance(value, Schedule):
        return (value.start, value.start if value.end is None else value.end)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        checks.fail(TypeError, name, "a number or a Schedule", repr(value))
    return (float(value),)


class Tracker(nn.Module):
    """State of the tracking of one weight: 9 bytes a weight up to 5 bits, 10 above.

    Args:
        options: what is tracked.
        bits: bit-width of the codes.
        device: of the state.

    Attributes:
        counts: int64 [5]: transitions, oscillations and frozen weights since the start, transitions of the last
            tracked step, and SEAL.
    """

    words: Any  # Tensors, or None until the first weight is known; see the schema of multi_tensor_fake_quantize
    scaled_frequency: Any
    scaled_average: Any
    counts: Any
    clock: Any

    def __init__(self, options: Oscillation, bits: int, device: torch.device) -> None:
        super().__init__()
        self.options, self._bits, self._device = options, bits, device
        # Of its own: a number of another object would be a symbol in a graph of dynamic shapes, which no op takes.
        self.momentum = options.momentum
        self.lowest = 0  # qmin: the words hold codes as their distance from it
        self.resets = 0  # times that it has begun anew
        for name in STATE:
            self.register_buffer(name, None)

    @property
    def is_materialized(self) -> bool:
        """True once the first weight was seen, or a state was loaded."""
        return self.words is not None

    @torch.inference_mode(False)
    def prepare(self, weight: Tensor, qmin: int) -> None:
        """Allocate the state for a weight, or give it the strides that the weight has now.

        Args:
            weight: what will be tracked.
            qmin: its lowest code.

        Raises:
            ValueError: the state belongs to a weight of another shape.
        """
        self.lowest = qmin
        if self.words is None or (self.words.shape != weight.shape and not self.has_tracked):
            self._allocate(weight, weight.device)
        elif self.words.shape != weight.shape:
            wanted = f"a weight of shape {list(self.words.shape)}, which has been tracked so far"
            checks.fail(ValueError, "Tracker", wanted, f"shape {list(weight.shape)}")
        if self.words.stride() == weight.stride():
            return
        like = torch.empty_like(weight, device="meta")  # dense, whatever the weight is
        if self.words.stride() != like.stride():
            for name in STATE[:3]:
                kept = getattr(self, name)
                setattr(self, name, torch.empty_like(like, dtype=kept.dtype, device=kept.device).copy_(kept))

    def _allocate(self, like: Tensor, device: torch.device) -> None:
        self.words = torch.zeros_like(like, dtype=words.dtype_of(self._bits), device=device)
        self.scaled_frequency = torch.zeros_like(like, dtype=torch.float32, device=device)
        self.scaled_average = torch.zeros_like(like, dtype=torch.float32, device=device)
        self.counts = torch.tensor([0, 0, 0, 0, SEAL], device=device)
        self.clock = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64, device=device)

    def reset(self, bits: int) -> None:
        """Forget everything; the next weight is the first. It has the shape of the last, as compiled code expects.

        The memory stays where it is, unless the words become wider or narrower.
        """
        self._bits = bits
        self.resets += 1
        if self.words is None:
            return
        if self.words.dtype != words.dtype_of(bits):
            self._allocate(self.words, self.words.device)
            return
        for name in STATE:
            getattr(self, name).zero_()
        self.counts[4] = SEAL
        self.clock[0], self.clock[1] = 1.0, -1.0

    @property
    def has_tracked(self) -> bool:
        """True if the state says anything. Reads it back from its device."""
        return self.words is not None and bool(self.clock[1] >= 0)

    def _word(self) -> words.Word:
        if self.words is None:
            raise RuntimeError("Tracker: wanted a weight that was tracked; got none yet (run a forward in training)")
        return words.unpacked(self.words)

    def codes(self) -> Tensor:
        """Last codes, the frozen code where frozen: int32, like the weight."""
        return self.lowest + self._word().index

    def frozen(self) -> Tensor:
        """Which weights are frozen: bool, like the weight."""
        return self._word().frozen

    def direction(self) -> Tensor:
        """Last direction of change, -1, 0 or 1: int8, like the weight; 0 where the frozen code is in effect."""
        direction = self._word().direction
        return (direction == words.UP).to(torch.int8) - (direction == words.DOWN).to(torch.int8)

    def frequency(self) -> Tensor:
        """Frequency of oscillation f at the last tracked step: float32, like the weight."""
        self._word()
        return (self.scaled_frequency.double() / self.clock[0]).float()

    def average(self) -> Tensor:
        """Average of the codes, the frozen code where frozen: float32, like the weight."""
        word = self._word()
        mean = self.lowest + word.index + self.scaled_average.double() / self.clock[0]
        return torch.where(word.frozen, self.codes().double(), mean).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._device = fn(torch.empty(0, device=self._device)).device
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.words is not None:
            super()._save_to_state_dict(destination, prefix, keep_vars)

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
        found = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
        if not found:  # the quantizer knows what that means
            return
        absent = [name for name in STATE if name not in found]
        if absent:
            wanted = f"all of {', '.join(STATE)}, or none"
            error_msgs.append(f"tracker {prefix.rstrip('.')!r}: wanted {wanted}; got none of {', '.join(absent)}")
            return
        fault = self._fault(found)
        if fault:
            error_msgs.append(f"tracker {prefix.rstrip('.')!r}, {fault}")
            return
        if len(found["counts"]) == 4:
            state_dict = {**state_dict, **{prefix + name: tensor for name, tensor in _sealed(found).items()}}
        if self.words is None:
            self._allocate(found["words"], self._device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _fault(self, found: dict[str, Tensor]) -> str:
        """Say what is wrong with a state that is to be loaded; nothing where it is right."""
        own = tuple((found["words"] if self.words is None else self.words).shape)
        wanted_shapes = {name: own for name in STATE[:3]} | {"counts": (5,), "clock": (3,)}
        for name, shape in wanted_shapes.items():
            came = tuple(found[name].shape)
            if came != shape and (name, came) != ("counts", (4,)):  # four of them are of an older file
                return f"{name}: wanted {list(shape)}; got {list(came)}"
        wanted_dtype = words.dtype_of(self._bits)
        if found["words"].dtype != wanted_dtype:
            return f"words: wanted {wanted_dtype} for {self._bits} bits; got {found['words'].dtype}"
        for name, dtypes in _KEPT_DTYPES.items():
            if found[name].dtype not in dtypes:
                return f"{name}: wanted {dtypes[0]}, as it was saved; got {found[name].dtype}"
        counts = found["counts"]
        if len(counts) == 5 and not counts.is_meta and int(counts[4]) != SEAL:
            wanted = f"{SEAL} at its end, as it was saved"
            return f"counts: wanted {wanted}; got {int(counts[4])}: integers were averaged; copy them instead"
        return ""


def _sealed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of four counts in the form of today.

    There a pending weight had its frozen index in the place of the average, and the own one in its word.
    """
    word, average = words.unpacked(found["words"]), found["scaled_average"]
    index = torch.where(word.pending, average.to(torch.int32), word.index)
    return {
        "words": words.packed(index, word.direction, word.frozen, found["words"].dtype),
        "scaled_average": torch.where(word.pending, word.index.to(average.dtype), average),
        "counts": torch.cat([found["counts"], found["counts"].new_tensor([SEAL])]),
    }
