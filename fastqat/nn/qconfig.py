"""``QSpec`` and ``QConfig``: which quantizers a model gets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastqat.nn.fake_quant import FakeQuant


@dataclass(frozen=True)
class QSpec:
    """Options of one kind of quantizer; each means what it means for :class:`fastqat.FakeQuant`."""

    bits: int = 8
    axis: int | None = None
    group_size: int | None = None
    signed: bool | None = None
    symmetric: bool = True
    restricted: bool = False
    range: str = "mse"
    learn: str | None = "scale"
    grad_scale: float | str | None = None
    ste_mask: str = "rounded"
    momentum: float = 0.9
    percentile: float = 99.99
    eps: float = 1e-8

    def build(self, **changes: Any) -> FakeQuant:
        """Make the quantizer, with some options changed."""
        return FakeQuant(**{**asdict(self), **changes})


@dataclass(frozen=True)
class QConfig:
    """Quantizers of a layer: of its weight and of its input; None leaves that tensor in float."""

    weight: QSpec | None = QSpec(axis=0)
    activation: QSpec | None = QSpec()
