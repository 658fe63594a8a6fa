"""A bit-width that is a real number: how it moves, when it oscillates about an integer, and how it is frozen then."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fastqat.ops import checks

FREEZE_TO = ("ceil", "majority")


@dataclass
class BitWidth:
    """N, whose ceiling is the bit-width that quantizers have.

    An oscillation is a change of N against the direction of the change before that changes its ceiling, too. After
    ``freeze_after`` of them N stays.

    Args:
        value: N.
        lr: eta.
        lowest, highest: bounds of N.
        freeze_after: number of oscillations; 0 never freezes.
        freeze_to: "ceil" is the ceiling of that moment, as in the paper; "majority" the one that was there for most
            updates since the first oscillation: where N goes to and fro about an integer, the moment may be either.

    Attributes:
        change: the last one that was not 0: a bound stops N, and not the direction that it came in.
        oscillations: so far.
        frozen: True once N stays.
        seen: ceiling -> updates since the first oscillation.
    """

    value: float
    lr: float
    lowest: int = 2
    highest: int = 8
    freeze_after: int = 10
    freeze_to: str = "ceil"
    change: float = 0.0
    oscillations: int = 0
    frozen: bool = False
    seen: dict[int, int] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """ceil(N)."""
        return math.ceil(self.value)

    def update(self, gradient: float) -> None:
        """N <- N - lr * gradient within the bounds (eq. 4); counts an oscillation.

        Nothing is done where N is frozen, or the gradient is not finite: a loss that diverged says nothing of bits.
        """
        if self.frozen or not math.isfinite(gradient):
            return
        before = self.value
        self.value = min(max(before - self.lr * gradient, float(self.lowest)), float(self.highest))
        change = self.value - before
        if change * self.change < 0 and math.ceil(before) != self.bits:
            self.oscillations += 1
        self.change = change or self.change
        if self.oscillations:
            self.seen[self.bits] = self.seen.get(self.bits, 0) + 1

    @property
    def has_settled(self) -> bool:
        """True once it has oscillated as often as freezing asks for."""
        return 0 < self.freeze_after <= self.oscillations

    def freeze(self) -> None:
        """Stay at an integer from now on."""
        if not self.frozen:
            majority = max(self.seen, key=lambda bits: (self.seen[bits], bits)) if self.seen else self.bits
            self.value = float(self.bits if self.freeze_to == "ceil" else majority)
            self.frozen = True

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        kept = asdict(self)
        return {name: kept[name] for name in ("value", "change", "oscillations", "frozen", "seen")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: N is outside its bounds.
        """
        if not self.lowest <= state["value"] <= self.highest:
            checks.fail(ValueError, "value", f"bits from {self.lowest} to {self.highest}", state["value"])
        for name in ("value", "change", "oscillations", "frozen"):
            setattr(self, name, state[name])
        self.seen = {int(bits): count for bits, count in state["seen"].items()}
