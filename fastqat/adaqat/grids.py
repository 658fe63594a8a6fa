"""Grids of other bit-widths for a while: written in place, and those that were there put back bit for bit."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastqat.nn.copied import versions
from fastqat.nn.fake_quant import FakeQuant


@contextlib.contextmanager
@torch.no_grad()
def at_bits(bits: Mapping[FakeQuant, int]) -> Iterator[None]:
    """Give quantizers the grids of other bit-widths, each with the range that it has.

    All of them are written by a few operations, as many for one quantizer as for a hundred.

    Args:
        bits: of each quantizer; those without a range are left alone, for they pass their tensor on.
    """
    grids: dict[FakeQuant, list[Tensor]] = {
        q: [p for p in q._parameters.values() if p is not None] for q in bits if q.initialized
    }
    if not grids:
        yield
        return
    qranges, values = [q.qrange for q in grids], [p for parameters in grids.values() for p in parameters]
    own = _copies(qranges), _copies(values)
    try:
        plain = [q for q, parameters in grids.items() if len(parameters) == 1 and q.range_low is None]
        if plain:
            wanted = [codes_tensor(*q.codes_at(bits[q]), q.qrange.device) for q in plain]
            torch._foreach_copy_([q.qrange for q in plain], wanted)
            torch._foreach_mul_([q.scale for q in plain], [q.scale_ratio(bits[q]) for q in plain])
        for q in set(grids).difference(plain):
            q.write_grid(q.grid_at(bits[q]))
        for q in grids:  # an evaluation finds other codes than its bit-width says
            q.note_checked(versions(q))
        yield
    finally:
        torch._foreach_copy_(qranges, own[0])
        torch._foreach_copy_(values, own[1])


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def codes_tensor(low: int, high: int, device: torch.device) -> Tensor:
    """qmin and qmax, int32 [2]: copied to their device once."""
    return torch.tensor((low, high), dtype=torch.int32, device=device)
