"""The word that oscillation tracking keeps per weight: one byte up to 5 bits, two bytes above.

From the lowest bit on: the index of the last code (code - qmin; 5 bits of a byte, 8 of two), the direction of its last
change (2 bits), and whether the weight is frozen (1 bit). A frozen weight has the index of its frozen code: no float
holds it, which something might average. One that was frozen in the current step keeps its direction until the next one:
it is *pending*, still quantized as it is, and its own index, against which the jump to the frozen code is a change,
stands in the place of its average. From then on it is *settled*: its direction is NONE.

The compiled twin is ``csrc/oscillation.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NONE, UP, DOWN = 0, 1, 2
CODE_BITS = {torch.uint8: 5, torch.int16: 8}  # those of the index, by dtype of the word


@dataclass(frozen=True)
class Word:
    """Words taken apart: int32, int32 and bool tensors of their shape."""

    index: Tensor
    direction: Tensor
    frozen: Tensor

    @property
    def settled(self) -> Tensor:
        """Frozen, and quantized to the frozen code."""
        return self.frozen & (self.direction == NONE)

    @property
    def pending(self) -> Tensor:
        """Frozen in the current step."""
        return self.frozen & (self.direction != NONE)


def dtype_of(bits: int) -> torch.dtype:
    """The dtype of the word for codes of a bit-width."""
    return torch.uint8 if bits <= CODE_BITS[torch.uint8] else torch.int16


def unpacked(words: Tensor) -> Word:
    """Take words apart."""
    code_bits, word = CODE_BITS[words.dtype], words.to(torch.int32)
    index = word & ((1 << code_bits) - 1)
    return Word(index, (word >> code_bits) & 3, (word >> (code_bits + 2)) & 1 != 0)


def packed(index: Tensor, direction: Tensor, frozen: Tensor, dtype: torch.dtype) -> Tensor:
    """Put words together."""
    code_bits = CODE_BITS[dtype]
    return (index | (direction << code_bits) | (frozen.to(torch.int32) << (code_bits + 2))).to(dtype)
