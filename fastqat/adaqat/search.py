"""``AdaQAT``: bit-widths of weights and activations, learned beside the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastqat.adaqat.bit_width import FREEZE_TO, BitWidth
from fastqat.adaqat.hardware import HardwareCost, hardware_cost
from fastqat.adaqat.probe import Closure, Probe
from fastqat.adaqat.widths import KINDS, Width, bits_of, learned_layers, quantized_layers
from fastqat.cost import FLOAT_BITS
from fastqat.nn.fake_quant import FakeQuant
from fastqat.ops import checks


@dataclass(frozen=True)
class Update:
    """An update of the bit-widths.

    Attributes:
        step: number of the call of :meth:`AdaQAT.step`, from 1 on.
        loss: of the task, at the ceilings.
        hardware: cost of the ceilings, without lambda.
        widths: N of each width after the update.
        differences: loss at the ceilings minus loss with this width one bit lower; None where that was not measured.
        oscillations: of each width so far.
        frozen: whether each width stays.
    """

    step: int
    loss: float
    hardware: float
    widths: tuple[float, ...]
    differences: tuple[float | None, ...]
    oscillations: tuple[int, ...]
    frozen: tuple[bool, ...]

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Update:
        """From its fields, as a file may hold them."""
        values: list[Any] = [saved[each.name] for each in fields(cls)]
        return cls(*(tuple(value) if isinstance(value, list) else value for value in values))


class AdaQAT:
    """Learn the bit-widths of weights and activations by gradient descent on task loss + lam * hardware cost.

    Each width N is real-valued and its quantizers use ceil(N). Its gradient is a finite difference::

        dL/dN_w = L(ceil N_w, ceil N_a) - L(floor N_w, ceil N_a)
                  + lam * (C(ceil N_w, ceil N_a) - C(floor N_w, ceil N_a))

    and likewise for N_a: a forward pass without gradients for each, on the same batch (see
    :class:`fastqat.adaqat.probe.Probe` for what such a pass leaves as it is). Where N is an integer, one less is its
    floor. A width that goes to and fro about an integer is frozen; once all are, training goes on as plain QAT. Use::

        widths = fastqat.AdaQAT(model, lam=0.15)
        for images, labels in batches:
            loss = criterion(model(images), labels)
            loss.backward()
            widths.step(loss, lambda: criterion(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()

    In torch.distributed the losses are means over all processes, which all call :meth:`step`.

    The text of the paper that is at hand leaves out its constants. Those here are not verified: lr_weight,
    lr_activation, freeze_after, where the widths start, the factor in the cost (1), and that each step updates.

    Args:
        model: prepared with :func:`fastqat.prepare`.
        lam: lambda, of the hardware cost.
        lr_weight, lr_activation: eta of the widths of weights and of activations.
        start_weight, start_activation: N at the start; None is what the quantizers have.
        lowest, highest: bounds of N, within 1 to 8.
        every: updates are made in one step of so many.
        freeze_after: oscillations after which a width is frozen; 0 freezes none.
        freeze: "each" width by itself, or "both": all at once, when each has oscillated so often.
        freeze_to: "ceil" or "majority", see :class:`BitWidth`.
        cost: "product", "bit_operations", "weight_bits", or a function, see :mod:`fastqat.adaqat.hardware`.
        example_inputs: a batch, where the cost needs one.
        fixed: names or patterns (``fnmatch``) of layers that keep their bit-widths; None: the first and the last
            quantized layer.

    Attributes:
        widths: the learned ones.
        history: of all updates.

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
    ) -> None:
        for name, rate in (("lam", lam), ("lr_weight", lr_weight), ("lr_activation", lr_activation)):
            if not 0 <= rate < math.inf:
                checks.fail(ValueError, name, "a number of at least 0", rate)
        checks.bit_width(lowest)
        checks.bit_width(highest, lowest=lowest)
        if every < 1:
            checks.fail(ValueError, "every", "a positive number of steps", every)
        if freeze_after < 0:
            checks.fail(ValueError, "freeze_after", "a number of oscillations, or 0", freeze_after)
        checks.choice("freeze", freeze, ("each", "both"))
        checks.choice("freeze_to", freeze_to, FREEZE_TO)
        self.model, self.lam, self.every, self.freeze = model, lam, every, freeze
        self._layers = quantized_layers(model)
        self._learned = learned_layers(self._layers, fixed)
        starts = {"weight": start_weight, "activation": start_activation}
        rates = {"weight": lr_weight, "activation": lr_activation}
        self.widths: list[Width] = []
        for kind, layers, quantizers in self._parts():
            start = starts[kind]
            value = float(max(q.bits for q in quantizers) if start is None else start)
            if not lowest <= value <= highest:
                got = f"{value:g} for {kind}s"
                checks.fail(ValueError, "start", f"bits from {lowest} to {highest}, lowest and highest", got)
            number = BitWidth(value, rates[kind], lowest, highest, freeze_after, freeze_to)
            prefix = "" if len(layers) == len(self._learned) else f"{layers[0]}."
            self.widths.append(Width(prefix + kind, kind, number, quantizers, layers))
        self.cost = hardware_cost(cost, model, list(self._learned), example_inputs)
        self.history: list[Update] = []
        self._step = 0
        self._probe = Probe(model)
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
            ValueError: a loss that is no scalar.
        """
        self._step += 1
        if self.is_frozen or (self._step - 1) % self.every:
            return None
        if loss.numel() != 1:
            checks.fail(ValueError, "loss", "a scalar", list(loss.shape))
        measured = [w for w in self.widths if not w.number.frozen and w.lower is not None]
        lower = [self._probe.loss(closure, dict.fromkeys(w.quantizers, w.lower)) for w in measured]  # type: ignore[arg-type]
        here, *there = _read([loss.detach(), *lower])
        differences = {w.name: here - other for w, other in zip(measured, there, strict=True)}
        cost = self.cost(self.bits())
        for width in self.widths:
            if not width.number.frozen:
                task = differences.get(width.name, 0.0)
                gradient = task + self.lam * (cost - self._lower_cost(width))
                width.number.update(gradient)
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
        self._probe.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in numbers and lists."""
        widths = {width.name: width.number.state_dict() for width in self.widths}
        return {"step": self._step, "widths": widths, "history": [asdict(update) for update in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the quantizers get its bit-widths.

        Raises:
            ValueError: the state is that of other widths; nothing is loaded then.
        """
        names, got = [width.name for width in self.widths], list(state["widths"])
        if names != got:
            checks.fail(ValueError, "state", f"widths {', '.join(names)}", ", ".join(got) or "none")
        for width in self.widths:
            width.number.load_state_dict(state["widths"][width.name])
        self._step = state["step"]
        self.history = [Update.of(saved) for saved in state["history"]]
        self._write()

    def _parts(self) -> list[tuple[str, list[str], list[FakeQuant]]]:
        """For each width its kind, and the layers and quantizers that have it."""
        parts = []
        for kind in KINDS:
            of_kind = {name: layer[kind] for name, layer in self._learned.items() if layer[kind]}
            if of_kind:
                parts.append((kind, list(self._learned), list(dict.fromkeys(q for qs in of_kind.values() for q in qs))))
        return parts

    def _lower_cost(self, width: Width) -> float:
        """Hardware cost with one width one bit lower."""
        part = KINDS.index(width.kind)
        bits = self.bits()
        for name in width.layers:
            pair = list(bits[name])
            if pair[part] != FLOAT_BITS:
                pair[part] = width.number.bits - 1
            bits[name] = (pair[0], pair[1])
        return self.cost(bits)

    def _freeze(self) -> None:
        settled = [width.number.has_settled or width.number.frozen for width in self.widths]
        for width, has in zip(self.widths, settled, strict=True):
            if has and (self.freeze == "each" or all(settled)):
                width.number.freeze()

    def _write(self) -> None:
        """Give the quantizers the ceilings."""
        for width in self.widths:
            for q in width.quantizers:
                q.change_bits(width.number.bits)


def _read(losses: list[Tensor]) -> list[float]:
    """Losses as numbers, from one copy; means over all processes."""
    values = torch.stack([loss.reshape(()).double() for loss in losses])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values.tolist()
