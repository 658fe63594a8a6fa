"""``AdaQAT``: bit-widths of weights and activations, learned beside the weights."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastqat.adaqat.bit_width import FREEZE_TO, BitWidth
from fastqat.adaqat.differences import Differences, EachAlone, ManyAtOnce
from fastqat.adaqat.hardware import HardwareCost, checked_cost, hardware_cost
from fastqat.adaqat.history import Update, from_columns, to_columns
from fastqat.adaqat.probe import Closure, Probe
from fastqat.adaqat.widths import Share, Width, bits_of, learned_layers, quantized_layers, shares
from fastqat.ops import checks


class AdaQAT:
    """Learn the bit-widths of weights and activations by gradient descent on task loss + lam * hardware cost.

    Each width N is real-valued and its quantizers use ceil(N). Its gradient is a finite difference::

        dL/dN_w = L(ceil N_w, ceil N_a) - L(floor N_w, ceil N_a)
                  + lam * (C(ceil N_w, ceil N_a) - C(floor N_w, ceil N_a))

    and likewise for N_a: a forward pass without gradients for each, on the same batch (see
    :class:`fastqat.adaqat.probe.Probe` for what such a pass leaves as it is). Where N is an integer, one less is its
    floor; at ``lowest``, the difference is that of one bit more. A width that goes to and fro about an integer is
    frozen; once all are, training goes on as plain QAT. Use::

        widths = fastqat.AdaQAT(model, lam=0.15)
        for images, labels in batches:
            loss = criterion(model(images), labels)
            loss.backward()
            widths.step(loss, lambda: criterion(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()

    In torch.distributed the losses are means over all processes, which all call :meth:`step`.

    With ``per_layer`` (beyond the paper) each layer has widths of its own, for two passes a step, too: their
    differences are estimated together, see :class:`fastqat.adaqat.differences.ManyAtOnce`. A share of a loss and of a
    cost has a gradient as much smaller; a width moves by lr times the number of widths of its kind times its gradient,
    so that the mean of them moves as one width for all would.

    The text of the paper that is at hand leaves out its constants. Those here are not verified: lr_weight,
    lr_activation, freeze_after, where the widths start, the factor in the cost (1), and that each step updates.

    Args:
        model: prepared with :func:`fastqat.prepare`.
        lam: lambda, of the hardware cost.
        lr_weight, lr_activation: eta of the widths of weights and of activations.
        start_weight, start_activation: N at the start; None is what the quantizers have.
        lowest, highest: bounds of N, within 1 to 8; from 2 on where the grid of a quantizer says so.
        every: updates are made in one step of so many.
        freeze_after: oscillations after which a width is frozen; 0 freezes none.
        freeze: "each" width by itself, or "both": all at once, when each has oscillated so often.
        freeze_to: "ceil" or "majority", see :class:`BitWidth`.
        cost: "product", "bit_operations", "weight_bits", or a function, see :mod:`fastqat.adaqat.hardware`.
        example_inputs: a batch, where the cost needs one.
        fixed: names or patterns (``fnmatch``) of layers that keep their bit-widths; None: the first and the last
            quantized layer.
        per_layer: True for widths of each layer; layers that share a quantizer share its width.
        seed: of what is drawn per layer.
        memory: steps that estimates per layer look back on.

    Attributes:
        widths: the learned ones, weights before activations.
        probe: computes losses at other bit-widths.
        history: of all updates; whoever has no use for it may clear it, for it grows.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted, and what came: a model without quantizers, bounds
            outside 1 to 8, a pattern that matches no layer.

    Source: Gernigon et al., "AdaQAT: Adaptive Bit-Width Quantization-Aware Training" (2404.16876), section III.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lam: float,
        lr_weight: float = 1e-3,
        lr_activation: float = 5e-4,
        start_weight: float | None = None,
        start_activation: float | None = None,
        lowest: int = 2,
        highest: int = 8,
        every: int = 1,
        freeze_after: int = 10,
        freeze: str = "each",
        freeze_to: str = "ceil",
        cost: str | HardwareCost = "product",
        example_inputs: Any = None,
        fixed: Iterable[str] | None = None,
        per_layer: bool = False,
        seed: int = 0,
        memory: int = 1000,
    ) -> None:
        for name, rate in (("lam", lam), ("lr_weight", lr_weight), ("lr_activation", lr_activation)):
            if not 0 <= rate < math.inf:
                checks.fail(ValueError, name, "a number of at least 0", rate)
        for name, steps in (("every", every), ("memory", memory)):
            if steps < 1:
                checks.fail(ValueError, name, "a positive number of steps", steps)
        if freeze_after < 0:
            checks.fail(ValueError, "freeze_after", "a number of oscillations, or 0", freeze_after)
        checks.choice("freeze", freeze, ("each", "both"))
        checks.choice("freeze_to", freeze_to, FREEZE_TO)
        self.model, self.lam, self.every, self.freeze = model, float(lam), every, freeze
        self._layers = quantized_layers(model)
        learned = learned_layers(self._layers, fixed)
        bounds = {"lowest": lowest, "highest": highest, "freeze_after": freeze_after, "freeze_to": freeze_to}
        starts = {"weight": ("start_weight", start_weight), "activation": ("start_activation", start_activation)}
        rates = {"weight": lr_weight, "activation": lr_activation}
        found = shares(learned, per_layer)
        count = Counter(share.kind for share in found)
        self.widths: list[Width] = []
        for share in found:
            start = _start(share, *starts[share.kind], lowest, highest)
            number = BitWidth(start, rates[share.kind] * count[share.kind], **bounds)  # type: ignore[arg-type]
            self.widths.append(Width(share.name, share.kind, share.quantizers, share.layers, number=number))
        self.cost = checked_cost(hardware_cost(cost, model, list(learned), example_inputs), self.bits())
        self.history: list[Update] = []
        self._differences: Differences = ManyAtOnce(self.widths, seed, memory) if per_layer else EachAlone()
        self._step = 0
        self._prices: tuple[list[int], float, list[float]] = ([], 0.0, [])
        self.probe = Probe(model)
        self._write()

    @property
    def is_frozen(self) -> bool:
        """True once all widths stay: what comes is plain QAT."""
        return all(width.number.frozen for width in self.widths)

    def bits(self) -> dict[str, tuple[int, int]]:
        """Bits of each quantized layer: of its weight and of its activation, 32 where that is not quantized."""
        return {name: (bits_of(parts["weight"]), bits_of(parts["activation"])) for name, parts in self._layers.items()}

    def step(self, loss: Tensor, closure: Closure) -> Update | None:
        """Measure what one bit less does to the loss, and move the widths; between backward and the optimizer's step.

        It waits for the losses: the quantizers of the next step depend on them.

        Args:
            loss: scalar, of the forward pass that was taken backward.
            closure: computes it again from the same batch.

        Returns:
            What was done; None in a step without an update, or when all widths are frozen.

        Raises:
            TypeError, ValueError: a loss that is no scalar tensor.
            RuntimeError: in the backward pass, where that comes after this: the quantizers have changed by then.
        """
        self._step += 1
        if self.is_frozen or (self._step - 1) % self.every:
            return None
        if not isinstance(loss, Tensor):
            checks.fail(TypeError, "loss", "a scalar tensor", type(loss).__name__)
        if loss.numel() != 1:
            checks.fail(ValueError, "loss", "a scalar", f"shape {list(loss.shape)}")
        if loss.requires_grad:
            loss.register_hook(_too_late)
        free = [width for width in self.widths if not width.number.frozen]
        passes = self._differences.choose(self._step, free)
        others = {width: width.other for width in free}
        settings = [{q: others[width] for width in chosen for q in width.quantizers} for chosen in passes]
        here, *there = _read([loss.detach(), *self.probe.losses(closure, settings)])
        differences = self._differences.of(free, passes, [here - other for other in there])
        cost, prices = self._priced()
        for width, price in zip(self.widths, prices, strict=True):
            width.number.update(differences.get(width.name, math.nan) + self.lam * price)
        self._freeze()
        self._write()
        numbers = [width.number for width in self.widths]
        update = Update(
            self._step,
            here,
            cost,
            tuple(number.value for number in numbers),
            tuple(differences.get(width.name) for width in self.widths),
            tuple(number.oscillations for number in numbers),
            tuple(number.frozen for number in numbers),
        )
        self.history.append(update)
        return update

    def remove(self) -> None:
        """Leave the model alone from now on; it keeps its bit-widths."""
        self.probe.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in numbers and lists."""
        return {
            "step": self._step,
            "widths": {width.name: width.number.state_dict() for width in self.widths},
            "differences": self._differences.state_dict(),
            "history": to_columns(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the quantizers get its bit-widths.

        Raises:
            ValueError, KeyError, TypeError: the state is that of other widths, or broken; nothing is loaded then.
        """
        names, got = [width.name for width in self.widths], list(state["widths"])
        if names != got:
            checks.fail(ValueError, "state", f"widths {', '.join(names)}", ", ".join(got) or "none")
        # Into copies first: what is broken raises before anything has changed.
        numbers = [copy.deepcopy(width.number) for width in self.widths]
        for name, number in zip(names, numbers, strict=True):
            number.load_state_dict(state["widths"][name])
        differences = copy.deepcopy(self._differences)
        differences.load_state_dict(state["differences"])
        step, history = int(state["step"]), from_columns(state["history"])
        for width, number in zip(self.widths, numbers, strict=True):
            width.number = number
        self._differences, self._step, self.history = differences, step, history
        self.probe.attach()
        self._write()

    def _priced(self) -> tuple[float, list[float]]:
        """The hardware cost of the ceilings, and what the measured bit of each width costs."""
        ceilings = [width.number.bits for width in self.widths]
        if self._prices[0] != ceilings:
            layers = self.bits()
            costs = [
                [self.cost(width.cost_at(bits, layers)) for bits in (width.upper, width.upper - 1)]
                for width in self.widths
            ]
            self._prices = (ceilings, self.cost(layers), [more - less for more, less in costs])
        return self._prices[1:]

    def _freeze(self) -> None:
        settled = [width.number.has_settled or width.number.frozen for width in self.widths]
        for width, has in zip(self.widths, settled, strict=True):
            if has and (self.freeze == "each" or all(settled)):
                width.number.freeze()

    def _write(self) -> None:
        """Give the quantizers the ceilings; leave the model alone once these stay."""
        for width in self.widths:
            for q in width.quantizers:
                q.change_bits(width.number.bits)
                q.bits_are_data = True
        if self.is_frozen:
            self.probe.remove()


def _start(share: Share, name: str, start: float | None, lowest: int, highest: int) -> float:
    """Where a width starts, within bounds that its quantizers may have."""
    fewest = max(q.fewest_bits for q in share.quantizers)
    for bound, bits, least in (("lowest", lowest, fewest), ("highest", highest, lowest)):
        if isinstance(bits, bool) or not isinstance(bits, int):
            checks.fail(TypeError, bound, f"an int from {least} to 8", repr(bits))
        if not least <= bits <= 8:
            checks.fail(ValueError, bound, f"{least} to 8, for the {share.kind} of {share.layers[0]}", bits)
    value = float(max(q.bits for q in share.quantizers) if start is None else start)
    if not lowest <= value <= highest:
        where = "" if start is not None else f", the {share.kind} of {share.layers[0]}"
        checks.fail(ValueError, name, f"bits from lowest to highest, {lowest} to {highest}", f"{value:g}{where}")
    return value


def _too_late(_: Tensor) -> None:
    """Hook of a loss."""
    wanted = "loss.backward() before it: it gives the quantizers other bit-widths"
    checks.fail(RuntimeError, "AdaQAT.step", wanted, "backward() of that loss after it")


def _read(losses: list[Tensor]) -> list[float]:
    """Losses as numbers, from one copy; means over all processes."""
    values = torch.stack([loss.reshape(()).double() for loss in losses])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values.tolist()
